# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""The command ``numpyro-maf activities``: from a table of sensors to probabilities, pictures and a report."""

from __future__ import annotations

import argparse
import sys
import time as clock
import warnings
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from numpyro_maf.activities.events import from_events
from numpyro_maf.activities.home import Home, load
from numpyro_maf.activities.learning import fit
from numpyro_maf.activities.records import as_frame
from numpyro_maf.activities.report import write_report
from numpyro_maf.activities.sensors import KINDS

__all__ = ["main"]

_EPILOG = """\
a table is a CSV file with a header: a column of times, one of labels, and one for each sensor

  time,activity,bed,kitchen motion,temperature
  2024-01-01 07:00,sleeping,1,0,19.5
  2024-01-01 07:01,,1,0,19.5            (the activity is not known)
  2024-01-01 07:02,cooking,0,1,         (the temperature is missing)

examples:
  learn from train.csv, and say what happened in new.csv:
    numpyro-maf activities train.csv --time time --label activity --predict new.csv --out results
  learn, and keep what was learned:
    numpyro-maf activities train.csv --time time --label activity --save home.safetensors
  use it later:
    numpyro-maf activities --home home.safetensors --predict new.csv --out results
  from a list of events (sensor, start, end) and one of activities (activity, start, end):
    numpyro-maf activities events.csv --events labels.csv --save home.safetensors

in --out: probabilities_NAME.csv, a picture for each day, report.html; if the table to predict has
labels, they are not looked at but compared with

exit codes: 0 done, 1 not done (the message says why), 2 the command was not understood, 130 interrupted
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="numpyro-maf activities",
        description="What is a person at home doing? Learns from a table of sensor readings with some "
        "labels, and answers with the probability of each activity at each time.",
        epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("train", nargs="?", metavar="TRAIN.csv", help="table to learn from")
    parser.add_argument("--time", default="time", help="column of times (default: time)")
    parser.add_argument("--label", default="activity", help="column of activities (default: activity)")
    parser.add_argument(
        "--sensors", nargs="+", metavar="NAME[=KIND]",
        help=f"columns to use; kinds: {', '.join(KINDS)} (default: all columns, kinds found out)",
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=float, help="length of a slot (default: the usual distance of rows)"
    )
    parser.add_argument("--events", metavar="LABELS.csv", help="TRAIN.csv lists events: sensor, start, end")
    parser.add_argument("--home", metavar="FILE", help="use what was saved instead of learning")
    parser.add_argument("--predict", nargs="+", default=[], metavar="CSV", help="tables to answer about")
    parser.add_argument("--online", action="store_true", help="answer from what came before each row only")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="folder for results (default: print a summary)"
    )
    parser.add_argument("--save", metavar="FILE", type=Path, help="keep what was learned in this file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    parser = _parser()
    given = list(sys.argv[1:] if argv is None else argv)
    if not given:
        parser.print_help()
        return 0
    try:
        args = parser.parse_args(given)
        if bool(args.train) == bool(args.home):
            parser.error("give a table to learn from or --home FILE, and not both")
        if not (args.predict or args.save):
            parser.error("nothing to do: give --predict CSV or --save FILE")
    except SystemExit as end:
        return int(end.code or 0)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
            warnings.simplefilter("always", UserWarning)
            _run(args)
    except KeyboardInterrupt:
        print("numpyro-maf activities: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        print(f"numpyro-maf activities: {error}", file=sys.stderr)
        return 1
    return 0


def _run(args) -> None:
    began = clock.perf_counter()
    home = load(args.home) if args.home else _learned(args)
    print(home)
    if args.save:
        home.save(args.save)
        print(f"saved in {args.save}")
    pages = []
    for name in args.predict:
        frame = _table(name, args, home.label)
        if home.time not in frame.columns:
            raise ValueError(f"{name} has no column {home.time!r}; its columns are {list(frame.columns)}")
        p = home.predict(frame, online=args.online)
        labelled = home.label in frame.columns and frame[home.label].notna().any()
        scores = home.score(frame, online=args.online) if labelled else None
        shares = p.mean().sort_values(ascending=False)
        print(
            f"{name}: {len(frame)} rows; "
            + ", ".join(f"{a} {s:.0%}" for a, s in shares.items() if s >= 0.005)
        )
        if scores:
            print("  " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
        pages.append((name, frame, p, scores))
    if args.out:
        report = write_report(home, pages, args.out)
        print(f"report: {report}")
    print(f"{clock.perf_counter() - began:.0f} s")


def _learned(args) -> Home:
    frame = _table(args.train, args, args.label)
    sensors = None
    if args.sensors:
        pairs = [
            text.rpartition("=") if text.rpartition("=")[2] in KINDS else (text, "", "")
            for text in args.sensors
        ]
        sensors = {name: kind or None for name, _, kind in pairs}
    return fit(
        frame, time=args.time, label=args.label, sensors=sensors, minutes=args.minutes, key=args.seed,
        progress=not args.quiet,
    )  # fmt: skip


def _table(path: str, args, label: str) -> pd.DataFrame:
    frame = _read(path)
    if args.events and path == args.train:
        return from_events(frame, _read(args.events), label=label, minutes=args.minutes or 1.0).rename(
            columns={"time": args.time}
        )
    return frame


def _read(path: str) -> pd.DataFrame:
    try:
        frame = pd.read_csv(path, sep=None, engine="python", skipinitialspace=True)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a table: {error}") from error
    frame.index = pd.RangeIndex(2, len(frame) + 2, name="line")  # errors name the line of the file
    return as_frame(frame.dropna(axis=1, how="all"), path) if len(frame) else as_frame(frame, path)
