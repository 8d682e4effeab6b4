"""Every flow against its laws: a density that integrates to one, and draws that follow it."""

import inspect
import json
import math
import pickle
from dataclasses import replace
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
    parametrize,
    shaken,
)
from numpyro.distributions import constraints
from numpyro.distributions.batch_util import promote_batch_shape
from numpyro.infer import MCMC, NUTS
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from scipy import stats

import numpyro_maf as nm
from numpyro_maf.flows.flow import BUILDERS

close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


@jax.jit
def score(d, y):
    return d.log_prob(y)


@partial(jax.jit, static_argnums=2)
def draw(d, key, shape=()):
    return d.sample(key, shape)


def distribution(case, *shape, seed=0):
    made, context = case(seed), context_of(case, *shape)
    return made() if context is None else made(context)


def events(case, *shape):
    """Inside every flow's support."""
    return inside(case.kind, 0.3 * jax.random.normal(jax.random.key(2), (*shape, *case.event_shape)))


# Densities -------------------------------------------------------------------------------------


each_low_flow = parametrize("case", FLOWS, lambda case: case.features <= 2)
BOUNDED = nm.FlowDistribution(bounded, list(FLOWS["maf"]().bijectors))  # by hand: its support is an image


def tame(case):
    """Near enough to the identity that a grid resolves the tails."""
    flow, context = shaken(case.make(jax.random.key(0)), 1, 0.12), context_of(case)
    return flow() if context is None else flow(context)


@lru_cache
def quadrature(case):
    """Total, mean and covariance of the density, by a sum over an even grid in ``arcsinh(y)``."""
    d, count = tame(case), 601
    if case.kind == "real":
        t = np.linspace(-7, 7, count)
        points, widths = np.sinh(t), (t[1] - t[0]) * np.cosh(t)
    else:
        interval = d.support.base_constraint
        ends = np.linspace(interval.lower_bound, interval.upper_bound, count + 1)
        points, widths = (ends[1:] + ends[:-1]) / 2, np.full(count, ends[1] - ends[0])
    y = np.stack(np.meshgrid(*[points] * case.features, indexing="ij"), -1).reshape(-1, case.features)
    cell = (
        np.stack(np.meshgrid(*[widths] * case.features, indexing="ij"), -1).reshape(-1, case.features).prod(1)
    )
    mass = np.exp(np.asarray(score(d, y), float)) * cell
    mean = mass @ y
    return mass.sum(), mean, np.einsum("n,ni,nj->ij", mass, y - mean, y - mean)


@each_low_flow
def test_density_integrates_to_one(case):
    total, _, _ = quadrature(case)
    np.testing.assert_allclose(total, 1, atol=1e-3)


@each_low_flow
def test_samples_have_the_moments_of_the_density(case):
    _, mean, covariance = quadrature(case)
    y = np.asarray(draw(tame(case), jax.random.key(1), (20000,)), float)
    products = np.einsum("ni,nj->nij", y - mean, y - mean)
    for actual, expected in [(y, mean), (products, covariance)]:
        error = actual.std(0) / len(y) ** 0.5 + 1e-3
        assert (abs(actual.mean(0) - expected) < 5 * error).all()


@each_flow
def test_log_prob_is_that_of_numpyros_transformed_distribution(case):
    d = distribution(case, 3)
    y = draw(d, jax.random.key(0), (4, 3)[d.batch_shape != () :])
    plain = dist.TransformedDistribution(d.base_dist, d.transforms)
    close(score(d, y), jax.jit(plain.log_prob)(y), atol=1e-4)


@each_flow
def test_intermediates_score_the_sample(case):
    @jax.jit
    def run(d, key):
        y, intermediates = d.sample_with_intermediates(key, (4,))
        return d.log_prob(y, intermediates), d.log_prob(y), y, d.sample(key, (4,))

    by_intermediates, alone, y, again = run(distribution(case), jax.random.key(0))
    close(by_intermediates, alone, rtol=1e-3, atol=1e-3)
    close(y, again)


# Shapes ----------------------------------------------------------------------------------------


@each_context_flow
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_context_batches_become_batch_shape(case, shape):
    d, y = distribution(case, *shape), events(case, 4, *shape)
    assert (d.batch_shape, d.event_shape) == (shape, case.event_shape)
    assert draw(d, jax.random.key(0)).shape == (*shape, *case.event_shape)
    x = draw(d, jax.random.key(0), (4,))
    assert x.shape == y.shape
    assert len(np.unique(x.reshape(-1, case.features), axis=0)) == 4 * math.prod(shape)
    log_prob = score(d, y)
    assert log_prob.shape == (4, *shape)
    context = context_of(case, *shape).reshape(-1, case.context)
    rows = y.reshape(4, -1, *case.event_shape)
    one = [score(case()(c), rows[:, i]) for i, c in enumerate(context)]
    close(log_prob.reshape(4, -1), np.stack(one, 1))
    first = y[0][(slice(None),) * (len(shape) - 1) + (slice(1),)] if shape else y[0]
    close(score(d, first).shape, shape)


@pytest.mark.parametrize("name", ["maf", "iaf", "maf-1d", "nsf-context", "maf-bounded"])
def test_expand_mask_and_to_event(name):
    case = FLOWS[name]
    d = distribution(case, *((3, 1) if case.context else ()))
    y, keep = events(case, 3, 2), jnp.array([True, False])
    wide = d.expand((3, 2))
    assert (wide.batch_shape, wide.event_shape) == ((3, 2), case.event_shape)
    log_prob = score(d, y)
    assert log_prob.shape == (3, 2)
    close(score(wide, y), log_prob)
    x = draw(wide, jax.random.key(0), (5,))
    assert x.shape == (5, 3, 2, *case.event_shape) and len(np.unique(x[..., 0])) == 30
    close(score(wide.mask(keep), y), np.where(keep, log_prob, 0))
    event = wide.to_event(1)
    assert (event.batch_shape, event.event_shape) == ((3,), (2, case.features))
    close(score(event, y), log_prob.sum(-1))
    x, intermediates = wide.sample_with_intermediates(jax.random.key(1), (5,))
    close(wide.log_prob(x, intermediates), wide.log_prob(x), rtol=1e-3, atol=1e-3)


@each_flow
def test_distributions_cross_jit(case):
    make = jax.jit(lambda flow, context: flow() if context is None else flow(context))
    context, y = context_of(case, 3), events(case, 3)
    d, through = distribution(case, 3), make(case(), context)
    assert (through.batch_shape, through.event_shape) == (d.batch_shape, d.event_shape)
    assert jax.tree.structure(through) == jax.tree.structure(d)
    close(score(through, y), score(d, y))
    close(draw(through, jax.random.key(0)), draw(d, jax.random.key(0)))


@each_flow
def test_distributions_made_by_vmap(case):
    """Out of vmap every leaf has one more axis, and ``batch_shape`` does not know."""
    keys, context, y = jax.random.split(jax.random.key(0), 3), context_of(case), events(case, 3)

    def make(key):
        flow = shaken(case.make(key), 1)
        return flow() if context is None else flow(context)

    stacked = jax.jit(jax.vmap(make))(keys)
    one = [make(key) for key in keys]
    expected = np.stack([score(d, row) for d, row in zip(one, y, strict=True)])
    close(score(stacked, y), expected)
    close(jax.vmap(score)(stacked, y), expected)
    assert promote_batch_shape(stacked).batch_shape == (3,)
    assert promote_batch_shape(one[0]).batch_shape == ()
    x = draw(stacked, jax.random.key(0), (5,))
    assert x.shape == (5, 3, *case.event_shape)
    by_column = np.stack([score(d, x[:, i]) for i, d in enumerate(one)], 1)
    close(score(stacked, x), by_column, atol=1e-4)


@each_context_flow
def test_distributions_made_by_vmap_over_contexts(case):
    made, context, y = case(), context_of(case, 3, 2), events(case, 3, 2)
    stacked = jax.vmap(made)(context)
    close(score(stacked, y), score(made(context), y))
    assert promote_batch_shape(stacked).batch_shape == (3, 2)
    assert draw(stacked, jax.random.key(0), (5,)).shape == (5, 3, 2, *case.event_shape)


def test_leaves_with_unequal_new_axes_are_refused():
    d = distribution(FLOWS["maf"])
    leaves, structure = jax.tree.flatten(d)
    odd = jax.tree.unflatten(structure, [jnp.asarray(leaves[0])[None], *leaves[1:]])
    with pytest.raises(ValueError, match="differ in the axes they gained.*map over all"):
        odd.log_prob(jnp.zeros(2))


# Gradients and traces --------------------------------------------------------------------------


@each_context_flow
def test_gradients_reach_weights_and_context(case):
    y, context = events(case, 3), context_of(case, 3)

    @jax.jit
    def gradients(flow, context):
        by_density = jax.grad(lambda f, c: f(c).log_prob(y).sum(), (0, 1))(flow, context)
        by_draws = jax.grad(lambda f, c: f(c).sample(jax.random.key(0)).sum(), (0, 1))(flow, context)
        return by_density, by_draws

    for of_flow, of_context in gradients(case(), context):
        assert (of_context != 0).all() and np.isfinite(of_context).all()
        leaves = jax.tree.leaves(of_flow.weights)
        assert all(np.isfinite(leaf).all() for leaf in leaves)
        assert any((leaf != 0).any() for leaf in leaves)


@each_flow
def test_equal_structures_share_one_trace(case):
    traces = []

    @jax.jit
    def run(flow, context, y, key):
        traces.append(flow)
        d = flow() if context is None else flow(context)
        return d.log_prob(y), d.sample(key)

    results = [run(case(seed), context_of(case), events(case), jax.random.key(seed)) for seed in range(3)]
    assert len(traces) == 1
    assert len({float(log_prob) for log_prob, _ in results}) == 3 or case is FLOWS["nice"]


# Files -----------------------------------------------------------------------------------------


def assert_bit_equal(actual, expected, case):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert jnp.result_type(a) == jnp.result_type(b)
        np.testing.assert_array_equal(a, b)
    context, y = context_of(case, 5), events(case, 5)
    of = jax.jit(lambda flow, context: (flow() if context is None else flow(context)).log_prob(y))
    np.testing.assert_array_equal(of(actual, context), of(expected, context))


@each_flow
def test_pickle_is_bit_equal(case):
    assert_bit_equal(pickle.loads(pickle.dumps(case())), case(), case)


@each_flow
def test_save_and_load_are_bit_equal(case, tmp_path):
    nm.save(tmp_path / "flow", case())
    assert_bit_equal(nm.load(tmp_path / "flow"), case(), case)


def test_save_and_load_keep_double_precision(tmp_path):
    case = FLOWS["maf-context"]
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64) / 3, case())
        nm.save(tmp_path / "flow", wide)
        assert_bit_equal(nm.load(str(tmp_path / "flow")), wide, case)
    with pytest.raises(ValueError, match="float64.*jax_enable_x64"):
        nm.load(tmp_path / "flow")


def test_fixed_scalings_are_in_the_file(tmp_path):
    scaled = replace(FLOWS["maf"](), event_scale=nm.Standardize(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])))
    nm.save(tmp_path / "flow", scaled)
    loaded = nm.load(tmp_path / "flow")
    np.testing.assert_array_equal(loaded.event_scale.loc, [1, 2])
    np.testing.assert_array_equal(loaded.event_scale.scale, [3, 4])


@pytest.fixture
def saved(tmp_path):
    nm.save(tmp_path / "flow", FLOWS["maf"]())
    return tmp_path / "flow"


def rewrite(path, change):
    """The same file with its header and arrays changed."""
    arrays = load_file(path)
    with safe_open(path, "numpy") as file:
        header = json.loads(file.metadata()["numpyro_maf"])
    change(header, arrays)
    save_file(arrays, path, metadata={"numpyro_maf": json.dumps(header)})


def later(header, arrays):
    header["version"] += 1


def drop(header, arrays):
    arrays.pop(".event_scale.loc")


def more(header, arrays):
    arrays["stowaway"] = np.zeros(3)


def widen(header, arrays):
    arrays[".event_scale.loc"] = np.zeros(3, np.float32)


def other_builder(header, arrays):
    header["spec"]["builder"] = "os.system"


def other_kind(header, arrays):
    header["kind"] = "pickle"


def other_base(header, arrays):
    header["spec"]["base"] = {"distribution": "os", "arguments": {}}


@pytest.mark.parametrize(
    "change, message",
    [
        (later, "format version 2, this is 1: please upgrade"),
        (drop, "does not fit its own structure: .event_scale.loc"),
        (more, "does not fit its own structure: stowaway"),
        (widen, r"event_scale.loc has shape \(3,\), expected \(2,\)"),
        (other_builder, "unknown builder 'os.system', expected one of"),
        (other_kind, "holds an unknown kind 'pickle', expected one of"),
        (other_base, "unknown distribution 'os'"),
    ],
)
def test_files_that_do_not_fit_are_refused(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(ValueError, match=message):
        nm.load(saved)


def test_foreign_and_damaged_files_are_refused(saved, tmp_path):
    save_file({"a": np.zeros(2)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="foreign was not written by numpyro_maf.save"):
        nm.load(tmp_path / "foreign")
    (tmp_path / "short").write_bytes(saved.read_bytes()[:-10])
    (tmp_path / "pickle").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "empty").write_bytes(b"")
    for name in ("short", "pickle", "empty"):
        with pytest.raises(ValueError, match=name):
            nm.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        nm.load(tmp_path / "none")


def test_the_file_is_safetensors_with_json(saved):
    data = saved.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    spec = json.loads(header["__metadata__"]["numpyro_maf"])["spec"]
    assert spec == FLOWS["maf"]().spec
    assert len(data) == 8 + size + 4 * sum(a.size for a in jax.tree.leaves(FLOWS["maf"]()))


@each_flow
def test_spec_round_trips_through_json(case):
    original = case()
    rebuilt = nm.from_spec(json.loads(json.dumps(original.spec)), jax.random.key(0))
    assert rebuilt.spec == original.spec
    assert jax.tree.structure(rebuilt) == jax.tree.structure(original)
    jax.tree.map(np.testing.assert_array_equal, rebuilt, case.make(jax.random.key(0)))
    assert (rebuilt.features, rebuilt.context) == (case.features, case.context)


def test_bases_that_are_not_numpyros_have_no_spec():
    class Own(dist.Normal):
        pass

    made = nm.maf(jax.random.key(0), 2, base=Own(jnp.zeros(2), 1.0).to_event(1))
    with pytest.raises(TypeError, match="base of type Own cannot be described"):
        _ = made.spec


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


@pytest.mark.parametrize("spec", [{}, {"builder": "unknown"}])
def test_unknown_builders_are_refused(spec):
    with pytest.raises(ValueError, match="unknown builder .*expected one of"):
        nm.from_spec(spec)


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
    d = distribution(case)
    corners = np.array([0.0, 1e-30, -1e-30, 1e4, -1e4], np.float32)
    y = np.concatenate([np.repeat(corners[:, None], case.features, 1)] * 2)
    y[5:, 0] = 0.1
    y = y.reshape(-1, *case.event_shape)
    log_prob = np.asarray(score(d, y))
    within = np.asarray(d.support(y))
    assert within.all() or case.kind != "real"
    assert np.isfinite(log_prob[within]).all() and (log_prob[~within] == -np.inf).all()
    gradient = jax.jit(jax.grad(lambda y: d.log_prob(y).sum()))(y[within])
    assert np.isfinite(gradient).all()


@each_flow
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_has_no_density(case, bad):
    y = np.zeros((case.features, case.features), np.float32)
    np.fill_diagonal(y, bad)
    log_prob = np.asarray(score(distribution(case), y.reshape(-1, *case.event_shape)))
    assert (np.isnan(log_prob) | (log_prob == -np.inf)).all()


@each_flow
def test_double_precision(case, x64):
    wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), case())

    @jax.jit
    def run(flow, context):
        d = flow() if context is None else flow(context)
        y, intermediates = d.sample_with_intermediates(jax.random.key(0), (4,))
        return y, d.log_prob(y), d.log_prob(y, intermediates)

    y, log_prob, by_intermediates = run(wide, context_of(case))
    assert y.dtype == log_prob.dtype == np.float64
    close(log_prob, by_intermediates, rtol=1e-9, atol=1e-9)


@each_flow
def test_support_is_honest(case):
    d = distribution(case)
    y = draw(d, jax.random.key(0), (100,))
    assert d.support(y).all() and np.isfinite(score(d, y)).all()
    real = d.support is constraints.real_vector
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
    close(nm.encode(d, nm.decode(d, u)), u, rtol=1e-3, atol=1e-3)
    far = nm.encode(d, jnp.array([[30.0, 0.0], [-1e4, 1e4]]))
    assert d.base_dist.support(far).all()


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
    close(nm.encode(flow(), x[:, None])[:, 0], cdf, rtol=1e-3)
    close(flow().log_prob(x[:, None]), expected, rtol=1e-3, atol=1e-3)


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
