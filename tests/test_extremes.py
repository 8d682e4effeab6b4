"""Laws at the edges: weights scaled up, and numbers on and beside knots, tiny and far out, in both dtypes.

One small program for each scalar map, bijector and dtype gives its facts for all scales of the weights.
"""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from conftest import BIJECTORS, SCALARS, apart, bound, fresh, inside, normals, parametrize, shaken

import numpyro_maf as nm

SCALES = (1.0, 3.0, 10.0)
DTYPES = {"float32": np.float32, "float64": np.float64}
QUICK = {("coupling-spline", "float32"), ("elementwise", "float64"), ("inverse-affine", "float32")}
QUICK |= {("lu", "float32"), ("actnorm", "float64"), ("logit", "float32"), ("heavy-tails", "float32")}
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
each_scalar = parametrize("scalar", SCALARS)
# Few in every run, of one precision: each takes seconds to compile.
each_bijector = pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(
            case, dtype, id=f"{name}-{kind}", marks=() if (name, kind) in QUICK else pytest.mark.slow
        )
        for name, case in BIJECTORS.items()
        for kind, dtype in DTYPES.items()
    ],
)


def finite(tree):
    return all(np.isfinite(a).all() for a in jax.tree.leaves(tree))


# Scalar maps --------------------------------------------------------------------------------------


def knots(scalar, params):
    """Where the bins of a scalar map meet, ``(K - 1, N)``; none for smooth maps."""
    sizes = getattr(scalar, "_sizes", lambda p: scalar._table(p)[0] if hasattr(scalar, "_table") else None)(
        params
    )
    if sizes is None:
        return np.zeros((0, params.shape[1]))
    start = {"unit": 0.0, "circle": -np.pi}.get(scalar.support) if scalar.support != "real" else -scalar.bound
    return start + np.cumsum(np.asarray(sizes[0][:-1]), 0)


@lru_cache(None)
def points(scalar, dtype):
    """Parameters ``(P, N)`` of all scales, and numbers on and beside their knots, tiny and far out."""
    rng = np.random.default_rng(0)
    start = np.array(scalar.initial)[:, None]
    params = np.concatenate([start + s * rng.normal(size=(scalar.num_params, 12)) for s in SCALES], 1)
    params = params.astype(dtype)
    with jax.enable_x64(dtype == np.float64):
        on = knots(scalar, params).astype(dtype)
    tops = {"unit": 1.0, "circle": 3.14159}.get(scalar.support, 1e4)
    fixed = np.array([0, 1e-30, 0.3, tops, -1e-30, -0.3, -tops], dtype)
    fixed = fixed[fixed >= 0] if scalar.support == "unit" else fixed
    ordinary = inside(scalar.support, 2 * rng.normal(size=(6, params.shape[1]))).astype(dtype)
    there = [np.nextafter(on, dtype(-9)), on, np.nextafter(on, dtype(9)), ordinary]
    x = np.concatenate([*there, np.repeat(fixed[:, None], params.shape[1], 1)])
    return np.repeat(params[:, None], len(x), 1).reshape(len(params), -1), x.ravel()


@lru_cache(None)
def scalar_facts(scalar, dtype):
    def run(params, x):
        (y, slope), (dy, _) = jax.jvp(partial(scalar.forward, params), (x,), (jnp.ones_like(x),))
        back, inverse_slope = scalar.inverse(params, y)
        seen = dict(y=y, slope=slope, dy=dy, back=back, inverse_slope=inverse_slope)
        for name, function, at in [("forward", scalar.forward, x), ("inverse", scalar.inverse, y)]:
            seen[name] = jax.grad(lambda p, v, f=function: sum(map(jnp.sum, f(p, v))), (0, 1))(params, at)
        return seen

    with jax.enable_x64(dtype == np.float64):
        return jax.tree.map(np.asarray, jax.jit(run)(*points(scalar, dtype)))


@each_scalar
@each_dtype
def test_scalars_are_finite_with_large_parameters(scalar, dtype):
    for name, value in scalar_facts(scalar, dtype).items():
        assert finite(value), name


@each_scalar
@each_dtype
def test_scalars_slopes_are_their_derivatives(scalar, dtype):
    at = scalar_facts(scalar, dtype)
    tolerance = 0.02 if dtype == np.float32 else 1e-8  # autodiff's derivative cancels where slopes are 1e-7
    within = np.abs(at["slope"]) < 80  # the others under- or overflow
    np.testing.assert_allclose(at["slope"][within], np.log(at["dy"][within]), rtol=tolerance, atol=tolerance)


@each_scalar
@each_dtype
def test_scalars_round_trips(scalar, dtype):
    """But for rounding of the middle value, which grows by the inverse map's slope; beside knots that changes
    a thousandfold within the rounding."""
    at, x = scalar_facts(scalar, dtype), points(scalar, dtype)[1].astype(float)
    steepest = np.maximum(at["inverse_slope"].astype(float), -at["slope"].astype(float))
    grown = np.exp(np.minimum(steepest, 700))
    size = 1 + np.abs(x) + (1 + np.abs(at["y"])) * grown
    error = np.abs(apart(scalar.support, at["back"].astype(float), x)) / size
    assert error.max() < 4000 * np.finfo(dtype).eps


@pytest.mark.parametrize("name", ["mixture", "mixture-1", "mixture-gaussian", "compose"])
def test_mixtures_are_right_far_out_in_single_precision(name):
    scalar = SCALARS[name]
    params, x = points(scalar, np.float32)
    far = np.abs(x) > 1e3
    narrow = scalar_facts(scalar, np.float32)
    with jax.enable_x64(True):
        y, slope = jax.jit(scalar.forward)(params[:, far].astype(float), x[far].astype(float))
    np.testing.assert_allclose(narrow["y"][far], y, rtol=1e-5)
    np.testing.assert_allclose(narrow["slope"][far], slope, atol=1e-4)


@pytest.mark.parametrize("law", ["logistic", "gaussian"])
@each_dtype
def test_tails_of_a_mixture_are_those_of_its_widest_component(law, dtype):
    """Far out ``y = (x - m) / s``, a little moved by the weight, and the log-slope is ``-log s``."""
    scalar, scale = nm.MixtureCDF(2, law, bound=50.0), np.array([0.5, -1.0])
    params = np.array([0.0, 0.0, 1.0, -2.0, *50 * np.arctanh(scale / 50)])[:, None].astype(dtype)
    for x in (-1e4, 1e4):
        with jax.enable_x64(dtype == np.float64):
            y, slope = (np.asarray(a)[0] for a in jax.jit(scalar.forward)(params, np.array([x], dtype)))
        np.testing.assert_allclose(y, (x - 1) / np.exp(0.5), rtol=1e-3)
        np.testing.assert_allclose(slope, -0.5, atol=1e-3)


# Bijectors ----------------------------------------------------------------------------------------


@lru_cache(None)
def bijector_facts(case, dtype):
    """At 3 events for each scale of the weights, with the whole Jacobian."""
    trees = [shaken(fresh(case, 0), 1, 0.3 * scale) for scale in SCALES]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves).astype(dtype), *trees)

    def facts(tree, x):
        def forward(tree, x):
            return bound(case, tree).forward_and_log_det(x)

        (y, log_det), pull = jax.vjp(forward, tree, x)
        jacobian = jax.vmap(jax.jacfwd(lambda v: forward(tree, v)[0]))(x)
        back, inverse = bound(case, tree).inverse_and_log_det(y)
        gradient = pull((jnp.ones_like(y), jnp.ones_like(log_det)))
        forth = forward(tree, back)[0]
        seen = dict(y=y, log_det=log_det, back=back, inverse=inverse, forth=forth)
        return seen | dict(jacobian=jacobian, gradient=gradient)

    with jax.enable_x64(dtype == np.float64):
        x = inside(case.kind, 1.5 * normals(11, 3, case.features))
        return x, jax.tree.map(
            np.asarray, jax.jit(jax.vmap(facts, (0, None), axis_size=len(SCALES)))(stacked, x)
        )


@each_bijector
def test_bijectors_are_finite_with_large_weights(case, dtype):
    for name, value in bijector_facts(case, dtype)[1].items():
        assert finite(value), name


@each_bijector
def test_bijectors_log_determinants_are_those_of_their_jacobians(case, dtype):
    _, at = bijector_facts(case, dtype)
    jacobian = at["jacobian"].astype(float)
    tolerance = np.finfo(dtype).eps * np.linalg.cond(jacobian)
    known = tolerance < 1e-3
    expected = np.linalg.slogdet(jacobian)[1]
    assert known[0].all() or dtype == np.float32
    size = 1 + np.abs(expected)
    assert (np.abs(at["log_det"] - expected) <= (50 * np.finfo(dtype).eps + 10 * tolerance) * size)[
        known
    ].all()


@each_bijector
def test_bijectors_round_trips(case, dtype):
    """But for rounding of the middle values, which grows by the inverse Jacobian.

    Where a mixture has next to no mass it is flat, and any number that gives the same result is as good.
    """
    x, at = bijector_facts(case, dtype)
    jacobian, y, eps = at["jacobian"].astype(float), at["y"].astype(float), np.finfo(dtype).eps
    regular = np.isfinite(np.linalg.slogdet(jacobian)[1])  # the others underflow
    jacobian[~regular] = np.eye(case.features)
    grown = np.abs(np.linalg.inv(jacobian)) @ (1 + np.abs(y)[..., None])
    size = 1 + np.abs(x) + grown[..., 0]
    known = regular & (eps * size.max(-1) < 1e-3)
    error = np.abs(apart(case.kind, at["back"], x)) / size
    same = np.abs(apart(case.kind, at["forth"], y)) / (1 + np.abs(y))
    assert ((error < 100 * eps) | (same < 100 * eps))[known].all()


# Off the support ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Out-of-support")
@pytest.mark.parametrize(
    "support",
    [dist.constraints.positive, dist.constraints.interval(-1.0, 2.0), dist.constraints.greater_than(3.0)],
    ids=["positive", "interval", "greater_than"],
)
def test_gradients_off_the_support_are_finite(support):
    flow = nm.maf(0, 2, transforms=1, hidden=(4,)).onto(support)
    off = np.array([[-9.0, 0.5], [-9.0, -9.0], [1e30, -1e30]], np.float32)

    @jax.jit
    def both(flow, x):
        value, pull = jax.vjp(lambda flow, x: flow().log_prob(x), flow, x)
        return value, pull(jnp.ones(3))

    value, gradient = both(flow, off)
    assert (np.asarray(value) == -np.inf).all() and finite(gradient)
