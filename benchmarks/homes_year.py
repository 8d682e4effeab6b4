"""A year of readings every 15 seconds, two million rows: minutes and memory of learning and of answering.

    python benchmarks/homes_year.py [--days 365]

The simulated flat, each minute four times, with a little noise on its levels. Goals: 10 minutes and 4 GB.
"""

import argparse
import resource
import time

import jax
import numpy as np
import pandas as pd

import numpyro_maf as nm
from numpyro_maf import activities
from numpyro_maf.datasets import simulate_flat


def year(days):
    data = simulate_flat(days)
    rng = np.random.default_rng(0)
    values = np.repeat(data.values, 4, 0).astype(np.float32)
    levels = [i for i, name in enumerate(data.names) if name in ("temperature", "humidity", "co2", "power")]
    values[:, levels] *= 1 + 1e-4 * rng.normal(size=(len(values), len(levels))).astype(np.float32)
    start = pd.Timestamp(data.time[0])
    frame = pd.DataFrame(values, columns=list(data.names))
    frame["time"] = pd.date_range(start, periods=len(values), freq="15s")
    frame["activity"] = pd.Categorical.from_codes(np.repeat(data.activity, 4), list(data.activities))
    return frame


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--days", type=int, default=365)
    args = parser.parse_args()
    print(f"numpyro_maf {nm.__version__}, jax {jax.__version__}")

    def told(what, began):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{what}: {time.perf_counter() - began:.0f} s, peak memory so far {peak:.2f} GB", flush=True)

    began = time.perf_counter()
    frame = year(args.days)
    told(f"made a table of {len(frame)} rows", began)
    began = time.perf_counter()
    home = activities.fit(frame, time="time", label="activity")
    told("fit", began)
    print(home)
    began = time.perf_counter()
    p = home.predict(frame)
    told("predict", began)
    right = (p.columns.to_numpy()[p.to_numpy().argmax(1)] == frame["activity"].to_numpy()).mean()
    print(f"accuracy on the rows that it learned from {right:.4f}")


if __name__ == "__main__":
    main()
