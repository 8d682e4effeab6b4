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
from numpyro_maf.flows.parametric import KINDS, parametric_from_spec

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


@lru_cache
def both_ways(scalar):
    """Forward and back with slopes by autodiff, one jitted function of params and points."""

    @jax.jit
    def run(params, x):
        one = jnp.ones_like(x)
        (y, slope), (dy, _) = jax.jvp(partial(scalar.forward, params), (x,), (one,))
        (back, inverse_slope), (dx, _) = jax.jvp(partial(scalar.inverse, params), (y,), (one,))
        forth = scalar.forward(params, scalar.inverse(params, x)[0])
        pulled = jax.vmap(jax.grad(lambda p, x: scalar.forward(p, x)[0], 1), (1, 0))(params, x)
        return y, (back, inverse_slope), forth, slope, inverse_slope, dy, dx, pulled

    def errors(params, x):
        y, *ways, slope, inverse_slope, dy, dx, pulled = jax.tree.map(np.asarray, run(params, x))
        # A rounding error of the middle value grows by the second map's slope: where a mixture has next to
        # no mass its distribution function is flat, and no inverse can know better.
        back, forth = (
            apart(scalar.support, there, x) / ((1 + abs(x)) * np.exp(np.clip(log_slope, 0, 700)))
            for there, log_slope in ways
        )
        return y, back, forth, slope, inverse_slope, dy, dx, pulled

    return errors


def assert_laws(scalar, params, x, tolerance):
    close = partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    y, back, forth, slope, inverse_slope, dy, dx, pulled = both_ways(scalar)(params, x)
    close(back, 0)
    close(forth, 0)
    flat = np.exp(np.clip(-slope, 0, 700))
    close((slope + inverse_slope) / flat, 0)
    for log_slope, derivative in ((slope, dy), (inverse_slope, dx)):
        within = abs(log_slope) < 80 if derivative.dtype == np.float32 else abs(log_slope) < 700
        close(log_slope[within], np.log(derivative[within]))  # the others under- or overflow
    close(pulled, dy)


@each_scalar
def test_laws_for_any_parameters_and_points(scalar):
    params = arrays(float, (scalar.num_params, POINTS), elements=st.floats(-4, 4))
    points = arrays(float, POINTS, elements=st.floats(-20, 20))

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(params, points)
    def check(params, x):
        with jax.enable_x64(True):
            assert_laws(scalar, params, np.asarray(inside(scalar.support, x)), 1e-7)

    check()


@each_scalar
@pytest.mark.parametrize("seed", range(3))
def test_monotone(scalar, seed, x64):
    ends = {"real": (-6, 6), "unit": (0, 1), "circle": (-3.14, 3.14)}[scalar.support]
    x = np.linspace(*ends, 400)
    params = np.repeat(parameters(scalar, 1, seed=seed), 400, 1)
    y, log_slope = jax.jit(scalar.forward)(params, x)
    y = np.unwrap(y) if scalar.support == "circle" else y
    assert (np.diff(y) > 0).all()
    # The slope integrates to the rise.
    middle = (np.exp(log_slope[1:]) + np.exp(log_slope[:-1])) / 2
    np.testing.assert_allclose(middle.sum() * (x[1] - x[0]), y[-1] - y[0], rtol=1e-2)


@each_scalar
def test_zero_parameters_are_the_identity(scalar):
    x = edges(scalar)
    zeros = np.zeros((scalar.num_params, len(x)), np.float32)
    for function in (scalar.forward, scalar.inverse):
        y, log_slope = jax.jit(function)(zeros, x)
        np.testing.assert_allclose(y, x, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(log_slope, 0, atol=2e-6)


@each_scalar
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_edges_are_finite_and_right(scalar, size, x64):
    x = edges(scalar).astype(float)
    params = size * parameters(scalar, len(x))
    y, back, forth, slope, inverse_slope, dy, dx, _ = both_ways(scalar)(params, x)
    for value in (y, slope, inverse_slope, dy, dx):
        assert np.isfinite(value).all()
    tolerance = 1e-9 if size == 1 else 1e-5
    np.testing.assert_allclose(back, 0, atol=tolerance)
    np.testing.assert_allclose(forth, 0, atol=tolerance)


@each_scalar
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("size", [0.0, 1.0, 30.0])
def test_gradients_are_finite_everywhere(scalar, direction, size):
    x = edges(scalar)
    params = (size * parameters(scalar, len(x))).astype(np.float32)

    @jax.jit
    def gradients(params, x):
        both = partial(jnp.vectorize(getattr(scalar, direction), signature="(p),()->(),()"))
        value = jax.grad(lambda p, x: both(p.T, x)[0].sum(), (0, 1))(params, x)
        log_slope = jax.grad(lambda p, x: both(p.T, x)[1].sum(), (0, 1))(params, x)
        return value, log_slope

    for leaf in jax.tree.leaves(gradients(params, x)):
        assert np.isfinite(leaf).all()


@each_scalar
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtypes_are_kept(scalar, dtype, x64):
    x = edges(scalar).astype(dtype)
    params = parameters(scalar, len(x)).astype(dtype)
    for function in (scalar.forward, scalar.inverse):
        assert [a.dtype for a in function(params, x)] == [dtype, dtype]


@each_scalar
def test_float32_round_trip(scalar):
    x = np.asarray(inside(scalar.support, np.linspace(-7, 7, 200, dtype=np.float32)))
    params = parameters(scalar, 200).astype(np.float32)
    _, back, forth, slope, inverse_slope, *_ = both_ways(scalar)(params, x)
    np.testing.assert_allclose(back, 0, atol=1e-4)
    np.testing.assert_allclose(forth, 0, atol=1e-4)
    np.testing.assert_allclose(slope, -inverse_slope, atol=2e-2)


@each_scalar
def test_batch_shapes(scalar):
    params, x = parameters(scalar, 2, 3), np.linspace(-2, 2, 6).reshape(2, 3)
    y, log_slope = scalar.forward(params, x)
    assert y.shape == log_slope.shape == (2, 3)
    alone = scalar.forward(params[:, 1, 2], x[1, 2])
    np.testing.assert_allclose(alone, (y[1, 2], log_slope[1, 2]), rtol=1e-5, atol=1e-6)


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
def test_splines_pass_through_their_knots(name, x64):
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
    np.testing.assert_allclose(spline.forward(repeated, x), (y, np.log(slopes)), rtol=1e-7, atol=1e-8)
    back = spline.inverse(repeated, y)
    np.testing.assert_allclose(back, (x, -np.log(slopes)), rtol=1e-7, atol=1e-8)
    # The derivative of the log-slope by the slope's own parameter, where both bins meet.
    slope_by = jax.jacfwd(lambda p: spline.forward(p[:, None], x[:1])[1][0])(params)[2 * k]
    np.testing.assert_allclose(slope_by, expit(params[2 * k] + shift) / slopes[0], rtol=1e-5)


@each_spline
def test_splines_are_the_identity_outside_their_box(name):
    spline = SCALARS[name]
    x = edges(spline)
    x = x[abs(x) >= spline.bound]
    params = parameters(spline, len(x)).astype(np.float32)
    for function in (spline.forward, spline.inverse):
        y, log_slope = jax.jit(function)(params, x)
        np.testing.assert_array_equal(y, x)
        np.testing.assert_array_equal(log_slope, np.zeros_like(x))


@each_spline
def test_splines_join_the_identity_smoothly(name, x64):
    spline = SCALARS[name]
    x = np.array([-1, 1]) * spline.bound * (1 - 1e-9)
    y, log_slope = spline.forward(np.repeat(parameters(spline, 1), 2, 1), x)
    np.testing.assert_allclose(y, x, rtol=1e-6)
    np.testing.assert_allclose(log_slope, 0, atol=1e-4)


@each_spline
def test_parameters_do_not_act_outside_the_box(name):
    spline = SCALARS[name]
    x = jnp.array([spline.bound, -spline.bound, 1e4])
    params = parameters(spline, 3).astype(np.float32)
    for function in (spline.forward, spline.inverse):
        pulled = jax.jacrev(function)(params, x)
        assert all((leaf == 0).all() for leaf in pulled)


# Configuration ---------------------------------------------------------------------------------


@each_scalar
def test_spec_round_trips_through_json(scalar):
    rebuilt = parametric_from_spec(json.loads(json.dumps(scalar.spec)))
    assert rebuilt == scalar and hash(rebuilt) == hash(scalar) and rebuilt.spec == scalar.spec
    assert type(scalar).__name__ in KINDS["scalar"]


@pytest.mark.parametrize(
    "spec, message",
    [
        ({}, "expected one of the keys .*'scalar'"),
        ({"scalar": "Cubic"}, "unknown scalar 'Cubic', expected one of.*'Affine'"),
        ({"scalar": None}, "unknown scalar None"),
    ],
)
def test_unknown_specs_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        parametric_from_spec(spec)


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
def test_mixtures_are_scipys(kernel, law, x64):
    """The quantile of the mixture's distribution function, and its slope, far into both tails."""
    scalar = nm.MixtureCDF(3, kernel)
    params = jax.random.normal(jax.random.key(0), (9,))
    logits, means, raw = np.split(np.asarray(params), 3)
    weights, scales = np.exp(logits) / np.exp(logits).sum(), np.exp(5 * np.tanh(raw / 5))
    x = np.linspace(-25, 25, 101)
    y, log_slope = scalar.forward(params[:, None], x)
    z = (x[:, None] - means) / scales
    below, above = law.cdf(z) @ weights, law.sf(z) @ weights
    expected = np.where(below < above, law.ppf(below), law.isf(above))
    told = np.isfinite(expected)  # where the mixture's own tail underflows scipy has no answer
    assert told.mean() > 0.8
    np.testing.assert_allclose(y[told], expected[told], rtol=1e-8)
    density = law.pdf(z) / scales @ weights
    np.testing.assert_allclose(log_slope[told], (np.log(density) - law.logpdf(expected))[told], rtol=1e-6)
