# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""The options of everything that trains: their names and types, checked once, where the user calls."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import numpy as np
import optax

from numpyro_maf.train.state import TrainState

__all__ = ["FitOptions", "TrainOptions", "check_options"]


class TrainOptions(TypedDict, total=False):
    """Keywords of :func:`train`, which says what they mean."""

    batch_size: int
    learning_rate: float
    max_epochs: int
    patience: float
    optimizer: optax.GradientTransformation | None
    average: float
    anneal: float
    tolerance: float
    progress: bool
    callback: Callable[[TrainState], Any] | None
    state: TrainState | None
    checkpoint: str | os.PathLike[str] | None


class FitOptions(TrainOptions, total=False):
    """Keywords of :func:`numpyro_maf.fit`, which says what they mean."""

    weights: Any
    validation: Any
    standardize: bool
    regression: bool | None


def _between(low, high):
    return lambda v: np.ndim(v) == 0 and low <= float(v + 0) <= high


def _count(value):
    return np.ndim(value) == 0 and value >= 1 and float(value) % 1 == 0


_CHECKS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "batch_size": ("a positive integer", _count),
    "max_epochs": ("a positive integer", _count),
    "patience": ("a positive number", _between(math.ulp(0), math.inf)),
    "learning_rate": ("a positive number", _between(math.ulp(0), 1e300)),
    "average": ("in [0, 1)", _between(0, math.nextafter(1, 0))),
    "anneal": ("in (0, 1]", _between(math.ulp(0), 1)),
    "tolerance": ("a number of at least 0", _between(0, 1e300)),
    "optimizer": ("an optax optimizer or None", lambda v: v is None or hasattr(v, "update")),
    "callback": ("a function or None", lambda v: v is None or callable(v)),
    "checkpoint": ("a folder or None", lambda v: v is None or bool(os.fspath(v))),
    "state": ("a TrainState or None", lambda v: v is None or isinstance(v, TrainState)),
}


def check_options(name: str, options: Mapping[str, Any], kind: type = FitOptions) -> None:
    """Check names and values of options.

    :param name: of the function that the user called.
    :param kind: the TypedDict that lists the options.
    :raises TypeError: for a name that is none of them; the message gives the nearest one.
    :raises ValueError: for a value that an option cannot have.
    """
    known = kind.__annotations__
    for option, value in options.items():
        if option not in known:
            near = difflib.get_close_matches(option, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"its options are {', '.join(sorted(known))}"
            raise TypeError(f"{name} got an unknown option {option!r}; {hint}")
        what, good = _CHECKS.get(option, ("", lambda v: True))
        try:
            fits = good(value)
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError(f"{option} must be {what}, got {value!r}")
