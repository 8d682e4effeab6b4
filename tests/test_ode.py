"""FFJORD: round trip, the trace, its estimate, both adjoints, NumPyro's paths."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from conftest import normals, shaken

import numpyro_maf as nm

TIGHT = dict(rtol=1e-8, atol=1e-8)


@lru_cache(None)
def bijector(context=0, **options):
    """In double precision, where the laws are tested."""
    with jax.enable_x64(True):
        made = nm.FFJORD.init(jax.random.key(0), 3, context=context, hidden=(6,), **{**TIGHT, **options})
        return shaken(made, 1, 0.5)


X = normals(2, 4, 3).astype(float)


@lru_cache(None)
def facts(context):
    """The solution there and back, and what it pulls back: units, for the Jacobian, and its own double."""
    c = np.array([[0.3, -0.5]]) if context else None

    @jax.jit
    def run(b, x):
        def forward(b, x):
            return (b.bind(c) if context else b).forward_and_log_det(x)

        (y, log_det), pull = jax.vjp(forward, b, x)
        units = jnp.broadcast_to(jnp.eye(3)[:, None], (3, *x.shape))
        pulled = (
            jnp.concatenate([units, 2 * y[None]]),
            jnp.concatenate([jnp.zeros((3, 4)), 2 * log_det[None]]),
        )
        by_weights, by_x = jax.vmap(pull)(pulled)
        back = (b.bind(c) if context else b).inverse_and_log_det(y)
        jacobian = jnp.moveaxis(by_x[:3], 0, 1)
        return y, log_det, *back, jacobian, jax.tree.map(lambda a: a[3], by_weights)

    return jax.tree.map(np.asarray, run(bijector(context), X))


@pytest.mark.parametrize("context", [0, 2])
def test_round_trip_and_log_det_of_the_jacobian(context, x64):
    y, log_det, back, inverse_log_det, jacobian, _ = facts(context)
    assert abs(y - X).max() > 0.1
    np.testing.assert_allclose(back, X, atol=1e-6)
    np.testing.assert_allclose(log_det, -inverse_log_det, atol=1e-6)
    np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobian)[1], atol=1e-6)


def test_the_estimate_of_the_trace_is_unbiased(x64):
    x = normals(2, 1, 3)

    @jax.jit
    def run(exact, rough, keys):
        draws = jax.vmap(lambda key: rough.randomized(key).forward_and_log_det(x)[1][0])(keys)
        fixed = rough.forward_and_log_det(x)[1]  # without a new key
        return exact.forward_and_log_det(x)[1][0], draws, fixed

    options = dict(rtol=1e-4, atol=1e-4)
    parts = bijector(**options), bijector(trace="hutchinson", **options)
    keys = jax.random.split(jax.random.key(3), 400)
    exact, draws, fixed = map(np.asarray, run(*parts, keys))
    error = draws.std() / 20
    assert 0 < error < 0.1 and abs(draws.mean() - exact) < 4 * error
    assert fixed == run(*parts, keys[::-1])[2]


def test_both_adjoints_agree(x64):
    """On the gradient of the sum of squares of events and log-determinants."""

    @jax.jit
    def gradient(b):
        return jax.grad(lambda b: sum(jnp.sum(a**2) for a in b.forward_and_log_det(X)))(b)

    one, other = facts(0)[-1], gradient(bijector(adjoint="backsolve"))
    assert bijector().adjoint == "recursive"
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (np.asarray(a) != 0).any()
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_every_event_is_within_tolerance(x64):
    """A calm event far from a stormy one gets the same answer as alone."""
    loose = shaken(bijector(rtol=1e-4, atol=1e-4), 1, 0.9)
    x = np.concatenate([normals(2, 20, 3), np.full((1, 3), 3.0)])
    run = jax.jit(lambda b, x: b(x))
    np.testing.assert_allclose(run(loose, x), np.stack([run(loose, row) for row in x]), atol=5e-3)


def test_the_flow_is_a_numpyro_distribution():
    flow = nm.ffjord(jax.random.key(0), 2, context=1, hidden=(6,))
    flow = nm.from_spec(flow.spec, jax.random.key(1))
    d = flow(jnp.ones((5, 1)))
    assert isinstance(d, dist.TransformedDistribution) and d.batch_shape == (5,)

    @jax.jit
    def run(d, key):
        y, intermediates = d.sample_with_intermediates(key, (4,))
        return d.log_prob(y, intermediates), d.log_prob(y), d.log_prob(jnp.full((1, 2), 1e4))

    by_intermediates, log_prob, far = run(d, jax.random.key(2))
    np.testing.assert_allclose(by_intermediates, log_prob, atol=1e-3)
    assert np.isfinite(far).all()
    assert flow.spec["trace"] is None and flow.bijectors[0].trace == "exact"
    assert nm.ffjord(jax.random.key(0), 11).bijectors[0].trace == "hutchinson"


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(trace="guess"), "trace must be one of .* got 'guess'"),
        (dict(adjoint="none"), "adjoint must be one of .* got 'none'"),
        (dict(rtol=0.0), "rtol and atol must be positive"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        nm.ffjord(jax.random.key(0), 2, **options)


def test_a_row_that_is_no_number_stops_no_other():
    d = nm.ffjord(jax.random.key(0), 2, hidden=(8,))()
    x = np.array([[np.nan, 0.0], [0.3, -0.2], [np.inf, 0.0]], np.float32)
    run = jax.jit(d.log_prob)
    found, alone = np.asarray(run(x)), np.asarray(run(x[[1, 1, 1]]))
    assert not np.isfinite(found[[0, 2]]).any()
    np.testing.assert_allclose(found[1], alone[1], rtol=1e-5)


def test_direct_solutions_have_derivatives_in_forward_mode():
    d = nm.ffjord(jax.random.key(0), 2, hidden=(8,), adjoint="direct")()
    x = jnp.array([0.3, -0.2])
    forward, reverse = jax.jit(lambda x: (jax.jacfwd(d.log_prob)(x), jax.grad(d.log_prob)(x)))(x)
    np.testing.assert_allclose(forward, reverse, rtol=1e-3, atol=1e-4)
