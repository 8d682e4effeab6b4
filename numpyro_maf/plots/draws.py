# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Draws by site: each number and each pair of numbers, and predictions beside the data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from numpyro_maf.inputs import as_numbers, by_site, rows_by_site
from numpyro_maf.plots.style import LINES, bare, colour_map, finished, ink, new_axes
from numpyro_maf.plots.tables import columns, named_draws

__all__ = ["pairs", "predictive"]

_REGIONS = (0.9, 0.5)  # mass of the regions of highest density that are drawn
_MOST = 10  # numbers that pairs draws without being asked


def pairs(
    draws: Any,
    *,
    names: Sequence[str] | None = None,
    prior: Any = None,
    reference: Any = None,
    truth: Mapping[str, ArrayLike] | None = None,
    weights: ArrayLike | None = None,
    log: Sequence[str] = (),
    zoom: bool = True,
    axes: Any = None,
    title: str = "",
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """Each number of the draws as a histogram, and each pair as regions that hold 50% and 90% of the mass.

    Smoothing is reflected at the outermost draws, so that no density is shown beyond a support's edge.

    :param draws: by site, ``(N, *shape)``; or what holds them: an :class:`~numpyro_maf.Answer`, a
        :class:`~numpyro_maf.GuideCheck` with its weights, a ``MCMC`` that has run, ArviZ's data.
    :param names: sites, ``"theta"``, or numbers of them, ``"theta[1]"``; None for all, up to ten numbers.
    :param prior: draws of the prior, in any of these forms, drawn in grey.
    :param reference: other draws of the same posterior, drawn as dashed lines.
    :param truth: values by site, drawn as lines and crosses.
    :param weights: ``(N,)``, how much each draw counts.
    :param log: sites, or numbers of them, on logarithmic axes.
    :param zoom: whether the axes end where the posterior does; False to show all of the prior.
    :param axes: matplotlib's, ``D * D`` of them, to draw on; None for a new figure.
    :param title: of the figure.
    :param path: file to save the picture in; None leaves the figure open in pyplot.
    :return: axes ``(D, D)``; those above the diagonal are empty.
    :raises ValueError: for names that are not there, more than ten numbers without ``names``, and unequal
        numbers of draws.
    """
    found, own = named_draws("draws", draws)
    weights = own if weights is None else weights
    table = columns(found, names)
    if len(table) > _MOST and names is None:
        raise ValueError(
            f"there are {len(table)} numbers, too many to see: choose some by names=, of {list(found)}"
        )
    labels, count = list(table), len(next(iter(table.values())))
    mass = np.ones(count) if weights is None else np.asarray(as_numbers("weights", weights), float)
    if mass.shape != (count,) or (mass < 0).any() or not mass.sum() > 0:
        raise ValueError(f"weights must be {count} numbers of at least 0, some of them positive")
    others = {}
    for label, given in (("prior", prior), ("reference", reference)):
        if given is not None:
            others[label] = columns(named_draws(label, given)[0], names if names else labels, optional=labels)
    points = columns({k: np.asarray(v)[None] for k, v in by_site("truth", truth or {}).items()}, None)
    scales = {label: label in log or label.split("[")[0] in log for label in labels}
    ranges = {label: _limits(label, table, mass, others, points, scales[label], zoom) for label in labels}
    size = max(1.9 * len(labels), 3.6)
    axes = new_axes(len(labels), len(labels), (size, size), axes)
    for i, y in enumerate(labels):
        for j, x in enumerate(labels):
            axis = axes[i, j]
            if j > i:
                axis.set_axis_off()
                continue
            axis.set(xlim=ranges[x][:2], xscale="log" if scales[x] else "linear")
            bare(axis)
            axis.tick_params(labelsize=8)
            if i == j:
                _one(axis, x, table, mass, others, points, ranges[x], scales[x])
            else:
                axis.set(ylim=ranges[y][:2], yscale="log" if scales[y] else "linear")
                _two(axis, (x, y), table, mass, others, points, ranges, scales)
            axis.set_xlabel(x if i == len(labels) - 1 else "")
            if j == 0 and i > 0:
                axis.set_ylabel(y)
            if i < len(labels) - 1:
                axis.tick_params(labelbottom=False)
            if 0 < j < i:
                axis.tick_params(labelleft=False)
    handles, shown = axes[0, 0].get_legend_handles_labels()
    place: dict[str, Any] = dict(loc="upper right", frameon=False, fontsize=9)
    if len(labels) > 1:
        axes[0, -1].legend(handles, shown, **place)
    elif len(handles) > 1:
        axes[0, 0].legend(handles, shown, **place)
    return finished(axes, title, path)


def predictive(
    replicates: Mapping[str, ArrayLike],
    observed: Mapping[str, ArrayLike],
    *,
    prior: Mapping[str, ArrayLike] | None = None,
    coords: Mapping[str, ArrayLike] | None = None,
    order: bool | None = None,
    axes: Any = None,
    title: str = "",
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """Replicated data beside the observed: bands of 50% and 90% of the replicates.

    A site of one number is a histogram with a line at the observed value. A site of several is drawn in
    their order, with the share of observed numbers within the 90% band; or, with ``order=False``, as
    distribution functions, for rows whose order means nothing.

    :param replicates: by site, ``(S, *shape)``, as ``posterior.predictive(key)`` gives them.
    :param observed: by site, ``(*shape)``; only these sites are drawn.
    :param prior: replicates under the prior, drawn in grey.
    :param coords: by site, ``shape``: where the numbers lie, times for instance; counted from 0 without.
    :param order: whether the order of a site's numbers means something; None: only with coords or up to 60.
    :param axes: matplotlib's, one for each observed site; None for a new figure.
    :param title: of the figure.
    :param path: file to save the picture in; None leaves the figure open in pyplot.
    :return: axes ``(number of sites,)``.
    :raises ValueError: for sites that are not there or have other shapes.
    """
    seen = {k: np.asarray(v, float) for k, v in by_site("observed", observed, missing=True).items()}
    if not seen:
        raise ValueError("observed holds no site")
    runs = rows_by_site("replicates", replicates, seen, "draws")
    before = rows_by_site("prior", prior, seen, "draws") if prior is not None else {}
    for name, value in seen.items():
        for what, group in (("replicates", runs), ("prior", before)):
            if name in group and group[name].shape[1:] != value.shape:
                expected = f"(S, *{value.shape})"
                raise ValueError(f"{what}[{name!r}] must be {expected}, got {group[name].shape}")
    axes = new_axes(1, len(seen), (max(4.6 * len(seen), 5.0), 3.2), axes)[0]
    for axis, (name, value) in zip(axes, seen.items()):
        flat, rows = value.ravel(), runs[name].reshape(len(runs[name]), -1)
        prior_rows = before[name].reshape(len(before[name]), -1) if name in before else None
        if flat.size == 1:
            _histogram(axis, name, flat[0], rows, prior_rows)
        elif order if order is not None else name in (coords or {}) or flat.size <= 60:
            at = np.ravel((coords or {}).get(name, np.arange(flat.size)))
            _bands(axis, name, at, flat, rows, prior_rows, name in (coords or {}))
        else:
            _functions(axis, name, flat, rows, prior_rows)
        bare(axis)
        axis.legend(frameon=False, fontsize=8)
    return finished(axes, title, path)


# Parts of the pictures ----------------------------------------------------------------------------


def _limits(label, table, mass, others, points, log, zoom) -> tuple[float, float, np.ndarray]:
    """Ends of an axis, and the edges of its bins."""
    rows = [table[label][mass > 0]]
    rows += [v[label] for k, v in others.items() if label in v and (k == "reference" or not zoom)]
    rows += [points[label]] if label in points else []
    whole = np.concatenate([r[np.isfinite(r)] for r in rows])
    if log and (whole <= 0).any():
        raise ValueError(f"{label} has values of 0 or less, which a logarithmic axis cannot show")
    if np.issubdtype(table[label].dtype, np.integer) or table[label].dtype == bool:
        low, high = int(whole.min()), int(whole.max())
        if high - low < 100:
            return low - 0.5, high + 0.5, np.arange(low, high + 2) - 0.5
    ends = [np.quantile(r, q) for r in rows for q in (0.001, 0.999)]
    low, high = min(ends), max(ends)
    if log:
        low, high = np.log(low), np.log(high)
    if not high > low:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, 41)
    margin = 0.04 * (high - low)
    low, high = low - margin, high + margin
    return (np.exp(low), np.exp(high), np.exp(edges)) if log else (low, high, edges)


def _one(axis, x, table, mass, others, points, limits, log) -> None:
    """A histogram, each bin's density being that of the axis as it is drawn."""
    edges = limits[2]
    widths = np.diff(np.log(edges) if log else edges)

    def heights(values, weights):
        return np.histogram(values, edges, weights=weights / weights.sum())[0] / widths

    top = heights(table[x], mass)
    axis.stairs(top, edges, fill=True, color=LINES[0], alpha=0.55, label="posterior", lw=0)
    axis.stairs(top, edges, color=LINES[0], lw=1.2)
    for kind, given in others.items():
        if x in given:
            style: dict[str, Any] = dict(color=ink(0.5)) if kind == "prior" else dict(color=ink(0.9), ls="--")
            axis.stairs(heights(given[x], np.ones(len(given[x]))), edges, lw=1.1, label=kind, **style)
    if x in points:
        axis.axvline(points[x][0], color=LINES[1], lw=1.6, label="truth")
    axis.set(yticks=[], ylim=(0, None))
    bare(axis, "top", "right", "left")


def _two(axis, pair, table, mass, others, points, ranges, scales) -> None:
    """Regions of highest density of a pair."""
    x, y = pair
    edges = [ranges[x][2], ranges[y][2]]

    def regions(values, weights):
        return _regions(values[0], values[1], weights, edges, [scales[x], scales[y]])

    for kind, given in others.items():
        if x in given and y in given and kind == "prior":
            some = np.random.default_rng(0).permutation(len(given[x]))[:1500]
            axis.scatter(
                given[x][some], given[y][some], s=2, color=ink(0.35), alpha=0.35, lw=0, rasterized=True
            )
    centres, height, levels = regions((table[x], table[y]), mass)
    shade = colour_map(LINES[0])
    axis.contourf(
        *centres, height.T, levels=[*levels, max(height.max(), levels[-1]) * (1 + 1e-9)],
        colors=[shade(0.35), shade(0.75)], alpha=0.85,
    )  # fmt: skip
    for kind, given in others.items():
        if x in given and y in given and kind == "reference":
            centres, height, levels = regions((given[x], given[y]), np.ones(len(given[x])))
            axis.contour(
                *centres, height.T, levels=levels, colors=[ink(0.9)], linewidths=1.0, linestyles="--"
            )
    if x in points and y in points:
        axis.axvline(points[x][0], color=LINES[1], lw=0.8)
        axis.axhline(points[y][0], color=LINES[1], lw=0.8)
        axis.plot(points[x], points[y], "x", color=LINES[1], ms=7, mew=2)


def _regions(x, y, weights, edges, logs) -> tuple[Any, np.ndarray, list[float]]:
    """Bin centres, smoothed mass by bin, and the thresholds of the regions of highest density."""
    from scipy.ndimage import gaussian_filter

    height, *_ = np.histogram2d(x, y, bins=edges, weights=weights / weights.sum())
    whole = all(len(e) > 2 and abs(e[0] % 1) == 0.5 for e in edges) and not any(logs)
    ess = weights.sum() ** 2 / (weights**2).sum()
    smooth = 0.0 if whole else 1.0 + 20.0 / ess**0.5
    height = gaussian_filter(height, smooth, mode="reflect") if smooth else height
    order = np.sort(height.ravel())[::-1]
    held = np.cumsum(order) / max(order.sum(), 1e-300)
    levels = order[np.minimum(np.searchsorted(held, _REGIONS), order.size - 1)].tolist()
    if not levels[0] < levels[1]:
        levels[1] = levels[0] * (1 + 1e-6) + 1e-300
    centres = [np.sqrt(e[1:] * e[:-1]) if log else (e[1:] + e[:-1]) / 2 for e, log in zip(edges, logs)]
    return centres, height, levels


def _histogram(axis, name, value, rows, prior) -> None:
    whole = np.concatenate([rows.ravel(), [value]])
    low, high = np.nanquantile(whole, [0.002, 0.998])
    low, high = min(low, value), max(high, value)
    edges = np.linspace(low, high if high > low else low + 1, 41)
    if prior is not None:
        axis.hist(
            prior.ravel(), edges, density=True, histtype="step", color=ink(0.5), label="prior predictive"
        )
    axis.hist(rows.ravel(), edges, density=True, color=LINES[0], alpha=0.6, label="posterior predictive")
    axis.axvline(value, color=LINES[1], lw=2, label="observed")
    axis.set(xlabel=name, yticks=[], ylim=(0, None))


def _bands(axis, name, at, value, rows, prior, given) -> None:
    order = np.argsort(at, kind="stable")
    at, value, rows = at[order], value[order], rows[:, order]
    quantiles = np.nanquantile(rows, [0.05, 0.25, 0.5, 0.75, 0.95], 0)
    if prior is not None:
        low, high = np.nanquantile(prior[:, order], [0.05, 0.95], 0)
        axis.fill_between(at, low, high, color=ink(0.5), alpha=0.18, lw=0, label="prior, 90%")
    axis.fill_between(
        at, quantiles[0], quantiles[4], color=LINES[0], alpha=0.25, lw=0, label="replicates, 90%"
    )
    axis.fill_between(
        at, quantiles[1], quantiles[3], color=LINES[0], alpha=0.45, lw=0, label="replicates, 50%"
    )
    axis.plot(at, quantiles[2], color=LINES[0], lw=1.2)
    there = np.isfinite(value)
    inside = (quantiles[0] <= value) & (value <= quantiles[4])
    label = f"observed, {inside[there].mean():.0%} in the 90% band"
    axis.plot(at, value, "o", color=LINES[1], ms=3.5, mec=ink(0.9), mew=0.3, label=label)
    axis.set(xlabel="coordinate" if given else "number", ylabel=name)


def _functions(axis, name, value, rows, prior) -> None:
    """Empirical distribution functions: of the data, and bands of those of the replicates."""
    value = np.sort(value[np.isfinite(value)])
    low, high = np.nanquantile(np.concatenate([rows.ravel(), value]), [0.001, 0.999])
    grid = np.linspace(low, high, 200)

    def bands(rows, ends):
        shares = np.stack(
            [np.searchsorted(np.sort(r[np.isfinite(r)]), grid, "right") / max(r.size, 1) for r in rows]
        )
        return np.quantile(shares, ends, 0)

    if prior is not None:
        axis.fill_between(
            grid, *bands(prior[:500], [0.05, 0.95]), color=ink(0.5), alpha=0.18, lw=0, label="prior, 90%"
        )
    low, left, right, high = bands(rows[:500], [0.05, 0.25, 0.75, 0.95])
    axis.fill_between(grid, low, high, color=LINES[0], alpha=0.25, lw=0, label="replicates, 90%")
    axis.fill_between(grid, left, right, color=LINES[0], alpha=0.45, lw=0, label="replicates, 50%")
    seen = np.searchsorted(value, grid, "right") / len(value)
    axis.plot(grid, seen, color=LINES[1], lw=1.6, label="observed")
    axis.set(xlabel=name, ylabel="share of numbers below", ylim=(0, 1))
