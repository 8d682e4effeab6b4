# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""How training went, and what the learned posteriors are worth."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from numpyro_maf.inputs import as_numbers, by_site
from numpyro_maf.plots.style import LINES, bare, finished, ink, new_axes
from numpyro_maf.plots.tables import columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["calibration", "loss_curves", "losses", "recovery"]


class _Curve(NamedTuple):
    """Losses of one training: those of validation may be empty."""

    label: str
    train: np.ndarray
    validation: np.ndarray
    best: int = -1
    unit: str = "epoch"
    end: str = ""


def losses(
    results: Any,
    *,
    window: int = 50,
    axes: Any = None,
    title: str = "",
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """Losses of whatever was trained: each beneath its running median, validation dashed, the best marked.

    :param results: one result, or several by label: of :func:`~numpyro_maf.fit`, of ``train``, a
        :class:`~numpyro_maf.GuideRun`, a neural posterior, rounds, NumPyro's ``SVIRunResult``, or a row of
        losses.
    :param window: of the running median, at most a fiftieth of the curve.
    :param axes: matplotlib's, to draw on; None for a new figure.
    :param title: of the figure.
    :param path: file to save the picture in; None leaves the figure open in pyplot.
    :return: the axes.
    :raises TypeError: for a result that has no losses.
    :raises ValueError: for losses that are no row of numbers.
    """
    curves = _curves(results)
    axis = new_axes(1, 1, (7, 3.2), axes)[0, 0]
    settled: list[Any] = []
    several = len(curves) > 1
    for i, curve in enumerate(curves):
        colour = LINES[i % len(LINES)]
        name = f"{curve.label}: " if several and curve.label else ""
        if len(curve.train):
            width = max(min(window, len(curve.train) // 50), 1)
            windows = np.lib.stride_tricks.sliding_window_view(curve.train, width)
            middle = np.nanmedian(windows, -1)
            if width > 1:
                axis.plot(curve.train, color=colour, alpha=0.25, lw=0.6)
            label = curve.label if not len(curve.validation) else f"{name}training"
            axis.plot(np.arange(len(middle)) + width // 2, middle, color=colour, lw=1.4, label=label or None)
        judged = curve.validation if len(curve.validation) else curve.train
        if len(curve.validation):
            axis.plot(curve.validation, color=colour, lw=1.4, ls="--", label=f"{name}held out")
        if 0 <= curve.best < len(judged):
            said = f"{name}best {judged[curve.best]:.4g}{f', {curve.end}' if curve.end else ''}"
            axis.plot(
                curve.best, judged[curve.best], "o", color=colour, ms=5, mec=ink(0.9), mew=0.6, label=said
            )
        for row in (curve.train, curve.validation):
            tail = row[len(row) // 4 :]
            settled += [np.nanquantile(tail, q) for q in (0.01, 0.99)] if np.isfinite(tail).any() else []
    if settled:
        low, high = min(settled), max(settled)
        margin = 0.3 * (high - low) + 1e-9
        axis.set_ylim(low - margin, high + 2 * margin)
    units = dict.fromkeys(curve.unit for curve in curves)
    axis.set(xlabel=" or ".join(units), ylabel="loss, nats")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=9)
    bare(axis)
    return finished(axis, title, path)


def loss_curves(
    results: Mapping[str, Any],
    *,
    window: int = 50,
    axis: Axes | None = None,
    path: str | os.PathLike[str] | None = None,
    title: str = "",
) -> Figure:
    """The picture of :func:`losses`, under its former name; gives the figure, not the axes.

    :param results: as for :func:`losses`, and so are ``window``, ``title`` and ``path``.
    :param axis: matplotlib's, to draw on; None for a figure of its own, which pyplot does not know.
    :return: the matplotlib figure.
    """
    from matplotlib.figure import Figure

    own: Any = Figure(figsize=(7, 3.2), layout="constrained").subplots() if axis is None else axis
    figure = losses(results, window=window, axes=own, title=title if axis is None else "").figure
    if axis is not None:
        axis.set_title(title)
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def _curves(results: Any) -> list[_Curve]:
    if isinstance(results, Mapping):
        if not results:
            raise ValueError("results holds nothing to draw")
        return [curve for label, result in results.items() for curve in _of(str(label), result)]
    return _of("", results)


def _of(label: str, result: Any) -> list[_Curve]:
    """The curves of one result; rounds have one each."""
    if isinstance(result, BaseException) or hasattr(result, "last") and hasattr(result, "rounds"):
        if isinstance(result, BaseException):
            return _of(label, getattr(result, "result", None))
        named = [(f"{label} round {i + 1}".strip(), r.learned) for i, r in enumerate(result.rounds)]
        return [curve for name, learned in named for curve in _of(name, learned)]
    for inner in ("neural", "trained"):  # of a posterior given an observation, and of a guide's run
        if getattr(result, inner, None) is not None:
            return [
                c._replace(unit="50 steps" if inner == "trained" else c.unit)
                for c in _of(label, getattr(result, inner))
            ]
    held = getattr(result, "losses", None)
    if hasattr(held, "train"):  # of neural posteriors
        return _of(label, held)
    train, valid = (
        getattr(result, f"{kind}_loss", getattr(result, kind, None)) for kind in ("train", "validation")
    )
    if train is None or callable(train):
        if held is None and hasattr(result, "__dict__") and not hasattr(result, "__array__"):
            raise TypeError(f"{label or 'results'}: a {type(result).__name__} has no losses")
        row = _row(label, result if held is None else held)
        return [_Curve(label, row, np.zeros(0), unit="step")]
    state = getattr(result, "state", result)
    best = getattr(result, "best_epoch", getattr(state, "best_epoch", -1))
    improving = getattr(result, "improving", False)
    end = getattr(result, "stopped", "") or ("still improving" if improving else "")
    return [_Curve(label, _row(label, train), _row(label, valid, empty=True), best, end=end)]


def _row(label: str, values: Any, empty: bool = False) -> np.ndarray:
    name = f"results[{label!r}]" if label else "results"
    row = np.asarray(as_numbers(name, values), float)
    if row.ndim != 1 or not (row.size or empty):
        raise ValueError(f"{name} must be a row of losses, got shape {row.shape}")
    return row


def calibration(
    result: Any, *, axes: Any = None, title: str = "", path: str | os.PathLike[str] | None = None
) -> Any:
    """Ranks number by number, and coverage, each with the band in which 99% of calibrated posteriors lie.

    A curve above 0 on the left means that the truth ranks too low: draws are too large. On the right, one
    below 0 means that regions hold the truth less often than they say: the posterior is too narrow.

    :param result: :class:`~numpyro_maf.sbi.Calibration`.
    :param axes: two of matplotlib's, to draw on; None for a new figure.
    :param title: of the figure.
    :param path: file to save the picture in; None leaves the figure open in pyplot.
    :return: axes ``(2,)``: ranks, regions.
    """
    ranks, regions = axes = new_axes(1, 2, (9, 4), axes)[0]
    found = result.sbc
    level = np.linspace(0, 1, 201)
    # Of the largest distance of an empirical distribution function (Kolmogorov), at 99%.
    band = 1.628 / math.sqrt(len(found.ranks))
    uniform = (found.ranks + 0.5) / (found.draws + 1)
    largest = 0.0
    for i, (u, name) in enumerate(zip(uniform.T, found.names)):
        difference = np.searchsorted(np.sort(u), level) / len(u) - level
        largest = max(largest, abs(difference).max())
        ranks.plot(level, difference, lw=1.2, label=name, color=LINES[i % len(LINES)])
    ranks.set(xlabel="rank of the truth, as a share of draws", ylabel="ECDF difference from uniform")
    for colour, (curve, name) in zip(
        LINES, [(result.coverage, "highest density"), (result.tarp, "about random points")]
    ):
        difference = curve.at(level) - level
        largest = max(largest, abs(difference).max())
        regions.plot(level, difference, lw=1.4, label=name, color=colour)
    regions.set(xlabel="credibility of the region", ylabel="empirical coverage minus credibility")
    height = max(1.6 * band, 1.4 * largest, 0.08)
    for axis in (ranks, regions):
        axis.axhspan(-band, band, color=ink(0.12), zorder=0, label="99% of calibrated posteriors")
        axis.axhline(0, color=ink(0.5), lw=0.8)
        axis.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
        axis.set_ylim(-height, height)
        bare(axis)
    return finished(axes, title, path)


def recovery(
    draws: Mapping[str, ArrayLike],
    truth: Mapping[str, ArrayLike],
    *,
    prior: Mapping[str, ArrayLike] | None = None,
    names: Sequence[str] | None = None,
    axes: Any = None,
    title: str = "",
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """Posteriors of many simulations beside their truths, and how much each learned from its data.

    For each number: the posterior mean and 90% interval over the truth; r is their correlation, and the
    contraction is 1 minus the mean variance of the posteriors over that of the prior: 0 if nothing was
    learned, 1 if all. The last axes show z-scores, (mean - truth) / standard deviation, over each
    posterior's own contraction (Schad, Betancourt & Vasishth 2021).

    :param draws: by site, ``(S, N, *shape)``, as ``posterior({"x": sims["x"]}).sample(key, (S,))`` gives.
    :param truth: by site, ``(N, *shape)``: the simulations.
    :param prior: draws of the prior by site; None for the truths, which simulations draw from the prior.
    :param names: sites, or numbers of them such as ``"theta[1]"``; None for all of the draws.
    :param axes: matplotlib's, one for each number and one more; None for a new figure.
    :param title: of the figure.
    :param path: file to save the picture in; None leaves the figure open in pyplot.
    :return: axes, one for each number and one more.
    :raises ValueError: for sites that are missing, and shapes that do not fit.
    """
    drawn = {k: np.asarray(v, float) for k, v in by_site("draws", draws).items()}
    true = {k: np.asarray(v, float) for k, v in by_site("truth", truth, drawn).items() if k in drawn}
    for name, value in drawn.items():
        if value.shape[1:] != true[name].shape or value.ndim < 2:
            raise ValueError(f"draws[{name!r}] must be (S, *{true[name].shape}), got {value.shape}")
    wide = prior if prior is not None else true
    before = {k: np.asarray(v, float) for k, v in by_site("prior", wide, drawn).items() if k in drawn}
    count = len(next(iter(true.values())))
    # Each number's draws: columns treats the draws of all simulations as rows.
    rows = columns({k: v.reshape(-1, *v.shape[2:]) for k, v in drawn.items()}, names)
    truths, widths = columns(true, list(rows)), columns(before, list(rows))
    axes = new_axes(1, len(rows) + 1, (3.4 * (len(rows) + 1), 3.4), axes)[0]
    last = axes[-1]
    for i, ((name, values), axis) in enumerate(zip(rows.items(), axes)):
        values, actual = values.reshape(-1, count), truths[name]
        mean, variance = values.mean(0), values.var(0)
        low, high = np.quantile(values, [0.05, 0.95], axis=0)
        contraction = 1 - variance / widths[name].var()
        colour = LINES[i % len(LINES)]
        ends = np.array([min(actual.min(), mean.min()), max(actual.max(), mean.max())])
        axis.plot(ends, ends, color=ink(0.5), lw=1)
        axis.vlines(actual, low, high, color=colour, lw=0.7, alpha=0.35)
        axis.plot(actual, mean, ".", color=colour, ms=4)
        r = np.corrcoef(actual, mean)[0, 1] if actual.std() > 0 and mean.std() > 0 else math.nan
        axis.set(xlabel=f"true {name}", ylabel="posterior mean, 90% interval")
        axis.set_title(f"{name}: r {r:.2f}, contraction {contraction.mean():.2f}", fontsize=10)
        score = (mean - actual) / np.sqrt(np.maximum(variance, 1e-300))
        last.plot(contraction, score, ".", color=colour, ms=4, alpha=0.7, label=name)
        bare(axis)
    last.axhspan(-2, 2, color=ink(0.12), zorder=0)
    last.axhline(0, color=ink(0.5), lw=0.8)
    last.set(xlabel="contraction", ylabel="z-score", xlim=(min(-0.05, last.get_xlim()[0]), 1.05))
    reach = max(4.0, 1.1 * np.abs(last.get_ylim()).max())
    last.set_ylim(-reach, reach)
    last.legend(frameon=False, fontsize=8)
    bare(last)
    return finished(axes, title, path)
