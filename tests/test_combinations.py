"""What a builder accepts is a density on its declared support: pairs of parts are integrated."""

import jax
import numpy as np
import numpyro.distributions as dist
import pytest
from combinations import combinations, facts, fitting, pairwise, sorted_out
from numpyro.distributions import constraints
from numpyro.distributions.transforms import AffineTransform

import numpyro_maf as nm
from numpyro_maf.flows.domains import fits

# Neural spline flows are those of maf and realnvp with another default; the script integrates them too.
PAIRS = pairwise([c for c in combinations() if fitting(c) and not c.builder.startswith("nsf")])
key = jax.random.key(0)


@pytest.mark.parametrize("combination", PAIRS, ids=lambda c: "-".join(str(p) for _, p in c.parts))
def test_accepted_pairs_are_densities_on_their_support(combination):
    mass, inside, distance = facts(combination)
    np.testing.assert_allclose(mass, 1, atol=5e-3)
    assert inside == 1
    assert distance < 0.05  # of 2000 draws: the Kolmogorov-Smirnov test at p = 1e-4


def test_builders_accept_what_fits_and_name_what_does_not():
    """One in eleven; all of them are sorted out by ``python tests/combinations.py``."""
    some = combinations()[::11]
    accepted, refused = sorted_out(some)
    assert accepted == [c for c in some if fitting(c)]
    for combination, message in refused.items():
        named = ("base", "mixing", "scalar", "logit", "onto")
        assert any(word in message for word in named), f"{combination}: {message}"


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: nm.nis(key, 2, mixing="linear"), "mixing='linear' takes numbers off the unit interval"),
        (lambda: nm.circular(key, 2, mixing="linear"), "mixing='linear' takes numbers off the circle"),
        (lambda: nm.nis(key, 2, base=dist.Normal(0, 1).expand([2]).to_event(1)), "base must live on"),
        (lambda: nm.maf(key, 2, scalar=nm.PiecewiseQuadratic(), logit=0.05), "logit takes the reals"),
        (lambda: nm.glow(key, 2, scalar=nm.PiecewiseQuadratic()), "scalar must be a map of the reals"),
        (lambda: nm.maf(key, 2, base=dist.Poisson(2.0).expand([2]).to_event(1)), "must be continuous"),
        (lambda: nm.maf(key, 2, base=dist.Dirichlet(np.ones(2))), "each number by itself"),
        (lambda: nm.maf(key, 2).onto(constraints.boolean), "single real numbers"),
        (lambda: nm.nis(key, 2).onto(constraints.positive), "onto takes a flow of real vectors"),
        (
            lambda: nm.Chain((nm.Permute((1, 0)), nm.Logit())),
            r"Permute 0 lives on the reals, Logit 1 maps from \[0, 1\]",
        ),
        (
            lambda: nm.FlowDistribution(dist.Normal(0, 1).expand([2]).to_event(1), nm.Logit()),
            r"the base lives on the reals, Logit maps from \[0, 1\]",
        ),
        (lambda: nm.Chain(()), "one bijector or more"),
    ],
)
def test_what_leaves_its_domain_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_supports_are_what_is_reached_where_a_domain_is_not_filled():
    """By hand: a box inside the reals, moved and stretched, is still a density, on the box it reaches."""
    inner = dist.Normal(0, 1).expand([1]).to_event(1)
    d = nm.FlowDistribution(inner, [nm.Inverse(nm.Logit()), nm.Standardize(np.array([1.0]), np.array([2.0]))])
    np.testing.assert_array_equal(
        d.support(np.array([[0.9], [1.1], [2.9], [3.1]])), [False, True, True, False]
    )
    y = np.linspace(0.5, 3.5, 3001, dtype=np.float32)[:, None]
    density = np.exp(np.asarray(jax.jit(d.log_prob)(y), float))
    np.testing.assert_allclose(density.sum() * 1e-3, 1, atol=1e-3)
    assert (density[(y < 1)[:, 0] | (y > 3)[:, 0]] == 0).all()
    gradient = jax.jit(jax.grad(lambda y: d.log_prob(y).sum()))(y)
    assert np.isfinite(gradient).all()


def test_reshape_has_numpyros_shapes():
    r, own = nm.Reshape((2, 3, 1)), dist.transforms.ReshapeTransform((2, 3, 1), (6,))
    for shape in [(6,), (4, 6)]:
        assert r.forward_shape(shape) == own.forward_shape(shape)
        assert r.inv.forward_shape(own.forward_shape(shape)) == shape
        assert r.inv.inverse_shape(shape) == own.forward_shape(shape)
    chain = nm.Chain((nm.ActNorm.init(6), r))
    assert chain.forward_shape((4, 6)) == (4, 2, 3, 1) and chain.inv.forward_shape((4, 2, 3, 1)) == (4, 6)
    d = nm.FlowDistribution(dist.Normal(0, 1).expand([6]).to_event(1), chain)
    back = nm.FlowDistribution(dist.Normal(np.zeros((2, 3, 1)), 1.0).to_event(3), chain.inv)
    assert (d.event_shape, back.event_shape) == ((2, 3, 1), (6,))
    y = d.sample(key, (4,))
    assert y.shape == (4, 2, 3, 1) and d.log_prob(y).shape == (4,)
    assert back.log_prob(back.sample(key, (4,))).shape == (4,)


def test_inverses_are_kept():
    for b in (nm.Permute((1, 0)), nm.Reshape((2, 1)), nm.Chain((nm.Permute((1, 0)), nm.ActNorm.init(2)))):
        assert b.inv is b.inv and b.inv.inv is b


@pytest.mark.parametrize(
    "support, domain, expected",
    [
        (constraints.unit_interval, constraints.real, True),
        (constraints.real, constraints.unit_interval, False),
        (constraints.real_vector, constraints.independent(constraints.real, 1), True),
        (constraints.circular, constraints.interval(-np.pi, np.pi), True),
        (constraints.interval(0.2, 0.4), constraints.unit_interval, True),
        (constraints.positive, constraints.greater_than(1.0), False),
        (constraints.greater_than(2.0), constraints.positive, True),
        (constraints.simplex, constraints.real_vector, False),
        (constraints.ordered_vector, constraints.real_vector, True),
        (constraints.boolean, constraints.real, False),
    ],
)
def test_fits(support, domain, expected):
    assert fits(support, domain) is expected


def test_elementwise_transforms_of_numpyro_meet():
    d = nm.FlowDistribution(dist.Normal(0, 1).expand([2]).to_event(1), [AffineTransform(1.0, 2.0)])
    expected = dist.Normal(1.0, 2.0).log_prob(np.array([0.3, 0.4])).sum()
    np.testing.assert_allclose(d.log_prob(np.array([0.3, 0.4])), expected, rtol=1e-6)
