"""Campaigns of simulations under faults: kill -9, calls that go wrong, damaged stores.

    python benchmarks/faults/campaigns.py                   # 100 kills of each kind, about an hour
    python benchmarks/faults/campaigns.py --kills 10 --mutations 200

Each line of the table is a kind of fault: how often it was tried, what was lost, and whether the rows at the
end are, bit for bit, those of a campaign that nothing disturbed. A call that is done when its process is
killed is lost if it is made again.
"""

import argparse
import ctypes
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import numpyro_maf as nm

NAP, CALLS, ROWS = 0.02, 600, 40_000


def host_model(folder):
    def run(key, a):
        time.sleep(NAP)
        result = float(a) + np.random.default_rng(key).normal(size=2)
        with open(folder, "a") as file:
            file.write(".")
        return result

    def model(x=None):
        a = numpyro.sample("a", dist.Normal(0, 1))
        numpyro.sample("x", nm.Simulator(run, a, event_shape=(2,), host=True), obs=x)

    return model


def device_model(x=None):
    def walk(key, a):
        step = lambda y, key: (y + 0.1 * jnp.tanh(a - y) + 0.1 * jax.random.normal(key), None)  # noqa: E731
        return jax.lax.scan(step, 0.0, jax.random.split(key, 3000))[0]

    a = numpyro.sample("a", dist.Normal(0, 1))
    numpyro.sample("x", nm.Simulator(walk, a), obs=x)


def job(kind, folder, store):
    """One campaign, in a process that may be killed."""
    if kind == "device":
        return nm.simulate(0, device_model, ROWS, store=store, progress=False)
    executor = ThreadPoolExecutor(4) if kind == "threads" else None
    return nm.simulate(
        0, host_model(str(folder / "calls")), CALLS, store=store, executor=executor, progress=False
    )


def size(path):
    return path.stat().st_size if path.exists() else 0


def start(kind, folder):
    command = [sys.executable, "-W", "ignore", __file__, "--job", kind, "--folder", str(folder)]
    return subprocess.Popen(command)


def killed(kind, kills):
    """Campaigns of one kind that are killed again and again until they are done."""
    done, worst, equal, campaigns = 0, 0, True, 0
    with tempfile.TemporaryDirectory() as whole:
        truth = job(kind, Path(whole), None)
        while done < kills:
            campaigns += 1
            with tempfile.TemporaryDirectory() as place:
                folder, before = Path(place), 0
                while True:
                    process, calls = start(kind, folder), folder / "calls"
                    journal = folder / "store" / "journal"
                    goal = random.randint(1, CALLS // 3) + size(calls)
                    lines = size(journal)
                    while process.poll() is None and done < kills:
                        if size(calls) >= goal or (kind == "device" and size(journal) > lines):
                            time.sleep(random.random() * (3 if kind == "device" else 0.3))
                            break
                        time.sleep(0.01)
                    if done >= kills:
                        process.wait()
                    elif process.poll() is None:
                        process.kill()
                        done += 1
                    process.wait()
                    time.sleep(2 * NAP)
                    if kind != "device":
                        gone = size(calls) - _units(folder / "store")
                        worst, before = max(worst, gone - before), gone
                    if process.returncode == 0:
                        break
                found = nm.sbi.Simulations.open(folder / "store")
                equal &= found.errors == truth.errors
                equal &= all(np.array_equal(found[name], truth[name]) for name in truth)
    return done, campaigns, worst, equal


def _units(store):
    """Calls that a store holds."""
    from numpyro_maf.sbi.store import Folder

    try:
        folder = Folder.at(store)
    except ValueError:
        return 0
    return int(folder.sites["x"].done.sum()) if "x" in folder.sites else 0


def goes_wrong(key, a):
    row = round(float(a))
    if row % 10 == 1:
        raise ArithmeticError("too large")
    if row % 10 == 2:
        sys.exit(0)
    if row % 10 == 3 and row < 100:
        os._exit(3)
    if row % 10 == 4 and row < 100:
        ctypes.string_at(0)
    if row % 10 == 5 and row < 20:
        time.sleep(60)
    return 2.0 * row


def wrong_model(x=None):
    numpyro.sample("x", nm.Simulator(goes_wrong, numpyro.sample("a", dist.Normal(0, 1)), host=True), obs=x)


def rows(executor=None, crashes=True, timeout=2.0):
    """Rows that raise, exit, crash and hang, among others."""
    a = np.arange(120.0) if crashes else 100 + np.arange(120.0)
    options = dict(executor=executor, timeout=timeout, progress=False)
    sims = nm.simulate(0, wrong_model, 120, given={"a": a}, **options)
    bad = [
        i for i, n in enumerate(a) if n % 10 in (1, 2) or (n % 10 in (3, 4) and n < 100) or n == 5 or n == 15
    ]
    good = ~sims.failed
    return len(bad), sorted(sims.errors) == bad, np.array_equal(sims["x"][good], 2 * a[good])


def dask():
    """Workers of a cluster, one of which is killed, and rows that kill workers."""
    import distributed

    logging.disable(logging.ERROR)  # the cluster's own reports of its workers' ends
    with distributed.Client(n_workers=2, threads_per_worker=1, dashboard_address=None) as client:
        pids = list(client.run(os.getpid).values())
        killer = ThreadPoolExecutor(1).submit(lambda: (time.sleep(1.0), os.kill(pids[0], 9)))
        with tempfile.TemporaryDirectory() as place:
            model = host_model(str(Path(place) / "calls"))
            found = nm.simulate(0, model, 300, executor=client.get_executor(), progress=False)
            truth = nm.simulate(0, model, 300, progress=False)
        killer.result()
        equal = not found.errors and np.array_equal(found["x"], truth["x"])

        def kills(key, a):
            return os._exit(1) if float(a) in (7, 30) else float(a)

        def model(x=None):
            numpyro.sample("x", nm.Simulator(kills, numpyro.sample("a", dist.Normal(0, 1)), host=True), obs=x)

        a = np.arange(40.0)
        sims = nm.simulate(0, model, 40, given={"a": a}, executor=client.get_executor(), progress=False)
    return equal, sorted(sims.errors) == [7, 30]


def mutated(count):
    """Stores with a flipped bit, or cut short: each is refused by name, then repaired; none is believed."""
    told = repaired = same = 0
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")

        def model(x=None):
            a = numpyro.sample("a", dist.Normal(0, 1))
            numpyro.sample("x", dist.Normal(a, 1).expand([3]).to_event(1), obs=x)

        good, bad = Path(place) / "good", Path(place) / "bad"
        truth = nm.simulate(0, model, 200, store=good, progress=False)
        equal = lambda sims: all(np.array_equal(sims[name], truth[name]) for name in truth)  # noqa: E731
        for i in range(count):
            shutil.rmtree(bad, ignore_errors=True)
            shutil.copytree(good, bad)
            path = random.choice([p for p in sorted(bad.iterdir()) if p.name != "lock"])
            data = bytearray(path.read_bytes())
            if random.random() < 0.2:
                data = data[: random.randrange(len(data))]
            else:
                data[random.randrange(len(data))] ^= 1 << random.randrange(8)
            path.write_bytes(data)
            try:
                found = nm.sbi.Simulations.open(bad)
                same += len(found["x"]) <= 200 and all(
                    np.array_equal(found[name], truth[name][: len(found["x"])]) for name in truth
                )
            except ValueError:
                told += 1
            if i % 10 == 0:
                try:
                    repaired += equal(nm.simulate(0, model, 200, store=bad, progress=False))
                except ValueError as error:
                    repaired += "another folder" in str(error)
    return told, same, repaired, len(range(0, count, 10))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="of each kind of campaign")
    parser.add_argument("--mutations", type=int, default=2000, help="of stores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job(options.job, options.folder, options.folder / "store")
        return
    random.seed(options.seed)
    print("| fault | tried | outcome | right rows |\n|---|---|---|---|", flush=True)
    for kind, what in [("processes", "own processes"), ("threads", "4 threads"), ("device", "device")]:
        done, campaigns, worst, equal = killed(kind, options.kills)
        loss = (
            "no row lost or changed"
            if kind == "device"
            else f"at most {worst} calls of {NAP * 1e3:.0f} ms made again"
        )
        print(f"| kill -9, {what} | {done} in {campaigns} campaigns | {loss} | {equal} |", flush=True)
    for what, given in [
        ("own processes", {}),
        ("threads", dict(executor=ThreadPoolExecutor(2), crashes=False)),
    ]:
        bad, named, right = rows(**given)
        print(
            f"| calls that go wrong, {what} | {bad} of 120 | those rows in errors: {named} | {right} |",
            flush=True,
        )
    equal, named = dask()
    print(f"| Dask, a worker killed | 1 | no row lost | {equal} |")
    print(f"| Dask, rows that kill workers | 2 of 40 | those rows in errors | {named} |", flush=True)
    told, same, repaired, tries = mutated(options.mutations)
    print(
        f"| store, a bit flipped or cut | {options.mutations} | {told} refused, {same} unharmed | "
        f"{told + same == options.mutations} |"
    )
    print(f"| the same, simulate repeated | {tries} | repaired, or refused | {repaired == tries} |")


if __name__ == "__main__":
    main()
