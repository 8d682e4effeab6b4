# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Latent arithmetic: a flow's base coordinates as a space to move in (Kingma & Dhariwal 2018, section 5.2).

``d`` is what a flow gives when called: a :class:`~numpyro_maf.FlowDistribution`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_maf.flows.distributions import FlowDistribution
from numpyro_maf.inputs import as_numbers

__all__ = ["attribute", "decode", "encode", "interpolate"]


def encode(d: FlowDistribution, x: ArrayLike):
    """Where events stand in the base: ``(..., *event_shape) -> (..., D)``.

    :raises TypeError: for a distribution that is no FlowDistribution, such as a MADE.
    """
    _check(d)
    return _encode(d, as_numbers("x", x))


def decode(d: FlowDistribution, z: ArrayLike):
    """The events at places in the base: ``(..., D) -> (..., *event_shape)``, :func:`encode`'s inverse."""
    _check(d)
    return _decode(d, as_numbers("z", z))


def interpolate(d: FlowDistribution, start: ArrayLike, end: ArrayLike, steps: int = 9):
    """Events on the straight line in the base from one event to another, both included.

    :param start: ``(..., *event_shape)``; ``end`` alike.
    :param steps: how many events, 2 or more.
    :return: ``(steps, ..., *event_shape)``.
    """
    if steps < 2:
        raise ValueError(f"steps must be 2 or more, got {steps}")
    a, b = encode(d, start), encode(d, end)
    t = jnp.linspace(0, 1, steps, dtype=a.dtype).reshape(-1, *(1,) * a.ndim)
    return decode(d, (1 - t) * a + t * b)


def attribute(d: FlowDistribution, group: ArrayLike, others: ArrayLike):
    """The direction in the base from other events to those of a group: difference of means, ``(D,)``.

    ``decode(d, encode(d, x) + strength * attribute(d, group, others))`` gives an event more of what the
    group has in common.

    :param group: ``(N, *event_shape)``; ``others``: ``(M, *event_shape)``.
    """
    for name, events in (("group", group), ("others", others)):
        if 0 in np.shape(as_numbers(name, events)):
            raise ValueError(f"{name} has no events")
    return encode(d, group).mean(0) - encode(d, others).mean(0)


# Compiled whole: one by one, the steps of a flow take seconds to compile.
@jax.jit
def _encode(d, x):
    for transform in reversed(d.transforms):
        x = transform.inv(x)
    return x


@jax.jit
def _decode(d, z):
    for transform in d.transforms:
        z = transform(z)
    return z


def _check(d):
    if not isinstance(d, FlowDistribution):
        raise TypeError(f"expected a FlowDistribution, what flow() gives, got {type(d).__name__}")
