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
    """Least-squares slope of a window, ``(T, ...) -> (T, ...)``; NaN with fewer than three readings."""
    there = ~np.isnan(values)
    count = there.sum(0)
    centre = np.where(there, values, 0.0).sum(0) / np.maximum(count, 1)
    y = np.where(there, values - centre, 0.0)
    t = (np.arange(len(values)) - len(values) / 2).reshape(-1, *(1,) * (values.ndim - 1))
    n, st, stt, sy, sty = (
        _window(v, before, after) for v in (there * 1.0, there * t, there * t * t, y, y * t)
    )
    spread = n * stt - st**2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((n >= 3) & (spread > 1e-9), (n * sty - st * sy) / spread, np.nan)


def _window(values: np.ndarray, before: int, after: int) -> np.ndarray:
    """Sums over slots ``t - before`` to ``t + after``, fewer at both ends, ``(T, ...) -> (T, ...)``."""
    sums = np.concatenate([np.zeros((1, *values.shape[1:])), np.cumsum(values, 0)])
    at = np.arange(len(values))
    first, last = np.maximum(at - before, 0), np.minimum(at + after + 1, len(values))
    return sums.take(last, 0) - sums.take(first, 0)


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
    """Features of one stretch: now, known, memory, there, and owners and looks ahead of memory's columns.

    All sensors of a kind are computed at once; columns stand sensor by sensor.
    """
    slots = [max(int(round(w / step)), 1) for w in WINDOWS]
    columns, owner, ahead = [], [], []

    def add(column, sensor, looks_ahead=False):
        columns.append(column)
        owner.append(sensor)
        ahead.append(looks_ahead)

    known = ~np.isnan(values)
    there = _window(known * 1.0, slots[0], 0) > 0
    now = np.nan_to_num(values).astype(np.float32)
    levels = [j for j, s in enumerate(sensors) if not s.is_event]
    of_level = _levels(values[:, levels], [sensors[j] for j in levels], slots, step)
    whose, flags = _flags(values, sensors)
    shares = [(_mean(flags, w, 0), _mean(flags, 0, w)) for w in slots]
    for j, sensor in enumerate(sensors):
        if not sensor.is_event:
            own, both = of_level[levels.index(j)]
            for column, looks_ahead in own:
                add(column, j, looks_ahead)
            now[:, j] = np.nan_to_num(own[0][0] if both is None else both)
            if both is not None:
                known[:, j] &= np.isfinite(both)
            continue
        for c in np.flatnonzero(whose == j):
            for back, forward in shares:
                add(back[:, c], j)
                add(forward[:, c], j, True)
        if sensor.kind == "count":
            now[:, j] = np.minimum(now[:, j], MOST_COUNT)
            add(np.log1p(np.maximum(values[:, j], 0)), j)
    if len(whose):
        _add_events(add, flags > 0, whose, len(sensors), step)
    memory = np.nan_to_num(np.stack(columns, -1).astype(np.float32))
    return now, known, memory, there, (np.array(owner), np.array(ahead))


def _levels(values, sensors, slots, step):
    """For each sensor of levels its columns, with whether they look ahead, and a slow one's slope."""
    if not sensors:
        return []
    centre, spread, scale = (
        np.array([getattr(s, n) for s in sensors]) for n in ("centre", "spread", "slope")
    )

    def change(before, after):
        return np.arcsinh(slope(values, before, after) / step / scale)

    slopes = [(change(w, 0) / 2, change(0, w) / 2) for w in slots]
    both = change(slots[0], slots[0])
    level = np.arcsinh((values - centre) / spread)
    means = [(_mean(values, w, 0), _mean(values, 0, w)) for w in slots]
    moved = [(np.arcsinh((values - b) / spread), np.arcsinh((f - values) / spread)) for b, f in means]
    found = []
    for c, sensor in enumerate(sensors):
        own = [(level[:, c], False)]
        if sensor.kind == "slow":
            for back, forward in slopes:
                own += [(back[:, c], False), (forward[:, c], True)]
            own.append((both[:, c] / 2, True))
        for back, forward in moved:
            own += [(back[:, c], False), (forward[:, c], True)]
        found.append((own, both[:, c] if sensor.kind == "slow" else None))
    return found


def _flags(values, sensors):
    """Sensors ``(C,)`` and activity ``(T, C)`` of what can be on or off: 1, 0, or NaN where missing."""
    parts = [
        (j, values[:, j] == state if sensor.kind == "categorical" else values[:, j] > 0)
        for j, sensor in enumerate(sensors) if sensor.is_event
        for state in (range(sensor.states) if sensor.kind == "categorical" else (1,))
    ]  # fmt: skip
    whose = np.array([j for j, _ in parts], int)
    flags = np.stack([flag for _, flag in parts], -1) if parts else np.zeros((len(values), 0))
    return whose, np.where(np.isnan(values[:, whose]), np.nan, flags * 1.0)


def _add_events(add, active, whose, shared, step) -> None:
    """Which sensor was the last and will be the next to fire and to change, and how long ago each did."""
    most = max(int(HORIZON / step), 1)
    changed = np.zeros_like(active)
    changed[1:] = active[1:] != active[:-1]
    ending = np.concatenate([changed[1:], np.zeros_like(changed[:1])])
    for flag, later, name in ((active, active, "active"), (changed, ending, "changed")):
        ago, until = _since(flag, most), _since(later[::-1], most)[::-1]
        last = (ago == ago.min(1, keepdims=True)) & (ago < most)
        following = (until == until.min(1, keepdims=True)) & (until < most)
        logs = [np.log1p(counts * step) / np.log1p(HORIZON) for counts in (ago, until)]
        decays = [[np.exp(-counts * step / decay) for decay in DECAYS] for counts in (ago, until)]
        for c, j in enumerate(whose):
            add(flag[:, c], j)
            add(last[:, c], j)
            add(following[:, c], j, True)
            if name == "active":
                for looks_ahead in (False, True):
                    add(logs[looks_ahead][:, c], j, looks_ahead)
                    for decay in decays[looks_ahead]:
                        add(decay[:, c], j, looks_ahead)
        if name == "changed":
            quiet, coming = ago.min(1) * step, until.min(1) * step
            add(np.log1p(quiet) / np.log1p(HORIZON), shared)
            add(np.log1p(coming) / np.log1p(HORIZON), shared, True)
            add(np.log1p(quiet + coming) / np.log1p(HORIZON), shared, True)
