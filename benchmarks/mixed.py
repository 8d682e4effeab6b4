"""Learned likelihoods of a choice with a time, and of counts, beside exact ones.

    python benchmarks/mixed.py

``nle`` with its defaults. Divergence is the mean of exact less learned log-likelihood on 3,000 fresh rows,
gap the mean of its size, both in nats a row. Shift is by how many exact standard deviations the posterior
mean of 60 drift diffusion trials is off, mean over 30 data sets and both parameters.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from hierarchical_models import passage, wiener

import numpyro_maf as nm


def diffusion(x=None):
    drift = numpyro.sample("drift", dist.Normal(0, 1.5))
    boundary = numpyro.sample("boundary", dist.Uniform(0.6, 2.0))
    numpyro.sample("x", nm.Simulator(passage, drift, boundary, event_shape=(2,)), obs=x)


def poisson(x=None):
    numpyro.sample("x", dist.Poisson(jnp.exp(numpyro.sample("log_mean", dist.Normal(1.5, 1)))), obs=x)


def large(x=None):
    numpyro.sample("x", dist.Poisson(jnp.exp(numpyro.sample("log_mean", dist.Normal(6, 1)))), obs=x)


def overdispersed(x=None):
    mean, size = (
        jnp.exp(numpyro.sample(name, dist.Normal(*about)))
        for name, about in (("log_mean", (1.5, 1)), ("log_size", (1, 0.5)))
    )
    numpyro.sample("x", dist.NegativeBinomial2(mean, size), obs=x)


def of_counts(x, log_mean, log_size=None):
    mean = jnp.exp(log_mean)
    d = dist.Poisson(mean) if log_size is None else dist.NegativeBinomial2(mean, jnp.exp(log_size))
    return d.log_prob(x[..., 0])


def shift(likelihood):
    """Of posterior means, on a grid of parameters."""
    sims = nm.simulate(2, diffusion, 30, progress=False)
    keys = jax.random.split(jax.random.key(3), (30, 60))
    several = jax.vmap(jax.vmap(passage, (0, None, None)))
    data = jax.jit(several)(keys, sims["drift"], sims["boundary"])
    grid = np.stack(np.meshgrid(np.linspace(-6, 6, 121), np.linspace(0.605, 1.995, 71)), -1).reshape(-1, 2)
    grid = grid.astype(np.float32)

    @jax.jit
    def scores(x):
        return jax.lax.map(
            lambda g: jnp.stack([
                likelihood(jnp.broadcast_to(g, (60, 2))).log_prob(x).sum(), wiener.log_prob(x, *g).sum()
            ]), grid, batch_size=512,
        )  # fmt: skip

    found = []
    for x in data:
        logs = np.asarray(scores(x), float) - grid[:, :1] ** 2 / 4.5
        shares = np.exp(logs - logs.max(0))
        shares /= shares.sum(0)
        ours, exact = shares.T @ grid
        found.append(np.abs(ours - exact) / np.sqrt(shares[:, 1] @ (grid - exact) ** 2))
    return np.mean(found)


CASES = {
    "drift diffusion": (diffusion, wiener.log_prob, (3_000, 10_000, 40_000)),
    "Poisson, mean about 5": (poisson, of_counts, (3_000, 20_000)),
    "Poisson, mean about 400": (large, of_counts, (3_000, 20_000)),
    "negative binomial": (overdispersed, of_counts, (3_000, 20_000)),
}


def main():
    print(f"numpyro {numpyro.__version__}, jax {jax.__version__}, numpyro_maf {nm.__version__}")
    print("| model | rows | divergence | gap | shift | seconds |\n|---|---|---|---|---|---|")
    for name, (model, exact, sizes) in CASES.items():
        fresh = nm.simulate(1, model, 3000, progress=False)
        theta = [fresh[site] for site in ("drift", "boundary", "log_mean", "log_size") if site in fresh]
        x = jnp.reshape(fresh["x"], (3000, -1))
        right = np.asarray(exact(x, *theta), float)
        for size in sizes:
            sims = nm.simulate(0, model, size, progress=False)
            began = time.perf_counter()
            likelihood = nm.nle(0, model, sims, progress=False)
            seconds = time.perf_counter() - began
            gap = right - np.asarray(likelihood(jnp.stack(theta, -1)).log_prob(x), float)
            off = f"{shift(likelihood):.2f}" if model is diffusion else ""
            figures = f"{gap.mean():.4f} | {np.abs(gap).mean():.3f} | {off} | {seconds:.0f}"
            print(f"| {name} | {size:,} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
