"""Memory of learning from a million simulations of a hundred numbers each, mapped from disk.

    python benchmarks/sbi_memory.py [--rows 1000000] [--width 100]

Prints the most memory that the process held above what it held before, and the size of the data. Pages of the
files that the system keeps in its cache count as the process's own, so the data may be in the figure once.
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import numpyro_maf as nm


def model(width, x=None):
    theta = numpyro.sample("theta", dist.Normal(0, 1).expand([5]).to_event(1))
    mean = jnp.tile(theta, width // 5)
    numpyro.sample("x", dist.Normal(mean, 1).to_event(1), obs=x)


def peak():
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=100)
    arguments = parser.parse_args()
    nm.npe(
        0, model, nm.simulate(0, model, 100, arguments.width, progress=False), max_epochs=1, progress=False
    )
    before = peak()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        sims = nm.simulate(0, model, arguments.rows, arguments.width, store=Path(folder), progress=False)
        made, simulated = time.perf_counter() - start, peak()
        size = sum(np.asarray(value).nbytes for value in sims.values()) / 1e9
        start = time.perf_counter()
        nm.npe(jax.random.key(1), model, sims, regression=True, max_epochs=1, batch_size=1024, progress=False)
        spent = time.perf_counter() - start
    print(f"data {size:.2f} GB; simulated in {made:.0f} s, one epoch in {spent:.0f} s")
    print(f"peak above the start {peak() - before:.2f} GB (simulation {simulated - before:.2f} GB)")


if __name__ == "__main__":
    main()
