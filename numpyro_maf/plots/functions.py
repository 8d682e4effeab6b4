# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Densities of one or two numbers, and what a flow makes of a grid."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_maf.inputs import as_numbers, checked_rows
from numpyro_maf.plots.style import LINES, bare, colour_map, finished, ink, new_axes

__all__ = ["density", "warp"]

_MASSES = (0.95, 0.8, 0.6, 0.4, 0.2)


def density(
    source: Any,
    *,
    context: ArrayLike | None = None,
    data: ArrayLike | None = None,
    limits: Sequence[Any] | None = None,
    points: int = 150,
    axes: Any = None,
    title: str = "",
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """The density of one number as a curve; of two, as regions that hold 20%, 40%, …, 95% of the mass.

    :param source: a flow, a distribution of one or two numbers, or a joint distribution or posterior by site
        that has one or two numbers in all.
    :param context: ``(C,)``, for a flow that takes one.
    :param data: ``(N, D)``, drawn beside it: a histogram, or points.
    :param limits: ``(low, high)`` for each number; None for where draws lie.
    :param points: of the grid in each direction.
    :param axes: matplotlib's, to draw on; None for a new figure.
    :param title: of the figure.
    :param path: file to save the picture in; None leaves the figure open in pyplot.
    :return: the axes.
    :raises ValueError: for more than two numbers, a batch of distributions, and a context that is missing.
    """
    names, draw, log_prob = _scored(source, context)
    size = len(names)
    if size not in (1, 2):
        raise ValueError(
            f"density draws one or two numbers, got {size}: choose some by .marginal, or use pairs"
        )
    rows = None
    if data is not None:
        rows = np.asarray(as_numbers("data", data), float)
        rows = checked_rows("data", rows[:, None] if rows.ndim == 1 else rows, (size,))
    if limits is None:
        some = draw(2000)
        some = some[np.isfinite(some).all(1)] if rows is None else np.concatenate([some, rows])
        low, high = np.quantile(some, [0.002, 0.998], axis=0)
        limits = np.stack([low, high]).T + 0.08 * (high - low)[:, None] * np.array([-1.0, 1.0])
    ends = np.asarray(limits, float).reshape(size, 2)
    grids = [np.linspace(low, high, points) for low, high in ends]
    cells = np.stack(np.meshgrid(*grids, indexing="ij"), -1).reshape(-1, size)
    height = np.exp(np.nan_to_num(log_prob(cells), nan=-np.inf)).reshape([points] * size)
    axis = new_axes(1, 1, (4.4, 3.2) if size == 1 else (4.2, 4.2), axes)[0, 0]
    if size == 1:
        if rows is not None:
            axis.hist(rows[:, 0], 60, range=tuple(ends[0]), density=True, color=ink(0.25), label="data")
        axis.plot(grids[0], height, color=LINES[0], lw=1.6, label="density")
        axis.set(xlabel=names[0], ylabel="density", xlim=ends[0], ylim=(0, None))
        if rows is not None:
            axis.legend(frameon=False, fontsize=8)
    else:
        order = np.sort(height.ravel())[::-1]
        held = np.cumsum(order) / order.sum()
        levels = np.unique(order[np.minimum(np.searchsorted(held, _MASSES), order.size - 1)])
        shade = colour_map(LINES[0])
        tops = [*levels, max(order[0], levels[-1]) * (1 + 1e-9)]
        axis.contourf(
            *grids, height.T, levels=tops, colors=[shade(v) for v in np.linspace(0.2, 0.95, len(levels))]
        )
        if rows is not None:
            some = np.random.default_rng(0).permutation(len(rows))[:2000]
            axis.scatter(*rows[some].T, s=3, color=LINES[1], lw=0, alpha=0.7, rasterized=True)
        axis.set(xlabel=names[0], ylabel=names[1], xlim=ends[0], ylim=ends[1])
    bare(axis)
    return finished(axis, title, path)


def warp(
    source: Any,
    *,
    context: ArrayLike | None = None,
    lines: int = 17,
    extent: float = 2.5,
    axes: Any = None,
    title: str = "",
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """A grid in the base space of a flow of two numbers, and what the flow makes of it.

    Each line is drawn in one colour on both sides. Lines that come close show where the flow gathers mass;
    none cross, since the flow is one to one.

    :param source: a flow of two features, or its distribution.
    :param context: ``(C,)``, for a flow that takes one.
    :param lines: of the grid, in each direction.
    :param extent: how far the grid goes, in standard deviations of a normal base; of another base, as far as
        the same share of its draws.
    :param axes: two of matplotlib's, to draw on; None for a new figure.
    :param title: of the figure.
    :param path: file to save the picture in; None leaves the figure open in pyplot.
    :return: axes ``(2,)``: the base, the data.
    :raises TypeError: for what has no base and no transforms.
    :raises ValueError: for flows of other than two features.
    """
    from matplotlib import colormaps
    from scipy.special import ndtr

    d = _bound(source, context)
    if not hasattr(d, "transforms") or not hasattr(d, "base_dist"):
        raise TypeError(f"warp takes a flow of bijectors or its distribution, got {type(source).__name__}")
    if d.event_shape != (2,) or d.batch_shape:
        raise ValueError(f"warp takes one flow of 2 features, got shapes {d.batch_shape}, {d.event_shape}")
    base = np.asarray(jax.jit(lambda key: d.base_dist.sample(key, (4000,)))(jax.random.key(0)))
    low, high = np.quantile(base, [ndtr(-extent), ndtr(extent)], axis=0)
    along, across = np.linspace(0, 1, 200), np.linspace(0, 1, lines)
    u, v = np.meshgrid(across, along, indexing="ij")
    both = np.stack([np.stack([u, v], -1), np.stack([v, u], -1)])  # (2, lines, 200, 2)
    grid = low + (high - low) * both

    @jax.jit
    def forward(z):
        for transform in d.transforms:
            z = transform(z)
        return z

    made = np.asarray(forward(jnp.asarray(grid.reshape(-1, 2), base.dtype))).reshape(grid.shape)
    axes = new_axes(1, 2, (8, 4), axes)[0]
    for axis, drawn, name in zip(axes, (grid, made), ("base", "data")):
        for family, shades in zip(drawn, ("viridis", "plasma")):
            for line, share in zip(family, across):
                axis.plot(*line.T, color=colormaps[shades](0.15 + 0.65 * share), lw=1.0)
        axis.set(xlabel=f"{name}[0]", ylabel=f"{name}[1]")
        bare(axis)
    return finished(axes, title, path)


def _bound(source: Any, context: ArrayLike | None) -> Any:
    """A distribution of a distribution, or of a flow given its context."""
    width = getattr(source, "context", None)
    if not callable(source) or width is None or hasattr(source, "batch_shape"):
        return source
    if bool(width) != (context is not None):
        raise ValueError(
            f"the flow takes a context of width {width}, got {'none' if context is None else 'one'}"
        )
    return source() if context is None else source(jnp.asarray(as_numbers("context", context)))


def _scored(source: Any, context: ArrayLike | None) -> tuple[list[str], Any, Any]:
    """Names of the numbers, a function of draws ``(n, D)``, and one from rows to log-densities."""
    d = _bound(source, context)
    if not hasattr(d, "log_prob") or not hasattr(d, "sample"):
        raise TypeError(f"density takes a flow, a distribution or a posterior, got {type(source).__name__}")
    key, sites = jax.random.key(0), getattr(d, "sites", None)
    if getattr(d, "batch_shape", ()):
        raise ValueError(f"density takes one distribution, got a batch of shape {d.batch_shape}")
    if sites is None:
        size = int(np.prod(d.event_shape))
        score = jax.jit(lambda rows: d.log_prob(rows.reshape(-1, *d.event_shape)))
        names = ["x"] if size == 1 else [f"x[{i}]" for i in range(size)]

        def draw(count):
            return np.asarray(d.sample(key, (count,)), float).reshape(count, size)

        return names, draw, lambda rows: np.asarray(score(jnp.asarray(rows, jnp.result_type(float))))
    names, parts = [], {}
    for name, shape in zip(sites.names, sites.shapes):
        indices = list(np.ndindex(shape))
        parts[name] = (slice(len(names), len(names) + len(indices)), shape)
        names += [f"{name}[{','.join(map(str, i))}]" if i else name for i in indices]

    def by_site(rows):
        return {name: rows[:, where].reshape(-1, *shape) for name, (where, shape) in parts.items()}

    def draws_of(count):
        drawn = d.sample(key, (count,))
        return np.concatenate([np.asarray(drawn[name], float).reshape(count, -1) for name in sites.names], 1)

    return names, draws_of, lambda rows: np.asarray(d.log_prob(by_site(np.asarray(rows, np.float32))))
