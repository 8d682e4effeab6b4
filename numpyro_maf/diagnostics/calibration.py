# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Whether posteriors mean what they say: ranks, regions of highest density, balls about random points."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from numpyro_maf.diagnostics.scores import known_numbers, scales
from numpyro_maf.inputs import by_site, check_finite
from numpyro_maf.pytrees import Described
from numpyro_maf.rng import as_key

__all__ = ["SBC", "Coverage", "coverage", "sbc", "tarp"]

Values = ArrayLike | Mapping[str, ArrayLike]

_SIGNIFICANT = 0.01


class SBC(NamedTuple):
    """The result of :func:`sbc`; printing it gives the verdict.

    :param ranks: ``(N, D)``: how many of the L draws lie below the truth.
    :param draws: number of draws of each posterior, L.
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
        corrected = np.minimum(len(self.names) * self.pvalues, 1.0)  # by Bonferroni
        for u, p, name in zip(uniform.T, corrected, self.names):
            if p < _SIGNIFICANT:
                lean = (u.mean() - 0.5) * math.sqrt(12 * len(u))
                width = (((u - 0.5) ** 2).mean() - 1 / 12) * math.sqrt(180 * len(u))
                side, size = "low" if lean > 0 else "high", "narrow" if width > 0 else "wide"
                kind = side if abs(lean) > abs(width) else size
                found.append(f"{name} is too {kind} ({_shown(p)})")
        if found:
            return "not calibrated: " + ", ".join(found)
        several = f", corrected for {len(self.names)} numbers" if len(self.names) > 1 else ""
        figures = f"{_shown(corrected.min(), 'least p')}{several}"
        return f"no miscalibration found in {len(self.ranks)} posteriors ({figures})"

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
        if self.pvalue >= _SIGNIFICANT:
            return f"no miscalibration found: {figures} ({_shown(self.pvalue)})"
        over = self.levels.mean() > 0.5
        kind = "overconfident" if over else "underconfident"
        return f"not calibrated, {kind}: {figures} ({_shown(self.pvalue)})"

    def _describe(self) -> list[str]:
        verdict = textwrap.wrap(f"Coverage: {self.verdict}", 100, subsequent_indent="  ")
        return [*verdict, f"  {len(self.levels)} posteriors"]

    __repr__, _repr_html_ = Described.__repr__, Described._repr_html_  # type: ignore[misc]

    def __str__(self) -> str:
        return self.verdict


def sbc(draws: Values, truth: Values, *, seed: Any = 0) -> SBC:
    """Simulation-based calibration: the truth's rank among draws of its posterior is uniform.

    Talts, Betancourt, Simpson, Vehtari & Gelman (2018), with a Kolmogorov-Smirnov test of each number.

    :param draws: ``(L, N, D)``: L draws of each of N posteriors; or values by site, ``(L, N, ...)``.
    :param truth: ``(N, D)``, what the data of each were made from; or values by site.
    :param seed: an integer or a ``jax.random`` key: ties, of discrete numbers, are broken at random.
    :raises ValueError: for shapes that do not fit, NaN, and fewer than 20 posteriors.
    """
    from scipy.stats import kstest

    draws, truth, names = _columns(draws, truth)
    rng, count = _stream("sbc", seed), len(draws)
    ranks = _ranked(draws < truth, draws == truth, rng)
    uniform = (ranks + rng.random(ranks.shape)) / (count + 1)
    pvalues = np.array([kstest(u, "uniform").pvalue for u in uniform.T])
    return SBC(ranks, count, pvalues, names)


def coverage(log_prob_draws: ArrayLike, log_prob_truth: ArrayLike, *, seed: Any = 0) -> Coverage:
    """Expected coverage of the regions of highest density.

    Hermans et al. (2022), eq. 3: the truth lies in the region of level alpha if a share of at most alpha of
    the draws is denser.

    :param log_prob_draws: ``(L, N)``, the posteriors' log-density at L draws of each.
    :param log_prob_truth: ``(N,)``, at what the data were made from.
    :param seed: as for :func:`sbc`.
    :raises ValueError: for shapes that do not fit, NaN, and fewer than 20 posteriors.
    """
    draws = known_numbers("log_prob_draws", log_prob_draws)
    truth = known_numbers("log_prob_truth", log_prob_truth)
    if draws.ndim != 2 or truth.shape != draws.shape[1:]:
        raise ValueError(
            f"expected log-densities log_prob_draws (L, N) and log_prob_truth (N,), got {draws.shape} and "
            f"{truth.shape}"
        )
    if not len(draws):
        raise ValueError(f"log_prob_draws must hold one draw or more, got shape {draws.shape}")
    equal = np.isclose(draws, truth, rtol=1e-5, atol=1e-6)  # computed apart, equal densities differ a little
    rng = _stream("coverage", seed)
    return _coverage(_ranked((draws > truth) & ~equal, equal, rng), len(draws), rng)


def tarp(draws: Values, truth: Values, *, seed: Any = 0) -> Coverage:
    """Expected coverage of balls about random points: needs draws alone, and finds what is wrong in general.

    Lemos, Coogan, Hezaveh & Perreault-Levasseur, *TARP* (2023), algorithm 2. Numbers are standardised by the
    truths; the points are uniform over their range.

    :param draws: as for :func:`sbc`, with ``truth`` and ``seed``.
    :raises ValueError: for shapes that do not fit, numbers that are not finite, and fewer than 20 posteriors.
    """
    drawn, true, _ = _columns(draws, truth)
    check_finite("draws", drawn), check_finite("truth", true)
    loc, scale = true.mean(0), scales(true)
    drawn, true = (drawn - loc) / scale, (true - loc) / scale
    rng = _stream("tarp", seed)
    points = rng.uniform(true.min(0), true.max(0), true.shape)
    drawn, true = (((a - points) ** 2).sum(-1) for a in (drawn, true))
    return _coverage(_ranked(drawn < true, drawn == true, rng), len(drawn), rng)


def _stream(name: str, seed: Any) -> np.random.Generator:
    """Random numbers that no other function, and no ``default_rng(seed)`` of the user's, has drawn."""
    data = np.asarray(jax.random.key_data(as_key(seed))).ravel().tolist()
    return np.random.default_rng([*data, *name.encode()])


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
        given, right = by_site("draws", draws), by_site("truth", truth, draws)
        for site, value in given.items():
            value, true = (
                known_numbers(f"draws[{site!r}]", value),
                known_numbers(f"truth[{site!r}]", right[site]),
            )
            if value.ndim < 2 or value.shape[1:] != true.shape:
                raise ValueError(f"draws of {site!r} must be (L, *{true.shape}), got {value.shape}")
            inner = list(np.ndindex(true.shape[1:]))
            names += [f"{site}[{', '.join(map(str, i))}]" if i else site for i in inner]
            parts.append(value.reshape(*value.shape[:2], -1))
            truths.append(true.reshape(len(true), -1))
        draws, truth = np.concatenate(parts, -1), np.concatenate(truths, -1)
    else:
        draws, truth = known_numbers("draws", draws), known_numbers("truth", truth)
        if draws.ndim != 3 or truth.shape != draws.shape[1:]:
            raise ValueError(
                f"expected draws (L, N, D) and truth (N, D), got {draws.shape} and {truth.shape}"
            )
        names = [f"[{i}]" for i in range(draws.shape[-1])]
    if not len(draws):
        raise ValueError(f"draws must hold one draw or more of each posterior, got shape {draws.shape}")
    if draws.shape[1] < 20:
        raise ValueError(f"calibration needs 20 posteriors or more, got {draws.shape[1]}")
    return draws, truth, tuple(names)


def _shown(p: float, name: str = "p") -> str:
    return f"{name} < 0.001" if p < 0.001 else f"{name} = {p:.2g}"
