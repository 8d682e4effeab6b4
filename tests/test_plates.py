# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Posteriors that follow plates, on models whose posterior is known."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import numpyro_maf as nm
from numpyro_maf.sbi.plates import PlateTree
from numpyro_maf.sbi.posterior import Setting

QUIET = dict(progress=False)
AFFINE = partial(nm.maf, transforms=1, hidden=(16,))
QUICK = dict(builder=AFFINE, max_epochs=2, **QUIET)


def groups(n, y=None):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with numpyro.plate("groups", n):
        z = numpyro.sample("z", dist.Normal(mu, 0.7))
        numpyro.sample("y", dist.Normal(z, 0.5), obs=y)


def exact(y):
    """Mean and covariance of ``(mu, z)``, which are Gaussian."""
    n = len(y)
    prior = np.ones((n + 1, n + 1)) + np.diag([0, *[0.49] * n])
    seen = prior[1:, 1:] + 0.25 * np.eye(n)
    gain = prior[:, 1:] @ np.linalg.inv(seen)
    return gain @ y, prior - gain @ prior[1:]


@lru_cache
def learned():
    several = [nm.simulate(n, groups, 1500, n, **QUIET) for n in (2, 4, 6)]
    return nm.npe(0, groups, several, "y", builder=AFFINE, max_epochs=60, **QUIET)


@pytest.mark.parametrize("n", [2, 3, 6])
def test_globals_and_locals_of_any_number_of_groups(n):
    y = np.random.default_rng(n).normal(size=n) + 0.5
    posterior = learned()({"y": y})
    draws = posterior.sample(1, 4000)
    vectors = np.concatenate([draws["mu"][:, None], draws["z"]], 1)
    mean, covariance = exact(y)
    sd = np.sqrt(np.diag(covariance))
    assert np.abs((vectors.mean(0) - mean) / sd).max() < 0.25
    np.testing.assert_allclose(vectors.std(0), sd, rtol=0.2)
    assert abs(np.corrcoef(vectors.T)[0, 1] - covariance[0, 1] / (sd[0] * sd[1])) < 0.15
    scores = posterior.log_prob({k: v[:5] for k, v in draws.items()})
    gap = vectors[:5] - mean
    right = (
        -0.5 * (gap @ np.linalg.inv(covariance) * gap).sum(1)
        - 0.5 * np.linalg.slogdet(2 * np.pi * covariance)[1]
    )
    assert np.abs(scores - right).max() < 0.2 * (n + 1)


def test_rows_are_a_set():
    y = np.array([0.1, 2.0, -1.0, 0.5])
    values = {"mu": jnp.array(0.3), "z": jnp.array([0.0, 1.0, 2.0, -1.0])}
    turned = {"mu": values["mu"], "z": values["z"][::-1]}
    one, other = learned()(y).log_prob(values), learned()(y[::-1].copy()).log_prob(turned)
    np.testing.assert_allclose(one, other, rtol=1e-5)


def test_batches_files_and_what_is_said(tmp_path):
    y = np.random.default_rng(0).normal(size=(3, 4))
    batch, one = learned()({"y": y}), learned()({"y": y[1]})
    draws = batch.sample(0, 5)
    assert draws["z"].shape == (5, 3, 4) and batch.log_prob(draws).shape == (5, 3)
    own = {name: value[:, 1] for name, value in draws.items()}
    np.testing.assert_allclose(batch.log_prob(draws)[:, 1], one.log_prob(own), rtol=1e-4)
    for learned_thing, name in ((learned(), "any"), (one, "one")):
        nm.save(tmp_path / name, learned_thing)
    loaded, again = nm.load(tmp_path / "any"), nm.load(tmp_path / "one")
    np.testing.assert_array_equal(loaded({"y": y[1]}).log_prob(own), one.log_prob(own))
    np.testing.assert_array_equal(again.sample(3, 2)["z"], one.sample(3, 2)["z"])
    lines = repr(learned())
    assert "groups 2 to 6" in lines and "z in groups" in lines and len(lines) < 400
    with pytest.warns(UserWarning, match="'groups' has 9 rows, where simulations had 2 to 6"):
        learned()({"y": np.zeros(9)})
    with pytest.raises(ValueError, match="without rows"):
        learned()({"y": np.zeros(0)})
    with pytest.raises(ValueError, match="not finite"):
        learned()({"y": np.array([0.0, np.nan])})


def nested(schools, pupils, y=None, w=None):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with numpyro.plate("schools", schools, dim=-2):
        a = numpyro.sample("a", dist.Normal(mu, 0.5))
        numpyro.sample("w", dist.Normal(a, 1.0), obs=w)
        with numpyro.plate("pupils", pupils, dim=-1):
            b = numpyro.sample("b", dist.Normal(a, 0.3))
            numpyro.sample(
                "y", dist.Normal(b[..., None], 0.5).expand([schools, pupils, 2]).to_event(1), obs=y
            )


def test_nested_plates_are_sets_of_sets():
    sims = nm.simulate(0, nested, 300, 3, 2, **QUIET)
    posterior = nm.npe(0, nested, sims, ("w", "y"), **QUICK)
    tree = posterior.tree
    assert [level.plates for level in tree.levels] == [(), ("schools",), ("schools", "pupils")]
    assert [level.latent for level in tree.levels] == [("mu",), ("a",), ("b",)]
    seen = {"w": np.zeros((3, 1)), "y": np.random.default_rng(0).normal(size=(3, 2, 2))}
    draws = posterior(seen).sample(0, 4)
    assert draws["a"].shape == (4, 3, 1) and draws["b"].shape == (4, 3, 2)
    before = posterior(seen).log_prob(draws)
    order = np.array([2, 0, 1])
    turned = {"w": seen["w"][order], "y": seen["y"][order][:, ::-1]}
    moved = {"mu": draws["mu"], "a": draws["a"][:, order], "b": draws["b"][:, order][:, :, ::-1]}
    np.testing.assert_allclose(posterior(turned).log_prob(moved), before, rtol=1e-4)
    with pytest.raises(ValueError, match="plate 'schools' has 3 rows by site 'w' and 2 by site 'y'"):
        posterior({"w": seen["w"], "y": seen["y"][:2]})


def test_missing_rows_do_not_count():
    sims = nm.simulate(0, groups, 300, 4, **QUIET)
    holes = np.asarray(sims["y"]).copy()
    holes[::2, 3] = np.nan
    posterior = nm.npe(0, groups, dict(sims) | {"y": holes}, "y", missing=True, model_args=(4,), **QUICK)
    codes = [posterior({"y": np.array([1.0, 2.0, 0.5, np.nan])}, warn=False).codes[0],
             posterior({"y": np.array([1.0, 2.0, 0.5])}, warn=False).codes[0]]  # fmt: skip
    np.testing.assert_allclose(*codes, rtol=1e-5)


def test_a_set_without_local_sites():
    def model(x=None):
        m = numpyro.sample("m", dist.Normal(0, 1))
        with numpyro.plate("rows", 4):
            numpyro.sample("x", nm.Simulator(lambda key, m: m + jax.random.normal(key), m), obs=x)

    sims = nm.simulate(0, model, 300, **QUIET)
    posterior = nm.npe(0, model, sims, ensemble=2, **QUICK)
    assert isinstance(posterior, nm.sbi.HierarchicalPosterior) and posterior.members == 2
    assert posterior(np.zeros(4)).sample(0, 3)["m"].shape == (3,)
    flat = nm.npe(0, model, sims, plates=False, **QUICK)
    assert isinstance(flat, nm.sbi.NeuralPosterior)


def crossed():
    with numpyro.plate("people", 3, dim=-2):
        a = numpyro.sample("a", dist.Normal(0, 1))
    with numpyro.plate("items", 4, dim=-1):
        b = numpyro.sample("b", dist.Normal(0, 1))
    with numpyro.plate("people", 3, dim=-2), numpyro.plate("items", 4, dim=-1):
        numpyro.sample("y", dist.Normal(a - b, 1))


def walk():
    with numpyro.plate("times", 4):
        step = numpyro.sample("step", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(jnp.cumsum(step), 1))


def total():
    with numpyro.plate("parts", 3):
        part = numpyro.sample("part", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(part, 1))
    numpyro.sample("sum", dist.Normal(part.sum(), 1))


def backwards():
    with numpyro.plate("times", 4):
        step = numpyro.sample("step", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(jnp.cumsum(step[::-1])[::-1], 1))


def covariate():
    a, b = (numpyro.sample(name, dist.Normal(0, 1)) for name in "ab")
    with numpyro.plate("rows", 4):
        numpyro.sample("y", dist.Normal(a + b * jnp.arange(4.0), 0.5))


def ends():
    with numpyro.plate("rows", 3):
        z = numpyro.sample("z", dist.Uniform(0, jnp.array([1.0, 2.0, 3.0])))
        numpyro.sample("y", dist.Normal(z, 1))


def simulated():
    b = numpyro.sample("b", dist.Normal(0, 1))
    with numpyro.plate("rows", 3):
        times = b * jnp.arange(3.0)
        numpyro.sample("y", nm.Simulator(lambda key, m: m + jax.random.normal(key), times, batch_ndim=1))


@pytest.mark.parametrize(("model", "observed", "reason"), [
    (covariate, ("y",), "the rows of 'y' are not alike"),
    (ends, ("y",), "the rows of 'z' are not alike"),
    (simulated, ("y",), "the rows of 'y' are not alike"),
    (backwards, ("y",), "site 'y' depends on 'step' of other rows"),
    (crossed, ("y",), "latent sites of the plates .* meet in 'y'"),
    (walk, ("y",), "site 'y' depends on 'step' of other rows"),
    (total, ("y", "sum"), "site 'sum' depends on 'part' of other rows"),
])  # fmt: skip
def test_plates_that_cannot_be_followed_are_refused_with_the_reason(model, observed, reason):
    sims = nm.simulate(0, model, 100, **QUIET)
    with pytest.raises(ValueError, match=f"cannot be followed: {reason}"):
        nm.npe(0, model, sims, observed, plates=True, **QUICK)
    with pytest.warns(UserWarning, match="learned jointly"):
        assert isinstance(nm.npe(0, model, sims, observed, **QUICK), nm.sbi.NeuralPosterior)


def test_slopes_of_covariates_are_learned():
    sims = nm.simulate(0, covariate, 1000, **QUIET)
    with pytest.warns(UserWarning, match="make the covariate a site"):
        posterior = nm.npe(0, covariate, sims, "y", builder=AFFINE, max_epochs=30, **QUIET)
    design = np.stack([np.ones(4), np.arange(4.0)], 1)
    y = design @ [0.5, 1.0]
    inverse = np.linalg.inv(np.eye(2) + 4 * design.T @ design)
    draws = posterior({"y": y}, warn=False).sample(1, 2000)
    assert abs(draws["b"].mean() - (inverse @ design.T @ y)[1] * 4) < 0.1
    assert abs(draws["b"].std() - inverse[1, 1] ** 0.5) < 0.1


def test_a_site_around_the_rows_is_not_left_out():
    sims = nm.simulate(0, groups, 100, 3, **QUIET)
    with pytest.raises(ValueError, match=r"rows of \['z'\] are independent given \['mu'\] only"):
        nm.npe(0, groups, sims, "y", latent=("z",), plates=True, **QUICK)
    posterior = nm.npe(0, groups, sims, "y", latent=("mu",), plates=True, **QUICK)
    assert list(posterior({"y": np.zeros(3)}).sample(0, 2)) == ["mu"]


def test_discrete_local_sites_keep_their_values():
    def model(y=None):
        m = numpyro.sample("m", dist.Normal(0, 1))
        with numpyro.plate("rows", 2):
            z = numpyro.sample("z", dist.Bernoulli(0.3))
            numpyro.sample("y", dist.Normal(m + 2 * z, 0.3), obs=y)

    sims = nm.simulate(0, model, 100, **QUIET)
    posterior = nm.npe(0, model, sims, "y", max_epochs=1, **QUIET)
    assert set(np.unique(posterior({"y": np.zeros(2)}, warn=False).sample(0, 50)["z"])) <= {0, 1}
    with pytest.raises(ValueError, match="a discrete site takes all sites as one vector"):
        nm.npe(0, model, sims, "y", plates=True, max_epochs=1, **QUIET)


def test_the_model_is_asked_at_the_size_of_the_data_set():
    one = learned()({"y": np.array([0.3, 0.1])})
    exact_evidence = (
        -0.5 * np.array([0.3, 0.1]) @ np.linalg.inv(np.ones((2, 2)) + 0.74 * np.eye(2)) @ [0.3, 0.1]
    )
    exact_evidence -= 0.5 * np.linalg.slogdet(2 * np.pi * (np.ones((2, 2)) + 0.74 * np.eye(2)))[1]
    assert abs(one.importance(0).log_evidence - exact_evidence) < 0.05
    three = learned()({"y": np.zeros(3)})
    with pytest.raises(ValueError, match=r"3 rows in plate 'groups', .*post.with_model\(model, model_args\)"):
        three.importance(0)
    assert three.with_model(groups, (3,)).predictive(0, 5)["y"].shape == (5, 3)
    with pytest.raises(ValueError, match="other sites than this model's"):
        three.with_model(groups, (2,))


def test_plates_that_numpyro_places_are_turned():
    def swapped(n, y=None):
        m = numpyro.sample("m", dist.Normal(0, 1))
        with numpyro.plate("outer", n):
            z = numpyro.sample("z", dist.Normal(m, 1))
            with numpyro.plate("inner", 3):
                numpyro.sample("y", dist.Normal(z, 0.1), obs=y)

    sims = nm.simulate(0, swapped, 100, 2, **QUIET)
    posterior = nm.npe(0, swapped, sims, "y", plates=True, **QUICK)
    y = np.arange(12.0).reshape(3, 4) / 10
    draws = posterior({"y": y}, warn=False).sample(0, 3)
    assert draws["z"].shape == (3, 4)
    order = np.array([3, 1, 0, 2])
    turned = {"m": draws["m"], "z": draws["z"][:, order]}
    before, after = posterior({"y": y}, warn=False), posterior({"y": y[::-1, order]}, warn=False)
    np.testing.assert_allclose(after.log_prob(turned), before.log_prob(draws), rtol=1e-4)
    with pytest.raises(ValueError, match="'y' must have 2 axes"):
        posterior({"y": 0.3})


def test_what_plates_do_not_take():
    sims = nm.simulate(0, groups, 50, 3, **QUIET)
    for options, reason in (
        ({"embedding": (8, 4)}, "an embedding takes"),
        ({"regression": True}, "a regression"),
    ):
        with pytest.raises(ValueError, match=reason):
            nm.npe(0, groups, sims, "y", plates=True, **options, **QUICK)
    tree = PlateTree.of(Setting(groups, (3,)), ("mu", "z"), ("y",))
    assert tree.sizes({"z": (5,), "y": (5,)}) == {"groups": 5}
    with pytest.raises(ValueError, match="has 5 rows by site 'z' and 4 by site 'y'"):
        tree.sizes({"z": (5,), "y": (4,)})
