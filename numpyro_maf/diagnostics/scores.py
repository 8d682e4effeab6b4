# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Classifiers: what their probabilities are worth, and how well one tells two samples apart."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from numpyro_maf.inputs import as_labels, as_numbers, check_finite

__all__ = ["c2st", "classification_scores", "expected_calibration_error"]


def c2st(
    reference: ArrayLike, draws: ArrayLike, *, seed: int = 0, folds: int = 5, jobs: int | None = None
) -> float:
    """Classifier two-sample test: how well a classifier tells two sets of draws apart, 0.5 not at all.

    Lopez-Paz & Oquab (2017), with the settings of Lueckmann et al. (2021): scikit-learn's ``MLPClassifier``,
    two hidden layers of 10 D units, on draws standardised by the reference; cross-validated accuracy.

    :param reference: ``(N, D)``; ``draws``: ``(N, D)``, as many.
    :param folds: of the cross-validation; ``jobs``: how many at once.
    :raises ValueError: for shapes that differ and values that are not finite.
    """
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.neural_network import MLPClassifier

    reference = np.asarray(check_finite("reference", as_numbers("reference", reference)), np.float64)
    draws = np.asarray(check_finite("draws", as_numbers("draws", draws)), np.float64)
    if reference.ndim != 2 or reference.shape != draws.shape or not reference.shape[-1]:
        raise ValueError(f"reference and draws must both be (N, D), got {reference.shape} and {draws.shape}")
    if len(reference) < folds:
        raise ValueError(f"reference and draws need a row for each of {folds} folds, got {len(reference)}")
    mean, sd = reference.mean(0), scales(reference)
    x = np.concatenate([(reference - mean) / sd, (draws - mean) / sd])
    label = np.repeat([0, 1], len(reference))
    units = 10 * reference.shape[1]
    classifier = MLPClassifier((units, units), max_iter=10_000, solver="adam", random_state=seed)
    split = KFold(folds, shuffle=True, random_state=seed)
    return float(cross_val_score(classifier, x, label, cv=split, scoring="accuracy", n_jobs=jobs).mean())


def classification_scores(probabilities: ArrayLike, labels: ArrayLike, bins: int = 15) -> dict[str, float]:
    """Accuracy, log-loss and expected calibration error of probabilities of classes.

    :param probabilities: ``(N, K)``, as the model gives them.
    :param labels: ``(N,)`` integers in ``0, …, K-1``.
    :param bins: of the calibration error.
    :return: ``accuracy`` and ``ece`` of the most probable class, ``log_loss`` in nats.
    :raises ValueError: for shapes that do not fit, rows that are no probabilities, and labels of no class.
    """
    p = known_numbers("probabilities", probabilities)
    if p.ndim != 2 or not p.size:
        raise ValueError(f"probabilities must be (N, K), got {p.shape}")
    wrong = (p < 0).any(1) | (np.abs(p.sum(1) - 1) > 1e-3)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise ValueError(f"probabilities must not be negative and sum to 1, row {row} is {p[row]}")
    labels = as_labels("labels", labels, p.shape[1], shape=p.shape[:1])
    right = p.argmax(-1) == labels
    given = np.maximum(p[np.arange(len(p)), labels], np.finfo(np.float64).tiny)
    return {
        "accuracy": float(right.mean()),
        "log_loss": float(-np.log(given).mean()),
        "ece": expected_calibration_error(p.max(-1), right, bins),
    }


def expected_calibration_error(confidence: ArrayLike, right: ArrayLike, bins: int = 15) -> float:
    """Mean distance of confidence from accuracy over equal bins of confidence, weighted by rows.

    Naeini, Cooper & Hauskrecht (2015).

    :param confidence: ``(N,)``, the probability of the class that was chosen.
    :param right: ``(N,)`` booleans, whether it was the right one.
    :raises ValueError: for shapes that do not fit, and numbers outside of [0, 1].
    """
    confidence = known_numbers("confidence", confidence)
    right = as_labels("right", right, 2, shape=confidence.shape).astype(np.float64)
    if confidence.ndim != 1 or not confidence.size:
        raise ValueError(f"confidence must be (N,), got {confidence.shape}")
    if (confidence < 0).any() or (confidence > 1 + 1e-6).any():
        raise ValueError(f"confidence must be in [0, 1], got {confidence.min()} to {confidence.max()}")
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(which, right - confidence, bins)
    return float(np.abs(gaps).sum() / len(confidence))


def known_numbers(name: str, value: Any) -> np.ndarray:
    """Numbers in double precision, none of them NaN."""
    a = np.asarray(as_numbers(name, value), np.float64)
    if np.isnan(a).any():
        raise ValueError(f"{name} holds NaN, {int(np.isnan(a).sum())} of {a.size} numbers")
    return a


def scales(rows) -> np.ndarray:
    """Standard deviations by column; 1 for a constant column, whatever rounding makes of it."""
    sd = rows.std(0, ddof=1)
    return np.where(sd > 1e-12 * np.abs(rows.mean(0)), sd, 1.0)
