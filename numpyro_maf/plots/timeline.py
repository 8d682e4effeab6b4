# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""What a person was doing, minute by minute."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from numpyro_maf.inputs import as_labels, as_numbers
from numpyro_maf.plots.style import COLOURS, bare, finished, ink, palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["activities", "activity_timeline"]


def activities(
    data: Any, probabilities: ArrayLike, *, path: str | os.PathLike[str] | None = None, title: str = ""
) -> Any:
    """The posterior over activities minute by minute, above the true activities and the sensors.

    :param data: :class:`~numpyro_maf.datasets.SensorData` of T minutes. Where the activity is -1, it is not
        known: the minute is hatched.
    :param probabilities: ``(T, K)``; NaN leaves a gap.
    :param path: file to save the picture in; None leaves the figure open in pyplot.
    :param title: of the figure.
    :return: axes ``(2 + S,)``: probabilities, truth, and one for each of S sensors.
    :raises ValueError: for probabilities of another shape, and activities beyond the names.
    """
    import matplotlib.pyplot as plt

    table, activity = _checked(data, probabilities)
    return finished(_drawn(plt.figure, data, table, activity, title), "", path)


def activity_timeline(
    data: Any, probabilities: ArrayLike, *, path: str | os.PathLike[str] | None = None, title: str = ""
) -> Figure:
    """The picture of :func:`activities` as a figure of its own, which pyplot does not know.

    :param data: as for :func:`activities`, and so are ``probabilities`` and ``title``.
    :param path: file to save the picture in; None does not save.
    :return: the matplotlib figure.
    :raises ValueError: for probabilities of another shape, and activities beyond the names.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def own(**options: Any) -> Figure:
        figure = Figure(**options)
        FigureCanvasAgg(figure)
        return figure

    table, activity = _checked(data, probabilities)
    figure = _drawn(own, data, table, activity, title)[0].figure
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def _checked(data: Any, probabilities: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and true activities of the expected shapes."""
    count, steps = len(data.activities), len(data.time)
    table = np.asarray(as_numbers("probabilities", probabilities))
    if table.shape != (steps, count):
        raise ValueError(f"probabilities must be ({steps}, {count}), got {table.shape}")
    if (table < 0).any() or (table > 1 + 1e-3).any():
        raise ValueError("probabilities must be in [0, 1]")
    return table, as_labels("the activities", data.activity, count, least=-1)


def _drawn(new: Any, data: Any, table: np.ndarray, activity: np.ndarray, title: str) -> Any:
    from matplotlib.colors import ListedColormap
    from matplotlib.dates import ConciseDateFormatter
    from matplotlib.patches import Patch

    count = len(data.activities)
    colours = [ink(0.2), COLOURS[1]] if count == 2 else palette(count)
    time, sensors = data.time, data.values.T
    heights = [3.4, 0.35, *[0.9] * len(sensors)]
    figure = new(figsize=(10, 0.9 * sum(heights) + 0.8), layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    axes[0].stackplot(time, table.T, colors=colours, labels=data.activities, lw=0)
    axes[0].set(ylim=(0, 1), ylabel="probability", title=title)
    handles = axes[0].get_legend_handles_labels()[0]
    if (activity < 0).any():
        unknown: dict[str, Any] = dict(facecolor=ink(0.0), edgecolor=ink(0.55), hatch="////", lw=0)
        axes[1].axhspan(0, 1, zorder=0, **unknown)
        handles = [*handles, Patch(label="not known", **unknown)]
    axes[0].legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    known = np.ma.masked_less(np.tile(activity, (2, 1)), 0)
    axes[1].pcolormesh(
        time, [0, 1], known, cmap=ListedColormap(colours), shading="nearest", vmin=-0.5, vmax=count - 0.5
    )
    axes[1].set(yticks=[], ylim=(0, 1))
    axes[1].set_ylabel("truth", rotation=0, ha="right", va="center")
    for axis, values, name, unit in zip(axes[2:], sensors, data.names, data.units):
        axis.plot(time, values, color=ink(0.8), lw=0.9)
        axis.set_ylabel(f"{name}\n{unit}", fontsize=8, rotation=0, ha="right", va="center")
        bare(axis)
        axis.tick_params(labelsize=8)
    axes[-1].xaxis.set_major_formatter(ConciseDateFormatter(axes[-1].xaxis.get_major_locator()))
    axes[-1].set_xlim(time[0], time[-1])
    return axes
