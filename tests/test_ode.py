"""FFJORD: round trip, the trace, its estimate, both adjoints, NumPyro's paths."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from conftest import shaken

import numpyro_maf as nm

TIGHT = dict(rtol=1e-8, atol=1e-8)


@lru_cache
def bijector(context=0, **options):
    made = nm.FFJORD.init(jax.random.key(0), 3, context=context, hidden=(6,), **TIGHT, **options)
    return shaken(made, 1, 0.5)


@pytest.mark.parametrize("context", [0, 2])
def test_round_trip_and_log_det_of_the_jacobian(context, x64):
    b = bijector(context)
    b = b.bind(jnp.array([[0.3, -0.5]])) if context else b
    x = jax.random.normal(jax.random.key(2), (4, 3))

    @jax.jit
    def run(b, x):
        y, log_det = b.forward_and_log_det(x)
        jacobian = jax.vmap(jax.jacrev(lambda x: b(x[None])[0]))(x)
        return y, log_det, *b.inverse_and_log_det(y), jacobian

    y, log_det, back, inverse_log_det, jacobian = run(b, x)
    assert abs(y - x).max() > 0.1
    np.testing.assert_allclose(back, x, atol=1e-6)
    np.testing.assert_allclose(log_det, -inverse_log_det, atol=1e-6)
    np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobian)[1], atol=1e-6)


def test_the_estimate_of_the_trace_is_unbiased(x64):
    x = jax.random.normal(jax.random.key(2), (1, 3))
    exact = bijector().forward_and_log_det(x)[1]
    rough = bijector(trace="hutchinson")
    keys = jax.random.split(jax.random.key(3), 400)
    draws = jax.jit(jax.vmap(lambda key: rough.randomized(key).forward_and_log_det(x)[1][0]))(keys)
    error = draws.std() / 20
    assert 0 < error < 0.1 and abs(draws.mean() - exact[0]) < 4 * error
    # Without a new key the probe is fixed.
    assert rough.forward_and_log_det(x)[1] == rough.forward_and_log_det(x)[1]


def test_both_adjoints_agree(x64):
    x = jax.random.normal(jax.random.key(2), (4, 3))

    def loss(b):
        y, log_det = b.forward_and_log_det(x)
        return jnp.sum(y**2) + log_det.sum()

    one, other = (jax.jit(jax.grad(loss))(bijector(adjoint=a)) for a in ("recursive", "backsolve"))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (a != 0).any()
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_every_event_is_within_tolerance(x64):
    """A calm event far from a stormy one gets the same answer as alone."""
    loose = shaken(nm.FFJORD.init(jax.random.key(0), 3, hidden=(6,), rtol=1e-4, atol=1e-4), 1, 1.0)
    x = jnp.concatenate([jax.random.normal(jax.random.key(2), (20, 3)), jnp.full((1, 3), 3.0)])
    together = loose(x)
    alone = jnp.stack([loose(row) for row in x])
    np.testing.assert_allclose(together, alone, atol=5e-3)


def test_the_flow_is_a_numpyro_distribution():
    flow = nm.ffjord(jax.random.key(0), 2, context=1, hidden=(6,))
    flow = nm.from_spec(flow.spec, jax.random.key(1))
    d = flow(jnp.ones((5, 1)))
    assert isinstance(d, dist.TransformedDistribution) and d.batch_shape == (5,)
    y, intermediates = d.sample_with_intermediates(jax.random.key(2), (4,))
    np.testing.assert_allclose(d.log_prob(y, intermediates), d.log_prob(y), atol=1e-3)
    assert np.isfinite(d.log_prob(jnp.full((1, 2), 1e4))).all()
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
