# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""How good probabilities of activities are."""

from __future__ import annotations

import numpy as np

from numpyro_maf.diagnostics import classification_scores

__all__ = ["confident_and_wrong", "scores_of"]


def scores_of(p: np.ndarray, label: np.ndarray, minutes: float) -> dict[str, float]:
    """Scores of ``(T, K)`` probabilities where labels ``(T,)`` are known, in slots of so many minutes.

    :raises ValueError: where no label is known.
    """
    known = label >= 0
    if not known.any():
        raise ValueError("the frame has no label to score against")
    scores = dict(classification_scores(p[known] / p[known].sum(1, keepdims=True), label[known]))
    best = p[known].argmax(1)
    truth = label[known]
    each = []
    for k in np.unique(np.concatenate([truth, best])):
        hits = ((best == k) & (truth == k)).sum()
        each.append(2 * hits / ((best == k).sum() + (truth == k).sum()))
    return {
        **{name: float(value) for name, value in scores.items()},
        "macro_f1": float(np.mean(each)),
        "minutes": float(known.sum() * minutes),
        "confident_and_wrong_minutes": confident_and_wrong(p, label, minutes),
    }


def confident_and_wrong(p: np.ndarray, label: np.ndarray, minutes: float, *, least: float = 10) -> float:
    """Minutes in stretches longer than ``least`` in which a wrong activity had more than 95%."""
    wrong = (label >= 0) & (p.max(1) > 0.95) & (p.argmax(1) != label)
    edges = np.flatnonzero(np.diff(np.r_[False, wrong, False]))
    lengths = (edges[1::2] - edges[::2]) * minutes
    return float(lengths[lengths > least].sum())
