"""Every flow against its laws: a density that integrates to one, and draws that follow it."""

import inspect
import pickle
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import (
    FLOWS,
    bounded,
    context_of,
    each_context_flow,
    each_flow,
    inside,
    normals,
    parametrize,
    shaken,
)
from numpyro.distributions import constraints
from numpyro.distributions.batch_util import promote_batch_shape
from numpyro.infer import MCMC, NUTS
from scipy import stats

import numpyro_maf as nm
from numpyro_maf.flow import BUILDERS
from numpyro_maf.flows.bijectors import Bijector

close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
host = partial(jax.tree.map, np.asarray)
N, ROWS = 10_000, 800  # draws; events that are scored at once


def given(flow, context):
    return flow() if context is None else flow(context)


score = jax.jit(lambda d, y: d.log_prob(y))


@partial(jax.jit, static_argnums=2)
def draw(d, key, shape=()):
    return d.sample(key, shape)


def distribution(case, *shape, seed=0):
    return given(case(seed), context_of(case, *shape))


def events(case, *shape):
    """Inside every flow's support."""
    return inside(case.kind, 0.3 * normals(2, *shape, *case.event_shape))


# Facts -----------------------------------------------------------------------------------------


@lru_cache(None)
def edges(case):
    """Six events inside, then zeros, tiny numbers and numbers off a box or far out, alone and all at once."""
    corners = np.array([0.0, 1e-30, -1e-30, 1e4, -1e4, 1.5, -0.5, -3.3], np.float32)
    y = np.concatenate([np.repeat(corners[:, None], case.features, 1)] * 2)
    y[len(corners) :, 0] = 0.1
    return np.concatenate([events(case, 6), y.reshape(-1, *case.event_shape)])


def at(a, *index):
    return None if a is None else a[index]


def once(t):
    """The same transform, which maps an array once however often it is asked: XLA merges no loops."""
    if not isinstance(t, Bijector):
        return t
    kind, known = type(t), {}

    def method(name):
        def call(self, x):
            if (name, id(x)) not in known:
                known[name, id(x)] = x, getattr(kind, name)(self, x)
            return known[name, id(x)][1]

        return call

    methods = {name: method(name) for name in ("forward_and_log_det", "inverse_and_log_det")}
    children, static = t.tree_flatten()
    return type(kind.__name__, (kind,), methods).tree_unflatten(static, children)


@lru_cache(None)
def program(case):
    """All facts in one compilation, of a flow and three others; and how often it was traced.

    Contexts are ``(2, 3, C)``; distributions are given the first one, or all. Gradients of the densities are
    weighted by the events' ``counts``.
    """
    traces = []

    @jax.jit
    def run(flow, others, context, key, counts):
        traces.append(flow)
        one = given(flow, at(context, 0, 0))
        plain = dist.TransformedDistribution(one.base_dist, [once(t) for t in one.transforms])
        y, intermediates = one.sample_with_intermediates(key, (N,))
        facts = {
            "draws": y,
            "again": one.sample(key, (N,)),
            "by_intermediates": one.log_prob(y, intermediates),
            "by_numpyro": plain.log_prob(y),
            "supported": one.support(y),
            "support": one.support(edges(case)),
        }

        # Mapped over flows, and over contexts.
        stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *others)
        stacked = jax.vmap(lambda flow: given(flow, at(context, 0, 0)))(stack)
        assert promote_batch_shape(stacked).batch_shape == (3,)
        assert promote_batch_shape(one).batch_shape == ()
        x, y = stacked.sample(key, (5,)), events(case, 3)
        assert jax.eval_shape(stacked.log_prob, y).shape == (3,)
        y = jnp.concatenate([y[None], x])
        facts["stacked"] = {
            "draws": x,
            "log_prob": stacked.log_prob(y),
            "mapped_log_prob": jax.vmap(lambda d, y: d.log_prob(y), (0, 1), 1)(stacked, y),
        }
        if case.context:
            by_context = jax.vmap(flow)(context)
            assert promote_batch_shape(by_context).batch_shape == (2, 3)
            shape = jax.eval_shape(lambda d: d.sample(key, (5,)), by_context).shape
            assert shape == (5, 2, 3, *case.event_shape)
            facts["by_context"] = by_context.log_prob(events(case, 4, 2, 3))

            def drawn(flow, context):
                y = flow(context).sample(key, (4,))
                return y.sum(), y

            facts["of_draws"], facts["drawn"] = jax.grad(drawn, (0, 1), has_aux=True)(flow, context)

        # Gradients of the density of four events, and of all the edges.
        y = several(case)
        facts["several"], pull = jax.vjp(lambda f, c, y: given(f, c).log_prob(y), flow, context, y)
        counts = counts.reshape(-1, *[1] * (facts["several"].ndim - 1))
        facts["gradients"] = pull(jnp.broadcast_to(counts, facts["several"].shape))
        return facts

    return run, traces


@lru_cache(None)
def several(case):
    """Four events, for each of ``(2, 3)`` contexts if there are any, and the edges for each."""
    shape = (2, 3) if case.context else ()
    y = edges(case).reshape(-1, *[1] * len(shape), *case.event_shape)
    return np.concatenate([events(case, 4, *shape), np.broadcast_to(y, (len(y), *shape, *case.event_shape))])


INSIDE, EVERYWHERE = (np.arange(26) < 10).astype(np.float32), np.ones(26, np.float32)


def run(case, flow, counts=EVERYWHERE):
    others = case(1), case(2), case(3)
    return program(case)[0](flow, others, context_of(case, 2, 3), jax.random.key(1), counts)


@lru_cache(None)
def facts(case, seed=0):
    flow = case(seed)
    found = host(run(case, flow))
    found["everywhere"], log_prob = found.pop("gradients"), found.pop("several")
    found["of_events"], found["edges"] = log_prob[:4], log_prob[4:]
    found["inside"] = host(run(case, flow, INSIDE)["gradients"])
    found["log_prob"] = scores(case, seed, at(context_of(case, 2, 3), 0, 0), found["draws"])
    return found


def scores(case, seed, context, y):
    """Log-densities of rows ``(n, ...)`` of events for one context."""
    return by_rows(given(case(seed), context), y)


def by_rows(d, y):
    """Log-densities ``(n,)``, so many rows at once that it is compiled once."""
    parts = -(-len(y) // ROWS)
    rows = np.resize(y, (parts * ROWS, *np.shape(y)[1:])).astype(np.float32)
    return np.concatenate([score(d, part) for part in np.split(rows, parts)])[: len(y)]


@lru_cache(None)
def wide(case):
    """Draws and their densities, in double precision."""

    @jax.jit
    def run(flow, context, key):
        d = given(flow, context)
        y, intermediates = d.sample_with_intermediates(key, (4,))
        return y, d.log_prob(y), d.log_prob(y, intermediates)

    with jax.enable_x64(True):
        return host(run(case(), context_of(case), jax.random.key(0)))


# Densities -------------------------------------------------------------------------------------


each_low_flow = parametrize("case", FLOWS, lambda case: case.features <= 2)
BOUNDED = nm.FlowDistribution(bounded, list(FLOWS["maf"]().bijectors))  # by hand: its support is an image


@lru_cache(None)
def tame(case):
    """Near enough to the identity that a grid resolves the tails; with draws."""
    flow = shaken(case.fresh(), 1, 0.12)
    draws = run(case, flow)["draws"]
    return given(flow, at(context_of(case, 2, 3), 0, 0)), np.asarray(draws, float)


@lru_cache(None)
def quadrature(case):
    """Total, mean and covariance of the density, by a sum over an even grid in ``arcsinh(y)``."""
    d, _ = tame(case)
    count = 800 if case.features == 1 else 160 if case.kind == "real" else 480  # densities in boxes jump
    if case.kind == "real":
        t = np.linspace(-6, 6, count)
        points, widths = np.sinh(t), (t[1] - t[0]) * np.cosh(t)
    else:
        interval = d.support.base_constraint
        ends = np.linspace(interval.lower_bound, interval.upper_bound, count + 1)
        points, widths = (ends[1:] + ends[:-1]) / 2, np.full(count, ends[1] - ends[0])
    y = np.stack(np.meshgrid(*[points] * case.features, indexing="ij"), -1).reshape(-1, case.features)
    cell = (
        np.stack(np.meshgrid(*[widths] * case.features, indexing="ij"), -1).reshape(-1, case.features).prod(1)
    )
    mass = np.exp(by_rows(d, y).astype(float)) * cell
    mean = mass @ y
    return mass.sum(), mean, np.einsum("n,ni,nj->ij", mass, y - mean, y - mean)


@each_low_flow
def test_density_integrates_to_one(case):
    total, _, _ = quadrature(case)
    np.testing.assert_allclose(total, 1, atol=1e-3)


@each_low_flow
def test_samples_have_the_moments_of_the_density(case):
    (_, mean, covariance), (_, y) = quadrature(case), tame(case)
    products = np.einsum("ni,nj->nij", y - mean, y - mean)
    for actual, expected in [(y, mean), (products, covariance)]:
        error = actual.std(0) / len(y) ** 0.5 + 1e-3
        assert (abs(actual.mean(0) - expected) < 5 * error).all()


@each_flow
def test_log_prob_is_that_of_numpyros_transformed_distribution(case):
    close(facts(case)["log_prob"], facts(case)["by_numpyro"], rtol=1e-3, atol=1e-3)


@each_flow
def test_intermediates_score_the_sample(case):
    by_intermediates, alone = (facts(case)[name] for name in ("by_intermediates", "log_prob"))
    close(by_intermediates[:100], alone[:100], rtol=1e-3, atol=1e-3)
    told = np.ones(len(alone), bool)
    if case.kind == "unit":  # beside the ends of a box the draw itself is rounded, and its density with it
        ends, rows = distribution(case).support.base_constraint, facts(case)["draws"].reshape(len(alone), -1)
        told = ((rows > ends.lower_bound + 1e-4) & (rows < ends.upper_bound - 1e-4)).all(1)
        assert told.mean() > 0.9
    assert (abs(by_intermediates - alone) < 1e-3 * (1 + abs(alone)))[told].mean() > 0.999
    close(facts(case)["draws"], facts(case)["again"])


# Shapes ----------------------------------------------------------------------------------------


def batches(case, shape):
    """Events ``(n, *shape, D)`` with their log-densities, and contexts ``(*shape, C)``."""
    found, context = facts(case), np.asarray(context_of(case, 2, 3))
    if not shape:
        return found["draws"][:4], found["log_prob"][:4], context[0, 0]
    if shape == (2, 3):
        return events(case, 4, 2, 3), found["of_events"], context
    return events(case, 4, 2, 3)[:, 1], found["by_context"][:, 1], context[1]


@each_context_flow
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_context_batches_become_batch_shape(case, shape):
    d = distribution(case, *shape)
    assert (d.batch_shape, d.event_shape) == (shape, case.event_shape)
    one = jax.eval_shape(d.log_prob, jnp.zeros((*(1,) * (len(shape) > 0), *case.event_shape)))
    assert one.shape == shape
    x = jax.eval_shape(lambda: d.sample(jax.random.key(0), (4,)))
    assert x.shape == (4, *shape, *case.event_shape)
    x = facts(case)["drawn"]  # for the contexts of shape (2, 3)
    assert len(np.unique(x.reshape(-1, case.features), axis=0)) == 24
    y, log_prob, context = batches(case, shape)
    assert log_prob.shape == (len(y), *context.shape[:-1])
    rows = np.reshape(y, (len(y), -1, *case.event_shape))
    one = [scores(case, 0, c, rows[:, i]) for i, c in enumerate(context.reshape(-1, case.context))]
    close(log_prob.reshape(len(y), -1), np.stack(one, 1), rtol=1e-3, atol=1e-3)


@each_flow
def test_empty_batches(case):
    d = distribution(case)
    y = jax.eval_shape(lambda: d.sample(jax.random.key(0), (0,)))
    assert y.shape == (0, *case.event_shape)
    assert jax.eval_shape(d.log_prob, jnp.zeros(y.shape)).shape == (0,)
    if case.context:
        nobody = case()(jnp.zeros((0, case.context)))
        y = jax.eval_shape(lambda: nobody.sample(jax.random.key(0)))
        assert nobody.batch_shape == (0,) and y.shape == (0, *case.event_shape)
        assert jax.eval_shape(nobody.log_prob, jnp.zeros(y.shape)).shape == (0,)


@each_flow
def test_keys_and_shapes_may_be_integers(case):
    d = distribution(case)
    for key in (3, jax.random.PRNGKey(3)):
        assert jax.eval_shape(lambda key=key: d.sample(key, 5)).shape == (5, *case.event_shape)


@pytest.mark.parametrize("name", ["maf", "iaf", "nsf-context", "glow", "nis"])
def test_integer_keys_draw_what_typed_keys_do(name):
    d = distribution(FLOWS[name])
    expected = draw(d, jax.random.key(3), (5,))
    for key in (3, np.int64(3), jax.random.PRNGKey(3)):
        np.testing.assert_array_equal(d.sample(key, 5), d.sample(jax.random.key(3), (5,)))
    close(d.sample(3, 5), expected)


@pytest.mark.parametrize("name", ["maf", "iaf", "maf-1d", "nsf-context", "maf-bounded"])
def test_expand_mask_and_to_event(name):
    case = FLOWS[name]
    d = distribution(case, *((3, 1) if case.context else ()))
    y, keep = events(case, 3, 2), jnp.array([True, False])
    wide = d.expand((3, 2))
    assert (wide.batch_shape, wide.event_shape) == ((3, 2), case.event_shape)
    event = wide.to_event(1)
    assert (event.batch_shape, event.event_shape) == ((3,), (2, case.features))

    @jax.jit
    def run(d, wide, event, y, key):
        kept, again = wide.mask(keep), wide.sample_with_intermediates(key, (5,))
        scored = wide.log_prob(*again), wide.log_prob(again[0])
        return d.log_prob(y), wide.log_prob(y), kept.log_prob(y), event.log_prob(y), again[0], scored

    log_prob, by_wide, by_kept, by_event, x, scored = run(d, wide, event, y, jax.random.key(0))
    assert log_prob.shape == (3, 2)
    close(by_wide, log_prob)
    close(by_kept, np.where(keep, log_prob, 0))
    close(by_event, log_prob.sum(-1))
    assert x.shape == (5, 3, 2, *case.event_shape) and len(np.unique(x[..., 0])) == 30
    close(draw(wide, jax.random.key(0), (5,)), x)
    close(*scored, rtol=1e-3, atol=1e-3)


@each_flow
def test_distributions_cross_jit(case):
    context = at(context_of(case, 2, 3), 0, 0)
    d, through = given(case(), context), jax.jit(given)(case(), context)
    assert (through.batch_shape, through.event_shape) == (d.batch_shape, d.event_shape)
    assert jax.tree.structure(through) == jax.tree.structure(d)
    jax.tree.map(close, through, d)
    y = facts(case)["draws"][:100]
    close(by_rows(through, y), facts(case)["log_prob"][:100], rtol=1e-3, atol=1e-3)


@each_flow
def test_distributions_made_by_vmap(case):
    """Out of vmap every leaf has one more axis, and ``batch_shape`` does not know."""
    context, stacked = at(context_of(case, 2, 3), 0, 0), facts(case)["stacked"]
    assert stacked["draws"].shape == (5, 3, *case.event_shape)
    for i in range(3):
        y = np.concatenate([events(case, 3)[None, i], stacked["draws"][:, i]])
        expected = scores(case, i + 1, context, y)
        for name in ("log_prob", "mapped_log_prob"):
            close(stacked[name][0, i], expected[0])
            close(stacked[name][1:, i], expected[1:], rtol=1e-3, atol=1e-3)


@each_context_flow
def test_distributions_made_by_vmap_over_contexts(case):
    close(facts(case)["by_context"], facts(case)["of_events"])


@each_flow
def test_flows_are_made_under_vmap_and_jit(case):
    keys = jax.random.split(jax.random.key(0), 3)
    stacked, alone = jax.vmap(case.make)(keys), [case.make(key) for key in keys]
    assert jax.tree.structure(stacked) == jax.tree.structure(alone[0])
    jax.tree.map(lambda leaf, *rows: close(leaf, np.stack(rows)), stacked, *alone)


@parametrize("case", FLOWS, lambda case: case is next(c for c in FLOWS.values() if c.builder is case.builder))
def test_builders_work_under_jit(case):
    """With the key outside and inside: the same densities as without jit."""

    outside = jax.eval_shape(case.make, jax.random.key(0))
    inside = jax.jit(lambda seed: case.make(jax.random.key(seed)))(0)
    context, y = context_of(case), events(case, 6)
    assert jax.tree.structure(outside) == jax.tree.structure(inside) == jax.tree.structure(case.fresh())
    close(by_rows(given(inside, context), y), by_rows(given(case.fresh(), context), y))


def test_leaves_with_unequal_new_axes_are_refused():
    d = distribution(FLOWS["maf"])
    leaves, structure = jax.tree.flatten(d)
    odd = jax.tree.unflatten(structure, [jnp.asarray(leaves[0])[None], *leaves[1:]])
    with pytest.raises(ValueError, match="differ in the axes they gained.*map over all"):
        odd.log_prob(jnp.zeros(2))


# Gradients and traces --------------------------------------------------------------------------


@each_context_flow
def test_gradients_reach_weights_and_context(case):
    of_density, of_draws = facts(case)["inside"], facts(case)["of_draws"]
    for of_flow, of_context in of_density[:2], of_draws:
        assert (of_context != 0).all() and np.isfinite(of_context).all()
        leaves = jax.tree.leaves(of_flow.weights)
        assert all(np.isfinite(leaf).all() for leaf in leaves)
        assert any((leaf != 0).any() for leaf in leaves)


@each_flow
def test_gradients_are_finite_everywhere(case):
    """Of the density by weights, contexts and events, off the support too."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(facts(case)["everywhere"])[0]:
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)


@each_flow
def test_equal_structures_share_one_trace(case):
    results = {
        float(log_prob.ravel()[0]) for log_prob in (facts(case)["of_events"], run(case, case(1))["several"])
    }
    assert len(program(case)[1]) == 1
    assert len(results) == 2 or case is FLOWS["nice"]


# Copies, specs, names ----------------------------------------------------------------------------


@each_flow
def test_pickle_is_bit_equal(case):
    copy = pickle.loads(pickle.dumps(case()))
    assert jax.tree.structure(copy) == jax.tree.structure(case())
    for a, b in zip(jax.tree.leaves(copy), jax.tree.leaves(case()), strict=True):
        assert jnp.result_type(a) == jnp.result_type(b)
        np.testing.assert_array_equal(a, b)
    context = at(context_of(case, 2, 3), 0, 0)
    again = by_rows(given(copy, context), facts(case)["draws"][:100])
    np.testing.assert_array_equal(again, facts(case)["log_prob"][:100])


@each_flow
def test_descriptions_are_short(case):
    for described in (case(), distribution(case), distribution(case, 2)):
        assert 0 < len(repr(described)) < 400


# Arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize("builder", BUILDERS.values(), ids=BUILDERS)
@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(features=0), ValueError, "features must be an integer of at least 1, got 0"),
        (dict(features=1.5), ValueError, "features must be an integer of at least 1, got 1.5"),
        (dict(context=-1), ValueError, "context must be an integer of at least 0, got -1"),
        (dict(transforms=0), ValueError, "transforms must be an integer of at least 1, got 0"),
        (dict(scalar="affine"), TypeError, r"scalar must be a Scalar such as Affine\(\), got 'af"),
        (dict(context=1, hidden=()), ValueError, "hidden must name one or more widths"),
        (dict(context=1, hidden=(4, 0)), ValueError, r"at least 1, got \(4, 0\)"),
        (dict(context=1, activation="no"), ValueError, "unknown activation 'no', expected one of"),
        (dict(base=dist.Normal(0, 1)), ValueError, r"event shape \(2,\).*\.expand\(\[2\]\)"),
        (dict(base=dist.Normal(0, 1).expand([2])), ValueError, r"base must have batch shape \(\)"),
    ],
)
def test_builders_check_their_arguments(builder, options, error, message):
    if not set(options) <= set(inspect.signature(builder).parameters):
        return pytest.skip("not an argument of this builder")
    with pytest.raises(error, match=message):
        builder(jax.random.key(0), **{"features": 2, **options})


@pytest.mark.parametrize("builder", [nm.maf, nm.iaf, nm.nsf])
@pytest.mark.parametrize(
    "options, message",
    [
        (dict(order=(0, 0)), r"order must hold each of 0..1 once, got \(0, 0\)"),
        (dict(order=(0, 1, 2)), "order must hold each of 0..1 once"),
        (dict(mixing="shuffle"), "mixing must be 'reverse', 'random' or 'linear', got 'shuffle'"),
    ],
)
def test_autoregressive_builders_check_orders(builder, options, message):
    with pytest.raises(ValueError, match=message):
        builder(jax.random.key(0), 2, **options)


def test_context_is_checked():
    plain, conditional = FLOWS["maf"](), FLOWS["maf-context"]()
    with pytest.raises(ValueError, match=r"takes no context, got one of shape \(2,\)"):
        plain(jnp.zeros(2))
    with pytest.raises(ValueError, match="expects a context of width 2, got none"):
        conditional()
    with pytest.raises(ValueError, match="context has width 3, flow expects 2"):
        conditional(jnp.zeros((4, 3)))
    with pytest.raises(ValueError, match="scalar.*flow expects 2"):
        conditional(1.0)


def test_order_and_mixing_reach_the_transforms():
    made = nm.maf(jax.random.key(0), 4, order=(2, 0, 3, 1), transforms=3)
    assert [b.order for b in made.bijectors] == [(2, 0, 3, 1), (1, 3, 0, 2), (2, 0, 3, 1)]
    random = nm.maf(jax.random.key(0), 8, mixing="random", transforms=3)
    assert len({b.order for b in random.bijectors}) == 3
    again = nm.maf(jax.random.key(1), 8, mixing="random", transforms=3)
    assert [b.order for b in again.bijectors] == [b.order for b in random.bijectors]


# Extremes, precision, support --------------------------------------------------------------------


@each_flow
def test_extreme_events(case):
    log_prob, within = facts(case)["edges"], facts(case)["support"]
    assert within[:6].all() and (within.all() or case.kind != "real")
    assert np.isfinite(log_prob[within]).all() and (log_prob[~within] == -np.inf).all()
    assert (facts(case)["everywhere"][2][4:][~within] == 0).all()


@each_flow
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_has_no_density(case, bad):
    y = np.zeros((case.features, case.features), np.float32)
    np.fill_diagonal(y, bad)
    context = at(context_of(case, 2, 3), 0, 0)
    log_prob = scores(case, 0, context, y.reshape(-1, *case.event_shape))
    assert (np.isnan(log_prob) | (log_prob == -np.inf)).all()


@each_flow
def test_double_precision(case):
    y, log_prob, by_intermediates = wide(case)
    assert y.dtype == log_prob.dtype == np.float64
    close(log_prob, by_intermediates, rtol=1e-9, atol=1e-9)


@each_flow
def test_support_is_honest(case):
    assert facts(case)["supported"].all() and np.isfinite(facts(case)["log_prob"]).all()
    real = distribution(case).support is constraints.real_vector
    assert real == (case.kind == "real")


def test_the_image_of_a_bounded_base():
    d = BOUNDED
    free = 5 * jax.random.normal(jax.random.key(0), (200, 2))
    bijection = dist.biject_to(d.support)
    inside = bijection(free)
    assert d.support(inside).all() and np.isfinite(score(d, inside)).all()
    close(bijection.inv(inside), free, rtol=1e-2, atol=1e-2)
    assert d.support(d.support.feasible_like(jnp.zeros((3, 2)))).all()
    x = jnp.array([[1.01, 0.0], [0.0, -1.01], [3.0, 3.0], [0.99, -0.99]])
    for transform in d.transforms:
        x = transform(x)
    np.testing.assert_array_equal(d.support(x), [False, False, False, True])
    assert (score(d, x)[:3] == -np.inf).all()


def test_nuts_starts_and_stays_in_the_image():
    d = BOUNDED
    mcmc = MCMC(NUTS(lambda: numpyro.sample("y", d)), num_warmup=300, num_samples=700, progress_bar=False)
    mcmc.run(jax.random.key(0))
    y, drawn = np.asarray(mcmc.get_samples()["y"], float), np.asarray(draw(d, jax.random.key(1), (20000,)))
    assert d.support(y).all()
    np.testing.assert_allclose((y.mean(0) - drawn.mean(0)) / drawn.std(0), 0, atol=0.3)


@pytest.mark.parametrize("name", ["maf-bounded", "maf-cdf"])
def test_builders_map_bounded_bases_to_the_reals(name):
    d = distribution(FLOWS[name])
    assert d.support is constraints.real_vector
    u = d.base_dist.sample(jax.random.key(0), (50,))
    far = jnp.array([[30.0, 0.0], [-1e4, 1e4]])
    there = jax.jit(lambda d, u: nm.encode(d, jnp.concatenate([nm.decode(d, u), far])))(d, u)
    close(there[:50], u, rtol=1e-3, atol=1e-3)
    assert d.base_dist.support(there[50:]).all()


@pytest.mark.parametrize("base", [dist.Uniform(0.0, 1.0), dist.Beta(5.0, 5.0), dist.Normal(0.0, 1.0)])
def test_flows_of_distribution_functions_are_scipys(base):
    """Onto a base in the box, u = F(x) of a mixture of normals; onto a normal, the density is the mixture."""
    scalar = nm.MixtureCDF(3, "gaussian")
    flow = shaken(nm.elementwise(jax.random.key(0), 1, scalar=scalar, base=base.expand([1]).to_event(1)), 1)
    logits, means, raw = np.split(np.asarray(flow.bijectors[0].params[:, 0], float), 3)
    weights, scales = np.exp(logits) / np.exp(logits).sum(), np.exp(5 * np.tanh(raw / 5))
    x = np.linspace(-4, 4, 41)
    z = (x[:, None] - means) / scales
    cdf, density = stats.norm.cdf(z) @ weights, stats.norm.pdf(z) / scales @ weights
    if isinstance(base, dist.Normal):
        cdf, expected = stats.norm.ppf(cdf), np.log(density)
    else:
        law = stats.beta(5, 5) if isinstance(base, dist.Beta) else stats.uniform()
        expected = np.log(density) + law.logpdf(cdf)
    encoded, log_prob = jax.jit(lambda d, x: (nm.encode(d, x)[:, 0], d.log_prob(x)))(flow(), x[:, None])
    close(encoded, cdf, rtol=1e-3)
    close(log_prob, expected, rtol=1e-3, atol=1e-3)


def test_densities_of_angles_are_periodic():
    d = distribution(FLOWS["circular"])
    step = 1e-3
    for turn in ([np.pi, 0.4], [0.4, np.pi]):
        turn = np.array(turn)
        side = np.where(turn == np.pi, 1.0, 0.0)
        y = np.stack([turn, turn - 2 * np.pi * side, turn - step * side, turn + (step - 2 * np.pi) * side])
        above, below, before, after = np.asarray(score(d, y.astype(np.float32)))
        close(above, below, atol=1e-3)
        close(before, after, atol=0.05)


def test_any_builder_takes_the_same_arguments():
    for builder in BUILDERS.values():
        made = builder(jax.random.key(0), 3, context=2, hidden=(4,))
        assert (made.features, made.context) == (3, 2)
        assert made(jnp.zeros((5, 2))).batch_shape == (5,)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: nm.maf(jax.random.key(0), 2, hidden=8), "hidden must be a tuple"),
        (lambda: nm.maf(jax.random.key(0), 2, base="normal"), "base must be a NumPyro distribution"),
        (lambda: nm.fit(0, distribution(FLOWS["maf"]), np.zeros((3, 2))), "fit takes a Flow"),
        (lambda: nm.save("unused", distribution(FLOWS["maf"])), "save takes a Flow"),
        (lambda: nm.flow_module("f", distribution(FLOWS["maf"])), "expected a Flow or a function"),
    ],
)
def test_arguments_of_another_kind_are_named(call, message):
    with pytest.raises(TypeError, match=message):
        call()
