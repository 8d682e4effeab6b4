# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Events ``(..., D)`` as the columns ``(D, B)`` that networks and sweeps work on, and the way back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_maf.flows.shapes import check_context, check_width
from numpyro_maf.nn.masked import MaskedMLP

__all__ = ["Restore", "enter"]


@dataclass(frozen=True)
class Restore:
    """The way back from columns to events of a batch shape."""

    batch: tuple[int, ...]
    order: tuple[int, ...] | None

    def __call__(self, y):
        """``(D, B) -> (..., D)``, in the features' own order."""
        if self.order is not None:
            y = y[np.argsort(self.order)]
        return y.T.reshape(*self.batch, len(y))

    def rows(self, values):
        """``(D, B) -> (...)``: the sum over the dimensions."""
        return values.sum(0).reshape(self.batch)


def enter(net: MaskedMLP, context, order, x, name: str, masks=None):
    """Events ``(..., D)`` as columns in order, weights and offsets, and the way back.

    With other masks for the weights if they are given. One event for many contexts stays one column.

    :raises ValueError: for events or a context of another width, and weights with extra axes.
    """
    if net.weights[0].ndim != 3:
        raise ValueError(
            f"{name} has weights with extra leading axes, {net.weights[0].shape}, as come back from "
            "vmap or scan. Call it under vmap, or use a FlowDistribution, which keeps count."
        )
    check_width(x, net.features, name)
    check_context(context, net.context, name)
    events = jnp.shape(x)[:-1]
    batch = jnp.broadcast_shapes(events, () if context is None else jnp.shape(context)[:-1])
    dtype = jnp.result_type(x, *jax.tree.leaves(net), float if context is None else context)
    if math.prod(events) != 1:
        x = jnp.broadcast_to(x, (*batch, net.features))
    x = jnp.asarray(x, dtype).reshape(-1, net.features).T
    if order is not None:
        x = x[np.array(order)]
    first, *rest = net.offsets(context)
    if first.ndim > 1 and first.size > first.shape[-1]:
        first = jnp.broadcast_to(first, (*batch, first.shape[-1]))
    first = first.reshape(-1, first.shape[-1]).T
    theta = net.layers(masks), (first, *(offset[..., None] for offset in rest))
    return x, theta, Restore(batch, order)
