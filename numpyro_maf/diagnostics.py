# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Diagnostics: arrays in, plain results out."""

from __future__ import annotations

import numpy as np

__all__ = ["classification_scores", "expected_calibration_error"]


def classification_scores(probabilities, labels, bins: int = 15) -> dict[str, float]:
    """Accuracy, log-loss and expected calibration error of probabilities of classes.

    :param probabilities: ``(N, K)``, as the model gives them.
    :param labels: ``(N,)`` integers in ``0, …, K-1``.
    :param bins: of the calibration error.
    :return: ``accuracy`` and ``ece`` of the most probable class, ``log_loss`` in nats.
    """
    p = np.asarray(probabilities, np.float64)
    labels = np.asarray(labels)
    if p.ndim != 2 or labels.shape != p.shape[:1]:
        raise ValueError(f"expected (N, K) probabilities and (N,) labels, got {p.shape}, {labels.shape}")
    right = p.argmax(-1) == labels
    given = np.maximum(p[np.arange(len(p)), labels], np.finfo(np.float64).tiny)
    return {
        "accuracy": float(right.mean()),
        "log_loss": float(-np.log(given).mean()),
        "ece": expected_calibration_error(p.max(-1), right, bins),
    }


def expected_calibration_error(confidence, right, bins: int = 15) -> float:
    """Mean distance of confidence from accuracy over equal bins of confidence, weighted by rows.

    Naeini, Cooper & Hauskrecht (2015).

    :param confidence: ``(N,)``, the probability of the class that was chosen.
    :param right: ``(N,)`` booleans, whether it was the right one.
    """
    confidence, right = np.asarray(confidence, np.float64), np.asarray(right, np.float64)
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(which, right - confidence, bins)
    return float(np.abs(gaps).sum() / len(confidence))
