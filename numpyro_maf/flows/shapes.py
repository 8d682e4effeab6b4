# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Shapes of events, orders and contexts: checked at the edge, with messages that name what came."""

from __future__ import annotations

import jax.numpy as jnp

__all__ = ["check_context", "check_order", "check_width", "zeros_of"]


def zeros_of(x, event_dim: int = 1):
    """A zero log-determinant for events ``x``: ``(..., D) -> (...)``."""
    shape = jnp.shape(x)
    return jnp.zeros(shape[: len(shape) - event_dim], jnp.result_type(x, float))


def check_width(x, features: int, name: str) -> None:
    """Raise ValueError unless the last axis of ``x`` is ``features`` wide."""
    shape = jnp.shape(x)
    if not shape or shape[-1] != features:
        raise ValueError(f"{name} expects events with last axis {features}, got an array of shape {shape}")


def check_order(order, features: int) -> tuple[int, ...]:
    """``order`` as a tuple of ints, or ValueError when it does not permute ``range(features)``."""
    order = tuple(int(i) for i in order)
    if sorted(order) != list(range(features)):
        raise ValueError(f"order must hold each of 0..{features - 1} once, got {order}")
    return order


def check_context(context, width: int, name: str) -> None:
    """Raise ValueError unless the context is what a network of that context width expects."""
    shape = None if context is None else jnp.shape(context)
    if (shape[-1:] if shape is not None else ()) != ((width,) if width else ()) or (shape == ()):
        expected = f"a context of width {width}" if width else "no context"
        raise ValueError(f"{name} expects {expected}, got {'none' if shape is None else f'shape {shape}'}")
