# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Diagnostics: arrays in, plain results out."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from numpyro_maf._arviz import import_arviz
from numpyro_maf.pytrees import Described

__all__ = [
    "PSIS", "SBC", "Coverage", "c2st", "classification_scores", "coverage", "expected_calibration_error",
    "psis", "sbc", "tarp",
]  # fmt: skip

Values = ArrayLike | Mapping[str, ArrayLike]


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


class SBC(NamedTuple):
    """The result of :func:`sbc`; printing it gives the verdict.

    :param ranks: ``(N, D)``: how many of the L draws lie below the truth.
    :param draws: L.
    :param pvalues: ``(D,)``, of uniform ranks.
    :param names: of the D numbers.
    """

    ranks: np.ndarray
    draws: int
    pvalues: np.ndarray
    names: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """One sentence: which posteriors are too narrow, too wide or to one side, if any."""
        uniform = (self.ranks + 0.5) / (self.draws + 1)
        found = []
        for u, p, name in zip(uniform.T, self.pvalues, self.names):
            if p < 0.01 / len(self.names):
                lean = (u.mean() - 0.5) * math.sqrt(12 * len(u))
                width = (((u - 0.5) ** 2).mean() - 1 / 12) * math.sqrt(180 * len(u))
                side, size = "low" if lean > 0 else "high", "narrow" if width > 0 else "wide"
                kind = side if abs(lean) > abs(width) else size
                found.append(f"{name} is too {kind} (p = {p:.1g})")
        if found:
            return "not calibrated: " + ", ".join(found)
        return f"no miscalibration found in {len(self.ranks)} posteriors (least p {self.pvalues.min():.2f})"

    def _describe(self) -> list[str]:
        counts = f"{len(self.ranks)} posteriors of {len(self.names)} numbers, {self.draws} draws of each"
        return [*textwrap.wrap(f"SBC: {self.verdict}", 100, max_lines=3), f"  {counts}"]

    __repr__, _repr_html_ = Described.__repr__, Described._repr_html_  # type: ignore[misc]

    def __str__(self) -> str:
        return self.verdict


class Coverage(NamedTuple):
    """The result of :func:`coverage` and :func:`tarp`; printing it gives the verdict.

    :param levels: ``(N,)``, for each posterior the least credible level of a region that holds the truth;
        uniform if all is well.
    :param pvalue: of that.
    """

    levels: np.ndarray
    pvalue: float

    def at(self, credibility: ArrayLike) -> np.ndarray:
        """The share of regions of a credibility that hold the truth."""
        return np.searchsorted(np.sort(self.levels), credibility, "right") / len(self.levels)

    @property
    def verdict(self) -> str:
        """One sentence: whether regions hold the truth as often as they say."""
        held = {level: float(self.at(level)) for level in (0.5, 0.9)}
        figures = ", ".join(f"{level:.0%} regions hold {share:.1%}" for level, share in held.items())
        if self.pvalue >= 0.01:
            return f"no miscalibration found: {figures} (p = {self.pvalue:.2f})"
        over = self.levels.mean() > 0.5
        kind = "overconfident" if over else "underconfident"
        return f"not calibrated, {kind}: {figures} (p = {self.pvalue:.1g})"

    def _describe(self) -> list[str]:
        verdict = textwrap.wrap(f"Coverage: {self.verdict}", 100, subsequent_indent="  ")
        return [*verdict, f"  {len(self.levels)} posteriors"]

    __repr__, _repr_html_ = Described.__repr__, Described._repr_html_  # type: ignore[misc]

    def __str__(self) -> str:
        return self.verdict


def sbc(draws: Values, truth: Values, *, seed: int = 0) -> SBC:
    """Simulation-based calibration: the truth's rank among draws of its posterior is uniform.

    Talts, Betancourt, Simpson, Vehtari & Gelman (2018), with a Kolmogorov-Smirnov test of each number.

    :param draws: ``(L, N, D)``: L draws of each of N posteriors; or values by site, ``(L, N, ...)``.
    :param truth: ``(N, D)``, what the data of each were made from; or values by site.
    :param seed: ties, of discrete numbers, are broken at random.
    :raises ValueError: for shapes that do not fit, and fewer than 20 posteriors.
    """
    from scipy.stats import kstest

    draws, truth, names = _columns(draws, truth)
    rng, count = _stream("sbc", seed), len(draws)
    ranks = _ranked(draws < truth, draws == truth, rng)
    uniform = (ranks + rng.random(ranks.shape)) / (count + 1)
    pvalues = np.array([kstest(u, "uniform").pvalue for u in uniform.T])
    return SBC(ranks, count, pvalues, names)


def coverage(log_prob_draws: ArrayLike, log_prob_truth: ArrayLike) -> Coverage:
    """Expected coverage of the regions of highest density.

    Hermans et al. (2022), eq. 3: the truth lies in the region of level alpha if a share of at most alpha of
    the draws is denser.

    :param log_prob_draws: ``(L, N)``, the posteriors' log-density at L draws of each.
    :param log_prob_truth: ``(N,)``, at what the data were made from.
    """
    draws, truth = np.asarray(log_prob_draws), np.asarray(log_prob_truth)
    if draws.ndim != 2 or truth.shape != draws.shape[1:]:
        raise ValueError(f"expected log-densities (L, N) and (N,), got {draws.shape} and {truth.shape}")
    equal = np.isclose(draws, truth, rtol=1e-5, atol=1e-6)  # computed apart, equal densities differ a little
    rng = _stream("coverage", 0)
    return _coverage(_ranked((draws > truth) & ~equal, equal, rng), len(draws), rng)


def tarp(draws: Values, truth: Values, *, seed: int = 0) -> Coverage:
    """Expected coverage of balls about random points: needs draws alone, and finds what is wrong in general.

    Lemos, Coogan, Hezaveh & Perreault-Levasseur, *TARP* (2023), algorithm 2. Numbers are standardised by the
    truths; the points are uniform over their range.

    :param draws: as for :func:`sbc`.
    """
    drawn, true, _ = _columns(draws, truth)
    loc, scale = true.mean(0), _scales(true)
    drawn, true = (drawn - loc) / scale, (true - loc) / scale
    rng = _stream("tarp", seed)
    points = rng.uniform(true.min(0), true.max(0), true.shape)
    drawn, true = (((a - points) ** 2).sum(-1) for a in (drawn, true))
    return _coverage(_ranked(drawn < true, drawn == true, rng), len(drawn), rng)


def _stream(name: str, seed: int) -> np.random.Generator:
    """Random numbers that no other function, and no ``default_rng(seed)`` of the user's, has drawn."""
    return np.random.default_rng([seed, *name.encode()])


def _ranked(before: np.ndarray, equal: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How many of the draws, on axis 0, come before the truth, ties broken at random."""
    return before.sum(0) + rng.integers(0, equal.sum(0) + 1)


def _coverage(counts: np.ndarray, of: int, rng: np.random.Generator) -> Coverage:
    from scipy.stats import kstest

    if len(counts) < 20:
        raise ValueError(f"calibration needs 20 posteriors or more, got {len(counts)}")
    levels = (counts + rng.random(len(counts))) / (of + 1)
    return Coverage(levels, float(kstest(levels, "uniform").pvalue))


def _columns(draws: Any, truth: Any) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """``(L, N, D)``, ``(N, D)`` and a name for each of the D numbers."""
    if isinstance(draws, Mapping):
        names, parts, truths = [], [], []
        for site, value in draws.items():
            value, true = np.asarray(value), np.asarray(truth[site])
            if value.ndim < 2 or value.shape[1:] != true.shape:
                raise ValueError(f"draws of {site!r} must be (L, *{true.shape}), got {value.shape}")
            inner = list(np.ndindex(true.shape[1:]))
            names += [f"{site}[{', '.join(map(str, i))}]" if i else site for i in inner]
            parts.append(value.reshape(*value.shape[:2], -1))
            truths.append(true.reshape(len(true), -1))
        draws, truth = np.concatenate(parts, -1), np.concatenate(truths, -1)
    else:
        draws, truth = np.asarray(draws), np.asarray(truth)
        if draws.ndim != 3 or truth.shape != draws.shape[1:]:
            raise ValueError(
                f"expected draws (L, N, D) and truths (N, D), got {draws.shape} and {truth.shape}"
            )
        names = [f"[{i}]" for i in range(draws.shape[-1])]
    if draws.shape[1] < 20:
        raise ValueError(f"calibration needs 20 posteriors or more, got {draws.shape[1]}")
    return draws.astype(np.float64), truth.astype(np.float64), tuple(names)


def _scales(rows) -> np.ndarray:
    """Standard deviations by column; 1 for a constant column, whatever rounding makes of it."""
    sd = rows.std(0, ddof=1)
    return np.where(sd > 1e-12 * np.abs(rows.mean(0)), sd, 1.0)


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

    reference, draws = np.asarray(reference, np.float64), np.asarray(draws, np.float64)
    if reference.ndim != 2 or reference.shape != draws.shape:
        raise ValueError(f"expected two arrays (N, D), got {reference.shape} and {draws.shape}")
    if not (np.isfinite(reference).all() and np.isfinite(draws).all()):
        raise ValueError("reference and draws must be finite")
    mean, sd = reference.mean(0), _scales(reference)
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


def expected_calibration_error(confidence: ArrayLike, right: ArrayLike, bins: int = 15) -> float:
    """Mean distance of confidence from accuracy over equal bins of confidence, weighted by rows.

    Naeini, Cooper & Hauskrecht (2015).

    :param confidence: ``(N,)``, the probability of the class that was chosen.
    :param right: ``(N,)`` booleans, whether it was the right one.
    """
    confidence, right = np.asarray(confidence, np.float64), np.asarray(right, np.float64)
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(which, right - confidence, bins)
    return float(np.abs(gaps).sum() / len(confidence))
