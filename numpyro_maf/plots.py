# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Pictures. Each function draws one kind of result; matplotlib is imported on use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["activity_timeline", "calibration", "loss_curves"]

COLOURS = ("#31508c", "#d1495b", "#edae49", "#7fb069", "#8d6a9f", "#4aa3a2", "#c9c9c9")


def activity_timeline(
    data: Any, probabilities: ArrayLike, *, path: str | os.PathLike[str] | None = None, title: str = ""
) -> Figure:
    """The posterior over activities minute by minute, above the true activities and the sensors.

    :param data: :class:`~numpyro_maf.datasets.SensorData` of T minutes. An activity of -1 is not known: its
        minute stays empty.
    :param probabilities: ``(T, K)``.
    :param path: where to save a PNG; None does not save.
    :return: the matplotlib figure.
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from matplotlib.dates import ConciseDateFormatter

    count = len(data.activities)
    colours: list[Any] = list(COLOURS[:count])
    if count == 2:
        colours = [COLOURS[-1], COLOURS[1]]
    elif count > len(COLOURS):
        colours = list(colormaps["turbo"](np.linspace(0, 1, count)))
    time, sensors = data.time, data.values.T
    heights = [3.4, 0.35, *[0.9] * len(sensors)]
    figure = _figure(10, 0.9 * sum(heights) + 0.8)
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    axes[0].stackplot(time, np.asarray(probabilities).T, colors=colours, labels=data.activities, lw=0)
    axes[0].set(ylim=(0, 1), ylabel="probability", title=title)
    axes[0].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    known = np.ma.masked_less(np.tile(data.activity, (2, 1)), 0)
    axes[1].pcolormesh(
        time, [0, 1], known, cmap=ListedColormap(colours), shading="nearest", vmin=-0.5, vmax=count - 0.5
    )
    axes[1].set(yticks=[], ylim=(0, 1))
    axes[1].set_ylabel("truth", rotation=0, ha="right", va="center")
    for axis, values, name, unit in zip(axes[2:], sensors, data.names, data.units):
        axis.plot(time, values, color="#333333", lw=0.9)
        axis.set_ylabel(f"{name}\n{unit}", fontsize=8, rotation=0, ha="right", va="center")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[-1].xaxis.set_major_formatter(ConciseDateFormatter(axes[-1].xaxis.get_major_locator()))
    axes[-1].set_xlim(time[0], time[-1])
    return _saved(figure, path)


def loss_curves(
    results: Mapping[str, Any],
    *,
    window: int = 50,
    axis: Axes | None = None,
    path: str | os.PathLike[str] | None = None,
    title: str = "",
) -> Figure:
    """Losses by step or epoch, each beneath its running median.

    :param results: by label: NumPyro's ``SVIRunResult``, a :class:`~numpyro_maf.FitResult`, whose validation
        loss is drawn dashed, or an array of losses.
    :param window: of the median, in steps.
    :param axis: matplotlib's, to draw on; None for a figure of its own.
    :param path: where to save a PNG; None does not save.
    :return: the matplotlib figure.
    """
    axes: Any = _figure(7, 3.2).subplots() if axis is None else axis
    settled: list[Any] = []
    for i, (label, result) in enumerate(results.items()):
        losses = getattr(result, "losses", getattr(result, "train_loss", result))
        losses = np.asarray(losses, float)
        width = max(min(window, len(losses) // 10), 1)
        windows = np.lib.stride_tricks.sliding_window_view(losses, width)
        middle = np.nanmedian(windows, -1)
        axes.plot(losses, color=f"C{i}", alpha=0.2, lw=0.6)
        axes.plot(np.arange(len(middle)) + width // 2, middle, color=f"C{i}", lw=1.4, label=label)
        validation = getattr(result, "validation_loss", np.array([]))
        if len(validation):
            axes.plot(validation, color=f"C{i}", lw=1.4, ls="--", label=f"{label}, held out")
        tail = losses[len(losses) // 4 :]
        settled += [np.nanquantile(tail, q) for q in (0.01, 0.99)]
    low, high = min(settled), max(settled)
    margin = 0.3 * (high - low) + 1e-9
    axes.set(ylim=(low - margin, high + 2 * margin), xlabel="step", ylabel="loss, nats", title=title)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return _saved(axes.figure, path)


def calibration(result: Any, *, path: str | os.PathLike[str] | None = None, title: str = "") -> Figure:
    """Ranks number by number, and coverage, each with the band in which 99% of calibrated posteriors lie.

    :param result: :class:`~numpyro_maf.sbi.Calibration`.
    :param path: where to save a PNG; None does not save.
    :return: the matplotlib figure.
    """
    figure = _figure(9, 4)
    ranks, regions = figure.subplots(1, 2)
    found = result.sbc
    level = np.linspace(0, 1, 201)
    # Of the largest distance of an empirical distribution function (Kolmogorov), at 99%.
    band = 1.628 / np.sqrt(len(found.ranks))
    uniform = (found.ranks + 0.5) / (found.draws + 1)
    for u, name in zip(uniform.T, found.names):
        ranks.plot(level, np.searchsorted(np.sort(u), level) / len(u) - level, lw=1.2, label=name)
    ranks.set(xlabel="rank of the truth, as a share of draws", ylabel="ECDF difference from uniform")
    for curve, name in [(result.coverage, "highest density"), (result.tarp, "about random points")]:
        regions.plot(level, curve.at(level) - level, lw=1.4, label=name)
    regions.set(xlabel="credibility of the region", ylabel="empirical coverage minus credibility")
    for axis in (ranks, regions):
        axis.axhspan(-band, band, color="#dddddd", zorder=0, label="99% of calibrated posteriors")
        axis.axhline(0, color="#888888", lw=0.8)
        axis.legend(frameon=False, fontsize=8, ncols=2)
        axis.set_ylim(-max(3 * band, 0.12), max(3 * band, 0.12))
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    return _saved(figure, path)


def _figure(width: float, height: float) -> Figure:
    """A figure that no window shows and no global list holds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _saved(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure
