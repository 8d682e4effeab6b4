# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""How the smart home's settings were chosen: scores on days of datatraining.txt held out in turn.

    python benchmarks/occupancy_choices.py DIR           # the folder of the UCI Occupancy files
    python benchmarks/occupancy_choices.py DIR --light

The test files are not opened for a choice. Differences in log-loss are from the first row, by day, with
their standard error over the seven days: among settings within one, the smoothest was taken.
"""

import argparse

import jax
import numpy as np

import numpyro_maf as nm
from numpyro_maf.datasets import load_occupancy
from numpyro_maf.diagnostics import classification_scores
from numpyro_maf.examples.smart_home import OCCUPANCY, learn, replace

SPLINE = nm.RQSpline()
CHOICES = {
    "spline, noise 0.35": replace(OCCUPANCY, scalar=SPLINE, noise=0.35),
    "as shipped: affine, noise 0.5": OCCUPANCY,
    "affine, noise 0.5, hour": replace(OCCUPANCY, hourly=True),
    "affine, noise 0.25": replace(OCCUPANCY, noise=0.25),
    "affine, noise 0.1": replace(OCCUPANCY, noise=0.1),
    "affine, noise 0.5, one member": replace(OCCUPANCY, members=1),
    "spline, noise 0.25, hour": replace(OCCUPANCY, scalar=SPLINE, noise=0.25, hourly=True),
    "spline, noise 0.35, 32x32": replace(OCCUPANCY, scalar=SPLINE, noise=0.35, hidden=(32, 32)),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory")
    parser.add_argument("--light", action="store_true")
    args = parser.parse_args()
    sensors = ("temperature", "humidity", "co2") + (("light",) if args.light else ())
    data = load_occupancy(args.directory)["datatraining"].select(sensors)
    days, day = np.unique(data.time.astype("datetime64[D]"), return_inverse=True)
    first = None
    print("setting | accuracy | log-loss | ECE | log-loss by day | minus first ± se")
    for i, (name, settings) in enumerate(CHOICES.items()):
        homes = learn(jax.random.key(0), data, settings, progress=False)
        for kind in ("flow", "gaussian_diagonal", "gaussian_full") if i == 0 else ("flow",):
            p = homes[kind].held_out
            scores = classification_scores(p, data.activity)
            losses = -np.log(np.maximum(p[np.arange(len(p)), data.activity], 1e-30))
            by_day = np.bincount(day, losses) / np.bincount(day)
            first = by_day if first is None else first
            gap = by_day - first
            print(
                name if kind == "flow" else kind,
                f"{scores['accuracy']:.4f}", f"{scores['log_loss']:.4f}", f"{scores['ece']:.4f}",
                np.array2string(by_day, precision=3),
                f"{gap.mean():+.4f} ± {gap.std(ddof=1) / len(days) ** 0.5:.4f}",
                sep=" | ", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
