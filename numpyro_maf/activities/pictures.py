# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""The picture of a day at home."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_maf.activities.records import Record
from numpyro_maf.plots.style import bare, ink, palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["day_picture", "days_of"]


def days_of(data: Record) -> np.ndarray:
    """The calendar days of a record."""
    return np.unique(data.time.astype("datetime64[D]"))


def day_picture(
    home: Any, data: Record, p: np.ndarray, *, day: Any = None,
    path: str | os.PathLike[str] | None = None, title: str = "",
) -> Figure:  # fmt: skip
    """A row for each activity: its probability as a band of colour, and the label as a line above it.

    :param home: a :class:`~numpyro_maf.activities.Home`; ``data``: what it read; ``p``: ``(T, K)``.

    Below the activities are the sensors: when those that are on or off were on, and the curves of levels.

    :raises ValueError: for a day that the record does not have.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.dates import ConciseDateFormatter, date2num
    from matplotlib.figure import Figure

    days = days_of(data)
    day = days[0] if day is None else np.datetime64(str(day)[:10], "D")
    if day not in days:
        raise ValueError(f"the frame has no {day}; it has {days[0]} to {days[-1]}")
    rows = data.time.astype("datetime64[D]") == day
    times, label = data.time[rows], data.label[rows]
    events = [j for j, s in enumerate(home.sensors) if s.is_event]
    levels = [j for j in range(len(home.sensors)) if j not in events]
    count = len(home.activities)
    heights = [0.3 * count + 0.3] + ([0.17 * len(events) + 0.3] if events else []) + [0.7] * len(levels)
    figure = Figure(figsize=(10, sum(heights) + 1.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = np.atleast_1d(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights))
    width = home.step / 1440
    left = date2num(times)
    top = axes[0]
    known = False
    for k, (name, colour) in enumerate(zip(home.activities, palette(count))):
        spans = _spans(p[rows, k] > 0.01)
        for a, b in spans:
            strip = np.ones((1, b - a, 4))
            strip[..., :3] = _rgb(colour)
            strip[..., 3] = p[rows, k][a:b].clip(0, 1)
            top.imshow(
                strip, extent=(left[a], left[b - 1] + width, k - 0.1, k + 0.38), aspect="auto",
                interpolation="nearest", zorder=2,
            )  # fmt: skip
        for a, b in _spans(label == k):
            known = True
            top.plot(
                [left[a], left[b - 1] + width], [k - 0.28] * 2, color=ink(0.85), lw=2.5, solid_capstyle="butt"
            )
        top.text(-0.01, k, name, transform=top.get_yaxis_transform(), ha="right", va="center", fontsize=9)
    if known:
        for a, b in _spans(label < 0):
            top.axvspan(
                left[a], left[b - 1] + width, facecolor="none", edgecolor=ink(0.3), hatch="////", lw=0
            )
    top.set(ylim=(count - 0.5, -0.5), yticks=[])
    legend = "bands: probability" + ("; lines: what it was" if known else "")
    legend += "; hatched: not known" if known and (label < 0).any() else ""
    top.set_title(f"{title or day}\n{legend}", fontsize=10, loc="left")
    bare(top)
    place = 1
    if events:
        axis = axes[1]
        place = 2
        for i, j in enumerate(events):
            value = data.values[rows, j]
            for a, b in _spans(value > 0):
                axis.plot([left[a], left[b - 1] + width], [i, i], color=ink(0.8), lw=4, solid_capstyle="butt")
            for a, b in _spans(np.isnan(value)):
                axis.plot([left[a], left[b - 1] + width], [i, i], color=ink(0.3), lw=1, ls=":")
            axis.text(
                -0.01, i, home.sensors[j].name, transform=axis.get_yaxis_transform(), ha="right", va="center",
                fontsize=8,
            )  # fmt: skip
        axis.set(ylim=(len(events) - 0.5, -0.5), yticks=[])
        bare(axis)
    for axis, j in zip(axes[place:], levels):
        axis.plot(left, data.values[rows, j], color=ink(0.8), lw=0.9)
        axis.set_ylabel(home.sensors[j].name, fontsize=8, rotation=0, ha="right", va="center")
        axis.tick_params(labelsize=8)
        bare(axis)
    axes[-1].set_xlim(left[0], left[-1] + width)
    axes[-1].xaxis_date()
    axes[-1].xaxis.set_major_formatter(ConciseDateFormatter(axes[-1].xaxis.get_major_locator()))
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def _rgb(colour: Any) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    return to_rgb(colour)


def _spans(flags: np.ndarray) -> list[tuple[int, int]]:
    """Beginnings and ends of the runs of True."""
    edges = np.flatnonzero(np.diff(np.r_[False, np.asarray(flags, bool), False]))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))
