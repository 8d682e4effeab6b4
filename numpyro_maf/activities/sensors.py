# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Sensors of any name: which kind each is, and its readings as numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from numpyro_maf.codec import storable

__all__ = ["KINDS", "Sensor", "find_sensors", "readings"]

KINDS = {
    "slow": "a level that drifts, such as temperature, humidity or CO2: its slope tells more than its value",
    "fast": "a level that jumps, such as light or power",
    "count": "how often something happened in a slot: 0, 1, 2, …",
    "binary": "on or off: motion, doors, pressure",
    "categorical": "one of a few names or codes",
}
ON = {"on", "true", "yes", "open", "1", "1.0", "active", "detected", "occupied", "present", "motion"}
OFF = {"off", "false", "no", "closed", "close", "0", "0.0", "inactive", "clear", "vacant", "absent", "idle"}
MOST_LEVELS = 30  # of a column of text, to be taken for names of states
MOST_COUNT = 15  # larger counts are taken for this one by the emission


@storable
@dataclass(frozen=True)
class Sensor:
    """A column of readings.

    :param name: of the column; ``kind``: one of :data:`KINDS`.
    :param levels: the names of a categorical sensor's states.
    :param centre: typical level, for ``slow`` and ``fast``; ``spread``: typical distance from it.
    :param slope: typical slope of a slow sensor, units a minute.
    """

    name: str
    kind: str
    levels: tuple[str, ...] = ()
    centre: float = 0.0
    spread: float = 1.0
    slope: float = 1.0

    @property
    def is_event(self) -> bool:
        """Whether the sensor is off or on, rather than high or low."""
        return self.kind in ("binary", "count", "categorical")

    @property
    def states(self) -> int:
        """The number of states of a categorical sensor, 1 for another."""
        return max(len(self.levels), 1) if self.kind == "categorical" else 1


def readings(column: pd.Series, sensor: Sensor | None = None) -> tuple[np.ndarray, tuple[str, ...]]:
    """A column as floats, NaN where missing, and the names that its numbers stand for.

    :param sensor: how the column was read when the home was learned; None to find out.
    :raises ValueError: for text among numbers and for a state that the sensor never had, with the row.
    """
    name = str(column.name)
    if pd.api.types.is_datetime64_any_dtype(column.dtype):
        raise ValueError(f"sensor {name!r} holds times; leave it out of sensors=, or name it as time=")
    levels = sensor.levels if sensor is not None else ()
    is_text = not pd.api.types.is_numeric_dtype(column.dtype) and not pd.api.types.is_bool_dtype(column.dtype)
    if not is_text and not levels:
        values = column.to_numpy(dtype=float, na_value=np.nan)
        wrong = np.isinf(values)
        if wrong.any():
            raise ValueError(f"sensor {name!r} is infinite at row {_first(column, wrong)}")
        return values, ()
    text = column.astype(str).str.strip()
    missing = (
        column.isna().to_numpy()
        | text.str.lower().isin(["", "nan", "none", "unknown", "unavailable", "null"]).to_numpy()
    )
    if levels:
        return _coded(column, text, missing, levels, name)
    numbers = pd.to_numeric(text.where(~missing), errors="coerce").to_numpy(dtype=float)
    bad = np.isnan(numbers) & ~missing
    if not bad.any():
        return numbers, ()
    lower = text.str.lower()
    switch = lower.isin(ON | OFF).to_numpy() | missing
    if switch.all():
        return np.where(missing, np.nan, lower.isin(ON).to_numpy(dtype=float)), ()
    found = sorted(set(text[~missing]))
    if not np.isnan(numbers[~missing]).all() or len(found) > MOST_LEVELS:
        row = _first(column, bad)
        what = (
            "text among its numbers" if len(found) <= MOST_LEVELS or (~bad).any() else "more text than states"
        )
        raise ValueError(
            f"sensor {name!r} holds {what}: {column.loc[row]!r} at row {row!r}; repair the cell, make it "
            "empty, or leave the column out of sensors="
        )
    return _coded(column, text, missing, tuple(found), name)


def _coded(column, text, missing, levels, name):
    codes = pd.Index(list(levels)).get_indexer(pd.Index(text)).astype(float)
    new = (codes < 0) & ~missing
    if new.any():
        row = _first(column, new)
        raise ValueError(
            f"sensor {name!r} is {column.loc[row]!r} at row {row!r}, a state that it did not have in "
            f"training; it had {list(levels)}"
        )
    return np.where(missing | (codes < 0), np.nan, codes), levels


def _first(column, wrong) -> Any:
    return column.index[int(np.flatnonzero(wrong)[0])]


def find_sensors(frame: pd.DataFrame, sensors, others: set[str]) -> list[tuple[str, str | None]]:
    """Names and given kinds of the sensors.

    :param sensors: names, kinds by name, or None for all columns but the ``others``.
    :raises ValueError: for unknown columns and kinds, and for no sensor at all.
    """
    if isinstance(sensors, str):
        sensors = [sensors]
    if sensors is None:
        found: list[tuple[str, str | None]] = [(str(c), None) for c in frame.columns if c not in others]
    else:
        kinds = sensors if isinstance(sensors, dict) else {}
        found = [(str(name), kinds.get(name)) for name in sensors]
    if unknown := [name for name, _ in found if name not in frame.columns]:
        raise ValueError(f"the frame has no column {unknown[0]!r}; its columns are {list(frame.columns)}")
    for name, kind in found:
        if kind is not None and kind not in KINDS:
            raise ValueError(f"sensor {name!r}: kind must be one of {sorted(KINDS)}, got {kind!r}")
    if not found:
        raise ValueError("the frame has no sensor: it needs a column beside time and label")
    return found


def find_kind(values: np.ndarray, levels: tuple[str, ...]) -> str:
    """The kind of a sensor from its readings on the grid, ``(T,)`` with NaN."""
    if levels:
        return "categorical"
    known = values[~np.isnan(values)]
    if np.isin(known, (0.0, 1.0)).all():
        return "binary"
    whole = (known == np.round(known)).all() and known.min() >= 0
    if whole and np.median(known) <= 1 and known.max() <= 100:
        return "count"
    steps = np.abs(np.diff(values))
    steps = steps[~np.isnan(steps)]
    low, high = np.quantile(known, [0.02, 0.98])
    width = high - low if high > low else np.ptp(known)
    # A level that crosses a third of its range from one reading to the next is no drift.
    return "fast" if len(steps) and np.quantile(steps, 0.999) > 0.3 * width else "slow"


def scaled(sensor: Sensor, values: np.ndarray, slopes: np.ndarray) -> Sensor:
    """The sensor with typical level, spread and slope of its readings."""
    if sensor.is_event:
        return sensor
    known = values[~np.isnan(values)]
    low, centre, high = np.quantile(known, [0.1, 0.5, 0.9])
    spread = (high - low) / 2 or float(np.std(known)) or max(abs(centre), 1.0)
    slopes = np.abs(slopes[np.isfinite(slopes)])
    typical = float(np.quantile(slopes, 0.7)) if len(slopes) else 0.0
    typical = typical or float(slopes.mean() if len(slopes) else 0.0) or spread / 60
    return replace(sensor, centre=float(centre), spread=float(spread), slope=typical)
