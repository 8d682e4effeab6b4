# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""What all networks share: activations, checked widths, random biases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_maf.rng import normal, split

__all__ = ["ACTIVATIONS"]


ACTIVATIONS: dict[str, Callable] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "elu": jax.nn.elu,
    "tanh": jnp.tanh,
}


def check_hidden(hidden, activation: str) -> tuple[int, ...]:
    """``hidden`` as a tuple of widths, or ValueError for bad widths or an unknown activation."""
    if not isinstance(hidden, (tuple, list)):
        raise TypeError(f"hidden must be a tuple of widths such as (64, 64), got {hidden!r}")
    hidden = tuple(int(width) for width in hidden)
    if not hidden or min(hidden) < 1:
        raise ValueError(f"hidden must name one or more widths of at least 1, got {hidden}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}, expected one of {sorted(ACTIVATIONS)}")
    return hidden


def initial_biases(key, hidden) -> list[Any]:
    """Random biases of the hidden layers, so that few inputs bend in many places."""
    # From zero biases all units bend at the mean: worse in most rows of benchmarks/density.py.
    keys = split(key, len(hidden))
    return [0.5 * normal(k, (width,)) for k, width in zip(keys, hidden)]
