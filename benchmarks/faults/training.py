"""Trainings under kill -9 and SIGTERM: is the resumed one, bit for bit, the one that nothing disturbed?

    python benchmarks/faults/training.py --kills 100

A training of ``fit``, of ``npe`` and of ``snpe`` runs in a process of its own, which is killed at a random
time; the same call resumes, is killed again, and so on. When it has ended, its result is compared with that
of an undisturbed call, and the next begins anew until all kills are spent.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist

import numpyro_maf as nm


def model():
    a = numpyro.sample("a", dist.Normal(0, 1).expand([2]).to_event(1))
    numpyro.sample(
        "x", nm.Simulator(lambda key, a: a + 0.3 * jax.random.normal(key, (2,)), a, event_shape=(2,))
    )


def fit(folder):
    x = np.random.default_rng(0).standard_t(5, (20_000, 2)).astype(np.float32)
    flow = nm.maf(jax.random.key(0), 2, transforms=2)
    return nm.fit(0, flow, x, max_epochs=60, progress=False, checkpoint=folder).flow


def npe(folder):
    sims = nm.simulate(0, model, 5000, progress=False)
    return nm.npe(0, model, sims, max_epochs=40, progress=False, checkpoint=folder)


def snpe(folder):
    options = dict(rounds=3, simulations=1000, max_epochs=30, progress=False, checkpoint=folder)
    return nm.snpe(0, model, {"x": np.zeros(2)}, **options).rounds[-1].learned


JOBS = {"fit": fit, "npe": npe, "snpe": snpe}


def digest(result) -> str:
    return hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in jax.tree.leaves(result))).hexdigest()


def started(name, folder):
    return subprocess.Popen([sys.executable, "-W", "ignore", __file__, "--job", name, str(folder)],
                            stdout=subprocess.PIPE, text=True)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="of each job")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        name, folder = args.job
        print(digest(JOBS[name](folder)))
        return
    draw = random.Random(0)
    print("| job | kill -9 | SIGTERM | trainings | bit-equal |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(folder) / "jax"))
        for name in JOBS:
            started(name, Path(folder) / "compiles").communicate()
            shutil.rmtree(Path(folder) / "compiles")
            began = time.perf_counter()
            right = started(name, Path(folder) / f"right-{name}").communicate()[0]
            seconds = time.perf_counter() - began
            kills = {signal.SIGKILL: 0, signal.SIGTERM: 0}
            trainings = equal = 0
            while sum(kills.values()) < args.kills:
                place = Path(folder) / f"{name}-{trainings}"
                while True:
                    process = started(name, place)
                    try:
                        found = process.communicate(timeout=draw.uniform(0.3, 1.1) * seconds)[0]
                        break
                    except subprocess.TimeoutExpired:
                        number = draw.choice(list(kills))
                        process.send_signal(number)
                        process.communicate()
                        kills[number] += 1
                trainings, equal = trainings + 1, equal + (found == right)
                shutil.rmtree(place)
            print(
                f"| {name} | {kills[signal.SIGKILL]} | {kills[signal.SIGTERM]} | {trainings} | {equal} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
