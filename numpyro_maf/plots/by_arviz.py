# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""ArviZ's own plots by one name in its versions 0.23 and 1."""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np

from numpyro_maf._arviz import import_arviz
from numpyro_maf.plots.style import finished

__all__ = ["arviz"]

# The function of ArviZ 0 and of ArviZ 1 for each kind.
_KINDS = {
    "distribution": ("plot_posterior", "plot_dist"),
    "forest": ("plot_forest", "plot_forest"),
    "pair": ("plot_pair", "plot_pair"),
    "predictive": ("plot_ppc", "plot_ppc_dist"),
    "trace": ("plot_trace", "plot_trace_dist"),
}


def arviz(
    kind: str, data: Any, *, title: str = "", path: str | os.PathLike[str] | None = None, **options: Any
) -> Any:
    """One of ArviZ's own plots of what ``to_arviz`` gave, by the same name in ArviZ 0 and in ArviZ 1.

    :param kind: ``"distribution"``, ``"forest"``, ``"pair"``, ``"predictive"`` or ``"trace"``.
    :param data: InferenceData or DataTree.
    :param title: of the figure.
    :param path: file to save the picture in; None leaves the figure open in pyplot.
    :param options: of ArviZ's function, such as ``var_names=["mu"]``.
    :return: axes, in a row.
    :raises ValueError: for another kind.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join(_KINDS)}, got {kind!r}")
    import matplotlib.pyplot as plt

    package = import_arviz()
    newer = int(package.__version__.split(".")[0]) >= 1
    with warnings.catch_warnings():
        # ArviZ 0.23 calls parts of matplotlib that 3.11 declares old; its user can change nothing there.
        warnings.filterwarnings("ignore", "Passing a dict or None as alias_mapping")
        drawn = getattr(package, _KINDS[kind][newer])(data, **({"backend": "matplotlib"} | options))
    figure = plt.gcf() if not newer else None
    if newer:
        figure = drawn.viz["figure"].item() if "figure" in drawn.viz else plt.gcf()
    axes: Any = np.asarray(figure.axes, object)  # type: ignore[union-attr]
    return finished(axes, title, path)
