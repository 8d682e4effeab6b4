"""Completion against closed forms and tables: what the unseen numbers are, given the seen ones."""

from functools import lru_cache, partial
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from conftest import BIJECTORS, FLOWS, parametrize, shaken
from numpyro.distributions.transforms import LowerCholeskyAffine
from test_bijectors import facts

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
    found = jax.jit(lambda x: gaussian().log_prob(x))(x)
    np.testing.assert_allclose(found, truth.log_prob(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["flow", "guide", "numpyro"])
def test_nuts_draws_the_conditional_of_a_normal(kind):
    """Of a flow, of what a guide gives, whose Gaussian mixes the numbers, and of NumPyro's own."""
    standard = dist.Normal(0.0, 1.0).expand([3]).to_event(1)
    d, seen = {
        "flow": (gaussian(), [False, True, False]),
        "guide": (nm.FlowDistribution(standard, [LowerCholeskyAffine(LOC, FACTOR)]), [False, True, True]),
        "numpyro": (dist.MultivariateNormal(LOC, scale_tril=FACTOR), [True, False, True]),
    }[kind]
    seen, x = np.array(seen), np.array([2.0, 0.3, -1.0])
    given = np.where(seen, x, np.nan)
    draws = nm.complete(1, d, given, seen, 4000, progress=False)
    assert draws.shape == (4000, 3)
    np.testing.assert_array_equal(
        draws[:, seen], np.broadcast_to(x[seen].astype(np.float32), (4000, seen.sum()))
    )
    assert_moments(np.asarray(draws, float)[:, ~seen], *conditional(x, seen), effective=600)


def test_images_are_completed_in_their_own_shape_and_box():
    """The logits of the pixels are normal: the box and the shape change nothing else."""
    base = dist.Normal(0.0, 1.0).expand([4]).to_event(1)
    factor = np.eye(4)
    factor[1:, 1:] = FACTOR
    loc, outer = np.array([0.0, *LOC]), [nm.Inverse(nm.Logit(0.05)), nm.Reshape((2, 2, 1), "box", 0.05)]
    d = nm.FlowDistribution(base, [LowerCholeskyAffine(loc, factor), *outer])
    logit = np.array([0.0, 2.0, 0.3, -1.0])
    x = (1 / (1 + np.exp(-logit)) - 0.05) / 0.9
    seen = np.array([[True, True], [False, False]])[..., None]
    draws = nm.complete(0, d, x.reshape(2, 2, 1), seen, 4000, progress=False)
    assert draws.shape == (4000, 2, 2, 1) and d.support(draws).all()
    assert (draws[:, 0] == x[:2].astype(np.float32).reshape(2, 1)).all()
    unseen = 0.05 + 0.9 * np.asarray(draws, float)[:, 1, :, 0]
    found = np.log(unseen) - np.log1p(-unseen)
    assert_moments(found, *conditional(logit[1:], np.array([True, False, False])), effective=600)


@lru_cache
def ordered(name):
    """A case of one layer, so that one order decides, far from the identity."""
    options = dict(order=(2, 0, 1), hidden=(8,))
    heavy = dist.StudentT(9.0).expand([3]).to_event(1)
    made = {
        "maf": partial(nm.maf, transforms=1),
        "iaf": partial(nm.iaf, transforms=1),
        "nsf": partial(nm.nsf, transforms=1),
        "made": partial(nm.made, columns=(Normal(), Mixture(2), Normal())),
        "maf-heavy": partial(nm.maf, transforms=1, base=heavy),
    }[name]
    return shaken(made(jax.random.key(0), 3, **options), 1, 0.5)()


X, FIRST = np.array([0.4, np.nan, -0.3], np.float32), np.array([True, False, True])


@lru_cache
def drawn(name, **options):
    return np.asarray(nm.complete(2, ordered(name), X, FIRST, 20000, **options))


@pytest.mark.parametrize("name", ["maf", "iaf", "nsf", "made", "maf-heavy"])
def test_ancestral_draws_follow_the_density(name):
    """Given the first two in the order, against the density of the third on a grid."""
    draws = drawn(name, method="ancestral")
    np.testing.assert_array_equal(draws[:, FIRST], np.broadcast_to(X[FIRST], (20000, 2)))
    grid = np.sinh(np.linspace(-6, 6, 4001))
    rows = np.stack([np.full_like(grid, X[0]), grid, np.full_like(grid, X[2])], -1)
    density = np.exp(np.asarray(jax.jit(type(ordered(name)).log_prob)(ordered(name), rows), float))
    mass = density * np.gradient(grid)
    cdf = np.interp(np.sort(draws[:, 1].astype(float)), grid, np.cumsum(mass) / mass.sum())
    assert abs(cdf - (np.arange(20000) + 0.5) / 20000).max() < 2.0 / np.sqrt(20000)  # Kolmogorov


def test_auto_takes_the_order_where_it_allows():
    np.testing.assert_array_equal(drawn("maf"), drawn("maf", method="ancestral"))
    with pytest.raises(ValueError, match="first in the order"):
        nm.complete(0, ordered("maf"), np.nan_to_num(X), ~FIRST, 50, method="ancestral")
    two_orders = nm.maf(jax.random.key(0), 3, transforms=2, hidden=(4,))()
    with pytest.raises(ValueError, match="first in the order"):
        nm.complete(0, two_orders, X, FIRST, 50, method="ancestral")


def test_nothing_seen_is_a_draw_and_all_seen_is_the_event():
    d, x = ordered("nsf"), jnp.array([0.4, 0.1, -0.3])
    np.testing.assert_array_equal(nm.complete(jax.random.key(0), d, x, True, 5), jnp.tile(x, (5, 1)))
    free = nm.complete(jax.random.key(0), d, x, False, 4000)
    drawn = jax.jit(type(d).sample, static_argnums=2)(d, jax.random.key(1), (4000,))
    np.testing.assert_allclose(free.mean(0), drawn.mean(0), atol=0.15 * float(drawn.std()))


def test_what_nuts_cannot_complete_is_refused():
    d = nm.made(jax.random.key(0), 2, columns=nm.conditionals.Bernoulli(), hidden=(4,))()
    with pytest.raises(ValueError, match="NUTS cannot draw discrete"):
        nm.complete(0, d, jnp.array([0, 1]), [False, True], 5)
    with pytest.raises(ValueError, match="free of each other"):
        nm.complete(0, dist.Dirichlet(jnp.ones(3)), jnp.ones(3) / 3, [True, False, False], 5)


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
    n = case.features
    moves = (facts(case)["inverse_jacobian"].reshape(6, n, n) != 0).any(0)  # inputs by outputs
    for count in range(n + 1):
        for known in map(frozenset, combinations(range(n), count)):
            inputs = case().inputs_of(known)
            if inputs is not None:
                assert len(inputs) == count
                others = sorted(set(range(n)) - known)
                assert not moves[np.ix_(sorted(inputs), others)].any(), (known, inputs)
            elif case.order is not None:
                assert known != set(case.order[:count])


# Amortised ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_completer_learns_every_conditional_of_a_normal():
    truth = dist.MultivariateNormal(LOC, covariance_matrix=COVARIANCE)
    rows = np.asarray(truth.sample(jax.random.key(0), (6000,)))
    flow = nm.maf(jax.random.key(1), 3, context=6, transforms=2)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, 150 * 22))
    options = dict(max_epochs=150, patience=150, optimizer=optimizer, progress=False)
    completer, result = nm.fit_completer(0, flow, rows, **options)
    assert len(result.train_loss) == 150 and "Completer of events of 3 numbers" in repr(completer)
    x = np.array([[2.0, -0.5, 0.3], [0.0, -2.5, 1.0]])
    for seen in ([True, False, False], [False, True, True], [False, False, False], [False, False, True]):
        seen = np.array(seen)
        draws = np.asarray(completer.sample(2, x, seen, 4000), float)
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
