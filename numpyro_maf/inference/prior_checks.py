# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Whether a learned joint distribution gives the samples that it was learned from, number by number."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from numpyro_maf.pytrees import Described

__all__ = ["JointCheck", "compared"]

_BLIND = "how three or more numbers depend on each other was not looked at"


@dataclass(frozen=True, eq=False, repr=False)
class JointCheck(Described):
    """The result of :meth:`~numpyro_maf.Joint.check`; printing it gives the verdict.

    :param table: by number, such as ``"theta[1]"``: mean and sd of the samples, mean and sd of the joint
        distribution's own draws, and the largest distance of their distribution functions.
    :param correlation: the pair of numbers whose rank correlations differ most, with that of the samples
        and that of the draws; None for one number.
    :param bound: distance that sampling noise exceeds once in a hundred checks; ``count``: of samples.
    :param tolerance: distance that is called small.
    """

    table: dict[str, dict[str, float]]
    correlation: tuple[str, str, float, float] | None
    bound: float
    count: float
    tolerance: float

    @property
    def distance(self) -> float:
        """The largest distance of distribution functions, of all numbers."""
        return max(row["distance"] for row in self.table.values())

    @property
    def good(self) -> bool:
        """Whether no distance and no difference of correlations is more than small, or than noise."""
        least = max(self.tolerance, self.bound)
        pair = self.correlation
        return self.distance <= least and (pair is None or abs(pair[2] - pair[3]) <= 4 * least)

    @property
    def verdict(self) -> str:
        """One sentence that names the sites that differ, if any."""
        worst = max(self.table, key=lambda name: self.table[name]["distance"])
        figures = f"the distribution functions of {worst} are {self.distance:.3f} apart"
        noise = f"noise alone gives up to {self.bound:.3f}"
        if self.good:
            found = "no difference found" if self.distance <= self.bound else "differences are small"
            return f"{found}: {figures}, {noise}; {_BLIND}"
        least = max(self.tolerance, self.bound)
        bad = [name for name, row in self.table.items() if row["distance"] > least]
        parts = [f"{', '.join(bad[:5])}{', ...' if len(bad) > 5 else ''}: {figures}, {noise}"] if bad else []
        if self.correlation and abs(self.correlation[2] - self.correlation[3]) > 4 * least:
            a, b, theirs, own = self.correlation
            parts.append(f"rank correlation of {a} and {b} is {own:.2f}, that of the samples {theirs:.2f}")
        return f"it differs from the samples in {'; '.join(parts)}; train longer, or with another builder"

    def _describe(self) -> list[str]:
        lines = textwrap.wrap(f"JointCheck: {self.verdict}", 100, subsequent_indent="  ", max_lines=3)
        for name, row in list(self.table.items())[:3]:
            theirs, own = (
                f"{row['mean']:.4g} +- {row['sd']:.4g}",
                f"{row['own_mean']:.4g} +- {row['own_sd']:.4g}",
            )
            lines.append(f"  {name}: samples {theirs}, joint {own}")
        return lines[:6]

    def __str__(self) -> str:
        return self.verdict


def compared(
    samples: Mapping[str, np.ndarray], draws: Mapping[str, np.ndarray], weights: np.ndarray, tolerance: float
) -> JointCheck:
    """Samples by site, ``(N, *shape)``, with weights ``(N,)``, beside draws by site, ``(M, *shape)``."""
    theirs, own = _numbers(samples), _numbers(draws)
    share = weights / weights.sum()
    effective = 1 / float((share**2).sum())
    count = len(next(iter(own.values())))
    # Of the two-sample Kolmogorov-Smirnov distance at 1%, shared among the numbers (Bonferroni).
    bound = math.sqrt(-math.log(0.005 / len(theirs)) / 2 * (1 / effective + 1 / count))
    table = {}
    for name, x in theirs.items():
        y = own[name]
        mean, own_mean = float(share @ x), float(y.mean())
        table[name] = dict(
            mean=mean, sd=math.sqrt(max(float(share @ (x - mean) ** 2), 0.0)), own_mean=own_mean,
            own_sd=float(y.std()), distance=_distance(x, share, y),
        )  # fmt: skip
    pair = None
    if len(theirs) > 1:
        uniform = np.full(count, 1 / count)
        a = _correlations(np.stack(list(theirs.values()), -1), share)
        b = _correlations(np.stack([own[name] for name in theirs], -1), uniform)
        i, j = np.unravel_index(np.abs(np.triu(a - b, 1)).argmax(), a.shape)
        names = list(theirs)
        pair = (names[i], names[j], float(a[i, j]), float(b[i, j]))
    return JointCheck(table, pair, bound, effective, tolerance)


def _numbers(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    found = {}
    for name, value in values.items():
        value = np.asarray(value, np.float64)
        for index in np.ndindex(value.shape[1:]):
            label = f"{name}[{','.join(map(str, index))}]" if index else name
            found[label] = value[(slice(None), *index)]
    return found


def _distance(x: np.ndarray, share: np.ndarray, y: np.ndarray) -> float:
    """The largest distance between two empirical distribution functions, the first of weighted numbers."""
    order = np.argsort(x, kind="stable")
    held = np.concatenate([[0.0], np.cumsum(share[order])])
    grid = np.concatenate([x, y])
    first = held[np.searchsorted(x[order], grid, "right")]
    second = np.searchsorted(np.sort(y), grid, "right") / len(y)
    return float(np.abs(first - second).max())


def _correlations(x: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Rank correlations of columns, weighted; 0 where a column is constant."""
    order = np.argsort(x, 0, kind="stable")
    held = np.cumsum(share[order], 0)
    ranks = np.empty_like(x)
    np.put_along_axis(ranks, order, held - share[order] / 2, 0)
    ranks -= share @ ranks
    covariance = (ranks * share[:, None]).T @ ranks
    sd = np.sqrt(np.diag(covariance))
    return covariance / np.maximum(np.outer(sd, sd), 1e-300)
