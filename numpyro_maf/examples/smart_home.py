# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""What is a person at home doing? A simulated flat, or an office with real sensors.

    python -m numpyro_maf.examples.smart_home                    # a simulated flat, seven activities
    python -m numpyro_maf.examples.smart_home --data DIR         # the UCI Occupancy Detection files

All is done by :mod:`numpyro_maf.activities`: this file makes tables, asks, and prints what came of it
beside two linear classifiers.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from numpyro_maf import activities
from numpyro_maf.activities.features import features_of
from numpyro_maf.activities.report import write_report
from numpyro_maf.activities.scores import scores_of
from numpyro_maf.datasets import SensorData, load_occupancy, simulate_flat

Scores = dict[str, dict[str, float]]


def frame_of(data: SensorData) -> pd.DataFrame:
    """A table with a column of times, one of activities, and one for each sensor."""
    frame = pd.DataFrame(data.values, columns=list(data.names))
    return frame.assign(time=data.time, activity=np.array(data.activities)[data.activity])


def classifiers(
    home: activities.Home, train: pd.DataFrame, tests: dict[str, pd.DataFrame]
) -> dict[str, Scores]:
    """Scores of scikit-learn's LDA and logistic regression on the recogniser's features."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def inputs(frame):
        data = home.read(frame)
        features = features_of(data, home.sensors)
        return data, np.concatenate([features.memory, features.basis[:, 1:]], -1)

    data, x = inputs(train)
    known = data.label >= 0
    scores: dict[str, Scores] = {name: {} for name in tests}
    for name, method in {
        "lda": LinearDiscriminantAnalysis(),
        "logistic": make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
    }.items():
        method.fit(x[known], data.label[known])
        for test, frame in tests.items():
            data_test, x_test = inputs(frame)
            scores[test][name] = scores_of(method.predict_proba(x_test), data_test.label, home.step)
    return scores


def run(
    title: str, train: pd.DataFrame, tests: dict[str, pd.DataFrame], out: Path, **options: Any
) -> dict[str, Scores]:
    """Learn from ``train``, answer about ``tests``; scores by test and method. A report goes to ``out``."""
    print(f"\n{title}: learning from {len(train)} minutes", flush=True)
    home = activities.fit(train, time="time", label="activity", **options)
    print(home)
    metrics = classifiers(home, train, tests)
    pages = []
    for name, frame in tests.items():
        metrics[name] = {"home": home.score(frame), "online": home.score(frame, online=True), **metrics[name]}
        pages.append((name, frame, home.predict(frame), metrics[name]["home"]))
        print(f"\n{title}, {name} ({len(frame)} minutes)")
        head = f"{'accuracy':>10s}{'macro-F1':>10s}{'log-loss':>10s}{'ECE':>8s}{'sure but wrong':>16s}"
        print(f"  {'':10s}{head}")
        for method, s in metrics[name].items():
            numbers = f"{s['accuracy']:10.3f}{s['macro_f1']:10.3f}{s['log_loss']:10.3f}{s['ece']:8.3f}"
            print(f"  {method:10s}{numbers}{s['confident_and_wrong_minutes']:12.0f} min")
    out.mkdir(parents=True, exist_ok=True)
    home.save(out / "home.safetensors")
    print(f"  report: {write_report(home, pages, out)}\n  what was learned: {out / 'home.safetensors'}")
    return metrics


def main(argv=None) -> dict[str, dict[str, Scores]]:
    """The command line; the metrics as they go to ``metrics.json``."""
    parser = argparse.ArgumentParser(
        prog="python -m numpyro_maf.examples.smart_home",
        description="What is a person at home doing? Learns from sensors, and answers with probabilities.",
    )
    parser.add_argument("--data", type=Path, help="folder of the UCI Occupancy Detection files")
    parser.add_argument(
        "--out", type=Path, default=Path("out/smart_home"), help="folder for reports and metrics.json"
    )
    parser.add_argument("--days", type=int, default=14, help="training days of the simulated flat")
    parser.add_argument("--steps", type=int, default=600, help="of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    if missing := [name for name in ("matplotlib", "sklearn") if find_spec(name) is None]:
        raise SystemExit(f"the example needs {', '.join(missing)}: pip install 'numpyro_maf[examples]'")
    began = time.perf_counter()
    options = dict(key=args.seed, steps=args.steps, progress=not args.quiet)
    metrics = {}
    if args.data is None:
        train = frame_of(simulate_flat(args.days, seed=args.seed))
        test = frame_of(simulate_flat(7, seed=args.seed + 1, start="2024-01-29"))
        metrics["simulated"] = run("simulated flat", train, {"test": test}, args.out / "flat", **options)
    else:
        files = {stem: frame_of(data) for stem, data in load_occupancy(args.data).items()}
        kept = ["time", "activity", "temperature", "humidity", "co2"]
        for name, columns in {"without_light": kept, "with_light": [*kept, "light"]}.items():
            tests = {stem: frame[columns] for stem, frame in files.items()}
            train = tests.pop("datatraining")
            title = f"office {name.replace('_', ' ')}"
            metrics[name] = run(title, train, tests, args.out / name, **options)
    path = args.out / "metrics.json"
    path.write_text(json.dumps(metrics, indent=2) + "\n")
    print(f"\nfigures: {path}\n{time.perf_counter() - began:.0f} s")
    return metrics


if __name__ == "__main__":
    main()
