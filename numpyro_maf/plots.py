# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Pictures. Each function draws one kind of result; matplotlib is imported on use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from numpyro_maf.inputs import as_labels, as_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["activity_timeline", "calibration", "loss_curves", "palette"]

COLOURS = ("#31508c", "#d1495b", "#edae49")  # the first three; others follow, see palette
QUIET = "#c9c9c9"


def activity_timeline(
    data: Any, probabilities: ArrayLike, *, path: str | os.PathLike[str] | None = None, title: str = ""
) -> Figure:
    """The posterior over activities minute by minute, above the true activities and the sensors.

    :param data: :class:`~numpyro_maf.datasets.SensorData` of T minutes. An activity of -1 is not known: its
        minute is hatched.
    :param probabilities: ``(T, K)``; NaN leaves a gap.
    :param path: where to save a PNG; None does not save.
    :return: the matplotlib figure.
    :raises ValueError: for probabilities of another shape, and activities beyond the names.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.dates import ConciseDateFormatter
    from matplotlib.patches import Patch

    count, steps = len(data.activities), len(data.time)
    table = np.asarray(as_numbers("probabilities", probabilities))
    if table.shape != (steps, count):
        raise ValueError(f"probabilities must be ({steps}, {count}), got {table.shape}")
    if (table < 0).any() or (table > 1 + 1e-3).any():
        raise ValueError("probabilities must be in [0, 1]")
    activity = as_labels("the activities", data.activity, count, least=-1)
    colours = [QUIET, COLOURS[1]] if count == 2 else palette(count)
    time, sensors = data.time, data.values.T
    heights = [3.4, 0.35, *[0.9] * len(sensors)]
    figure = _figure(10, 0.9 * sum(heights) + 0.8)
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    axes[0].stackplot(time, table.T, colors=colours, labels=data.activities, lw=0)
    axes[0].set(ylim=(0, 1), ylabel="probability", title=title)
    handles = axes[0].get_legend_handles_labels()[0]
    if (activity < 0).any():
        unknown: dict[str, Any] = dict(facecolor="white", edgecolor="#777777", hatch="////", lw=0)
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
        axis.plot(time, values, color="#333333", lw=0.9)
        axis.set_ylabel(f"{name}\n{unit}", fontsize=8, rotation=0, ha="right", va="center")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[-1].xaxis.set_major_formatter(ConciseDateFormatter(axes[-1].xaxis.get_major_locator()))
    axes[-1].set_xlim(time[0], time[-1])
    return _saved(figure, path)


def palette(count: int) -> list[str]:
    """Colours for any number of activities, told apart by people who see red and green alike, too.

    Each new one is the colour of a grid that is farthest from those before it, from white and from black,
    seen by normal, green-blind and red-blind eyes (Vienot, Brettel & Mollon 1999), in the space OKLab.
    """
    steps = np.linspace(0.1, 0.95, 10)
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    chosen = [tuple(int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)) for c in COLOURS[:count]]
    taken, seen = [*chosen, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)], _seen(grid)
    nearest = np.min([_apart(seen, _seen(np.array([c]))) for c in taken], 0)
    while len(chosen) < count:
        best = int(nearest.argmax())
        chosen.append(tuple(grid[best]))
        nearest = np.minimum(nearest, _apart(seen, seen[:, [best]]))
    return ["#" + "".join(f"{round(255 * c):02x}" for c in colour) for colour in chosen]


# From linear RGB to what green-blind and red-blind eyes see, and on to OKLab (Ottosson 2020).
_EYES = np.array([
    np.eye(3),
    [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
    [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
])  # fmt: skip
_CONES = np.array([
    [0.4122214708, 0.5363325363, 0.0514459929],
    [0.2119034982, 0.6806995451, 0.1073969566],
    [0.0883024619, 0.2817188376, 0.6299787005],
])  # fmt: skip
_LAB = np.array([
    [0.2104542553, 0.7936177850, -0.0040720468],
    [1.9779984951, -2.4285922050, 0.4505937099],
    [0.0259040371, 0.7827717662, -0.8086757660],
])  # fmt: skip


def _seen(colours: np.ndarray) -> np.ndarray:
    """sRGB colours ``(N, 3)`` as each kind of eyes sees them, ``(3, N, 3)``."""
    linear = np.where(colours > 0.04045, ((colours + 0.055) / 1.055) ** 2.4, colours / 12.92)
    eyes = np.einsum("eij,nj->eni", _EYES, linear)
    return np.cbrt(np.clip(eyes, 0, 1) @ _CONES.T) @ _LAB.T


def _apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How far colours are from each other to the eyes that tell them apart least."""
    return np.linalg.norm(a - b, axis=-1).min(0)


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
        losses = np.asarray(as_numbers(f"results[{label!r}]", losses), float)
        if losses.ndim != 1 or not losses.size:
            raise ValueError(f"results[{label!r}] must be a row of losses, got shape {losses.shape}")
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
