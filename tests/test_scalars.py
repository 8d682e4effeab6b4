"""Every scalar map against its laws: round trip, slope by autodiff, monotone, identity at zero."""

import json
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SCALARS, apart, each_scalar, inside
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from scipy.special import expit, softmax

import numpyro_maf as nm
from numpyro_maf import codec

POINTS = 9
each_spline = pytest.mark.parametrize("name", ["spline", "spline-2"])


def parameters(scalar, *shape, seed=0):
    return np.random.default_rng(seed).normal(0, 1.5, (scalar.num_params, *shape))


def edges(scalar):
    """Where a map could break: 0, tiny, huge, and around the ends of a box."""
    bound = np.float32(getattr(scalar, "bound", 1.0))
    around = [np.nextafter(bound, np.float32(0)), bound, np.nextafter(bound, np.float32(9))]
    positive = np.array([0, 1e-30, 1e-3, 1, *around, 50, 1e4], np.float32)
    if scalar.support == "circle":
        positive = np.array([0, 1e-30, 1e-3, 1, 2, 3.1], np.float32)
    return np.concatenate([positive, -positive])


@lru_cache(None)
def program(scalar):
    """Forward at ``x`` and inverse at ``z``, slopes by autodiff, and a pullback: each stands once in it."""

    def both(params, x, z):
        ways = scalar.forward(params, x), scalar.inverse(params, z)
        return tuple(a for way in ways for a in jnp.broadcast_arrays(*way))

    @jax.jit
    def run(params, x, z, cotangent):
        values, push = jax.linearize(both, params, x, z)
        pull = jax.linear_transpose(push, params, x, z)
        dy, _, dx, _ = push(jnp.zeros_like(params), jnp.ones_like(x), jnp.ones_like(z))
        return {
            "values": values,
            "slopes": (dy, dx),
            "pulled": pull(tuple(jnp.broadcast_to(c, x.shape) for c in cotangent)),
            "alone": scalar.forward(params[:, 4], x[4]),
            "batch": scalar.forward(params[:, :6].reshape(-1, 2, 3), x[:6].reshape(2, 3)),
        }

    return run


# Of what the gradient is: the value or the log-slope of the one way or of the other.
GRADIENTS = ["forward value", "forward slope", "inverse value", "inverse slope"]


def run(scalar, params, x, z, dtype=np.float64, of="forward value"):
    """At any number of points up to 400: always the same program, its results without what filled it up.

    Each point has its own parameters, so that a gradient of a sum is one of each.
    """
    at = np.arange(400) % len(x)
    args = params[:, at], np.asarray(x)[at], np.asarray(z)[at], [float(name == of) for name in GRADIENTS]
    with jax.enable_x64(dtype == np.float64):
        found = program(scalar)(*jax.tree.map(partial(np.asarray, dtype=dtype), args))
    return jax.tree.map(lambda a: np.asarray(a)[..., : len(x)] if np.shape(a)[-1:] == (400,) else a, found)


def facts(scalar, params, x, dtype=np.float64):
    """Both ways at the points, and both round trips, with slopes and all that ``program`` has."""
    at = run(scalar, params, x, x, dtype)
    y, slope, there, its_slope = at["values"]
    returned = run(scalar, params, there, y, dtype)
    back, inverse_slope = returned["values"][2:]
    return {
        **dict(forward=(y, slope), inverse=(there, its_slope), alone=at["alone"], batch=at["batch"]),
        **dict(y=y, slope=slope, dy=at["slopes"][0]),
        **dict(back=back, inverse_slope=inverse_slope, dx=returned["slopes"][1]),
        "forth": returned["values"][0],
        "forward value gradient": at["pulled"][:2],
    }


def errors(scalar, params, x, dtype=np.float64):
    """Of both round trips, in units of what rounding makes of them.

    A rounding error of the middle value grows by the second map's slope: where a mixture has next to no mass
    its distribution function is flat, and no inverse can know better.
    """
    at = facts(scalar, params, x, dtype)
    pairs = [(at["back"], at["inverse_slope"]), (at["forth"], at["slope"])]
    return [
        apart(scalar.support, there, x) / ((1 + abs(x)) * np.exp(np.clip(log_slope, 0, 700)))
        for there, log_slope in pairs
    ]


def assert_laws(scalar, params, x, tolerance):
    close = partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    at = facts(scalar, params, x)
    for error in errors(scalar, params, x):
        close(error, 0)
    slope, inverse_slope, dy, dx = (at[name] for name in ["slope", "inverse_slope", "dy", "dx"])
    flat = np.exp(np.clip(-slope, 0, 700))
    close((slope + inverse_slope) / flat, 0)
    for log_slope, derivative in ((slope, dy), (inverse_slope, dx)):
        within = abs(log_slope) < 700
        close(log_slope[within], np.log(derivative[within]))  # the others under- or overflow
    close(at["forward value gradient"][1], dy)


@each_scalar
def test_laws_for_any_parameters_and_points(scalar):
    params = arrays(float, (scalar.num_params, POINTS), elements=st.floats(-4, 4))
    points = arrays(float, POINTS, elements=st.floats(-20, 20))

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(params, points)
    def check(params, x):
        assert_laws(scalar, params, inside(scalar.support, x), 1e-7)

    check()


@each_scalar
@pytest.mark.parametrize("seed", range(3))
def test_monotone(scalar, seed):
    ends = {"real": (-6, 6), "unit": (0, 1), "circle": (-3.14, 3.14)}[scalar.support]
    x = np.linspace(*ends, 400)
    params = np.repeat(parameters(scalar, 1, seed=seed), 400, 1)
    at = facts(scalar, params, x)
    y = np.unwrap(at["y"]) if scalar.support == "circle" else at["y"]
    assert (np.diff(y) > 0).all()
    # The slope integrates to the rise.
    slope = np.exp(at["slope"])
    middle = (slope[1:] + slope[:-1]) / 2
    np.testing.assert_allclose(middle.sum() * (x[1] - x[0]), y[-1] - y[0], rtol=1e-2)


@each_scalar
def test_zero_parameters_are_the_identity(scalar):
    x = edges(scalar)
    at = facts(scalar, np.zeros((scalar.num_params, len(x))), x, np.float32)
    for y, log_slope in (at["forward"], at["inverse"]):
        np.testing.assert_allclose(y, x, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(log_slope, 0, atol=2e-6)


@each_scalar
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_edges_are_finite_and_right(scalar, size):
    x = edges(scalar).astype(float)
    params = size * parameters(scalar, len(x))
    at = facts(scalar, params, x)
    for name in ("y", "slope", "inverse_slope", "dy", "dx"):
        assert np.isfinite(at[name]).all()
    for error in errors(scalar, params, x):
        np.testing.assert_allclose(error, 0, atol=1e-9 if size == 1 else 1e-5)


@each_scalar
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("size", [0.0, 1.0, 30.0])
def test_gradients_are_finite_everywhere(scalar, direction, size):
    x = edges(scalar)
    params = size * parameters(scalar, len(x))
    for of in (f"{direction} value", f"{direction} slope"):
        for leaf in jax.tree.leaves(run(scalar, params, x, x, np.float32, of)["pulled"]):
            assert np.isfinite(leaf).all()


@each_scalar
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtypes_are_kept(scalar, dtype, x64):
    x = edges(scalar).astype(dtype)
    params = parameters(scalar, len(x)).astype(dtype)
    for function in (scalar.forward, scalar.inverse):
        assert [a.dtype for a in jax.eval_shape(function, params, x)] == [dtype, dtype]
    assert facts(scalar, params, x, dtype)["y"].dtype == dtype


@each_scalar
def test_float32_round_trip(scalar):
    x = inside(scalar.support, np.linspace(-7, 7, 200, dtype=np.float32)).astype(np.float32)
    params = parameters(scalar, 200).astype(np.float32)
    for error in errors(scalar, params, x, np.float32):
        np.testing.assert_allclose(error, 0, atol=1e-4)
    at = facts(scalar, params, x, np.float32)
    np.testing.assert_allclose(at["slope"], -at["inverse_slope"], atol=2e-2)


@each_scalar
def test_batch_shapes(scalar):
    at = facts(scalar, parameters(scalar, 6), np.linspace(-2, 2, 6))
    expected = np.stack(at["forward"])
    assert [np.shape(part) for part in at["batch"]] == [(2, 3), (2, 3)]
    np.testing.assert_allclose(np.reshape(at["batch"], (2, 6)), expected, rtol=1e-9, atol=1e-12)
    assert [np.shape(part) for part in at["alone"]] == [(), ()]
    np.testing.assert_allclose(at["alone"], expected[:, 4], rtol=1e-9, atol=1e-12)


# Known answers -----------------------------------------------------------------------------------


def test_affine_and_additive_known_answers():
    x, params = np.array([-1.0, 0.0, 2.0]), np.array([[0.5], [0.3]])
    scale = np.exp(2 * np.tanh(0.3 / 2))
    y, log_slope = nm.Affine(bound=2.0).forward(params, x)
    np.testing.assert_allclose(y, x * scale + 0.5, rtol=1e-6)
    np.testing.assert_allclose(np.broadcast_to(log_slope, 3), np.log(scale), rtol=1e-6)
    _, largest = nm.Affine(bound=2.0).forward(np.array([0.0, 1e6]), np.array(1.0))
    np.testing.assert_allclose(largest, 2.0)
    y, log_slope = nm.Additive().forward(params[:1], x)
    np.testing.assert_allclose(y, x + 0.5, rtol=1e-6)
    np.testing.assert_array_equal(log_slope, np.zeros(3))


@each_spline
def test_splines_pass_through_their_knots(name):
    """Ends of the bins and derivatives there, from the paper's softmax and softplus by hand."""
    spline = SCALARS[name]
    k, bound = spline.bins, spline.bound
    params = parameters(spline)

    def knots(raw):
        share = spline.min_bin + (1 - k * spline.min_bin) * softmax(raw)
        return 2 * bound * np.cumsum(share)[:-1] - bound

    x, y = knots(params[:k]), knots(params[k : 2 * k])
    shift = np.log(np.expm1(1 - spline.min_slope))
    slopes = spline.min_slope + np.logaddexp(0, params[2 * k :] + shift)
    repeated = np.repeat(params[:, None], k - 1, 1)
    at = facts(spline, repeated, x)
    np.testing.assert_allclose(at["forward"], (y, np.log(slopes)), rtol=1e-7, atol=1e-8)
    back = facts(spline, repeated, y)["inverse"]
    np.testing.assert_allclose(back, (x, -np.log(slopes)), rtol=1e-7, atol=1e-8)
    # The derivative of the log-slope by the slope's own parameter, where both bins meet.
    slope_by = run(spline, repeated, x, x, of="forward slope")["pulled"][0][2 * k, 0]
    np.testing.assert_allclose(slope_by, expit(params[2 * k] + shift) / slopes[0], rtol=1e-5)


@each_spline
def test_splines_are_the_identity_outside_their_box(name):
    spline = SCALARS[name]
    x = edges(spline)
    x = x[abs(x) >= spline.bound]
    params = parameters(spline, len(x))
    at = facts(spline, params, x, np.float32)
    for direction in ("forward", "inverse"):
        y, log_slope = at[direction]
        np.testing.assert_array_equal(y, x)
        np.testing.assert_array_equal(log_slope, np.zeros_like(x))
    for of in GRADIENTS:  # the parameters do not act there
        assert (run(spline, params, x, x, np.float32, of)["pulled"][0] == 0).all()


@each_spline
def test_splines_join_the_identity_smoothly(name):
    spline = SCALARS[name]
    x = np.array([-1, 1]) * spline.bound * (1 - 1e-9)
    y, log_slope = facts(spline, np.repeat(parameters(spline, 1), 2, 1), x)["forward"]
    np.testing.assert_allclose(y, x, rtol=1e-6)
    np.testing.assert_allclose(log_slope, 0, atol=1e-4)


# Configuration ---------------------------------------------------------------------------------


@each_scalar
def test_configurations_round_trip_through_json(scalar):
    rebuilt = codec.read(json.loads(json.dumps(codec.write(scalar))))
    assert rebuilt == scalar and hash(rebuilt) == hash(scalar)


@pytest.mark.parametrize("described", [{}, {"class": "Cubic"}, {"class": None}])
def test_unknown_configurations_are_refused(described):
    with pytest.raises(ValueError, match="holds an unknown kind"):
        codec.read(described)


@pytest.mark.parametrize(
    "kind, options, message",
    [
        (nm.RQSpline, dict(bins=1), "bins >= 2.*bins=1"),
        (nm.RQSpline, dict(bins=10, min_bin=0.1), "bins \\* min_bin < 1.*min_bin=0.1"),
        (nm.RQSpline, dict(min_bin=-0.1), "min_bin=-0.1"),
        (nm.RQSpline, dict(bound=0.0), "bound=0.0"),
        (nm.RQSpline, dict(min_slope=1.0), "min_slope=1.0"),
        (nm.RQSpline, dict(min_slope=-1.0), "min_slope=-1.0"),
        (nm.Affine, dict(bound=0.0), "bound"),
        (nm.Affine, dict(bound=-1.0), "bound"),
    ],
)
def test_bad_options_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


@pytest.mark.parametrize("kernel, law", [("logistic", stats.logistic), ("gaussian", stats.norm)])
def test_mixtures_are_scipys(kernel, law):
    """The quantile of the mixture's distribution function, and its slope, far into both tails."""
    scalar = nm.MixtureCDF(3, kernel)
    params = np.random.default_rng(0).normal(size=9)
    logits, means, raw = np.split(params, 3)
    weights, scales = np.exp(logits) / np.exp(logits).sum(), np.exp(5 * np.tanh(raw / 5))
    x = np.linspace(-25, 25, 101)
    y, log_slope = facts(scalar, np.repeat(params[:, None], len(x), 1), x)["forward"]
    z = (x[:, None] - means) / scales
    below, above = law.cdf(z) @ weights, law.sf(z) @ weights
    expected = np.where(below < above, law.ppf(below), law.isf(above))
    told = np.isfinite(expected)  # where the mixture's own tail underflows scipy has no answer
    assert told.mean() > 0.8
    np.testing.assert_allclose(y[told], expected[told], rtol=1e-8)
    density = law.pdf(z) / scales @ weights
    np.testing.assert_allclose(log_slope[told], (np.log(density) - law.logpdf(expected))[told], rtol=1e-6)


@pytest.mark.parametrize("method, lines", [("forward", 1200), ("inverse", 2400)])
def test_gaussian_mixtures_are_small_programs(method, lines):
    """What is much to compile, the normal's distribution function, is in them a few times and no more."""
    arguments = jnp.zeros((9, 4)), jnp.zeros(4)
    text = jax.jit(getattr(nm.MixtureCDF(3, "gaussian"), method)).lower(*arguments).as_text()
    assert len(text.splitlines()) < lines


@pytest.mark.parametrize("scalar", [nm.RQSpline(), nm.CircularSpline(), nm.PiecewiseQuadratic()], ids=repr)
def test_sharp_splines_are_finite_on_and_beside_their_knots(scalar):
    rng = np.random.default_rng(0)
    params = (10 * rng.normal(size=(scalar.num_params, 300))).astype(np.float32)
    low, high = (0, 1) if isinstance(scalar, nm.PiecewiseQuadratic) else (-3, 3)
    x = np.sort(rng.uniform(low, high, (300, 300)).astype(np.float32), 1)
    for direction in (scalar.forward, scalar.inverse):
        run = jax.jit(jax.vmap(direction, (None, 1), 1))
        y, _ = run(params, x)
        there = np.stack([np.nextafter(x, -9), x, np.nextafter(x, 9)]).reshape(-1, 300).T
        for points in (there, np.clip(np.asarray(y), low, high)):
            assert all(np.isfinite(a).all() for a in run(params, points.astype(np.float32)))
