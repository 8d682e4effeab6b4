# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Random numbers of a set-up, drawn once: JAX's own, but not compiled anew for every shape.

Outside of ``jit`` JAX compiles an operation for each shape that it meets. Drawing the weights of one network
so takes longer than training it for a while; here few sizes are drawn, and cut on the host.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["as_key", "as_shape", "generator", "normal", "some_rows", "split"]

KEYS = 8


def as_key(key) -> Any:
    """A typed key, from an integer, an old key of two ``uint32`` numbers, or a typed key.

    :raises TypeError: for anything else.
    """
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        with jax.ensure_compile_time_eval():
            return jax.random.key(int(key))
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return key
    if dtype is not None and dtype == np.uint32 and np.ndim(key) >= 1:
        if isinstance(key, jax.core.Tracer):
            return jax.random.wrap_key_data(key)
        with jax.ensure_compile_time_eval():
            return jax.random.wrap_key_data(jnp.asarray(key))
    if dtype is not None and jnp.issubdtype(dtype, jnp.integer) and np.ndim(key) == 0:
        return jax.random.key(key)
    raise TypeError(f"key must be an integer or made by jax.random.key, got {type(key).__name__}")


def as_shape(sample_shape) -> tuple[int, ...]:
    """A shape, from an integer or a sequence of integers: ``10`` is ``(10,)``.

    :raises TypeError: for anything else.
    """
    if isinstance(sample_shape, (int, np.integer)) and not isinstance(sample_shape, bool):
        return (int(sample_shape),)
    try:
        shape = tuple(operator.index(n) for n in sample_shape)
    except TypeError:
        raise TypeError(
            f"sample_shape must be an integer or a tuple of integers, got {sample_shape!r}"
        ) from None
    if any(n < 0 for n in shape):
        raise ValueError(f"sample_shape must not be negative, got {shape}")
    return shape


def split(key, count: int = 2) -> list[Any]:
    """Keys as from ``jax.random.split``; up to eight of them are cut from eight.

    For a set-up: the keys pass through the host, which a loop should not wait for. A key that is known is
    split at once, also where a program is being traced.
    """
    key = as_key(key)
    if count > KEYS or jnp.ndim(key) or isinstance(key, jax.core.Tracer):
        return list(jax.random.split(key, count))
    with jax.ensure_compile_time_eval():
        rows = np.asarray(jax.random.key_data(jax.random.split(key, KEYS)))
        return [jax.random.wrap_key_data(row, impl=jax.random.key_impl(key)) for row in rows[:count]]


def normal(key, shape):
    """``jax.random.normal`` of this shape, up to rounding; a NumPy array where the key is known."""
    size = math.prod(shape)
    room = max(2**12, 1 << (size - 1).bit_length())
    if isinstance(key, jax.core.Tracer):
        return jax.random.normal(key, (room,))[:size].reshape(shape)
    with jax.ensure_compile_time_eval():  # each number depends on its place alone
        return np.asarray(jax.random.normal(key, (room,)))[:size].reshape(shape)


def generator(key) -> np.random.Generator:
    """NumPy's random numbers from a key, for what is chosen on the host: nothing has to be compiled."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def some_rows(key, size: int, count: int) -> np.ndarray:
    """``count`` row numbers of ``size`` rows in random order: each once as long as there are enough."""
    draw = generator(key)
    return np.concatenate([draw.permutation(size) for _ in range(max(-(-count // size), 1))])[:count]
