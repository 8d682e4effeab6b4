"""Completion against closed forms and tables: what the unseen numbers are, given the seen ones."""

from functools import lru_cache, partial
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from conftest import BIJECTORS, FLOWS, bound, inside, parametrize, shaken

import numpyro_maf as nm
from numpyro_maf.flows.conditionals import Mixture, Normal

FACTOR = np.array([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [-0.5, 0.9, 0.7]])
LOC = np.array([1.0, -2.0, 0.5])
COVARIANCE = FACTOR @ FACTOR.T


def gaussian():
    """A flow whose density is normal with that mean and covariance, by weights set by hand."""
    inverse = np.linalg.inv(FACTOR)  # L U y = x, and the inverse of a lower triangle is one
    diagonal = np.diagonal(inverse)
    lower = np.tril(inverse / diagonal, -1)
    linear = nm.LULinear(jnp.array(lower), 5.0 * jnp.diag(jnp.arctanh(jnp.log(diagonal) / 5.0)))
    base = dist.Normal(0.0, 1.0).expand([3]).to_event(1)
    return nm.FlowDistribution(base, [linear, nm.Standardize(jnp.array(LOC), jnp.ones(3))])


def conditional(x, seen):
    """Mean and covariance of the unseen numbers of a normal event."""
    a, b = ~seen, seen
    gain = COVARIANCE[np.ix_(a, b)] @ np.linalg.inv(COVARIANCE[np.ix_(b, b)])
    return LOC[a] + gain @ (x[b] - LOC[b]), COVARIANCE[np.ix_(a, a)] - gain @ COVARIANCE[np.ix_(b, a)]


def assert_moments(draws, mean, covariance, effective):
    """Within five standard errors, for so many independent draws."""
    sd = np.sqrt(np.diagonal(covariance))
    np.testing.assert_allclose((draws.mean(0) - mean) / sd, 0, atol=5 / np.sqrt(effective))
    np.testing.assert_allclose(np.cov(draws.T) / np.outer(sd, sd), covariance / np.outer(sd, sd),
                               atol=5 * np.sqrt(2 / effective))  # fmt: skip


def test_the_flow_made_by_hand_is_normal():
    x = jax.random.normal(jax.random.key(0), (20, 3)) * 2
    truth = dist.MultivariateNormal(LOC, covariance_matrix=COVARIANCE)
    np.testing.assert_allclose(gaussian().log_prob(x), truth.log_prob(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seen", [[True, False, False], [False, True, False], [True, False, True]])
def test_nuts_draws_the_conditional_of_a_normal(seen):
    seen, x = np.array(seen), np.array([2.0, 0.3, -1.0])
    given = np.where(seen, x, np.nan)
    draws = nm.complete(jax.random.key(1), gaussian(), given, seen, 4000, method="nuts", progress=False)
    assert draws.shape == (4000, 3)
    np.testing.assert_array_equal(
        draws[:, seen], np.broadcast_to(x[seen].astype(np.float32), (4000, seen.sum()))
    )
    assert_moments(np.asarray(draws, float)[:, ~seen], *conditional(x, seen), effective=600)


@lru_cache
def trained_shape(name):
    """A case of one layer, so that one order decides, far from the identity."""
    made = {
        "maf": partial(nm.maf, order=(2, 0, 1), transforms=1, hidden=(8,)),
        "iaf": partial(nm.iaf, order=(2, 0, 1), transforms=1, hidden=(8,)),
        "nsf": partial(nm.nsf, order=(2, 0, 1), transforms=1, hidden=(8,)),
        "made": partial(nm.made, order=(2, 0, 1), columns=(Normal(), Mixture(2), Normal()), hidden=(8,)),
        "maf-heavy": partial(
            nm.maf,
            order=(2, 0, 1),
            transforms=1,
            hidden=(8,),
            base=dist.StudentT(9.0).expand([3]).to_event(1),
        ),
    }[name]
    return shaken(made(jax.random.key(0), 3), 1, 0.5)()


@pytest.mark.parametrize("name", ["maf", "iaf", "nsf", "made", "maf-heavy"])
def test_ancestral_draws_follow_the_density(name):
    """Given the first two in the order, against the density of the third on a grid."""
    d, x, seen = trained_shape(name), np.array([0.4, np.nan, -0.3]), np.array([True, False, True])
    draws = np.asarray(nm.complete(jax.random.key(2), d, x, seen, 20000, method="ancestral"), float)
    np.testing.assert_array_equal(draws[:, seen], np.broadcast_to(np.float32(x[seen]), (20000, 2)))
    grid = np.sinh(np.linspace(-6, 6, 4001))
    rows = np.stack([np.full_like(grid, x[0]), grid, np.full_like(grid, x[2])], -1)
    density = np.exp(np.asarray(d.log_prob(rows), float))
    mass = density * np.gradient(grid)
    cdf = np.interp(np.sort(draws[:, 1]), grid, np.cumsum(mass) / mass.sum())
    assert abs(cdf - (np.arange(20000) + 0.5) / 20000).max() < 2.0 / np.sqrt(20000)  # Kolmogorov


def test_auto_takes_the_order_where_it_allows():
    d, x = trained_shape("maf"), jnp.array([0.4, jnp.nan, -0.3])
    key = jax.random.key(0)
    allowed = np.array([True, False, True])
    np.testing.assert_array_equal(
        nm.complete(key, d, x, allowed, 50), nm.complete(key, d, x, allowed, 50, method="ancestral")
    )
    with pytest.raises(ValueError, match="first in the order"):
        nm.complete(key, d, x, ~allowed, 50, method="ancestral")
    two_orders = shaken(nm.maf(key, 3, transforms=2, hidden=(4,)), 1)()
    with pytest.raises(ValueError, match="first in the order"):
        nm.complete(key, two_orders, x, allowed, 50, method="ancestral")


def test_nothing_seen_is_a_draw_and_all_seen_is_the_event():
    d, x = trained_shape("nsf"), jnp.array([0.4, 0.1, -0.3])
    np.testing.assert_array_equal(nm.complete(jax.random.key(0), d, x, True, 5), jnp.tile(x, (5, 1)))
    free = nm.complete(jax.random.key(0), d, x, False, 4000)
    drawn = d.sample(jax.random.key(1), (4000,))
    np.testing.assert_allclose(free.mean(0), drawn.mean(0), atol=0.15 * float(drawn.std()))


def test_images_and_boxes_are_completed_in_their_own_shape():
    flow = shaken(
        nm.realnvp(jax.random.key(0), (2, 2, 1), hidden=(4,), transforms=1, levels=1, logit=0.05), 1, 0.1
    )
    x = np.full((2, 2, 1), 0.3, np.float32)
    seen = np.array([[True, True], [False, False]])[..., None]
    draws = nm.complete(jax.random.key(0), flow(), x, seen, 40, num_warmup=50, num_chains=2, progress=False)
    assert draws.shape == (40, 2, 2, 1) and flow().support(draws).all()
    assert (draws[:, 0] == x[0]).all() and len(np.unique(draws[:, 1])) > 20


def test_discrete_columns_out_of_order_are_refused():
    d = nm.made(jax.random.key(0), 2, columns=nm.conditionals.Bernoulli(), hidden=(4,))()
    with pytest.raises(ValueError, match="NUTS cannot draw discrete"):
        nm.complete(jax.random.key(0), d, jnp.array([0, 1]), [False, True], 5)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=jnp.zeros(2)), "one event of shape"),
        (dict(x=jnp.zeros((4, 3))), "one event of shape"),
        (dict(method="exact"), "'auto', 'ancestral' or 'nuts'"),
        (dict(d=FLOWS["maf-context"]()(jnp.zeros((3, 2)))), "one distribution"),
    ],
)
def test_arguments_are_checked(change, message):
    given = dict(key=jax.random.key(0), d=gaussian(), x=jnp.zeros(3), seen=True) | change
    with pytest.raises(ValueError, match=message):
        nm.complete(**given)


# Which inputs decide ----------------------------------------------------------------------------


@parametrize("case", BIJECTORS, lambda case: case.features <= 4)
def test_inputs_of_agrees_with_the_jacobian(case):
    """What it says is decided by some outputs alone does not move with the others."""
    bijector, n = bound(case, case()), case.features
    at = inside(case.kind, jax.random.normal(jax.random.key(0), (5, n)))
    domain_kind = "real" if case.kind == "real" else case.kind
    y = bijector(at) if domain_kind == case.kind else at
    jacobian = np.asarray(jax.jit(jax.vmap(jax.jacfwd(bijector._inverse)))(y))
    moves = (jacobian != 0).any(0)  # inputs by outputs
    for count in range(n + 1):
        for known in map(frozenset, combinations(range(n), count)):
            inputs = bijector.inputs_of(known)
            if inputs is not None:
                assert len(inputs) == count
                others = sorted(set(range(n)) - known)
                assert not moves[np.ix_(sorted(inputs), others)].any(), (known, inputs)
            elif case.order is not None:
                assert known != set(case.order[:count])


# Amortised ---------------------------------------------------------------------------------------


def test_a_completer_learns_every_conditional_of_a_normal():
    truth = dist.MultivariateNormal(LOC, covariance_matrix=COVARIANCE)
    rows = np.asarray(truth.sample(jax.random.key(0), (6000,)))
    flow = nm.maf(jax.random.key(1), 3, context=6, transforms=2)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, 150 * 22))
    options = dict(max_epochs=150, patience=150, optimizer=optimizer, progress=False)
    completer, result = nm.fit_completer(0, flow, rows, **options)
    assert len(result.train_loss) == 150
    x = np.array([[2.0, -0.5, 0.3], [0.0, -2.5, 1.0]])
    for seen in ([True, False, False], [False, True, True], [False, False, False], [False, False, True]):
        seen = np.array(seen)
        draws = np.asarray(completer.sample(jax.random.key(2), x, seen, (4000,)), float)
        assert draws.shape == (4000, 2, 3)
        np.testing.assert_array_equal(
            draws[..., seen], np.broadcast_to(np.float32(x[:, seen]), draws[..., seen].shape)
        )
        for i in range(2):
            mean, covariance = conditional(x[i], seen) if seen.any() else (LOC, COVARIANCE)
            drawn, sd = draws[:, i, ~seen], np.sqrt(np.diagonal(covariance))
            np.testing.assert_allclose((drawn.mean(0) - mean) / sd, 0, atol=0.15)
            np.testing.assert_allclose(drawn.std(0) / sd, 1, atol=0.15)


def test_completers_need_a_context_for_numbers_and_mask():
    with pytest.raises(ValueError, match="context 4"):
        nm.fit_completer(0, nm.maf(jax.random.key(0), 2, context=2), np.zeros((10, 2)))
