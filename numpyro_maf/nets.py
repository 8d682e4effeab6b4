# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

r"""Masked networks, and the sweep that evaluates one a dimension at a time at the cost of one pass.

A :class:`MaskedMLP` maps an event ``x`` to the parameters of D scalar maps so that those of
dimension ``d`` see ``x[0], …, x[d-1]`` only (MADE, Germain et al. 2015). Every hidden unit has a
*degree* ``m``: it sees the inputs below ``m`` and is seen by the outputs from ``m`` on. All masks
follow from one comparison of degrees.

Units are sorted by degree. Then, going through the dimensions in order, the units that become
computable are the next few rows of every weight matrix, and nothing computed before changes:
:func:`sweep` computes each unit once. It fills in blocks of dimensions: what earlier blocks
contribute to a block is one matrix product, so that most of the arithmetic is large products and the
sequential part stays small and in cache.

Inside this module arrays are units first, batch last, ``(H, B)``: the rows a step needs are
contiguous.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import register_dataclass

from numpyro_maf.bijectors import static
from numpyro_maf.rng import normal, split

__all__ = ["ACTIVATIONS", "Layers", "MaskedMLP", "masks_of", "sweep"]

SKIP_SIZE = 2**16  # from so many numbers on, skipping a quarter of a matrix saves time

ACTIVATIONS: dict[str, Callable] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "elu": jax.nn.elu,
    "tanh": jnp.tanh,
}


@register_dataclass
@dataclass(frozen=True)
class Layers:
    """The matrices of a masked network with its degrees, ready for :func:`sweep`.

    :param first: ``(H1, Q, D)``; each of the D inputs is Q numbers wide.
    :param hidden: ``(H2, H1), …``.
    :param last: ``(P, D, H)``; P outputs for each dimension.
    :param degrees: one sorted tuple for each hidden layer: a unit of degree ``m`` sees the
        inputs below ``m`` and is seen by the outputs from ``m`` on. Empty for units in no order, which
        no sweep can take.
    :param direct: ``(P, D, Q, D)`` from inputs to outputs, or None.
    """

    first: Any
    hidden: tuple[Any, ...]
    last: Any
    degrees: tuple[tuple[int, ...], ...] = static()
    direct: Any = None

    def skip(self, inputs):
        """What the direct connections add to the outputs: ``(Q, D, B) -> (P, D, B)``, or 0."""
        return 0.0 if self.direct is None else jnp.tensordot(self.direct, inputs, 2)

    def product(self, layer: int, inputs):
        """What a layer's matrix makes of its inputs, ``(H, B)``, or ``(Q, D, B)`` for the first.

        The result is rows ``(H', B)``, of the last layer ``(P, D, B)``. Sorted by degree, a matrix is
        block-triangular: of a large one the upper half of the rows skips the columns that none of them sees.
        """
        weight = (self.first, *self.hidden, self.last)[layer]
        rows, axes = (0, 2) if layer == 0 else (weight.ndim - 2, 1)
        half = weight.shape[rows] // 2
        if not self.degrees:
            return jnp.tensordot(weight, inputs, axes)
        seen = self._seen(layer, half)
        if weight.size < SKIP_SIZE or seen > 0.8 * weight.shape[-1]:
            return jnp.tensordot(weight, inputs, axes)
        upper = lax.slice_in_dim(weight, 0, half, axis=rows)[..., :seen]
        lower = lax.slice_in_dim(weight, half, None, axis=rows)
        parts = jnp.tensordot(upper, inputs[..., :seen, :], axes), jnp.tensordot(lower, inputs, axes)
        return jnp.concatenate(parts, axis=-2)

    def _seen(self, layer: int, rows: int) -> int:
        """How many of a layer's inputs its first rows see between them."""
        if rows == 0:
            return 0
        if layer == len(self.degrees):
            return bisect_right(self.degrees[-1], rows - 1)
        highest = self.degrees[layer][rows - 1]
        return highest if layer == 0 else bisect_right(self.degrees[layer - 1], highest)

    def reversed(self) -> Layers:
        """The transposed network, its dimensions counted from the last: the same structure.

        A unit that the outputs from ``m`` on see becomes one that sees the inputs below ``D - m``.
        """
        features = self.last.shape[1]
        return Layers(
            first=self.last[:, ::-1, ::-1].transpose(2, 0, 1),
            hidden=tuple(w[::-1, ::-1].T for w in self.hidden[::-1]),
            last=self.first[::-1, :, ::-1].transpose(1, 2, 0),
            degrees=tuple(tuple(features - m for m in ms[::-1]) for ms in self.degrees[::-1]),
            direct=None if self.direct is None else self.direct[:, ::-1, :, ::-1].transpose(2, 3, 0, 1),
        )


@register_dataclass
@dataclass(frozen=True)
class MaskedMLP:
    """A masked multilayer perceptron: its weights are leaves, its shape is static.

    Made by :meth:`init`. Context, if any, enters the first hidden layer unmasked, and units of degree 0,
    which see nothing else, let the first dimension depend on it too.
    """

    weights: tuple[Any, ...]  # (H1, Q, D), (H2, H1), …, (P, D, H)
    biases: tuple[Any, ...]  # (H1,), (H2,), …, (P, D)
    context_weight: Any  # (H1, C) or None
    activation: str = static(default="silu")
    direct: Any = None  # (P, D, Q, D) or None

    @classmethod
    def init(
        cls, key, features: int, outputs: int, *, hidden, context=0, activation="silu", inputs=1, initial=0.0,
        direct=False,
    ) -> MaskedMLP:  # fmt: skip
        """Random weights, scaled by what the masks let through; the last layer starts near 0.

        :param key: a ``jax.random`` key.
        :param features: D, the width of the event.
        :param outputs: P, parameters for each dimension.
        :param hidden: widths of the hidden layers, one or more.
        :param context: width of the context, 0 for none.
        :param inputs: Q, how many numbers the network is given for each dimension.
        :param initial: ``(P,)``, ``(P, D)`` or a number: where the outputs start.
        :param direct: connect inputs to outputs too (Germain et al. 2015, section 4.1), at first by 0.
        :raises ValueError: for an empty ``hidden``, widths below 1 or an unknown activation.
        """
        hidden = check_hidden(hidden, activation)
        shapes: list[tuple[int, ...]] = [(hidden[0], inputs, features), *zip(hidden[1:], hidden[:-1])]
        shapes += [(outputs, features, hidden[-1])]
        *keys, context_key, bias_key = split(key, len(shapes) + 2)
        initial = np.asarray(initial, jnp.result_type(float))
        initial = np.broadcast_to(initial[:, None] if initial.ndim == 1 else initial, (outputs, features))
        net = cls(
            weights=tuple(normal(k, shape) for k, shape in zip(keys, shapes)),
            biases=(*initial_biases(bias_key, hidden), initial),
            context_weight=normal(context_key, (hidden[0], context)) if context else None,
            activation=activation,
        )
        fan_in = [np.maximum(mask.sum(-1, keepdims=True), 1) for mask in net.masks[:-1]]
        fan_in[0] = inputs * fan_in[0] + context
        scales = [1 / np.sqrt(n) for n in fan_in]
        scales[-1] = 0.1 * scales[-1]
        weights = tuple(w * s.astype(w.dtype) for w, s in zip(net.weights, scales))
        context_weight = net.context_weight
        if context_weight is not None:
            context_weight = context_weight * scales[0][:, 0].astype(context_weight.dtype)
        skip = np.zeros((outputs, features, inputs, features), initial.dtype) if direct else None
        return jax.device_put(cls(weights, net.biases, context_weight, activation, skip))

    @property
    def features(self) -> int:
        return self.weights[0].shape[-1]

    @property
    def context(self) -> int:
        return 0 if self.context_weight is None else self.context_weight.shape[-1]

    @property
    def degrees(self) -> tuple[tuple[int, ...], ...]:
        """The hidden units' degrees: sorted, spread evenly over those that are of use."""
        lowest = 0 if self.context or self.features == 1 else 1
        count = self.features - lowest
        widths = (w.shape[0] for w in self.weights[:-1])
        return tuple(tuple((lowest + np.arange(h) * count // h).tolist()) for h in widths)

    @property
    def masks(self) -> tuple[np.ndarray, ...]:
        """One boolean array for each weight, and the direct ones: which inputs each row may see."""
        return masks_of(np.arange(self.features), [np.asarray(m) for m in self.degrees])

    def layers(self, masks=None) -> Layers:
        """The masked matrices; with other masks, :func:`masks_of` dimensions and units in no order."""
        degrees = self.degrees if masks is None else ()
        masks = self.masks if masks is None else masks
        first, *hidden, last = (jnp.where(mask, weight, 0) for mask, weight in zip(masks, self.weights))
        direct = self.direct
        if direct is not None:
            direct = jnp.where(masks[-1], direct, 0)
        return Layers(first, tuple(hidden), last, degrees, direct)

    def permuted(self, order, units) -> MaskedMLP:
        """The network with its dimensions and hidden units in another order, and so under other masks.

        :param order: ``(D,)``, the features in the order in which they are made.
        :param units: for each hidden layer, ``(H,)``: its units in order of their degrees.
        """
        first, *hidden, last = self.weights
        first = first[units[0]][..., order]
        hidden = [w[after][:, before] for w, after, before in zip(hidden, units[1:], units)]
        last = last[:, order][..., units[-1]]
        biases = *(b[u] for b, u in zip(self.biases, units)), self.biases[-1][:, order]
        context = None if self.context_weight is None else self.context_weight[units[0]]
        direct = None if self.direct is None else self.direct[:, order][..., order]
        return MaskedMLP((first, *hidden, last), biases, context, self.activation, direct)

    def offsets(self, context=None) -> tuple[Any, ...]:
        """What is added before each activation: biases, and the context's share in the first.

        :param context: ``(..., C)`` or None.
        :return: ``(..., H1)`` with context, else ``(H1,)``; then ``(H2,), …, (P, D)``.
        """
        first, *rest = self.biases
        if context is not None:
            first = first + context @ self.context_weight.T
        return first, *rest


def masks_of(places, degrees):
    """One boolean array for each weight, and the direct ones: which inputs each row may see.

    :param places: ``(D,)``, when each dimension is made.
    :param degrees: for each hidden layer ``(H,)``, the degree of each unit.
    """
    first = (degrees[0][:, None] > places)[:, None, :]
    hidden = [after[:, None] >= before for before, after in zip(degrees, degrees[1:])]
    last = places[:, None] >= degrees[-1]
    direct = (places[:, None] > places)[:, None, :]
    return first, *hidden, last, direct


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


# The sweep ------------------------------------------------------------------------------------


def sweep(layers: Layers, offsets, activate, emit, gains=None, data=(), *, rows, size, dtype):
    """Evaluate a masked network whose inputs are made from its own outputs, in one pass.

    For the dimensions in order: the units that see the inputs so far, then the outputs ``params`` of the
    dimension, then ``inputs, result = emit(params, *data)``, the dimension's own inputs to the network.

    :param layers: the masked matrices.
    :param offsets: added before each activation, ``(H1, n), …, (P, D, n)``, n the batch or 1.
    :param activate: ``activate(a, gain)`` of a hidden layer's rows, gain being those rows of ``gains``.
    :param emit: rows in, rows out: ``(P, k, B), *(…, k, B) -> (Q, k, B), (R, k, B)``.
    :param gains: None, or one ``(H, B)`` for each hidden layer.
    :param data: arrays ``(…, D, B)``, handed to ``emit`` by rows.
    :param rows: R, how many numbers ``emit`` results in for each dimension.
    :param size: B.
    :param dtype: of everything computed.
    :return: all inputs ``(Q, D, B)`` and all results ``(R, D, B)``.
    """
    depth = len(layers.degrees)
    features = layers.last.shape[1]
    inputs = jnp.zeros((layers.first.shape[1], features, size), dtype)
    results = jnp.zeros((rows, features, size), dtype)
    units = [jnp.zeros((len(ms), size), dtype) for ms in layers.degrees]
    gains = (None,) * depth if gains is None else gains

    for block in _blocks(features, layers.degrees):
        (low, high), own = block.dims, block.units
        ranges = [slice(*r) for r in own]
        # What earlier blocks contribute, all at once.
        pre = [offset[r] for offset, r in zip(offsets, ranges)]
        out = offsets[-1][:, low:high]
        if low:
            pre[0] = pre[0] + _dot(layers.first[ranges[0], :, :low], inputs[:, :low])
        for l, weight in enumerate(layers.hidden):
            if done := own[l][0]:
                pre[l + 1] = pre[l + 1] + weight[ranges[l + 1], :done] @ units[l][:done]
        if done := own[-1][0]:
            out = out + layers.last[:, low:high, :done] @ units[-1][:done]
        if low and layers.direct is not None:
            out = out + jnp.tensordot(layers.direct[:, low:high, :, :low], inputs[:, :low], 2)
        # What the block contributes to itself, a group of dimensions at a time.
        local = Layers(
            first=layers.first[ranges[0], :, low:high],
            hidden=tuple(w[ranges[l + 1], ranges[l]] for l, w in enumerate(layers.hidden)),
            last=layers.last[:, low:high, ranges[-1]],
            degrees=(),
            direct=None if layers.direct is None else layers.direct[:, low:high, :, low:high],
        )
        local_gains = [g if g is None else g[r] for g, r in zip(gains, ranges)]
        local_data = [a[..., low:high, :] for a in data]
        made = _within_block(
            block, local, pre, out, activate, emit, local_gains, local_data, rows, size, dtype
        )
        inputs = inputs.at[:, low:high].set(made[0])
        results = results.at[:, low:high].set(made[1])
        units = [u.at[r].set(h) for u, r, h in zip(units, ranges, made[2])]
    return inputs, results


def _dot(weight, inputs):
    """``(H, Q, D), (Q, D, B) -> (H, B)``."""
    return jnp.tensordot(weight, inputs, 2)


def _within_block(block, local, pre, out, activate, emit, gains, data, rows, size, dtype):
    """The sequential part of a sweep: one step for each group of dimensions in the block."""
    cut, put = lax.dynamic_slice_in_dim, lax.dynamic_update_slice_in_dim

    def step(carry, starts):
        inputs, results, units = carry
        dim, units = starts[0], list(units)
        for l, (row, count) in enumerate(zip(starts[1:], block.unit_counts)):
            if l == 0:
                below = _dot(cut(local.first, row, count), inputs)
            else:
                below = cut(local.hidden[l - 1], row, count) @ units[l - 1]
            gain = None if gains[l] is None else cut(gains[l], row, count)
            h = activate(cut(pre[l], row, count) + below, gain)
            units[l] = put(units[l], h.astype(dtype), row, 0)
        params = cut(out, dim, block.dim_count, 1)
        params = params + cut(local.last, dim, block.dim_count, 1) @ units[-1]
        if local.direct is not None:
            params = params + jnp.tensordot(cut(local.direct, dim, block.dim_count, 1), inputs, 2)
        made, result = emit(params, *(cut(a, dim, block.dim_count, a.ndim - 2) for a in data))
        inputs = put(inputs, made.astype(dtype), dim, 1)
        results = put(results, result.astype(dtype), dim, 1)
        return (inputs, results, tuple(units)), None

    count = block.dims[1] - block.dims[0]
    carry = (
        jnp.zeros((local.first.shape[1], count, size), dtype),
        jnp.zeros((rows, count, size), dtype),
        tuple(jnp.zeros((end - start, size), dtype) for start, end in block.units),
    )
    # Groups differ in size by one or so. A step takes as many rows as the largest needs: those of
    # later groups are made again in their turn, and masked where they are seen before it.
    if len(block.starts) == 1:
        return step(carry, block.starts[0])[0]
    return lax.scan(step, carry, np.array(block.starts))[0]


@dataclass(frozen=True)
class Block:
    """Consecutive groups of dimensions, and the hidden units that become computable with them."""

    dims: tuple[int, int]
    units: tuple[tuple[int, int], ...]  # one range for each hidden layer
    starts: tuple[tuple[int, ...], ...]  # by group, within the block: dimension, unit, unit, …
    dim_count: int  # the largest group's
    unit_counts: tuple[int, ...]


# Fewer products as against shorter steps: at large widths 4 to 16 blocks measured alike; at small ones two
# are as fast and compile in two thirds of the time.
MAX_BLOCKS, FEW_BLOCKS, SMALL_WIDTH = 4, 2, 32


@lru_cache(maxsize=256)
def _blocks(features: int, degrees) -> tuple[Block, ...]:
    """Group the dimensions that see the same units, and pack the groups into equal blocks."""
    heads = sorted({0} | {m for ms in degrees for m in ms if m < features})
    ends = [*heads[1:], features]
    unit_ends = [[bisect_left(ms, end) for ms in degrees] for end in ends]
    unit_heads = [[0] * len(degrees), *unit_ends[:-1]]
    per_block = math.ceil(len(heads) / (FEW_BLOCKS if features <= SMALL_WIDTH else MAX_BLOCKS))
    blocks = []
    for i in range(0, len(heads), per_block):
        groups = range(i, min(i + per_block, len(heads)))
        last = groups[-1]
        origin = (heads[i], *unit_heads[i])
        blocks.append(
            Block(
                dims=(heads[i], ends[last]),
                units=tuple(zip(unit_heads[i], unit_ends[last])),
                starts=tuple(
                    tuple(a - o for a, o in zip((heads[g], *unit_heads[g]), origin)) for g in groups
                ),
                dim_count=max(ends[g] - heads[g] for g in groups),
                unit_counts=tuple(
                    max(e[l] - h[l] for h, e in zip(unit_heads[i : last + 1], unit_ends[i : last + 1]))
                    for l in range(len(degrees))
                ),
            )
        )
    return tuple(blocks)
