# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Colours, inks and frames that all pictures share."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLOURS", "LINES", "bare", "colour_map", "finished", "ink", "new_axes", "palette"]

# The first eight: blue, orange, teal, plum, lilac, straw, indigo, brick. Others follow, see palette.
COLOURS = ("#3f6fb5", "#ee9b3f", "#45a393", "#873260", "#c3b0f0", "#eedd77", "#4b3f99", "#bd5b45")
# Those that are seen as thin lines, on white and on black.
LINES = ("#3f6fb5", "#ee9b3f", "#45a393", "#bd5b45", "#a06cd5", "#8d8d3c")


def palette(count: int) -> list[str]:
    """Colours for any number of activities, told apart by people who see red and green alike, too.

    After the first eight, each new one is the colour of a grid that is farthest from those before it and from
    white, seen by normal, green-blind and red-blind eyes (Vienot, Brettel & Mollon 1999), in the space OKLab.
    The grid leaves out glaring and nearly black or white colours.

    :param count: number of colours; fewer colours are the first ones of more.
    """
    steps = np.linspace(0.05, 0.95, 19)
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    light, a, b = _seen(grid)[0].T
    chroma = np.hypot(a, b)
    grid = grid[(light > 0.35) & (light < 0.9) & (chroma > 0.04) & (chroma < 0.16)]
    chosen = [tuple(int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)) for c in COLOURS[:count]]
    taken, seen = [*chosen, (1.0, 1.0, 1.0)], _seen(grid)
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


def ink(share: float = 1.0) -> str:
    """A grey between the page (0) and the text (1) of matplotlib's present style, light or dark."""
    import matplotlib as mpl
    from matplotlib.colors import to_hex, to_rgb

    page, text = (np.array(to_rgb(mpl.rcParams[name])) for name in ("axes.facecolor", "text.color"))
    return to_hex(page + share * (text - page))


def colour_map(colour: str) -> Any:
    """A colour map from the page to a colour."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list(colour, [ink(0.0), colour])


def new_axes(rows: int, columns: int, size: tuple[float, float], given: Any = None, **options: Any) -> Any:
    """Axes ``(rows, columns)`` of a new figure of pyplot's, or those that were given, in that shape.

    :param size: of a new figure, in inches.
    :raises ValueError: for another number of axes than is needed.
    """
    if given is None:
        import matplotlib.pyplot as plt

        _, axes = plt.subplots(
            rows, columns, figsize=size, layout="constrained", squeeze=False, **options
        )  # fmt: skip
        return axes
    axes = np.asarray(given, object).ravel()
    if len(axes) != rows * columns:
        raise ValueError(f"axes must be {rows * columns} of matplotlib's axes, got {len(axes)}")
    return axes.reshape(rows, columns)


def bare(axis: Axes, *sides: str) -> None:
    """Take frame lines away, those at the top and at the right without ``sides``."""
    axis.spines[list(sides or ("top", "right"))].set_visible(False)


def finished(axes: Any, title: str, path: str | os.PathLike[str] | None) -> Any:
    """The axes, with their figure's title; saved and closed, if there is a path."""
    figure: Any = np.asarray(axes, object).ravel()[0].figure
    if title:
        figure.suptitle(title)
    if path is not None:
        import matplotlib.pyplot as plt

        figure.savefig(path, dpi=150)
        plt.close(figure)
    return axes
