# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""The conditional of a MADE that each column needs: by the declared support, else by simulated values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpyro.distributions import constraints

from numpyro_maf.flows.conditionals import Bernoulli, Categorical, Conditional, Count, LogMixture, Mixture
from numpyro_maf.flows.domains import of_one_number
from numpyro_maf.inference.sites import Sites

__all__ = ["kinds_of", "latent_columns", "of_real_columns", "troubles"]

_MANY = 64  # categories; where there are more, a count
_FEW = 20  # values from 0 that may be categories without having been declared
_EXACT = 2**22  # whole numbers beyond are as good as real ones, and float32 cannot tell cells apart


def latent_columns(sites: Sites, vectors) -> tuple[Conditional, ...]:
    """A conditional for each number of the latent sites' vector.

    :param vectors: ``(N, D)``, by which counts are scaled.
    """
    made: list[Conditional] = []
    for n in sites.columns:
        if 0 <= n <= _MANY:
            made.append({0: Mixture(10), 2: Bernoulli()}.get(n) or Categorical(n))
        else:
            made.append(Count(most=None if n < 0 else n - 1))
    return tuple(_scaled(made, np.asarray(vectors)))


def kinds_of(support: Any, x: np.ndarray) -> tuple[Conditional | None, ...]:
    """The conditional of each column of a site's values, None for a continuous one.

    A support that is boolean or of integers decides. Where it says nothing, as that of most simulators, the
    values do: whole numbers of which few are different, or which repeat, are discrete.

    :param support: of one number; ``x``: ``(N, D)`` values.
    """
    x = np.asarray(x)
    each = of_one_number(support)
    made = [_declared(each, x[:, d]) if each.is_discrete else _found(x[:, d]) for d in range(x.shape[1])]
    return tuple(_scaled(made, x))


def of_real_columns(
    support: Any, kinds: Sequence[Conditional | None], x: np.ndarray
) -> tuple[Conditional, ...]:
    """The same with mixtures for continuous columns: of logarithms for positive ones that are skewed.

    :param support: of one number; ``x``: ``(N, D)`` values.
    """
    positive = of_one_number(support) is constraints.positive
    logs = [d for d, kind in enumerate(kinds) if kind is None and _is_positive(np.asarray(x[:, d]), positive)]
    pooled = _log_mixture(x[:, logs]) if logs else None
    return tuple(
        kind or (pooled if pooled is not None and d in logs else Mixture(10)) for d, kind in enumerate(kinds)
    )


def troubles(kinds: Sequence[Conditional | None], x: np.ndarray) -> dict[int, str]:
    """What no density can describe in continuous columns, by column: values that repeat amid others.

    A value that the discrete columns foretell, as a flag of a time-out does, is no trouble: it is the same
    wherever they are.
    """
    x = np.asarray(x)
    discrete = [d for d, kind in enumerate(kinds) if kind is not None]
    group = np.unique(x[:, discrete], axis=0, return_inverse=True)[1].ravel() if discrete else 0
    found = {}
    for d in (d for d, kind in enumerate(kinds) if kind is None):
        values, which, counts = np.unique(x[:, d], return_inverse=True, return_counts=True)
        if len(values) == 1:
            continue  # training names constant columns
        top, share = int(counts.argmax()), counts.max() / len(x)
        if _is_whole(values):
            if values[0] < 0 and x[:, d].std() < 10:
                found[d] = "takes whole numbers, some of them negative: add a number to it, to have counts"
        elif len(values) <= min(100, len(x) / 10):
            found[d] = f"takes only {len(values)} different values: number them 0, 1, … to have categories"
        elif counts[top] >= 10 and share >= 0.01 and counts[top] > 10 * np.median(counts):
            there = which.ravel() == top
            groups = np.broadcast_to(group, len(x))
            own = np.isin(groups, groups[there])
            if not there[own].all():
                found[d] = (
                    f"is exactly {values[top]:.6g} in {share:.1%} of the rows, amid other values: return a "
                    "flag for that, 0 or 1, as one more number"
                )
    return found


def _declared(each, values) -> Conditional | None:
    """By the support of one number."""
    if each is constraints.boolean:
        return Bernoulli()
    if isinstance(each, constraints.integer_interval):
        low, high = int(np.min(each.lower_bound)), int(np.max(each.upper_bound))
        if (low, high) == (0, 1):
            return Bernoulli()
        if high - low < _MANY:
            return Categorical(high - low + 1, low)
        return Count(most=high) if low >= 0 and high < _EXACT else None
    counted = isinstance(each, constraints.integer_greater_than) and np.min(each.lower_bound) >= 0
    return (Count() if values.max() < _EXACT else None) if counted else _found(values)


def _found(values) -> Conditional | None:
    """By what was simulated."""
    if values.dtype == bool:
        return Bernoulli()
    if not _is_whole(values):
        return None
    low, high = int(values.min()), int(values.max())
    count, different = high - low + 1, len(np.unique(values))
    if high == low or different > len(values) / 2:
        return None  # constant, or hardly any value repeats
    if (low, high) == (0, 1):
        return Bernoulli()
    # Counts have a tail: the largest is rare. Of categories it is one as the others. In doubt a count, to
    # which no number is impossible.
    closed = count <= _FEW and (values == high).mean() >= max(0.01, 0.5 / count)
    if count <= _MANY and (closed or low < 0):
        return Categorical(count, low)
    return Count() if low >= 0 else None


def _is_whole(values) -> bool:
    return bool((values == np.round(values)).all() and np.abs(values).max(initial=0) < _EXACT)


def _is_positive(values, declared: bool) -> bool:
    """Whether a continuous column is taken on the scale of its logarithm."""
    values = np.asarray(values, np.float64)
    if not (values > 0).all():
        return False
    logs = np.log(values)
    if logs.std() < 1e-4:  # more than float32 can tell apart
        return False
    return declared or (_skewness(values) > 1 and abs(_skewness(logs)) < _skewness(values))


def _skewness(values) -> float:
    sd = values.std()
    return float((((values - values.mean()) / sd) ** 3).mean()) if sd > 0 else 0.0


def _scaled(kinds, x) -> list[Any]:
    """The same with one scale for all counts, so that they are of few kinds."""
    counts = [d for d, kind in enumerate(kinds) if isinstance(kind, Count)]
    if not counts:
        return list(kinds)
    loc, scale = _place(np.log1p(np.maximum(np.asarray(x[:, counts], np.float64), 0)), 1 / 16)
    return [replace(k, loc=loc, scale=scale) if isinstance(k, Count) else k for k in kinds]


def _log_mixture(x) -> LogMixture:
    loc, scale = _place(np.log(np.asarray(x, np.float64)))
    return LogMixture(loc=loc, scale=scale)


def _place(logs, least: float = 1e-3) -> tuple[float, float]:
    """Mean and standard deviation of logarithms, rounded: so that few programs are compiled."""
    scale = 2.0 ** round(math.log2(max(float(logs.std()), least)))
    return round(2 * float(logs.mean()) / scale) * scale / 2, scale
