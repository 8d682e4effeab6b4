# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Convolutional networks of images, with self-attention among their pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import register_dataclass

from numpyro_maf.codec import storable
from numpyro_maf.nn.attention import attend, layer_norm
from numpyro_maf.nn.init import ACTIVATIONS, check_hidden
from numpyro_maf.pytrees import static
from numpyro_maf.rng import normal

__all__ = ["ConvNet"]


@storable
@register_dataclass
@dataclass(frozen=True)
class ConvNet:
    """Gated residual convolutions, each followed by gated self-attention if asked: Flow++'s conditioner.

    Ho et al., *Flow++* (2019), section 3.3 and figure 1, without dropout. What is not seen is 0, with a mask
    that says so. A vector is an image D pixels high and one pixel wide, with kernels of one pixel: attention
    alone joins its features.

    :param shape: ``(H, W, C)`` of the event, whose features run over channels first, then columns.
    :param seen: the features that are seen; ``moved``: those that are mapped.
    """

    first: Any
    position: Any
    context_weight: Any
    blocks: tuple[Any, ...]
    last: Any
    last_bias: Any
    shape: tuple[int, int, int] = static()
    seen: tuple[int, ...] = static()
    moved: tuple[int, ...] = static()
    heads: int = static(default=0)
    activation: str = static(default="silu")

    @classmethod
    def init(
        cls, key, shape, seen, moved, outputs: int, *, inputs=1, context=0, width=32, blocks=2, heads=0,
        activation="silu", initial=0.0,
    ) -> ConvNet:  # fmt: skip
        """Random weights; the outputs start near ``initial``.

        :param outputs: number of channels of the result, P.
        :param inputs: number of channels of the input, Q.
        :param context: C, 0 for none.
        :param width: F, channels of the hidden layers; ``blocks``: how many of them.
        :param heads: of the attention, a divisor of F; 0 for convolutions alone.
        :raises ValueError: when ``heads`` does not divide ``width``.
        """
        (width,) = check_hidden((width,), activation)
        if heads and width % heads:
            raise ValueError(f"heads must divide the width {width}, got {heads}")
        height, columns, channels = shape
        size = (1, 1) if columns == 1 else (3, 3)
        keys = iter(jax.random.split(key, 4 + 4 * blocks))

        def dense(*shape, scale=1.0):
            return jnp.asarray(scale * normal(next(keys), shape) / math.sqrt(max(math.prod(shape[:-1]), 1)))

        def block():
            made = {
                "scale": jnp.ones(width),
                "conv": dense(*size, width, width),
                "bias": jnp.zeros(width),
                "gate": dense(width, 2 * width),
            }
            if heads:
                made |= {
                    "attention_scale": jnp.ones(width),
                    "query_key_value": dense(width, 3 * width),
                    "attention_gate": dense(width, 2 * width),
                }
            return made

        initial = jnp.broadcast_to(jnp.asarray(initial, float), (outputs,))
        return cls(
            first=dense(*size, channels * (inputs + 1), width),
            position=dense(1, height, columns, width),
            context_weight=dense(context, width) if context else None,
            blocks=tuple(block() for _ in range(blocks)),
            last=dense(*size, width, outputs * channels, scale=0.1),
            last_bias=jnp.repeat(initial, channels),
            shape=tuple(shape),
            seen=tuple(seen),
            moved=tuple(moved),
            heads=heads,
            activation=activation,
        )

    def __call__(self, seen, context=None):
        height, columns, channels = self.shape
        batch, inputs = seen.shape[:-2], seen.shape[-2]
        known = np.zeros((1, height * columns * channels))
        known[:, self.seen] = 1
        x = jnp.zeros((*batch, inputs, known.size), seen.dtype).at[..., np.array(self.seen, int)].set(seen)
        x = jnp.concatenate([x, jnp.broadcast_to(known, (*batch, *known.shape)).astype(x.dtype)], -2)
        rows = math.prod(batch)
        x = x.reshape(rows, inputs + 1, height, columns, channels).transpose(0, 2, 3, 1, 4)
        x = _conv(x.reshape(rows, height, columns, (inputs + 1) * channels), self.first) + self.position
        if context is not None:
            width = context.shape[-1]
            context = jnp.broadcast_to(context, (*batch, width)).reshape(rows, 1, 1, width)
            x = x + context @ self.context_weight
        for block in self.blocks:
            x = self._block(block, x)
        x = _conv(ACTIVATIONS[self.activation](x), self.last) + self.last_bias
        outputs = x.shape[-1] // channels
        x = x.reshape(rows, height, columns, outputs, channels).transpose(0, 3, 1, 2, 4)
        x = x.reshape(*batch, outputs, height * columns * channels)
        return x[..., np.array(self.moved)]

    def _block(self, block, x):
        act = ACTIVATIONS[self.activation]
        h = _conv(act(layer_norm(x) * block["scale"]), block["conv"]) + block["bias"]
        x = x + _gated(act(h) @ block["gate"])
        if self.heads:
            h = layer_norm(x) * block["attention_scale"]
            tokens = (h @ block["query_key_value"]).reshape(len(h), math.prod(h.shape[1:3]), 3 * h.shape[-1])
            x = x + _gated(attend(tokens, self.heads) @ block["attention_gate"]).reshape(x.shape)
        return x


def _conv(x, kernel):
    """``(N, H, W, C), (k, k, C, F) -> (N, H, W, F)``."""
    if kernel.shape[:2] == (1, 1):
        return x @ kernel[0, 0]
    dtype = jnp.result_type(x, kernel)
    return lax.conv_general_dilated(
        x.astype(dtype), kernel.astype(dtype), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _gated(x):
    value, gate = jnp.split(x, 2, -1)
    return value * jax.nn.sigmoid(gate)
