# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Masked networks: each output sees the inputs before it.

A :class:`MaskedMLP` maps an event ``x`` to the parameters of D scalar maps so that those of dimension ``d``
see ``x[0], …, x[d-1]`` only (MADE, Germain et al. 2015). Every hidden unit has a *degree* ``m``: it sees
the inputs below ``m`` and is seen by the outputs from ``m`` on. All masks follow from one comparison of
degrees. Units are sorted by degree, so the masked matrices are block-triangular, and
:func:`numpyro_maf.flows.sweeps.sweep` finds the units that become computable with a dimension in the next
few rows.

Arrays are units first, batch last, ``(H, B)``.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import register_dataclass

from numpyro_maf.codec import storable
from numpyro_maf.nn.init import check_hidden, initial_biases
from numpyro_maf.pytrees import static
from numpyro_maf.rng import normal, split

__all__ = ["Layers", "MaskedMLP", "masks_of"]


SKIP_SIZE = 2**16  # from so many numbers on, skipping a quarter of a matrix saves time


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
        return 0.0 if self.direct is None or inputs.shape[1] == 1 else jnp.tensordot(self.direct, inputs, 2)

    def product(self, layer: int, inputs):
        """What a layer's matrix makes of its inputs, ``(H, B)``, or ``(Q, D, B)`` for the first.

        The result is rows ``(H', B)``, of the last layer ``(P, D, B)``. Sorted by degree, a matrix is
        block-triangular: of a large one the upper half of the rows skips the columns that none of them sees.
        What one dimension alone adds is seen by no output: it is left out, 0 for the whole batch, ``(H, 1)``.
        """
        weight = (self.first, *self.hidden, self.last)[layer]
        if layer == 0 and inputs.shape[1] == 1:
            return jnp.zeros((len(weight), 1), jnp.result_type(weight, inputs))
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


@storable
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
