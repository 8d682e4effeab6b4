# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Diagnostics: arrays in, plain results out."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

__all__ = ["PSIS", "c2st", "classification_scores", "expected_calibration_error", "psis"]


class PSIS(NamedTuple):
    """What :func:`psis` returns.

    :param khat: shape of the Pareto tail of the weights.
    :param log_weights: ``(S,)``, smoothed, of weights that sum to 1.
    :param ess: effective sample size, 1 over the sum of their squares.
    :param threshold: the largest ``khat`` with which estimates from S draws can be trusted.
    """

    khat: float
    log_weights: np.ndarray
    ess: float
    threshold: float


def psis(log_weights) -> PSIS:
    """Pareto-smoothed importance sampling, by ArviZ.

    Vehtari, Simpson, Gelman, Yao & Gabry (2024); the threshold is their ``min(1 - 1 / log10(S), 0.7)``.

    :param log_weights: ``(S,)``, log target minus log proposal at draws of the proposal, S at least 25.
    :raises ValueError: for another shape, or weights that are NaN or plus infinity.
    """
    raw = np.array(log_weights, np.float64)
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
    smoothed = smoothed - np.logaddexp.reduce(smoothed)
    ess = float(np.exp(-np.logaddexp.reduce(2 * smoothed)))
    return PSIS(float(khat), smoothed, ess, min(1 - 1 / math.log10(len(raw)), 0.7))


def _psislw(log_weights):
    try:
        from arviz_stats.base import array_stats  # ArviZ 1
    except ImportError:
        from arviz import psislw

        return psislw(log_weights)
    return array_stats.psislw(-log_weights)


def c2st(reference, draws, *, seed: int = 0, folds: int = 5, jobs: int | None = None) -> float:
    """Classifier two-sample test: how well a classifier tells two sets of draws apart, 0.5 not at all.

    Lopez-Paz & Oquab (2017), with the settings of Lueckmann et al. (2021): scikit-learn's ``MLPClassifier``,
    two hidden layers of 10 D units, on draws standardised by the reference; cross-validated accuracy.

    :param reference: ``(N, D)``; ``draws``: ``(N, D)``, as many.
    :param folds: of the cross-validation; ``jobs``: how many at once.
    :raises ValueError: for shapes that differ and values that are not finite.
    """
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.neural_network import MLPClassifier

    reference, draws = np.asarray(reference, np.float64), np.asarray(draws, np.float64)
    if reference.ndim != 2 or reference.shape != draws.shape:
        raise ValueError(f"expected two arrays (N, D), got {reference.shape} and {draws.shape}")
    if not (np.isfinite(reference).all() and np.isfinite(draws).all()):
        raise ValueError("reference and draws must be finite")
    mean, sd = reference.mean(0), reference.std(0, ddof=1)
    x = np.concatenate([(reference - mean) / sd, (draws - mean) / sd])
    label = np.repeat([0, 1], len(reference))
    units = 10 * reference.shape[1]
    classifier = MLPClassifier((units, units), max_iter=10_000, solver="adam", random_state=seed)
    split = KFold(folds, shuffle=True, random_state=seed)
    return float(cross_val_score(classifier, x, label, cv=split, scoring="accuracy", n_jobs=jobs).mean())


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
