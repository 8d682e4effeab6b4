# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""From a data frame to a regular grid of slots: times, readings and labels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from numpyro_maf.activities.sensors import Sensor, readings

__all__ = [
    "MOST_SLOTS",
    "Record",
    "as_frame",
    "gathered",
    "label_names",
    "label_text",
    "record",
    "slot_start",
    "times_of",
]

LONGEST_GAP = pd.Timedelta(hours=6)  # the record is cut where nothing was recorded for longer
MOST_SLOTS = 50_000_000
_OFFSET = r"(?<=[0-9])\s*(?:Z|[+-][0-9]{2}:?[0-9]{2})$"


@dataclass(frozen=True)
class Record:
    """T slots of equal length; slots in which nothing was recorded are there, with NaN.

    :param time: ``(T,)`` local wall time, datetime64[ns]; ``starts``: ``(T,)``, where a stretch begins.
    :param values: ``(T, S)``, NaN where missing; ``label``: ``(T,)``, -1 where unknown.
    :param slot: for each row of the frame, its slot.
    :param step: length of a slot in minutes.
    """

    time: np.ndarray
    starts: np.ndarray
    values: np.ndarray
    label: np.ndarray
    slot: np.ndarray
    step: float

    def __len__(self) -> int:
        return len(self.time)

    @property
    def hour(self) -> np.ndarray:
        """Hour of the day in [0, 24)."""
        return (self.time - self.time.astype("datetime64[D]")) / np.timedelta64(1, "h")

    @property
    def weekend(self) -> np.ndarray:
        """Whether the day is a Saturday or Sunday."""
        return (self.time.astype("datetime64[D]").astype(np.int64) + 3) % 7 >= 5

    @property
    def day(self) -> np.ndarray:
        """``(T,)``: the number of the calendar day, from 0, without days that are not there."""
        return np.unique(self.time.astype("datetime64[D]"), return_inverse=True)[1]

    def part(self, rows: slice) -> Record:
        """Some consecutive slots, the first of which begins a stretch."""
        starts = self.starts[rows].copy()
        starts[0] = True
        none = np.zeros(0, np.int64)
        return Record(self.time[rows], starts, self.values[rows], self.label[rows], none, self.step)

    @property
    def stretches(self) -> list[slice]:
        """The slots of each stretch without a long gap."""
        first = np.flatnonzero(self.starts)
        return [slice(a, b) for a, b in zip(first, [*first[1:], len(self)])]


def as_frame(frame: Any, name: str = "frame") -> pd.DataFrame:
    """A pandas DataFrame of a pandas, polars or xarray table.

    :raises TypeError: for something else.
    :raises ValueError: for a table without rows, or with two columns of one name.
    """
    if not isinstance(frame, pd.DataFrame):
        if hasattr(frame, "to_dataframe"):  # xarray
            frame = frame.to_dataframe().reset_index()
        elif (
            hasattr(frame, "to_dict") and hasattr(frame, "columns") and hasattr(frame, "to_pandas")
        ):  # polars
            frame = pd.DataFrame({str(c): frame[c].to_list() for c in frame.columns})
        elif hasattr(frame, "to_pandas"):
            frame = frame.to_pandas()
        else:
            raise TypeError(
                f"{name} must be a DataFrame of pandas, polars or xarray, got {type(frame).__name__}"
            )
    if not len(frame):
        raise ValueError(f"{name} has no rows")
    if twice := list(frame.columns[frame.columns.duplicated()]):
        raise ValueError(f"{name} has two columns named {twice[0]!r}")
    return frame


def times_of(
    frame: pd.DataFrame, time: str, name: str = "frame"
) -> tuple[pd.DatetimeIndex, pd.DatetimeIndex]:
    """Instants and local wall times of a frame's rows.

    :param time: a column, or the name of the index.
    :raises ValueError: for a missing column, for numbers, and for what is no time, with its row.
    """
    if time in frame.columns:
        column = frame[time]
    elif frame.index.name == time or (isinstance(frame.index, pd.DatetimeIndex) and time in (None, "index")):
        column = frame.index.to_series()
    else:
        raise ValueError(f"{name} has no column {time!r} for the time; its columns are {list(frame.columns)}")
    if pd.api.types.is_numeric_dtype(column.dtype):
        raise ValueError(
            f"column {time!r} holds numbers, not times; convert them, for instance by "
            f"pandas.to_datetime(frame[{time!r}], unit='s')"
        )
    offsets = not _is_time(column) and _has_offsets(column)
    style = None if _is_time(column) else "mixed"
    stamps = pd.to_datetime(column, errors="coerce", format=style, utc=offsets)
    bad = stamps.isna().to_numpy()
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"column {time!r} of {name}: {column.iloc[row]!r} at row {frame.index[row]!r} is no time "
            f"({int(bad.sum())} such rows)"
        )
    instants = pd.DatetimeIndex(stamps)
    if instants.tz is None:
        return instants.as_unit("ns"), instants.as_unit("ns")
    wall = instants.tz_localize(None)
    if offsets:  # which may differ from row to row: the wall time is what the text says without them
        bare = column.astype(str).str.strip().str.replace(_OFFSET, "", regex=True)
        wall = pd.DatetimeIndex(pd.to_datetime(bare, format="mixed"))
    return instants.tz_convert("UTC").tz_localize(None).as_unit("ns"), wall.as_unit("ns")


def _is_time(column) -> bool:
    return pd.api.types.is_datetime64_any_dtype(column.dtype)


def _has_offsets(column) -> bool:
    """Whether a column of text gives times with offsets."""
    return bool(column.astype(str).str.strip().str.contains(_OFFSET, regex=True).any())


def record(
    frame: pd.DataFrame,
    time: str,
    sensors: Sequence[Sensor],
    *,
    label: str | None = None,
    activities: Sequence[str] = (),
    minutes: float | None = None,
    name: str = "frame",
) -> Record:
    """The frame on a grid.

    Rows may come in any order, irregularly, and several in a slot: see :func:`gathered`; the most frequent
    label holds.

    :param sensors: a sensor that the frame lacks is missing.
    :param activities: the names of the labels; a label that is none of them is an error.
    :param minutes: length of a slot; None for the usual distance of rows.
    """
    instants, local = times_of(frame, time, name)
    order = np.argsort(instants.to_numpy(), kind="stable")
    at = instants.to_numpy()[order].astype("datetime64[ns]").astype(np.int64)
    gaps = np.diff(at)
    if minutes is None:
        positive = gaps[gaps > 0]
        minutes = float(np.round(np.median(positive) / 1e9)) / 60 if len(positive) else 1.0
        minutes = minutes or float(np.median(positive)) / 6e10
    if not minutes > 0:
        raise ValueError(f"minutes must be positive, got {minutes}")
    width = int(round(minutes * 6e10))
    # Number the slots of each stretch from its first row.
    cut = np.r_[True, gaps > max(LONGEST_GAP.value, 3 * width)]
    first = at[cut][np.cumsum(cut) - 1]
    first = slot_start(first, width)
    within = (at - first) // width
    ends = np.r_[np.flatnonzero(cut)[1:] - 1, len(at) - 1]
    lengths = within[ends] + 1
    offset = np.r_[0, np.cumsum(lengths)[:-1]]
    total = int(lengths.sum())
    if total > MOST_SLOTS:
        raise ValueError(f"{name} spans {total} slots of {minutes:g} minutes; give larger slots by minutes=")
    slot_sorted = within + offset[np.cumsum(cut) - 1]
    slot = np.empty(len(at), np.int64)
    slot[order] = slot_sorted
    starts = np.zeros(total, bool)
    starts[offset] = True
    instants_of = np.repeat(first[cut], lengths) + (np.arange(total) - np.repeat(offset, lengths)) * width
    shift = local.to_numpy().astype("datetime64[ns]").astype(np.int64)[order] - at
    known = np.zeros(total, np.int64)
    known[slot_sorted] = np.arange(len(at)) + 1
    wall = instants_of + shift[np.maximum(np.maximum.accumulate(known) - 1, 0)]

    values = np.full((total, len(sensors)), np.nan)
    for j, sensor in enumerate(sensors):
        if sensor.name in frame.columns:
            numbers = readings(frame[sensor.name], sensor)[0]
            values[:, j] = gathered(numbers[order], slot_sorted, total, sensor)
    labels = np.full(total, -1, np.int64)
    if label is not None:
        labels = _majority(_codes(frame, label, activities, name), slot, total, len(activities))
    return Record(wall.astype("datetime64[ns]"), starts, values, labels, slot, minutes)


def slot_start(instant: Any, width: int) -> Any:
    """Where the first slot begins, in nanoseconds: on the clock, if slots of this width divide a day."""
    return instant - instant % width if 86_400 * 10**9 % width == 0 else instant


def gathered(numbers: np.ndarray, slot: np.ndarray, total: int, sensor: Sensor) -> np.ndarray:
    """``(total,)``: the readings of each slot as one, NaN without any.

    Of levels it is the mean, of counts the sum; what is on or off was on if it was on once; of states the
    last holds.

    :param numbers: ``(rows,)`` in the order of time, NaN where missing; ``slot``: ``(rows,)``.
    """
    there = ~np.isnan(numbers)
    numbers, slot = numbers[there], slot[there]
    out = np.full(total, np.nan)
    if sensor.kind == "categorical":
        out[slot] = numbers
        return out
    if sensor.kind == "binary":
        out[slot] = 0.0
        out[slot[numbers > 0]] = 1.0
        return out
    count = np.bincount(slot, minlength=total)
    centre = numbers.mean() if len(numbers) and sensor.kind != "count" else 0.0
    sums = np.bincount(slot, numbers - centre, minlength=total)
    share = np.ones(total) if sensor.kind == "count" else np.maximum(count, 1)
    return np.where(count > 0, sums / share + centre, np.nan)


def label_names(frame: pd.DataFrame, label: str, name: str = "frame") -> tuple[str, ...]:
    """The activities of a column of labels, sorted; empty cells say that the activity is not known."""
    if label not in frame.columns:
        raise ValueError(
            f"{name} has no column {label!r} for the label; its columns are {list(frame.columns)}"
        )
    return tuple(sorted({*label_text(frame[label]).dropna()}))


def label_text(column: pd.Series) -> pd.Series:
    """Labels as text, missing where a cell is empty."""
    text = column.astype(str).str.strip()
    if pd.api.types.is_float_dtype(column.dtype):
        whole = column.dropna().mod(1).eq(0).all()
        text = column.map(lambda v: str(int(v)) if whole and v == v else str(v))
    empty = column.isna() | text.isin(["", "nan", "None", "<NA>", "NaT"])
    return text.where(~empty)


def _codes(frame, label, activities, name) -> np.ndarray:
    if label not in frame.columns:
        raise ValueError(
            f"{name} has no column {label!r} for the label; its columns are {list(frame.columns)}"
        )
    text = label_text(frame[label])
    codes = pd.Index(list(activities)).get_indexer(pd.Index(text)).astype(np.int64)
    new = (codes < 0) & text.notna().to_numpy()
    if new.any():
        row = int(np.flatnonzero(new)[0])
        raise ValueError(
            f"column {label!r}: {text.iloc[row]!r} at row {frame.index[row]!r} is an activity that was not "
            f"in training; the activities are {list(activities)}"
        )
    return codes


def _majority(codes, slot, total, states) -> np.ndarray:
    known = codes >= 0
    if not known.any():
        return np.full(total, -1, np.int64)
    pairs, counts = np.unique(slot[known] * states + codes[known], return_counts=True)
    at = pairs // states
    order = np.lexsort((-counts, at))
    first = np.r_[True, np.diff(at[order]) > 0]
    out = np.full(total, -1, np.int64)
    out[at[order][first]] = (pairs % states)[order][first]
    if len(pairs) > first.sum():
        share = 1 - counts[order][first].sum() / counts.sum()
        if share > 0.05:
            warnings.warn(
                f"{share:.0%} of the labels differ from others of the same slot; the most frequent "
                "one holds. Does the table hold more than one person, or are slots too long?", stacklevel=4,
            )  # fmt: skip
    return out
