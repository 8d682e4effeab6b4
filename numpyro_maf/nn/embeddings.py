# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Networks that summarise sets, series and images, some entries of which may be missing.

``present`` says which numbers of ``x`` are there; those that are not must be 0. An element of a set, a time
or a pixel without any number that is there has no influence at all, so padding changes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_maf.codec import storable
from numpyro_maf.nn.attention import attend, layer_norm

__all__ = ["Attention", "Conv", "DeepSet", "Embedding", "GRU"]


@dataclass(frozen=True)
class Embedding:
    """A network from rows of data to C numbers each (abstract).

    Subclasses give ``init(key, x, present)``, the weights as a dictionary, and the call. They are plain
    configuration: hashable, and equal if their arguments are.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        storable(cls)

    def init(self, key, x, present=None) -> dict[str, Any]:
        """Random weights for rows like ``x``."""
        raise NotImplementedError

    def __call__(self, weights, x, present=None):
        """``(B, ...) -> (B, outputs)``."""
        raise NotImplementedError


@dataclass(frozen=True)
class DeepSet(Embedding):
    """One network for each element, means and the log of their number, and another network of these.

    Zaheer et al., *Deep Sets* (2017), Theorem 2. For independent data in any order and number:
    ``x`` is ``(B, N, F)``, or ``(B, N)`` for single numbers; N may differ from one call to the next.

    :param outputs: width of the summary, C.
    :param hidden: widths of the hidden layers of both networks.
    """

    outputs: int = 16
    hidden: tuple[int, ...] = (64, 64)

    def init(self, key, x, present=None):
        first, second = jax.random.split(key)
        width = elements(x, present, 1)[0].shape[-1]
        return {
            "each": dense_init(first, (width, *self.hidden)),
            "all": dense_init(second, (self.hidden[-1] + 1, *self.hidden, self.outputs)),
        }

    def __call__(self, weights, x, present=None):
        x, there = elements(x, present, 1)
        each = jax.nn.silu(dense(weights["each"], x))
        count = there.sum(1)
        mean = (each * there).sum(1) / jnp.maximum(count, 1)
        return dense(weights["all"], jnp.concatenate([mean, jnp.log1p(count)], -1))


@dataclass(frozen=True)
class Conv(Embedding):
    """Convolutions, each followed by a mean over pairs; means and maxima over what is left; one linear map.

    For series, ``(B, T, F)`` or ``(B, T)``, with ``axes=1``; for images, ``(B, H, W, F)`` or ``(B, H, W)``,
    with ``axes=2``.

    :param axes: of convolution, 1 or 2.
    :param outputs: width of the summary, C.
    :param channels: of each convolution; the mean over pairs halves the length after each.
    :param kernel: how many neighbours each sees.
    """

    axes: int = 1
    outputs: int = 16
    channels: tuple[int, ...] = (16, 32)
    kernel: int = 5

    def __post_init__(self):
        if self.axes not in (1, 2):
            raise ValueError(f"axes must be 1 or 2, got {self.axes!r}")

    def init(self, key, x, present=None):
        *keys, last = jax.random.split(key, len(self.channels) + 1)
        widths = (elements(x, present, self.axes)[0].shape[-1], *self.channels)
        size = (self.kernel,) * self.axes
        layers = [
            {
                "kernel": jax.random.normal(k, (*size, a, b)) / math.sqrt(a * math.prod(size)),
                "bias": jnp.zeros(b),
            }
            for k, a, b in zip(keys, widths, widths[1:])
        ]
        return {"layers": layers, "last": dense_init(last, (2 * widths[-1], self.outputs))}

    def __call__(self, weights, x, present=None):
        x, there = elements(x, present, self.axes)
        for layer in weights["layers"]:
            x = jax.nn.silu(_convolved(x, layer["kernel"]) + layer["bias"]) * there
            for axis in range(1, self.axes + 1):
                x, there = _halved(x, there, axis)
        axes = tuple(range(1, self.axes + 1))
        mean = (x * there).sum(axes) / jnp.maximum(there.sum(axes), 1)
        most = jnp.where(there > 0, x, -1.0).max(axes)  # silu is above -1
        return dense(weights["last"], jnp.concatenate([mean, most], -1))


@dataclass(frozen=True)
class GRU(Embedding):
    """A gated recurrent unit (Cho et al. 2014) over a series ``(B, T, F)`` or ``(B, T)``; its last state.

    Times that are missing leave the state as it is.

    :param outputs: width of the summary, C.
    :param width: of the state.
    """

    outputs: int = 16
    width: int = 32

    def init(self, key, x, present=None):
        keys = jax.random.split(key, 4)
        inputs = elements(x, present, 1)[0].shape[-1]
        return {
            "gates": dense_init(keys[0], (inputs + self.width, 2 * self.width)),
            "new": dense_init(keys[1], (inputs + self.width, self.width)),
            "last": dense_init(keys[2], (self.width, self.width, self.outputs)),
        }

    def __call__(self, weights, x, present=None):
        x, there = elements(x, present, 1)

        def step(state, now):
            x, there = now
            gates = jax.nn.sigmoid(dense(weights["gates"], jnp.concatenate([x, state], -1)))
            reset, update = jnp.split(gates, 2, -1)
            new = jnp.tanh(dense(weights["new"], jnp.concatenate([x, reset * state], -1)))
            return jnp.where(there > 0, update * state + (1 - update) * new, state), None

        state = jnp.zeros((len(x), self.width), jnp.result_type(x, weights["new"][0]["weight"]))
        state, _ = lax.scan(step, state, (x.swapaxes(0, 1), there.swapaxes(0, 1)))
        return dense(weights["last"], state)


@dataclass(frozen=True)
class Attention(Embedding):
    """Self-attention among the elements of a set, and their mean: a Set Transformer (Lee et al. 2019).

    ``x`` is ``(B, N, F)`` or ``(B, N)``. Order does not matter; where it should, make the time a feature.

    :param outputs: width of the summary, C.
    :param width: of each element's state, a multiple of ``heads``.
    :param blocks: of attention and a small network.
    """

    outputs: int = 16
    width: int = 32
    heads: int = 4
    blocks: int = 2

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"heads must divide the width {self.width}, got {self.heads}")

    def init(self, key, x, present=None):
        first, last, *keys = jax.random.split(key, 2 + 3 * self.blocks)
        w = self.width
        return {
            "first": dense_init(first, (elements(x, present, 1)[0].shape[-1], w)),
            "blocks": [
                {
                    "query_key_value": dense_init(a, (w, 3 * w)),
                    "mix": dense_init(b, (w, w)),
                    "net": dense_init(c, (w, 2 * w, w)),
                }
                for a, b, c in zip(keys[::3], keys[1::3], keys[2::3])
            ],
            "last": dense_init(last, (w, w, self.outputs)),
        }

    def __call__(self, weights, x, present=None):
        x, there = elements(x, present, 1)
        x = dense(weights["first"], x)
        for block in weights["blocks"]:
            mixed = attend(dense(block["query_key_value"], layer_norm(x)), self.heads, there)
            x = x + dense(block["mix"], mixed)
            x = x + dense(block["net"], layer_norm(x))
        mean = (x * there).sum(1) / jnp.maximum(there.sum(1), 1)
        return dense(weights["last"], mean)


def elements(x, present, axes: int):
    """Rows as elements with features, and which are there at all: ``(B, ..., F)``, ``(B, ..., 1)``.

    Where numbers may be missing, every feature comes with another that says whether it is there.

    :raises ValueError: when x has too few axes.
    """
    if x.ndim not in (axes + 1, axes + 2):
        raise ValueError(f"the embedding takes rows with {axes} or {axes + 1} axes, got shape {x.shape[1:]}")
    if x.ndim == axes + 1:
        x, present = x[..., None], None if present is None else present[..., None]
    if present is None:
        return x, jnp.ones((*x.shape[:-1], 1), x.dtype)
    there = present.any(-1, keepdims=True).astype(x.dtype)
    return jnp.concatenate([x, present.astype(x.dtype)], -1), there


def dense_init(key, widths) -> list[dict[str, Any]]:
    """Random weights of a network with these widths, the first of its inputs."""
    keys = jax.random.split(key, len(widths) - 1)
    return [
        {"weight": jax.random.normal(k, (a, b)) / math.sqrt(a), "bias": jnp.zeros(b)}
        for k, a, b in zip(keys, widths, widths[1:])
    ]


def dense(layers, x):
    """The network with SiLU between its layers, ``(..., inputs) -> (..., outputs)``."""
    for i, layer in enumerate(layers):
        x = (jax.nn.silu(x) if i else x) @ layer["weight"] + layer["bias"]
    return x


def _convolved(x, kernel):
    """A convolution as one product of neighbours side by side: XLA's own is slow in loops on a CPU."""
    sizes, axes = kernel.shape[:-2], range(1, kernel.ndim - 1)
    for axis, size in zip(axes, sizes):
        length, before = x.shape[axis], (size - 1) // 2
        padding = [(before, size - 1 - before) if i == axis else (0, 0) for i in range(x.ndim)]
        wide = jnp.pad(x, padding)
        x = jnp.concatenate([lax.slice_in_dim(wide, i, i + length, axis=axis) for i in range(size)], -1)
    # Shifts along the last axis vary slowest, features fastest.
    order = (*reversed(range(len(sizes))), len(sizes), len(sizes) + 1)
    return x @ kernel.transpose(order).reshape(-1, kernel.shape[-1])


def _halved(x, there, axis):
    """Means over pairs of what is there."""
    odd = x.shape[axis] % 2
    padding = [(0, odd if i == axis else 0) for i in range(x.ndim)]
    x, there = jnp.pad(x, padding), jnp.pad(there, padding)

    def paired(a):
        return a.reshape(*a.shape[:axis], -1, 2, *a.shape[axis + 1 :]).sum(axis + 1)

    count = paired(there)
    return paired(x * there) / jnp.maximum(count, 1), jnp.minimum(count, 1)
