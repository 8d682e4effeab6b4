# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Networks without masks: they make the parameters of scalar maps from features that pass unchanged.

A conditioner is called as ``net(seen, context)``, with the n features that it sees as Q numbers each,
``(..., Q, n)``, and a context ``(..., C)`` or None. It gives P parameters for each of the m features that
are mapped, ``(..., P, m)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from numpyro_maf.codec import storable
from numpyro_maf.nn.init import ACTIVATIONS, check_hidden, initial_biases
from numpyro_maf.pytrees import static
from numpyro_maf.rng import normal, split

__all__ = ["MLP"]


@storable
@register_dataclass
@dataclass(frozen=True)
class MLP:
    """A multilayer perceptron of the features that are seen and of the context."""

    weights: tuple[Any, ...]
    biases: tuple[Any, ...]
    outputs: tuple[int, ...] = static()
    activation: str = static(default="silu")

    @classmethod
    def init(
        cls, key, inputs: int, outputs: tuple[int, int], *, hidden, activation="silu", initial=0.0
    ) -> MLP:
        """Random weights; the outputs start near ``initial``.

        :param inputs: Q n + C.
        :param outputs: P and m.
        :param initial: ``(P,)`` or a number. Other arguments as for ``MaskedMLP.init``.
        """
        hidden = check_hidden(hidden, activation)
        widths = (inputs, *hidden, math.prod(outputs))
        *keys, bias_key = split(key, len(widths))
        weights = [normal(k, (a, b)) / math.sqrt(max(a, 1)) for k, a, b in zip(keys, widths, widths[1:])]
        weights[-1] = 0.1 * weights[-1]
        initial = np.asarray(initial, jnp.result_type(float))
        initial = np.broadcast_to(initial[..., None], outputs).ravel()
        net = cls(tuple(weights), (*initial_biases(bias_key, hidden), initial), tuple(outputs), activation)
        return jax.device_put(net)

    @property
    def inputs(self) -> int:
        return self.weights[0].shape[0]

    def __call__(self, seen, context=None):
        parts = [] if seen is None else [seen.reshape(*seen.shape[:-2], math.prod(seen.shape[-2:]))]
        x = _joined(parts if context is None else [*parts, context])
        *hidden, (last, bias) = zip(self.weights, self.biases)
        for weight, offset in hidden:
            x = ACTIVATIONS[self.activation](x @ weight + offset)
        x = x @ last + bias
        return x.reshape(*x.shape[:-1], *self.outputs)


def _joined(parts):
    """Arrays side by side on the last axis, their batch axes broadcast."""
    batch = jnp.broadcast_shapes(*(p.shape[:-1] for p in parts))
    return jnp.concatenate([jnp.broadcast_to(p, (*batch, p.shape[-1])) for p in parts], -1)
