# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""From lists of events, as binary sensors record them, to a table of slots."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd

from numpyro_maf.activities.records import MOST_SLOTS, as_frame, label_text, times_of

__all__ = ["from_events"]


def from_events(
    events: Any,
    labels: Any = None,
    *,
    sensor: str = "sensor",
    start: str = "start",
    end: str = "end",
    label: str = "activity",
    minutes: float = 1.0,
) -> pd.DataFrame:
    """A frame of slots from a list of events: ``sensor, start, end``, as binary sensors record them.

    A sensor is on in each slot that one of its events touches. The label of a slot is that of the activity
    that fills most of it, empty where none does. An event that ends before it starts is left out, with a
    warning that names its row.

    :param events: a table with a row for each activation; an event without an end lasts no time.
    :param labels: a table of activities with their ``start`` and ``end``, or None.
    :param minutes: length of a slot.
    :return: columns ``time``, one a sensor, and ``label`` if there are labels.
    :raises ValueError: for a missing column, and for an event without a name.
    """
    events = as_frame(events, "events")
    names, begun, ended = _spans(events, sensor, start, end, "events")
    width = pd.Timedelta(minutes=minutes)
    spans = [(begun, ended)]
    if labels is not None:
        activities, *span = _spans(as_frame(labels, "labels"), label, start, end, "labels")
        spans.append((span[0], span[1]))
    origin = min(a.min() for a, _ in spans).floor(width)
    total = int((max(b.max() for _, b in spans) - origin) // width) + 1
    if total > MOST_SLOTS:
        raise ValueError(
            f"the events span {total} slots of {minutes:g} minutes; give larger slots by minutes="
        )
    columns: dict[str, Any] = {"time": origin + np.arange(total) * width}
    for name in sorted(set(names)):
        mine = names == name
        edges = np.zeros(total + 1)
        np.add.at(edges, (begun[mine] - origin) // width, 1)
        np.add.at(edges, (ended[mine] - origin) // width + 1, -1)
        columns[name] = (np.cumsum(edges)[:-1] > 0).astype(int)
    if labels is not None:
        columns[label] = _longest(activities, *spans[1], origin, width, total)
    return pd.DataFrame(columns)


def _spans(table, column, start, end, name):
    """Names, beginnings and ends of the rows of a table."""
    if column not in table.columns:
        raise ValueError(f"{name} has no column {column!r}; its columns are {list(table.columns)}")
    names = label_text(table[column])
    if names.isna().any():
        row = table.index[int(names.isna().argmax())]
        raise ValueError(f"{name}: column {column!r} is empty at row {row!r}")
    begun = times_of(table, start, name)[1]
    if end in table.columns and table[end].isna().any():
        table = table.assign(**{end: table[end].where(table[end].notna(), table[start])})
    ended = times_of(table, end, name)[1] if end in table.columns else begun
    wrong = np.asarray(ended < begun)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        warnings.warn(
            f"{name}: row {table.index[row]!r} ends at {ended[row]}, before it starts, at {begun[row]}; "
            f"{int(wrong.sum())} such rows are left out", stacklevel=3,
        )  # fmt: skip
    if wrong.all():
        raise ValueError(f"{name} has no row that ends after it starts")
    return names.to_numpy()[~wrong], begun[~wrong], ended[~wrong]


def _longest(names, begun, ended, origin, width, total) -> np.ndarray:
    """The activity that fills most of each slot."""
    filled, best = np.zeros(total), np.full(total, None, object)
    for name in sorted(set(names)):
        share = np.zeros(total)
        for a, b in zip(begun[names == name], ended[names == name]):
            low, high = (a - origin) / width, (b - origin) / width + 1e-9
            first, last = int(low), min(int(high), total - 1)
            share[first : last + 1] += np.minimum(np.arange(first, last + 1) + 1, high) - np.maximum(
                np.arange(first, last + 1), low
            )
        better = share > filled
        filled, best = np.where(better, share, filled), np.where(better, name, best)
    return best
