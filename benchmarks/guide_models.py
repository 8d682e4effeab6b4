# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Models on which guides are measured, each with data simulated from a fixed seed.

``MODELS`` holds pairs of a model and its arguments. Three of them have supports that depend on other sites
(``garch``, ``thresholds``, ``shares``), three have densities that overflow within the prior (``arma``,
``garch``, ``counts``), and two (``funnel``, ``banana``) have no data: their posterior is known exactly.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax
from numpyro.distributions.transforms import OrderedTransform

__all__ = ["EXACT", "MODELS", "TRUTH"]


def arma(y):
    """ARMA(1, 1), conditional on a first error of 0, with wide priors."""
    mu, phi = numpyro.sample("mu", dist.Normal(0, 10)), numpyro.sample("phi", dist.Normal(0, 2))
    theta, sigma = numpyro.sample("theta", dist.Normal(0, 2)), numpyro.sample("sigma", dist.HalfCauchy(2.5))

    def step(error, pair):
        before, now = pair
        error = now - mu - phi * before - theta * error
        return error, error

    _, errors = lax.scan(step, jnp.zeros(()), (y[:-1], y[1:]))
    numpyro.sample("errors", dist.Normal(0, sigma), obs=errors)


def simulate_arma(rng, length=200):
    noise, y = 0.5 * rng.normal(size=length + 1), np.zeros(length + 1)
    for t in range(1, length + 1):
        y[t] = 0.3 + 0.9 * y[t - 1] + noise[t] + 0.4 * noise[t - 1]
    return y


def garch(y):
    """GARCH(1, 1), stationary by a support that depends on another site."""
    mu, floor = numpyro.sample("mu", dist.Normal(0, 10)), numpyro.sample("alpha0", dist.HalfCauchy(5))
    alpha = numpyro.sample("alpha1", dist.Uniform(0, 1))
    beta = numpyro.sample("beta1", dist.Uniform(0, 1 - alpha))

    def step(variance, pair):
        before = pair - mu
        variance = floor + alpha * before**2 + beta * variance
        return variance, variance

    _, variances = lax.scan(step, jnp.asarray(1.0), y[:-1])
    numpyro.sample("y", dist.Normal(mu, jnp.sqrt(variances)), obs=y[1:])


def simulate_garch(rng, length=300):
    y, variance = np.zeros(length), 1.0
    for t in range(1, length):
        variance = 0.4 + 0.3 * (y[t - 1] - 0.5) ** 2 + 0.4 * variance
        y[t] = 0.5 + variance**0.5 * rng.normal()
    return y


def counts(x, y):
    """Poisson counts of a log-linear rate; the covariates are years and metres, not standardised."""
    intercept = numpyro.sample("intercept", dist.Normal(0, 10))
    slopes = numpyro.sample("slopes", dist.Normal(0, 1).expand([2]).to_event(1))
    numpyro.sample("y", dist.Poisson(jnp.exp(intercept + x @ slopes)), obs=y)


def simulate_counts(rng, rows=150):
    x = np.stack([rng.uniform(20, 80, rows), rng.uniform(100, 400, rows)], -1)
    return x, rng.poisson(np.exp(1.0 + 0.03 * x[:, 0] - 0.004 * x[:, 1])).astype(np.float32)


def funnel():
    """Neal's funnel of ten numbers."""
    v = numpyro.sample("v", dist.Normal(0, 3))
    numpyro.sample("x", dist.Normal(0, jnp.exp(v / 2)).expand([9]).to_event(1))


def banana():
    """A curved ridge, 10 wide and 1 thick."""
    x = numpyro.sample("x", dist.Normal(0, 10))
    numpyro.sample("y", dist.Normal(0.03 * (x**2 - 100), 1))


def ordinal(x, y):
    """Ordered logistic regression with four cut points."""
    slope = numpyro.sample("slope", dist.Normal(0, 5).expand([2]).to_event(1))
    cuts = dist.TransformedDistribution(dist.Normal(0, 5).expand([4]).to_event(1), OrderedTransform())
    cuts = numpyro.sample("cuts", cuts)
    numpyro.sample("y", dist.OrderedLogistic(x @ slope, cuts), obs=y)


def simulate_ordinal(rng, rows=200):
    x = rng.normal(size=(rows, 2))
    latent = x @ np.array([1.5, -0.7]) + rng.logistic(size=rows)
    return x, np.searchsorted([-2.0, -0.5, 0.5, 2.5], latent)


def thresholds(x, y):
    """Ordered logistic regression whose cut points are sites, each truncated by the one before."""
    slope, cuts = numpyro.sample("slope", dist.Normal(0, 5)), []
    cuts.append(numpyro.sample("cut0", dist.Normal(0, 5)))
    for i in (1, 2):
        cuts.append(numpyro.sample(f"cut{i}", dist.TruncatedNormal(0, 5, low=cuts[-1])))
    numpyro.sample("y", dist.OrderedLogistic(x[:, 0] * slope, jnp.stack(cuts)), obs=y)


def simulate_thresholds(rng, rows=120):
    x = rng.normal(size=(rows, 1))
    return x, np.searchsorted([-1.0, 0.2, 1.5], 1.2 * x[:, 0] + rng.logistic(size=rows))


def shares(y):
    """Shares of a whole, each uniform on what the others leave, and counts of them."""
    a = numpyro.sample("a", dist.Uniform(0, 1))
    b = numpyro.sample("b", dist.Uniform(0, 1 - a))
    c = numpyro.sample("c", dist.Uniform(0, 1 - a - b))
    numpyro.sample("y", dist.Multinomial(20, jnp.stack([a, b, c, 1 - a - b - c])), obs=y)


def horseshoe(x, y):
    """Sparse regression, ten slopes of which two matter; not centred."""
    tau = numpyro.sample("tau", dist.HalfCauchy(0.2))
    sigma = numpyro.sample("sigma", dist.HalfNormal(2))
    width = numpyro.sample("lambda", dist.HalfCauchy(1).expand([x.shape[1]]).to_event(1))
    z = numpyro.sample("z", dist.Normal(0, 1).expand([x.shape[1]]).to_event(1))
    slopes = numpyro.deterministic("slopes", z * width * tau)
    numpyro.sample("y", dist.Normal(x @ slopes, sigma), obs=y)


def simulate_horseshoe(rng, rows=80):
    x = rng.normal(size=(rows, 10))
    return x, 2 * x[:, 0] - x[:, 3] + rng.normal(size=rows)


def mixture(y):
    """Three normals in one dimension, in the order of their means."""
    means = dist.TransformedDistribution(dist.Normal(0, 5).expand([3]).to_event(1), OrderedTransform())
    means = numpyro.sample("means", means)
    sds = numpyro.sample("sds", dist.LogNormal(0, 0.5).expand([3]).to_event(1))
    shares = numpyro.sample("shares", dist.Dirichlet(3 * jnp.ones(3)))
    numpyro.sample("y", dist.MixtureSameFamily(dist.Categorical(shares), dist.Normal(means, sds)), obs=y)


def simulate_mixture(rng, rows=200):
    which = rng.choice(3, size=rows, p=[0.3, 0.5, 0.2])
    return np.array([-4.0, 0.0, 3.5])[which] + np.array([1.0, 0.7, 1.2])[which] * rng.normal(size=rows)


def predator_prey(start, rates, steps=80, dt=0.25):
    """Lotka-Volterra by Runge-Kutta steps, every fourth of them: ``(20, 2)``."""
    birth, hunt, death, feed = rates

    def slope(state):
        prey, predator = state
        return jnp.stack([(birth - hunt * predator) * prey, (feed * prey - death) * predator])

    def step(state, _):
        a = slope(state)
        b = slope(state + dt / 2 * a)
        c = slope(state + dt / 2 * b)
        d = slope(state + dt * c)
        state = state + dt / 6 * (a + 2 * b + 2 * c + d)
        return state, state

    return lax.scan(step, start, length=steps)[1][3::4]


def ode(y):
    """Rates and start of a predator-prey system, from noisy counts."""
    centre = jnp.log(jnp.array([0.5, 0.05, 0.5, 0.05]))
    rates = numpyro.sample("rates", dist.LogNormal(centre, 0.5).to_event(1))
    start = numpyro.sample("start", dist.LogNormal(jnp.log(10.0), 1).expand([2]).to_event(1))
    sigma = numpyro.sample("sigma", dist.LogNormal(-1, 1).expand([2]).to_event(1))
    path = predator_prey(start, rates)
    path = jnp.where(path > 1e-6, path, 1e-6)  # NaN, too, of a path that overflows
    numpyro.sample("y", dist.LogNormal(jnp.log(path), sigma).to_event(1), obs=y)


def simulate_ode(rng):
    path = predator_prey(jnp.array([12.0, 6.0]), jnp.array([0.55, 0.028, 0.8, 0.024]))
    return np.asarray(path) * np.exp(0.2 * rng.normal(size=path.shape))


def hierarchical(group, x, y):
    """Logistic regression with an intercept for each of twenty groups; centred."""
    mu = numpyro.sample("mu", dist.Normal(0, 2))
    tau = numpyro.sample("tau", dist.HalfNormal(1))
    slope = numpyro.sample("slope", dist.Normal(0, 2))
    with numpyro.plate("groups", 20):
        intercept = numpyro.sample("intercept", dist.Normal(mu, tau))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Bernoulli(logits=intercept[group] + slope * x), obs=y)


def simulate_hierarchical(rng, rows=300):
    group, x = rng.integers(0, 20, rows), rng.normal(size=rows)
    logits = (0.5 + 0.8 * rng.normal(size=20))[group] - 1.0 * x
    return group, x, rng.binomial(1, 1 / (1 + np.exp(-logits)))


def made(model, simulate=None):
    """A model and its data as JAX arrays, single precision."""
    data = simulate(np.random.default_rng(3)) if simulate else ()
    data = data if isinstance(data, tuple) else (data,)
    return model, tuple(
        jnp.asarray(d, None if np.issubdtype(d.dtype, np.integer) else jnp.float32) for d in data
    )


MODELS = {
    "arma": made(arma, simulate_arma),
    "garch": made(garch, simulate_garch),
    "counts": made(counts, simulate_counts),
    "funnel": made(funnel),
    "banana": made(banana),
    "ordinal": made(ordinal, simulate_ordinal),
    "thresholds": made(thresholds, simulate_thresholds),
    "shares": made(shares, lambda rng: rng.multinomial(20, [0.5, 0.3, 0.05, 0.15])),
    "horseshoe": made(horseshoe, simulate_horseshoe),
    "mixture": made(mixture, simulate_mixture),
    "ode": made(ode, simulate_ode),
    "hierarchical": made(hierarchical, simulate_hierarchical),
}


# Where NUTS starts for the reference, where it gets stuck otherwise.
TRUTH = {
    "counts": {"intercept": 1.0, "slopes": jnp.array([0.03, -0.004])},
    "mixture": {"means": jnp.array([-4.0, 0.0, 3.5]), "sds": jnp.array([1.0, 0.7, 1.2])},
    "ode": {"rates": jnp.array([0.55, 0.028, 0.8, 0.024]), "start": jnp.array([12.0, 6.0])},
}


def _exact(model, key, num_samples):
    """Draws of a model without data."""
    from numpyro.infer import Predictive

    return jax.jit(Predictive(model, num_samples=num_samples))(key)


EXACT = {"funnel": partial(_exact, funnel), "banana": partial(_exact, banana)}
