# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Rows to train on: checked, split, scaled, and fed in batches from memory or disk."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_maf.flows.linear import HeavyTails, Standardize
from numpyro_maf.inputs import as_numbers, checked_rows
from numpyro_maf.rng import generator

__all__ = ["Rows", "checked_rows", "checked_weights", "held_out_rows", "scaling", "warn_of_rounding"]

RESIDENT, BLOCK = 2**28, 2**26  # bytes


@dataclass(frozen=True, eq=False)
class Rows:
    """Arrays of rows and the rows' weights: on the device, or, if large, where they are, to pass in blocks.

    :param arrays: ``(N, ...)`` each; ``weights``: ``(N,)``. On the device they have room for more rows.
    """

    arrays: tuple[Any, ...]
    weights: Any
    resident: bool

    @classmethod
    def of(cls, data, weights) -> Rows:
        """Put arrays of not more than 256 MB together on the device."""
        if sum(a.nbytes for a in data) > RESIDENT:
            return cls(tuple(data), weights, False)
        # Few sizes, so that few are compiled.
        n = len(weights)
        room = n if n > 2**14 else max(2**10, 1 << (n - 1).bit_length())
        return cls(tuple(_with_room(np.asarray(a), room) for a in data), _with_room(weights, room), True)

    def feed(
        self, key, rows, size: int, order: np.random.Generator | None = None
    ) -> Iterator[tuple[Any, ...]]:
        """Some rows in batches, block by block.

        :param rows: their numbers.
        :param size: rows of a batch.
        :param order: mixes the rows; None to keep their order.
        :return: data, weights, a key, row numbers ``(steps, size)``, and how many steps are used.
        """
        if order is not None:
            rows = order.permutation(rows)
        if self.resident:
            yield self.arrays, self.weights, key, *_batches(rows, size, len(self.weights))
            return
        each = sum(a.nbytes for a in self.arrays) // len(self.weights)
        block = max(BLOCK // each // size, 1) * size
        for i, start in enumerate(range(0, len(rows), block)):
            chosen = np.sort(rows[start : start + block])  # in the order of the disk, mixed again below
            weights, *data = (_with_room(a[chosen], block) for a in (self.weights, *self.arrays))
            again = np.arange(len(chosen)) if order is None else order.permutation(len(chosen))
            yield tuple(data), weights, jax.random.fold_in(key, i), *_batches(again, size, block)


def _with_room(a, room):
    """An array on the device, with copies of its last row in the room that is left."""
    left = room - len(a)
    return jax.device_put(np.concatenate([a, np.repeat(a[-1:], left, 0)]) if left else a)


def _batches(rows, size, room):
    """Row numbers in batches ``(steps, size)``, and how many of these are used.

    Filled up with rows that do not count, ``~row``: real ones, for losses that compare rows.
    """
    batches = np.empty((-(-room // size), size), int)
    batches.reshape(-1)[: len(rows)] = rows
    batches.reshape(-1)[len(rows) :] = ~np.resize(rows, batches.size - len(rows))
    return batches, -(-len(rows) // size)


def checked_weights(weights, held_out) -> np.ndarray:
    """How much each row counts, ``(N,)``, relative to the one that counts most.

    :param weights: ``(N,)``, or None for equal ones.
    :param held_out: ``(N,)`` booleans, the validation rows.
    :raises ValueError: for another shape, negative numbers, and weights that leave no row to train or to
        validate on.
    """
    n = len(held_out)
    if weights is None:
        return np.ones(n)
    weights = checked_rows("weights", weights, (), n).astype(float)
    if (weights < 0).any() or not weights.any():
        raise ValueError(
            "weights must be not negative and not all 0; from logarithms, they are "
            "exp(log_weights - log_weights.max())"
        )
    for rows, what in [(~held_out, "train on"), (held_out, "validate on")]:
        if rows.any() and not weights[rows].any():
            raise ValueError(f"all rows to {what} have weight 0")
    return weights / weights.max()


def held_out_rows(key, validation, n: int) -> np.ndarray:
    """Which rows validate, ``(N,)`` booleans: as given, or a random share.

    :raises ValueError: for booleans of another shape, a share outside of [0, 1), and none left to train on.
    """
    validation = np.asarray(as_numbers("validation", validation))
    if validation.ndim:
        mask = validation
        if mask.shape != (n,) or mask.dtype != bool:
            raise ValueError(
                f"validation must be a share or ({n},) booleans, got {mask.dtype} of shape {mask.shape}"
            )
    else:
        if not 0 <= validation < 1:
            raise ValueError(f"validation must be in [0, 1), got {validation}")
        mask = np.zeros(n, bool)
        mask[generator(key).permutation(n)[: round(validation * n)]] = True
    if mask.all():
        raise ValueError("validation holds out every row, none is left to train on")
    return mask


_HEAVY = 100  # the farthest number in half-widths of the middle 68%: 4 of a normal, 1000 of a Cauchy
_SAMPLE = 2**14


def scaling(
    x, rows, weights, inner: Callable = lambda part: part, *, name: str, density: bool = False,
    tails: bool = False, keep: Any = False,
) -> Standardize:  # fmt: skip
    """Weighted mean and standard deviation of some rows of an array, NaN left out, in one pass over it.

    They are computed in double precision on the host. Where JAX's floating point would lose them, the result
    holds NumPy arrays.

    :param x: ``(N, ...)``; ``rows``: numbers of the rows that count; ``weights``: ``(N,)``.
    :param inner: what is done to rows first. A column that does not vary keeps scale 1.
    :param name: of the array. A warning says where JAX's floating point cannot resolve a column's spread.
    :param density: whether a density of the columns is learned. Then a warning names constant columns.
    :param tails: whether columns with heavy tails are compressed, by :class:`HeavyTails`. Their median and
        quantiles scale them, for a Cauchy distribution has no mean.
    :param keep: booleans by column, True for those that keep their units: nothing is said of them.
    """
    count: Any = 0.0
    mean: Any = 0.0
    square: Any = 0.0
    for start in range(0, len(rows), 2**15):
        chunk = rows[start : start + 2**15]
        part = np.asarray(inner(np.asarray(x[chunk])), np.float64)
        weight = weights[chunk].reshape(-1, *[1] * (part.ndim - 1)) * ~np.isnan(part)
        total = weight.sum(0)
        part = np.nan_to_num(part)
        own = (weight * part).sum(0) / np.maximum(total, 1e-300)
        new = np.maximum(count + total, 1e-300)
        # Chan, Golub & LeVeque (1979): the parts' squares about their own means, and those of the means.
        square = square + (weight * (part - own) ** 2).sum(0) + (own - mean) ** 2 * count * total / new
        mean, count = mean + (own - mean) * total / new, count + total
    sd = np.sqrt(square / np.maximum(count, 1e-300))
    varies = sd > np.maximum(1e-14 * np.abs(mean), np.finfo(jnp.result_type(float)).tiny)
    sd = np.where(varies, sd, 1.0)
    width = np.zeros(np.shape(mean))
    if tails:
        counted = rows[weights[rows] > 0]
        share = weights[counted] / weights[counted].sum()
        some = np.random.default_rng(0).choice(counted, min(_SAMPLE, 4 * len(counted)), p=share)
        part = np.asarray(inner(np.asarray(x[np.sort(some)])), np.float64)
        low, middle, high = np.quantile(part, [0.16, 0.5, 0.84], axis=0)
        half = (high - low) / 2
        farthest = np.abs(part - middle).max(0)
        heavy = varies & (half > 1e-14 * np.abs(middle)) & (farthest > _HEAVY * half)
        mean, sd = np.where(heavy, middle, mean), np.where(heavy, half, sd)
        width = np.where(heavy, np.arcsinh((part - mean) / sd).std(0), 0.0)
    if density:
        for column in np.flatnonzero(~varies & ~np.asarray(keep))[:3]:
            warnings.warn(
                f"{name}: column {column} is constant, or varies by less than can be told: there is no "
                "density to learn in it; leave it out",
                stacklevel=4,
            )
    warn_of_rounding(name, mean, sd, varies)
    lost = _resolution(mean) > 1e-3 * sd
    arrays = (mean, sd) if lost.any() else jax.device_put((mean, sd))
    if width.any():
        return HeavyTails(*arrays, jax.device_put(width))
    return Standardize(*arrays)


def _resolution(mean) -> np.ndarray:
    """The distance of numbers about these that JAX's floating point can tell apart."""
    return np.finfo(jnp.result_type(float)).eps * np.abs(mean)


def warn_of_rounding(name: str, mean, sd, varies) -> None:
    """Warn of columns whose spread JAX's floating point cannot resolve.

    :param name: of the array; ``mean``, ``sd`` and ``varies``, whether it is not constant, are by column.
    """
    mean, sd, varies = (np.reshape(a, -1) for a in (mean, sd, varies))
    dtype, resolution = np.dtype(jnp.result_type(float)).name, _resolution(mean)
    for column in np.flatnonzero(varies & (resolution > 0.05 * sd))[:3]:
        warnings.warn(
            f"{name}: column {column} varies by {sd[column]:.3g} about {mean[column]:.6g}, where {dtype} "
            f"resolves {resolution[column]:.2g}: subtract an origin first, or set jax_enable_x64",
            stacklevel=5,
        )
