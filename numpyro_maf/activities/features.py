# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""What a slot's readings say, and what came before and comes after: features that any home has.

Windows are in minutes, so that they mean the same at any resolution. Each feature belongs to a sensor, and
is left out, for the emission and the recogniser alike, where that sensor's readings are missing; those that
look ahead are left out where the future is not known yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from numpyro_maf.activities.records import Record
from numpyro_maf.activities.sensors import MOST_COUNT, Sensor

__all__ = ["Features", "blocks", "features_at", "features_of", "slope", "time_basis"]

HORIZON = 720  # minutes that are remembered
WINDOWS = (15, 60)  # minutes
DECAYS = (3, 20)  # minutes
HARMONICS = 4
BLOCK = 100_000  # slots whose features are in memory at a time


@dataclass(frozen=True)
class Features:
    """Features of T slots.

    :param now: ``(T, S)``, what the emission models: a slow sensor's slope, another's reading; 0 where
        missing. ``known``: ``(T, S)`` booleans. ``now_ahead``: ``(S,)``, whether it looks ahead.
    :param memory: ``(T, F)``, what the recogniser sees. ``owner``: ``(F,)``, the sensor of each column, S for
        those of the whole home; ``ahead``: ``(F,)``, whether it looks ahead.
    :param there: ``(T, S)``: whether the sensor gave a reading in the last quarter of an hour.
    :param basis: ``(T, H)``, harmonics of the time of day and the weekend.
    """

    now: np.ndarray
    known: np.ndarray
    memory: np.ndarray
    owner: np.ndarray
    ahead: np.ndarray
    there: np.ndarray
    basis: np.ndarray
    now_ahead: np.ndarray

    OF_ROWS: ClassVar[tuple[str, ...]] = ("now", "known", "memory", "there", "basis")

    def rows(self, rows: Any) -> Features:
        """Those of some slots."""
        return replace(self, **{name: getattr(self, name)[rows] for name in self.OF_ROWS})


def time_basis(record: Record) -> np.ndarray:
    """``(T, 2 HARMONICS + 2)``: one, sines and cosines of the hour, weekend."""
    angle = 2 * np.pi * record.hour[:, None] * np.arange(1, HARMONICS + 1) / 24
    weekend = record.weekend[:, None]
    return np.concatenate([np.ones_like(weekend), np.sin(angle), np.cos(angle), weekend], -1).astype(
        np.float32
    )


def features_of(record: Record, sensors: Sequence[Sensor]) -> Features:
    """The features of a record, each stretch by itself."""
    parts = [_stretch(record.values[s], sensors, record.step) for s in record.stretches]
    now, known, memory, there = (np.concatenate([p[i] for p in parts]) for i in range(4))
    ahead = np.array([s.kind == "slow" for s in sensors])
    owner, looks_ahead = parts[0][4]
    return Features(now, known, memory, owner, looks_ahead, there, time_basis(record), ahead)


def blocks(record: Record, sensors: Sequence[Sensor]) -> Iterator[tuple[slice, Features]]:
    """The features of a record of any length, some slots at a time: a year fits in memory.

    They are those of the whole record, because each block sees what is remembered before and after it.
    """
    margin = int(HORIZON / record.step) + 1
    for begin in range(0, len(record), BLOCK):
        end = min(begin + BLOCK, len(record))
        low, high = max(begin - margin, 0), min(end + margin, len(record))
        part = record.part(slice(low, high))
        yield slice(begin, end), features_of(part, sensors).rows(slice(begin - low, end - low))


def features_at(record: Record, sensors: Sequence[Sensor], rows: np.ndarray) -> Features:
    """The features of the slots that a ``(T,)`` mask chooses."""
    parts = [features.rows(rows[where]) for where, features in blocks(record, sensors)]
    of_rows = {n: np.concatenate([getattr(p, n) for p in parts]) for n in Features.OF_ROWS}
    return replace(parts[0], **of_rows)


def slope(values: np.ndarray, before: int, after: int) -> np.ndarray:
    """Least-squares slope of a window, per slot; NaN with fewer than three readings, ``(T,) -> (T,)``."""
    there = ~np.isnan(values)
    centre = values[there].mean() if there.any() else 0.0
    y = np.where(there, values - centre, 0.0)
    t = np.arange(len(values)) - len(values) / 2
    n, st, stt, sy, sty = (
        _window(v, before, after) for v in (there * 1.0, there * t, there * t * t, y, y * t)
    )
    spread = n * stt - st**2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((n >= 3) & (spread > 1e-9), (n * sty - st * sy) / spread, np.nan)


def _window(values: np.ndarray, before: int, after: int) -> np.ndarray:
    """Sums over slots ``t - before`` to ``t + after``, fewer at both ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    return sums[np.minimum(at + after + 1, len(values))] - sums[np.maximum(at - before, 0)]


def _mean(values, before, after):
    """Mean of the readings of a window, NaN without any."""
    there = ~np.isnan(values)
    count = _window(there * 1.0, before, after)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(count > 0, _window(np.where(there, values, 0.0), before, after) / count, np.nan)


def _since(flags: np.ndarray, most: float) -> np.ndarray:
    """Slots since a flag was last up, ``(T, C) -> (T, C)``; ``most`` where it was not."""
    at = np.arange(len(flags))[:, None]
    last = np.maximum.accumulate(np.where(flags, at, -(10**9)), 0)
    return np.minimum(at - last, most)


def _stretch(values, sensors, step):
    """Features of one stretch: now, known, memory, there, and owners and looks ahead of memory's columns."""
    slots = [max(int(round(w / step)), 1) for w in WINDOWS]
    most = max(int(HORIZON / step), 1)
    columns, owner, ahead = [], [], []

    def add(column, sensor, looks_ahead=False):
        columns.append(np.nan_to_num(np.asarray(column, np.float32)))
        owner.append(sensor)
        ahead.append(looks_ahead)

    now = np.zeros(values.shape, np.float32)
    known = ~np.isnan(values)
    there = np.stack([_window(known[:, j] * 1.0, slots[0], 0) > 0 for j in range(values.shape[1])], -1)
    flags, whose = [], []
    for j, sensor in enumerate(sensors):
        v = values[:, j]
        if not sensor.is_event:
            level = np.arcsinh((v - sensor.centre) / sensor.spread)
            add(level, j)
            if sensor.kind == "slow":
                both = np.arcsinh(slope(v, slots[0], slots[0]) / step / sensor.slope)
                now[:, j], known[:, j] = np.nan_to_num(both), np.isfinite(both) & known[:, j]
                for width in slots:
                    add(np.arcsinh(slope(v, width, 0) / step / sensor.slope) / 2, j)
                    add(np.arcsinh(slope(v, 0, width) / step / sensor.slope) / 2, j, True)
                add(both / 2, j, True)
            else:
                now[:, j] = np.nan_to_num(level)
            for width in slots:
                add(np.arcsinh((v - _mean(v, width, 0)) / sensor.spread), j)
                add(np.arcsinh((_mean(v, 0, width) - v) / sensor.spread), j, True)
            continue
        now[:, j] = np.nan_to_num(np.minimum(v, MOST_COUNT) if sensor.kind == "count" else v)
        states = [v == s for s in range(sensor.states)] if sensor.kind == "categorical" else [v > 0]
        for state in states:
            flags.append(state)
            whose.append(j)
            active = np.where(np.isnan(v), np.nan, state * 1.0)
            for width in slots:
                add(_mean(active, width, 0), j)
                add(_mean(active, 0, width), j, True)
        if sensor.kind == "count":
            add(np.log1p(np.maximum(v, 0)), j)
    if flags:
        _add_events(add, np.stack(flags, -1), whose, len(sensors), step, most)
    memory = np.stack(columns, -1)
    return now, known, memory, there, (np.array(owner), np.array(ahead))


def _add_events(add, active, whose, shared, step, most) -> None:
    """Which sensor was the last and will be the next to fire and to change, and how long ago each did."""
    changed = np.zeros_like(active)
    changed[1:] = active[1:] != active[:-1]
    ending = np.concatenate([changed[1:], np.zeros_like(changed[:1])])
    for flag, later, name in ((active, active, "active"), (changed, ending, "changed")):
        ago, until = _since(flag, most), _since(later[::-1], most)[::-1]
        last = (ago == ago.min(1, keepdims=True)) & (ago < most)
        following = (until == until.min(1, keepdims=True)) & (until < most)
        for c, j in enumerate(whose):
            add(flag[:, c], j)
            add(last[:, c], j)
            add(following[:, c], j, True)
            if name == "active":
                for counts, looks_ahead in ((ago, False), (until, True)):
                    minutes = counts[:, c] * step
                    add(np.log1p(minutes) / np.log1p(HORIZON), j, looks_ahead)
                    for decay in DECAYS:
                        add(np.exp(-minutes / decay), j, looks_ahead)
        if name == "changed":
            quiet, coming = ago.min(1) * step, until.min(1) * step
            add(np.log1p(quiet) / np.log1p(HORIZON), shared)
            add(np.log1p(coming) / np.log1p(HORIZON), shared, True)
            add(np.log1p(quiet + coming) / np.log1p(HORIZON), shared, True)
