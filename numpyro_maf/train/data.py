# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Rows to train on: checked, split, scaled, and fed in batches from memory or disk."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from numpyro_maf.flows.linear import Standardize
from numpyro_maf.rng import generator

_RESIDENT, _BLOCK = 2**28, 2**26  # bytes


def _feed(key, data, weights, rows, size, resident):
    """Data and weights, whole or block by block, with a key, row numbers in batches, and how many batches."""
    if resident:
        yield data, weights, key, *_batches(rows, size, len(weights))
        return
    each = sum(a.nbytes for a in data) // len(weights)
    block = max(_BLOCK // each // size, 1) * size
    mixed = generator(key)
    for i, start in enumerate(range(0, len(rows), block)):
        chosen = np.sort(rows[start : start + block])  # in the order of the disk, mixed again below
        weight, *part = (_with_room(a[chosen], block) for a in (weights, *data))
        yield part, weight, jax.random.fold_in(key, i), *_batches(mixed.permutation(len(chosen)), size, block)


def _room(count: int) -> int:
    """How many rows an array of so many gets room for: few sizes, so that few are compiled."""
    return count if count > 2**14 else max(2**10, 1 << (count - 1).bit_length())


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


def _finite(name, value, ndim):
    value = np.asarray(value)
    if value.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} axes, got shape {value.shape}")
    if not np.isfinite(value).all():
        rows = np.flatnonzero(~np.isfinite(value.reshape(len(value), -1)).all(1))
        raise ValueError(f"{name} is not finite in {len(rows)} rows, the first is {rows[0]}")
    return value


def held_out_rows(key, validation, n) -> np.ndarray:
    """Which rows validate: given, or a random share."""
    if np.ndim(validation):
        mask = np.asarray(validation)
        if mask.shape != (n,) or mask.dtype != bool:
            raise ValueError(f"validation must be a share or ({n},) booleans, got {mask.shape}")
    else:
        if not 0 <= validation < 1:
            raise ValueError(f"validation must be in [0, 1), got {validation}")
        mask = np.zeros(n, bool)
        mask[generator(key).permutation(n)[: round(validation * n)]] = True
    if mask.all():
        raise ValueError("validation holds out every row, none is left to train on")
    return mask


def scaling(x, rows, weights, inner: Callable = lambda part: part) -> Standardize:
    """Weighted mean and standard deviation of some rows of an array, NaN left out, in one pass over it.

    :param inner: what is done to rows first. A column that does not vary keeps scale 1.
    """
    count = mean = square = 0.0
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
    sd = np.where(sd > 1e-10 * np.maximum(np.abs(mean), 1e-30), sd, 1.0)
    return Standardize(*jax.device_put((mean, sd)))
