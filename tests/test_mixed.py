"""Likelihoods and posteriors of discrete and mixed numbers, beside exact ones."""

import math
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import wiener
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS

import numpyro_maf as nm
from numpyro_maf.answers.routes import densities_by
from numpyro_maf.flows.conditionals import Bernoulli, Categorical, Count, LogMixture, Mixture
from numpyro_maf.sbi.kinds import kinds_of, of_real_columns, troubles

QUIET = dict(progress=False)
QUICK = dict(max_epochs=2, **QUIET)


# Which conditional a column needs ----------------------------------------------------------------

RNG = np.random.default_rng(0)
N = 1000
FOUND = {
    "real": (RNG.normal(size=N), None),
    "booleans": (RNG.uniform(size=N) < 0.1, "Bernoulli"),
    "zeros and ones": (RNG.integers(0, 2, N), "Bernoulli"),
    "floats": (RNG.integers(0, 2, N) * 1.0, "Bernoulli"),
    "signs": (2 * RNG.integers(0, 2, N) - 1.0, Categorical(3, -1)),
    "choices from 1": (RNG.integers(1, 4, N), Categorical(3, 1)),
    "few": (RNG.integers(0, 5, N), Categorical(5)),
    "differences": (RNG.poisson(5, N) - RNG.poisson(5, N), "Categorical"),
    "counts": (RNG.poisson(3, N), "Count"),
    "small counts": (RNG.poisson(1, 200), "Count"),
    "large counts": (RNG.poisson(200, N), "Count"),
    "zeros and counts": (RNG.poisson(20, N) * RNG.integers(0, 2, N), "Count"),
    "one category": (np.full(N, 2), None),
    "seconds": (1.7e9 + RNG.integers(0, 10**6, N), None),
    "hardly a repetition": (RNG.integers(0, 10**6, N), None),
    "negative, wide": (np.round(RNG.normal(0, 100, N)), None),
}


@pytest.mark.parametrize("name", FOUND)
def test_values_say_what_a_column_is(name):
    values, expected = FOUND[name]
    (kind,) = kinds_of(constraints.real, values[:, None])
    assert (type(kind).__name__ if isinstance(expected, str) else kind) == expected


DECLARED = [
    (constraints.boolean, Bernoulli()),
    (constraints.integer_interval(0, 1), Bernoulli()),
    (constraints.integer_interval(2, 5), Categorical(4, 2)),
    (constraints.integer_interval(0, jnp.array([3, 5])), Categorical(6)),
    (constraints.integer_interval(0, 1000), "Count"),
    (constraints.nonnegative_integer, "Count"),
    (constraints.positive_integer, "Count"),
]


@pytest.mark.parametrize(("support", "expected"), DECLARED)
def test_a_support_decides_whatever_the_values(support, expected):
    (kind,) = kinds_of(support, np.full((N, 1), 2))
    assert (type(kind).__name__ if isinstance(expected, str) else kind) == expected
    if isinstance(kind, Count):
        assert kind.most == (1000 if isinstance(support, constraints.integer_interval) else None)


def test_counts_share_a_scale_and_positive_numbers_their_logarithm():
    x = np.stack([RNG.poisson(3, N), RNG.poisson(900, N), RNG.gamma(1, 3, N), RNG.normal(9, 1, N)], 1)
    first, second, *_ = kinds = kinds_of(constraints.real, x)
    assert first == second and first.loc == 4 and first.scale == 2
    columns = of_real_columns(constraints.real, kinds, x)
    assert columns[2:] == (LogMixture(5, 0.5, 1.0), Mixture(10))
    assert kinds_of(constraints.nonnegative_integer, np.full((N, 1), 2**23)) == (None,)


def test_what_no_density_describes_is_named():
    times = np.minimum(RNG.gamma(2, 1, N), 3.0)
    choice = RNG.integers(0, 2, N)
    late = (times == 3.0).astype(int)
    cases = [
        ([times, choice], "is exactly 3 in .*% of the rows, amid other values: return a flag"),
        ([times, late], None),  # the flag says it
        ([np.round(RNG.gamma(2, 1, N), 3), choice], None),
        ([RNG.integers(0, 3, N) + 0.5, choice], "takes only 3 different values"),
        ([np.round(RNG.normal(0, 50, N)), choice], None),
        (
            [np.where(np.arange(N) < 5, 90, RNG.poisson(5, N) - 5), choice],
            "whole numbers, some of them negative",
        ),
        ([np.where(RNG.uniform(size=N) < 0.3, 0.0, RNG.gamma(2, 1, N)), choice], "is exactly 0 in"),
        ([np.full(N, 0.5), choice], None),
    ]
    for columns, message in cases:
        x = np.stack(columns, 1)
        found = troubles(kinds_of(constraints.real, x), x)
        assert (not found) if message is None else re.search(message, found[0])


# A choice and a time -----------------------------------------------------------------------------


def diffusion(trials, x=None):
    drift = numpyro.sample("drift", dist.Normal(0, 1.5))
    boundary = numpyro.sample("boundary", dist.Uniform(0.6, 2.0))
    with numpyro.plate("trials", trials):
        fn = nm.Simulator(wiener.first_passage, drift, boundary, event_shape=(2,))
        numpyro.sample("x", fn, obs=x)


def exactly(trials, x):
    drift = numpyro.sample("drift", dist.Normal(0, 1.5))
    boundary = numpyro.sample("boundary", dist.Uniform(0.6, 2.0))
    numpyro.factor("x", wiener.log_prob(x, drift, boundary).sum())


def drawn(model, *args, warmup=200, draws=600, **kwargs):
    mcmc = MCMC(NUTS(model), num_warmup=warmup, num_samples=draws, progress_bar=False)
    mcmc.run(jax.random.key(0), *args, **kwargs)
    return {name: np.asarray(value) for name, value in mcmc.get_samples().items()}


@cache
def passages():
    sims = nm.simulate(0, diffusion, 2000, 10, **QUIET)
    return nm.nle(0, diffusion, sims, **QUIET)


def test_first_passages_have_a_density():
    t = np.exp(np.linspace(math.log(0.002), math.log(60), 4000))
    for drift, boundary, start in ((0.0, 1.0, 0.5), (2.0, 1.5, 0.3), (-3.0, 0.7, 0.6)):
        mass = [
            np.trapezoid(np.exp(wiener.log_prob(np.stack([c + 0 * t, t], -1), drift, boundary, start)), t)
            for c in (0.0, 1.0)
        ]
        share = (
            start if drift == 0 else np.expm1(-2 * drift * boundary * start) / np.expm1(-2 * drift * boundary)
        )
        np.testing.assert_allclose(mass, [1 - share, share], atol=1e-3)


def test_choices_and_times_of_a_drift_diffusion():
    likelihood = passages()
    assert [type(c).__name__ for c in likelihood.columns] == ["Bernoulli", "LogMixture"]
    fresh = nm.simulate(1, diffusion, 3000, 1, **QUIET)
    theta, x = jnp.stack([fresh["drift"], fresh["boundary"]], -1), fresh["x"][:, 0]
    gap = jax.jit(lambda f, t, x: f(t).log_prob(x) - wiener.log_prob(x, *t.T))(likelihood, theta, x)
    assert np.abs(gap).mean() < 0.08 and abs(gap.mean()) < 0.02


def test_nuts_over_choices_and_times():
    x = np.asarray(nm.simulate(2, diffusion, 1, 60, **QUIET)["x"])[0]
    found = drawn(nm.learned(diffusion, {"x": passages()}), 60, x=x)
    grid = np.stack(np.meshgrid(np.linspace(-5, 5, 101), np.linspace(0.605, 1.995, 71)), -1).reshape(-1, 2)
    exact = jax.jit(jax.vmap(lambda g: wiener.log_prob(x, *g).sum()))(grid) - grid[:, 0] ** 2 / 4.5
    share = np.exp(np.asarray(exact, float) - exact.max())
    mean = share @ grid / share.sum()
    sd = np.sqrt(share @ (grid - mean) ** 2 / share.sum())
    draws = np.stack([found["drift"], found["boundary"]], 1)
    assert (np.abs(draws.mean(0) - mean) < 0.4 * sd).all()
    np.testing.assert_allclose(draws.std(0), sd, rtol=0.2)


# Counts ------------------------------------------------------------------------------------------


def counted(rows, simulated=True, y=None):
    """Overdispersed counts, whose density is hidden in a simulator; zero is common."""
    log_mean = numpyro.sample("log_mean", dist.Normal(1.5, 1))
    log_size = numpyro.sample("log_size", dist.Normal(1, 0.5))
    known = dist.NegativeBinomial2(jnp.exp(log_mean), jnp.exp(log_size))

    def draw(key, log_mean, log_size):
        return dist.NegativeBinomial2(jnp.exp(log_mean), jnp.exp(log_size)).sample(key)

    with numpyro.plate("rows", rows):
        numpyro.sample("y", nm.Simulator(draw, log_mean, log_size) if simulated else known, obs=y)


@cache
def counts():
    sims = nm.simulate(0, counted, 2000, 8, **QUIET)
    return sims, nm.nle(1, counted, sims, "y", **QUIET)


def test_counts_have_their_probabilities():
    _, likelihood = counts()
    (column,) = likelihood.columns
    assert isinstance(column, Count) and likelihood.support.is_discrete
    fresh = nm.simulate(1, counted, 3000, 1, **QUIET)
    theta, y = jnp.stack([fresh["log_mean"], fresh["log_size"]], -1), fresh["y"]
    exact = dist.NegativeBinomial2(*jnp.exp(theta).T).log_prob(y[:, 0])
    gap = np.asarray(jax.jit(lambda f: f(theta).log_prob(y))(likelihood) - exact)
    assert np.abs(gap).mean() < 0.05 and abs(gap.mean()) < 0.01
    table = np.exp(likelihood(jnp.array([1.0, 1.0])).log_prob(jnp.arange(3000.0)[:, None]))
    np.testing.assert_allclose(table.sum(), 1, atol=1e-3)


def test_nuts_over_counts():
    y = np.asarray(nm.simulate(3, counted, 1, 40, **QUIET)["y"])[0]
    found = drawn(nm.learned(counted, {"y": counts()[1]}), 40, y=y)
    exact = drawn(counted, 40, simulated=False, y=y)
    for name, right in exact.items():
        assert abs(found[name].mean() - right.mean()) < 0.4 * right.std(), name
        np.testing.assert_allclose(found[name].std(), right.std(), rtol=0.25)


def test_poisson_sites_are_learned_as_counts():
    def model(x=None):
        log_rate = numpyro.sample("log_rate", dist.Normal(1.5, 1))
        numpyro.sample("x", dist.Poisson(jnp.exp(log_rate)), obs=x)

    sims, fresh = (nm.simulate(seed, model, 5000, **QUIET) for seed in (0, 1))
    likelihood = nm.nle(0, model, sims, **QUIET)
    learned = jax.jit(lambda f, t, x: f(t).log_prob(x))(
        likelihood, fresh["log_rate"][:, None], fresh["x"][:, None]
    )
    gap = np.asarray(learned - dist.Poisson(jnp.exp(fresh["log_rate"])).log_prob(fresh["x"]))
    assert np.abs(gap).mean() < 0.08 and abs(gap.mean()) < 0.02


# What is said ------------------------------------------------------------------------------------


def test_builders_without_columns_are_warned_about():
    sims, _ = counts()
    with pytest.warns(UserWarning, match=r"'y' is discrete \(column 0 as Count\).*leave out builder="):
        flow = nm.nle(0, counted, sims, "y", builder=partial(nm.maf, transforms=1, hidden=(4,)), **QUICK)
    assert flow.is_real
    flow = nm.nle(0, counted, sims, "y", builder=partial(nm.made, hidden=(4,)), **QUICK)
    assert isinstance(flow.columns[0], Count) and flow.recipe["hidden"] == (4,)
    own = partial(nm.made, columns=Categorical(300), hidden=(4,))
    assert nm.nle(0, counted, sims, "y", builder=own, **QUICK).columns == (Categorical(300),)


def test_a_builder_of_answers_leaves_discrete_columns_to_a_made():
    build = densities_by(partial(nm.maf, transforms=1, hidden=(4,)))
    assert build(0, 2, context=1).is_real
    assert build(0, 1, context=1, columns=(Count(),), order=(0,)).columns == (Count(),)
    assert densities_by(nm.made) is nm.made
    flow = nm.nle(0, counted, counts()[0], "y", builder=build, **QUICK)
    assert isinstance(flow.columns[0], Count)


def test_a_value_amid_others_is_named():
    def draw(key, scale):
        return jnp.minimum(scale * jax.random.exponential(key), 2.0)

    def model(x=None):
        numpyro.sample("x", nm.Simulator(draw, numpyro.sample("scale", dist.LogNormal(0, 0.3))), obs=x)

    sims = nm.simulate(0, model, 500, **QUIET)
    with pytest.warns(UserWarning, match="'x', column 0, is exactly 2 in .* of the rows"):
        nm.nle(0, model, sims, builder=partial(nm.maf, transforms=1, hidden=(4,)), **QUICK)


def kinds(x=None):
    shift = numpyro.sample("shift", dist.Normal(0, 1))
    fn = lambda key, shift: jax.random.categorical(key, jnp.array([0.0, 1.0, 0.5]) * shift) + 1  # noqa: E731
    numpyro.sample("x", nm.Simulator(fn, shift), obs=x)


def test_categories_that_no_simulation_had_are_refused():
    weights = np.ones(400)
    sims = dict(nm.simulate(0, kinds, 400, **QUIET))
    sims["x"] = np.asarray(sims["x"]).copy()
    sims["x"][:3], weights[:3] = 9, 0  # rows that do not count
    flow = nm.nle(0, kinds, sims, weights=weights, **QUICK)
    assert flow.columns == (Categorical(3, 1),)
    ready = nm.learned(kinds, {"x": flow})
    total, _ = numpyro.infer.util.log_density(ready, (2,), {}, {"shift": 0.0})
    assert np.isfinite(total)
    for use in (
        lambda: numpyro.infer.util.log_density(ready, (9,), {}, {"shift": 0.0}),
        lambda: nm.smc(0, kinds, {"x": 9}, {"x": flow}, num_particles=100, **QUIET),
    ):
        with pytest.raises(ValueError, match=r"1 of 1 values of 'x' are none that .*, for one \[9.0\]"):
            use()


def test_rounds_answers_and_ratios_take_discrete_data():
    post = nm.snle(0, kinds, {"x": 2}, rounds=2, simulations=200, num_particles=500, **QUICK)
    assert post.last.likelihoods["x"].columns == (Categorical(3, 1),)
    assert np.isfinite(nm.nre(0, kinds, post.rounds[-1].sims, **QUICK)(np.zeros(1), 2))


def test_particles_that_leave_the_prior_are_told():
    def model(x=None):
        numpyro.sample("x", dist.Normal(numpyro.sample("m", dist.Normal(0, 1)), 0.1), obs=x)

    options = dict(num_particles=500, moves=3, last_moves=3, **QUIET)
    with pytest.warns(UserWarning, match="particles are where the prior draws nothing, .* nats beyond"):
        post = nm.smc(0, model, {"x": 20.0}, **options)
    assert post.is_lost and post.beyond > 100
    assert not nm.smc(0, model, {"x": 2.0}, **options).is_lost


# Latent counts -----------------------------------------------------------------------------------


def hidden(x=None):
    n = numpyro.sample("n", dist.Poisson(4))
    m = numpyro.sample("m", dist.Normal(0, 1))
    numpyro.sample("x", dist.Normal(n + m, 0.5), obs=x)


def test_latent_counts_have_a_posterior(tmp_path):
    sims = nm.simulate(0, hidden, 3000, **QUIET)
    posterior = nm.npe(0, hidden, sims, builder=partial(nm.made, hidden=(32,)), max_epochs=40, **QUIET)
    assert [type(c).__name__ for c in posterior.flows.flows.columns] == ["Count", "Mixture"]
    post = posterior({"x": 5.3})
    draws = post.sample(1, 4000)
    n = np.arange(30)
    known = np.exp(dist.Poisson(4).log_prob(n) + dist.Normal(n, 1.25**0.5).log_prob(5.3))
    known /= known.sum()
    assert jnp.issubdtype(draws["n"].dtype, jnp.integer) and draws["n"].min() >= 0
    shares = np.bincount(np.asarray(draws["n"]), minlength=30)[:30] / 4000
    assert np.abs(shares - known).max() < 0.07
    assert np.isneginf(post.log_prob({"n": -1, "m": 0.0})) and np.isfinite(post.log_prob({"n": 90, "m": 0.0}))
    nm.save(tmp_path / "posterior", posterior)
    again = nm.load(tmp_path / "posterior").with_model(hidden)({"x": 5.3})
    assert again.log_prob({"n": 3, "m": 0.5}) == post.log_prob({"n": 3, "m": 0.5})
    assert post.importance(0, 1000).psis.ess > 300
