"""How near every builder comes to the best one can do on two moons, in nats.

    python benchmarks/two_moons.py [--models maf nsf …] [--rows 50000]

The data are two interleaved half circles with normal noise, whose log-density quadrature gives
(``numpyro_maf.datasets.two_moons_log_prob``). Printed: the mean over 100,000 test points of the true
log-density minus the flow's, an estimate of the Kullback-Leibler divergence, with its standard error, and the
seconds of training. The goal is 0.02. Builders of boxes and angles get the same points, affinely mapped.
"""

import argparse
import importlib.metadata
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax

import numpyro_maf as nm
from numpyro_maf.datasets import two_moons, two_moons_log_prob
from numpyro_maf.flows.conditionals import Mixture

NOISE, BATCH = 0.1, 512
WIDE = dict(hidden=(64, 64))
BOX = np.array([[-1.8, -1.4], [2.8, 1.9]])  # eight standard deviations of the noise around the moons

# name: builder, epochs, mapped to ("plane", "unit", "circle")
MODELS = {
    "maf": (lambda key: nm.maf(key, 2, transforms=10, **WIDE), 60, "plane"),
    "maf MoG": (
        lambda key: nm.maf(key, 2, base=nm.made(key, 2, columns=Mixture(10), **WIDE), **WIDE), 30, "plane",
    ),
    "maf CDF, normal": (
        lambda key: nm.maf(key, 2, transforms=2, scalar=nm.MixtureCDF(8), **WIDE), 30, "plane",
    ),
    "maf CDF, uniform": (
        lambda key: nm.maf(
            key, 2, transforms=2, scalar=nm.MixtureCDF(8, "gaussian"),
            base=dist.Uniform(0.0, 1.0).expand([2]).to_event(1), **WIDE,
        ), 30, "plane",
    ),
    "iaf": (lambda key: nm.iaf(key, 2, transforms=10, **WIDE), 60, "plane"),
    "nsf": (lambda key: nm.nsf(key, 2, transforms=2, **WIDE), 30, "plane"),
    "nsf coupling": (lambda key: nm.nsf(key, 2, transforms=4, coupling=True, **WIDE), 30, "plane"),
    "realnvp": (lambda key: nm.realnvp(key, 2, transforms=12, **WIDE), 60, "plane"),
    "nice": (lambda key: nm.nice(key, 2, transforms=8, **WIDE), 30, "plane"),
    "glow": (lambda key: nm.glow(key, 2, transforms=12, **WIDE), 60, "plane"),
    "flowpp": (lambda key: nm.flowpp(key, 2, hidden=(16, 16), heads=2), 10, "plane"),
    "ffjord": (lambda key: nm.ffjord(key, 2, **WIDE), 25, "plane"),
    "made": (lambda key: nm.made(key, 2, **WIDE), 20, "plane"),
    "made MoG": (lambda key: nm.made(key, 2, columns=Mixture(10), **WIDE), 30, "plane"),
    "elementwise": (lambda key: nm.elementwise(key, 2), 20, "plane"),
    "nis": (lambda key: nm.nis(key, 2, scalar=nm.PiecewiseQuadratic(32), **WIDE), 30, "unit"),
    "circular": (lambda key: nm.circular(key, 2, scalar=nm.CircularSpline(16), **WIDE), 30, "circle"),
}  # fmt: skip


def mapped(x, kind):
    """Points on the plane, in the unit box or on the torus, and the log of the map's Jacobian."""
    if kind == "plane":
        return x, 0.0
    width = BOX[1] - BOX[0]
    unit = np.clip((x - BOX[0]) / width, 0, 1)
    if kind == "unit":
        return unit, -np.log(width).sum()
    return 2 * np.pi * unit - np.pi, (np.log(2 * np.pi) - np.log(width)).sum()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rows", type=int, default=50_000)
    args = parser.parse_args()
    for name in ("jax", "numpyro", "numpyro_maf"):
        print(f"{name} {importlib.metadata.version(name)}", end="  ")
    x, test = two_moons(args.rows, noise=NOISE, seed=0), two_moons(100_000, noise=NOISE, seed=1)
    truth = two_moons_log_prob(test, noise=NOISE)
    print(f"\n{args.rows} rows; the best test log-likelihood is {truth.mean():.4f}")
    print(f"{'model':18s} {'below the best':>22s} {'seconds':>8s}")
    for name in args.models:
        build, epochs, kind = MODELS[name]
        rows, log_det = mapped(x, kind)
        steps = epochs * -(-int(0.9 * len(rows)) // BATCH)
        optimizer = optax.chain(
            optax.clip_by_global_norm(5.0), optax.adam(optax.cosine_decay_schedule(3e-3, steps))
        )
        start = time.perf_counter()
        flow = build(jax.random.key(0))
        if name in ("glow", "flowpp"):
            flow = replace(
                flow, event_scale=nm.Standardize(jnp.array(rows.mean(0)), jnp.array(rows.std(0)))
            ).initialized(rows[:1000])
        flow = nm.fit(
            jax.random.key(1), flow, rows, batch_size=BATCH, max_epochs=epochs,
            patience=epochs, progress=False, optimizer=optimizer,
        ).flow  # fmt: skip
        seconds = time.perf_counter() - start
        score = jax.jit(lambda flow, x: flow().log_prob(x))
        parts = np.split(mapped(test, kind)[0].astype(np.float32), 20)
        gap = truth - log_det - np.concatenate([np.asarray(score(flow, part)) for part in parts])
        error = gap.std() / np.sqrt(len(gap))
        met = "" if gap.mean() <= 0.02 else "  over 0.02"
        print(f"{name:18s} {gap.mean():12.4f} ± {error:.4f} {seconds:8.0f}{met}", flush=True)


if __name__ == "__main__":
    main()
