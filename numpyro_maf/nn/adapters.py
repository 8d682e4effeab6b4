# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Networks that summarise data, whatever library they come from, as weights and a function."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_maf.nn.embeddings import Embedding
from numpyro_maf.nn.mlp import MLP

__all__ = ["as_network"]


def as_network(encoder, key, example, present=None) -> tuple[Any, Callable]:
    """A network as a pytree of weights and ``apply(weights, x)``, of batches ``(B, ...) -> (B, C)``.

    ``apply(weights, x, present)`` with booleans also says which numbers are there; networks that are no
    :class:`~numpyro_maf.embeddings.Embedding` get x alone, in which missing numbers are 0.

    :param encoder: widths of an MLP of the flattened rows, the last one C; an embedding, such as
        ``DeepSet()``; a flax module, linen or nnx; or an equinox module, which takes one row. Dropout and
        batch statistics are not supported.
    :param key: for the weights that are not there yet.
    :param example: a batch ``(B, ...)``, and which of its numbers are ``present``.
    :raises TypeError: for something else; ValueError for a tuple of less than two widths.
    """
    if isinstance(encoder, Embedding):
        return encoder.init(key, example, present), encoder
    if isinstance(encoder, tuple):
        if len(encoder) < 2:
            raise ValueError(f"encoder needs hidden widths and the context's, as (64, 32), got {encoder}")
        *hidden, outputs = encoder
        width = math.prod(jnp.shape(example)[1:])
        net = MLP.init(key, width, (1, outputs), hidden=tuple(hidden))
        return net, _apply_mlp
    kinds = {name: sys.modules.get(name) for name in ("flax.linen", "flax.nnx", "equinox")}
    linen, nnx, equinox = kinds.values()
    if linen and isinstance(encoder, linen.Module):
        return encoder.init(key, example), lambda weights, x, present=None: encoder.apply(weights, x)
    if nnx and isinstance(encoder, nnx.Module):
        graph, weights, rest = nnx.split(encoder, nnx.Param, ...)
        return weights, lambda weights, x, present=None: nnx.merge(graph, weights, rest)(x)
    if equinox and isinstance(encoder, equinox.Module):
        weights, rest = equinox.partition(encoder, equinox.is_inexact_array)
        return weights, lambda weights, x, present=None: jax.vmap(equinox.combine(weights, rest))(x)
    raise TypeError(
        "encoder must be a tuple of widths, an Embedding such as DeepSet(), or a flax or equinox module, got "
        f"{type(encoder).__name__}"
    )


def _apply_mlp(net, x, present=None):
    return net(None, x.reshape(len(x), -1))[..., 0, :]
