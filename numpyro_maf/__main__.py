# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""The command ``numpyro-maf``, also ``python -m numpyro_maf``: what it can do, and which part does it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

from numpyro_maf._version import __version__

__all__ = ["main"]

_EPILOG = """\
examples:
  numpyro-maf demo                        learn a density, use it as a prior, learn a posterior: a minute
  numpyro-maf demo --out pictures         the same, with pictures
  numpyro-maf activities --help           what a person at home is doing, from a table of sensors
  numpyro-maf info posterior.safetensors  what is in a saved file; nothing in it is executed
  numpyro-maf bench --builders maf nsf    how fast flows score and sample on this machine

exit codes: 0 done, 1 not done (the message says why), 2 the command was not understood, 130 interrupted
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="numpyro-maf", description="Normalizing flows for NumPyro: a demonstration, homes, files, speed",
        epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"numpyro_maf {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    demo = commands.add_parser(
        "demo", help="three small jobs, with their code and results",
        description="Learn a density from samples, use it as a prior in a model, and learn the posterior of "
        "a simulator. Prints the code of each job and what came of it. Takes about a minute.",
    )  # fmt: skip
    demo.add_argument("--out", metavar="DIR", help="folder for pictures; needs numpyro_maf[plots]")
    demo.add_argument("--quick", action="store_true", help="smaller and rougher, in a few seconds a job")
    demo.add_argument(
        "--only", nargs="+", choices=("density", "prior", "posterior"), metavar="JOB",
        help="density, prior or posterior; the prior needs the density, which is then learned too",
    )  # fmt: skip

    # Its options are its own: see numpyro-maf activities --help.
    commands.add_parser(
        "activities", add_help=False, help="what a person at home is doing, from tables of sensors"
    )

    info = commands.add_parser(
        "info", help="what is in a saved file, in words",
        description="Describe a file of numpyro_maf.save, or a folder of a training or of simulations. Reads "
        "the header only: nothing is executed, and no numbers are loaded.",
    )  # fmt: skip
    info.add_argument("file", metavar="FILE", help="file or folder")
    info.add_argument(
        "--check", action="store_true", help="read all numbers too, and compare the SHA-256 digest"
    )
    info.add_argument("--arrays", action="store_true", help="list every array with its shape and type")

    bench = commands.add_parser(
        "bench", help="how fast flows score and sample on this machine",
        description="Time scoring and sampling of each builder's default flow, compiled, the best of several "
        "rounds. Times depend on the machine; the ratio of sampling to scoring does so less.",
    )  # fmt: skip
    bench.add_argument("--features", type=int, default=8, metavar="D", help="width of an event (default 8)")
    bench.add_argument("--batch", type=int, default=1000, metavar="N", help="events at once (default 1000)")
    bench.add_argument(
        "--hidden", type=int, nargs="+", default=[64, 64], metavar="H", help="hidden widths (default 64 64)"
    )
    bench.add_argument(
        "--rounds", type=int, default=5, metavar="R", help="rounds, the best counts (default 5)"
    )
    bench.add_argument("--builders", nargs="+", metavar="NAME", help="which builders (default: most of them)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    :param argv: arguments; None for those of the process.
    :return: the exit code.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if given[:1] == ["activities"]:
        return _guarded(lambda: _activities(given[1:]), False)
    try:
        args = parser.parse_args(given)
    except SystemExit as end:  # argparse has printed help, version or what is wrong
        return int(end.code or 0)
    if args.command is None:
        parser.print_help()
        return 0
    options = {k: v for k, v in vars(args).items() if k not in ("command", "traceback")}
    module = {"demo": "demonstration", "info": "files", "bench": "speeds"}[args.command]
    run = import_module(f"numpyro_maf.commands.{module}").run
    return _guarded(lambda: run(**options), args.traceback)


def _activities(argv: list[str]) -> int:
    if find_spec("numpyro_maf.activities") is None:
        raise ModuleNotFoundError("this version of numpyro_maf has no command for activities")
    return import_module("numpyro_maf.activities.command").main(argv)


def _guarded(run, traceback: bool) -> int:
    """The exit code of a part, with its errors in words."""
    try:
        return run() or 0
    except KeyboardInterrupt:
        print("numpyro-maf: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # of a reader that had enough, as in: numpyro-maf info FILE | head
        return 0
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError) as error:
        if traceback:
            raise
        words = str(error) or type(error).__name__
        if isinstance(error, OSError) and error.strerror and error.filename:
            words = f"{error.filename}: {error.strerror}"
        print(f"numpyro-maf: {words}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
