"""First passages of a drift diffusion between two boundaries: the exact density, and exact draws.

Navarro & Fuss, *Fast and accurate calculations for first-passage times in Wiener diffusion models* (2009):
the series for small times, their eq. 6, and that for large times, their eq. 5.
"""

import jax
import jax.numpy as jnp

TERMS = 6


def log_density(t, drift, boundary, start=0.5):
    """Log-density of a first passage at time t through the lower boundary; all of one shape."""
    time = t / boundary**2
    places = start + 2.0 * jnp.arange(-TERMS, TERMS + 1).reshape(-1, *[1] * jnp.ndim(time))
    small = (places * jnp.exp(-(places**2) / (2 * time))).sum(0) / jnp.sqrt(2 * jnp.pi * time**3)
    number = jnp.arange(1, 2 * TERMS).reshape(-1, *[1] * jnp.ndim(time)) * jnp.pi
    large = (number * jnp.exp(-(number**2) * time / 2) * jnp.sin(number * start)).sum(0)
    first = jnp.log(start) - start**2 / (2 * time) - 0.5 * jnp.log(2 * jnp.pi * time**3)  # of k = 0 alone
    series = jnp.log(jnp.maximum(jnp.where(time < 0.3, small, large), 1e-37))
    log = jnp.where(time < 0.02, first, series) - 2 * jnp.log(boundary)
    return log - drift * boundary * start - drift**2 * t / 2


def log_prob(x, drift, boundary, start=0.5):
    """Log-density of choices, 1 for the upper boundary, and times, ``(..., 2)``."""
    upper = log_density(x[..., 1], -drift, boundary, 1 - start)
    return jnp.where(x[..., 0] > 0.5, upper, log_density(x[..., 1], drift, boundary, start))


def first_passage(key, drift, boundary, start=0.5):
    """A choice and a time, by inversion of the distribution functions on a grid."""
    choice_key, time_key = jax.random.split(key)
    t = jnp.exp(jnp.linspace(jnp.log(0.005), jnp.log(20.0), 600)) * boundary**2
    tables = []
    for choice in (0.0, 1.0):
        density = jnp.exp(log_prob(jnp.stack([choice + 0 * t, t], -1), drift, boundary, start))
        tables.append(jnp.cumsum((density[1:] + density[:-1]) / 2 * jnp.diff(t)))
    lower, upper = tables
    choice = jax.random.uniform(choice_key) < upper[-1] / (upper[-1] + lower[-1])
    table = jnp.where(choice, upper / upper[-1], lower / lower[-1])
    return jnp.stack([1.0 * choice, jnp.interp(jax.random.uniform(time_key), table, t[1:])])
