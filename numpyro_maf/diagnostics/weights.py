# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Importance weights, and whether to trust them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from numpyro_maf._arviz import import_arviz
from numpyro_maf.inputs import as_numbers
from numpyro_maf.pytrees import Described

__all__ = ["PSIS", "psis"]


class PSIS(NamedTuple):
    """The result of :func:`psis`; printing it gives the verdict.

    :param khat: shape of the Pareto tail of the weights.
    :param log_weights: ``(S,)``, smoothed, of weights that sum to 1.
    :param ess: effective sample size, 1 over the sum of their squares.
    :param threshold: the largest ``khat`` with which estimates from S draws can be trusted.
    """

    khat: float
    log_weights: np.ndarray
    ess: float
    threshold: float

    @property
    def verdict(self) -> str:
        """One sentence: whether estimates from the weighted draws can be trusted."""
        good = self.khat < self.threshold
        advice = "the weighted draws can be trusted" if good else "do not trust the weighted draws"
        return f"{advice}: k-hat {self.khat:.2f}, threshold {self.threshold:.2f}"

    def _describe(self) -> list[str]:
        return [
            f"PSIS: {self.verdict}",
            f"  effective {self.ess:.0f} of {len(self.log_weights)} draws",
        ]

    __repr__, _repr_html_ = Described.__repr__, Described._repr_html_  # type: ignore[misc]

    def __str__(self) -> str:
        return self.verdict


def psis(log_weights: ArrayLike) -> PSIS:
    """Pareto-smoothed importance sampling, by ArviZ.

    Vehtari, Simpson, Gelman, Yao & Gabry (2024); the threshold is their ``min(1 - 1 / log10(S), 0.7)``.

    :param log_weights: ``(S,)``, log target minus log proposal at draws of the proposal, S at least 25.
    :raises ValueError: for another shape, or weights that are NaN or plus infinity.
    """
    raw = np.array(as_numbers("log_weights", log_weights), np.float64)
    if raw.ndim != 1 or len(raw) < 25:
        raise ValueError(f"log_weights must be (S,) with S at least 25, got {raw.shape}")
    if np.isnan(raw).any() or raw.max() == np.inf or raw.max() == -np.inf:
        raise ValueError("log_weights must be finite or minus infinity, and some finite")
    raw -= raw.max()
    raw = np.maximum(raw, -700.0)  # exp of it is the least float
    if np.ptp(raw) < 1e-4:
        smoothed, khat = raw, -math.inf  # equal but for rounding: no tail
    else:
        smoothed, khat = _psislw(raw)
        if not (np.isfinite(khat) and np.isfinite(smoothed).all()):
            smoothed, khat = raw, math.inf  # a tail to which no Pareto distribution could be fitted
    smoothed = smoothed - np.logaddexp.reduce(smoothed)
    ess = float(np.exp(-np.logaddexp.reduce(2 * smoothed)))
    return PSIS(float(khat), smoothed, ess, min(1 - 1 / math.log10(len(raw)), 0.7))


def _psislw(log_weights: np.ndarray) -> Any:
    try:
        from arviz_stats.base import array_stats  # ArviZ 1
    except ImportError:
        return import_arviz().psislw(log_weights)
    return array_stats.psislw(-log_weights)
