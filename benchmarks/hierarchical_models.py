"""Hierarchical models whose posterior is known, or can be drawn from: the likelihood may be hidden from us.

Each is called with a number of groups and observed values; local sites are called ``z``.
"""

import pathlib
import sys
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.scipy.ndimage import map_coordinates

import numpyro_maf as nm

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))
import wiener  # noqa: E402

TRIALS, PEOPLE, WEEKS = 20, 200, 8


def gaussian(n, y=None):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with numpyro.plate("groups", n):
        z = numpyro.sample("z", dist.Normal(mu, 0.7))
        numpyro.sample("y", dist.Normal(z, 0.5), obs=y)


def scales(n, y=None):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    log_scale = numpyro.sample("log_scale", dist.Normal(-0.5, 0.5))
    with numpyro.plate("groups", n):
        z = numpyro.sample("z", dist.Normal(mu, jnp.exp(log_scale)))
        numpyro.sample("y", dist.Normal(z, 0.5), obs=y)


def schools(n, y=None, sigma=None):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    log_tau = numpyro.sample("log_tau", dist.Normal(-0.5, 0.7))
    with numpyro.plate("schools", n):
        log_sigma = numpyro.sample("sigma", dist.Normal(0.2, 0.3), obs=sigma)
        z = numpyro.sample("z", dist.Normal(mu, jnp.exp(log_tau)))
        numpyro.sample("y", dist.Normal(z, jnp.exp(log_sigma)), obs=y)


# Drift diffusion of several subjects -------------------------------------------------------------


@lru_cache
def _quantiles():
    """Logarithms of first-passage times, by drift times boundary and by logit of the probability.

    From the middle, choice and time are independent, and in units of the squared boundary the time depends
    on the product alone.
    """
    products, logits = np.linspace(0, 16, 161), np.linspace(-14, 14, 561)
    t = np.exp(np.linspace(np.log(0.004), np.log(20), 4000))
    rows = []
    for product in products:
        density = np.exp(np.asarray(wiener.log_density(t, product, 1.0), float) - product**2 / 4)
        table = np.append(0, np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(t)))
        rows.append(np.interp(1 / (1 + np.exp(-logits)), table / table[-1], np.log(t)))
    return np.array(rows, np.float32)


QUANTILES = _quantiles()


def passage(key, drift, boundary):
    """A choice and a time of a diffusion that starts in the middle."""
    choice_key, time_key = jax.random.split(key)
    product = drift * boundary
    choice = jax.random.bernoulli(choice_key, jax.nn.sigmoid(product))
    at = jnp.stack([jnp.abs(product) * 10, (jax.random.logistic(time_key) + 14) * 20])
    return jnp.stack([1.0 * choice, jnp.exp(map_coordinates(QUANTILES, at, 1, "nearest")) * boundary**2])


def diffusion(n, y=None, exact=False):
    mu = numpyro.sample("mu", dist.Normal(1, 1))
    log_scale = numpyro.sample("log_scale", dist.Normal(-0.5, 0.5))
    log_boundary = numpyro.sample("log_boundary", dist.Normal(0.3, 0.3))
    boundary = jnp.exp(log_boundary)
    with numpyro.plate("subjects", n, dim=-2):
        z = numpyro.sample("z", dist.Normal(mu, jnp.exp(log_scale)))
        with numpyro.plate("trials", TRIALS, dim=-1):
            if exact:
                numpyro.factor("y", wiener.log_prob(y, *jnp.broadcast_arrays(z, boundary, y[..., 0])[:2]))
            else:
                fn = nm.Simulator(passage, z, boundary, event_shape=(2,), batch_ndim=2)
                numpyro.sample("y", fn, obs=y)


# Epidemics in several cities ---------------------------------------------------------------------


def outbreak(key, log_rate):
    """New cases by week of a chain binomial (Reed and Frost): who is ill infects others for one week."""

    def week(state, key):
        well, ill = state
        share = -jnp.expm1(-jnp.exp(log_rate) * ill / PEOPLE)
        caught = jax.random.uniform(key, (PEOPLE,)) < share  # faster than JAX's own binomial numbers
        new = (caught & (jnp.arange(PEOPLE) < well)).sum().astype(share.dtype)
        return (well - new, new), new

    first = 3.0
    return jax.lax.scan(week, (PEOPLE - first, first), jax.random.split(key, WEEKS))[1]


def epidemics(n, y=None, exact=False):
    mu = numpyro.sample("mu", dist.Normal(0.4, 0.4))
    log_scale = numpyro.sample("log_scale", dist.Normal(-1.2, 0.5))
    with numpyro.plate("cities", n):
        z = numpyro.sample("z", dist.Normal(mu, jnp.exp(log_scale)))
        if exact:
            y = jnp.asarray(y)
            ill = jnp.concatenate([jnp.full((n, 1), 3.0), y[:, :-1]], 1)
            well = PEOPLE - jnp.cumsum(ill, 1)
            share = -jnp.expm1(-jnp.exp(z)[:, None] * ill / PEOPLE)
            share = jnp.where(ill > 0, share, 0.5)
            scores = dist.Binomial(well, share).log_prob(y)
            numpyro.factor("y", jnp.where(ill > 0, scores, 0.0).sum(-1))
        else:
            numpyro.sample("y", nm.Simulator(outbreak, z, event_shape=(WEEKS,), batch_ndim=1), obs=y)
