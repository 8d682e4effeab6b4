"""Networks of sets, series and images, and what missing numbers do to them."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

import numpyro_maf as nm
from numpyro_maf.nn.embeddings import GRU, Attention, Conv, DeepSet
from numpyro_maf.sbi import Simulator
from numpyro_maf.sbi.views import Summary, View

EMBEDDINGS = {
    "deep-set": DeepSet(3, (8,)),
    "conv-1": Conv(1, 3, (4, 5), 3),
    "conv-2": Conv(2, 3, (4,), 3),
    "gru": GRU(3, 8),
    "attention": Attention(3, 8, 2, 1),
}
each_embedding = pytest.mark.parametrize("name", EMBEDDINGS)


def rows(name, lengths=(6,), features=2):
    shape = (4, *lengths, *([5] if name == "conv-2" else []), features)
    return jax.random.normal(jax.random.key(0), shape)


@each_embedding
def test_padding_and_what_is_missing_change_nothing(name):
    net, x = EMBEDDINGS[name], rows(name)
    there = jnp.ones(x.shape, bool)
    weights = net.init(jax.random.key(1), x, there)
    apply = jax.jit(net)
    plain = apply(weights, x, there)
    assert plain.shape == (4, 3) and np.ptp(plain, 0).min() > 1e-3
    padding = [(0, 0), (0, 3), *[(0, 0)] * (x.ndim - 2)]
    np.testing.assert_allclose(apply(weights, jnp.pad(x, padding), jnp.pad(there, padding)), plain, atol=1e-5)
    hidden = there.at[:, 2].set(False)
    assert not np.allclose(apply(weights, jnp.where(hidden, x, 0), hidden), plain, atol=1e-3)


@each_embedding
def test_single_numbers_and_empty_rows(name):
    net, x = EMBEDDINGS[name], rows(name)[..., 0]
    weights = net.init(jax.random.key(1), x)
    assert net(weights, x).shape == (4, 3)
    there = jnp.ones(x.shape, bool).at[0].set(False)
    weights = net.init(jax.random.key(1), x, there)
    gradient = jax.grad(lambda w: net(w, jnp.where(there, x, 0), there).sum())(weights)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    with pytest.raises(ValueError, match="takes rows with"):
        net.init(jax.random.key(1), jnp.zeros((4, 2, 2, 2, 2)))


@pytest.mark.parametrize("name", ["deep-set", "attention"])
def test_sets_have_no_order(name):
    net, x = EMBEDDINGS[name], rows(name)
    weights = net.init(jax.random.key(1), x)
    np.testing.assert_allclose(net(weights, x[:, ::-1]), net(weights, x), atol=1e-5)


def repeated(x=None):
    mean = numpyro.sample("mean", dist.Normal(0, 1))
    draw = lambda key, mean: mean + jax.random.normal(key, (8,))  # noqa: E731
    numpyro.sample("x", Simulator(draw, mean, event_shape=(8,)), obs=x)


def test_posteriors_of_any_number_of_observations():
    sims = nm.simulate(0, repeated, 2000, progress=False)
    count = np.random.default_rng(0).integers(1, 9, 2000)
    shown = {**sims, "x": np.where(np.arange(8) < count[:, None], sims["x"], np.nan)}
    options = dict(progress=False, max_epochs=30, builder=partial(nm.maf, transforms=1, hidden=(16,)))
    found = nm.npe(1, repeated, shown, embedding=DeepSet(4, (16, 16)), missing=True, **options)
    assert "networks: DeepSet" in repr(found)
    for n in (1, 4, 8):
        x = np.linspace(0.4, 1.2, n) if n > 1 else np.array([0.8])
        draws = found({"x": x}).sample(jax.random.key(0), (4000,))["mean"]
        np.testing.assert_allclose(draws.mean(), x.sum() / (n + 1), atol=0.12)
        np.testing.assert_allclose(draws.std(), (n + 1) ** -0.5, atol=0.08)
    alone = found({"x": np.array([0.8])}).sample(jax.random.key(0), (5,))["mean"]
    padded = found({"x": np.array([0.8, np.nan, np.nan])}).sample(jax.random.key(0), (5,))["mean"]
    np.testing.assert_allclose(padded, alone, rtol=1e-5)


def test_embeddings_by_site_and_their_errors():
    def two(a=None, b=None):
        mean = numpyro.sample("mean", dist.Normal(0, 1))
        numpyro.sample("a", dist.Normal(mean, 1).expand([4]).to_event(1), obs=a)
        numpyro.sample("b", dist.Normal(mean, 1), obs=b)

    sims = nm.simulate(jax.random.key(0), two, 200, progress=False)
    learn = partial(nm.npe, jax.random.key(0), two, sims, ("a", "b"), progress=False, max_epochs=1)
    builder = partial(nm.maf, transforms=1, hidden=(4,))
    found = learn(builder=builder, embedding={"a": (8, 3)})
    assert found.flows.context == 3 + 1
    with pytest.raises(ValueError, match="dict by site"):
        learn(embedding=DeepSet())
    with pytest.raises(ValueError, match="embedding has"):
        learn(embedding={"c": (8, 3)})
    with pytest.raises(ValueError, match="no embedding"):
        learn(embedding={"a": (8, 3)}, builder=builder, regression=True)


def test_a_size_that_was_never_simulated_is_said():
    view = View.of({"x": constraints.real}, {"x": np.zeros((3, 5))}, np.arange(3), [1], False)
    summary, _ = Summary.of(view, Conv(axes=1), (np.zeros((2, 5)),))
    assert summary.unseen(view, (np.zeros((4, 5)),)) == []
    (said,) = summary.unseen(view, (np.zeros((4, 3)),))
    assert "(3,)" in said and "(5,)" in said
    padded = replace(view, missing=True)
    assert summary.unseen(padded, (np.zeros((4, 3)),)) == []
    assert len(summary.unseen(padded, (np.zeros((4, 7)),))) == 1
