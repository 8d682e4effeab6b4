# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Self-attention among the elements of a set, and layer normalisation."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["attend", "layer_norm"]


def attend(query_key_value, heads: int, there=None):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2): ``(B, N, 3 F) -> (B, N, F)``.

    :param query_key_value: queries, keys and values of N elements side by side.
    :param heads: a divisor of F.
    :param there: ``(B, N, 1)``, above 0 for elements that are there; None for all.
    """
    # Written out: jax.nn.dot_product_attention works in float32 whatever it is given.
    count, number, width = query_key_value.shape
    parts = query_key_value.reshape(count, number, 3, heads, width // 3 // heads)
    query, key, value = jnp.moveaxis(parts, 2, 0)
    scores = jnp.einsum("nqhf,nkhf->nhqk", query, key) / math.sqrt(query.shape[-1])
    if there is not None:
        scores = jnp.where(there[:, None, None, :, 0] > 0, scores, -1e30)
    mixed = jnp.einsum("nhqk,nkhf->nqhf", jax.nn.softmax(scores, axis=-1), value)
    return mixed.reshape(count, number, width // 3)


def layer_norm(x):
    """Mean 0 and variance 1 over the last axis (Ba, Kiros & Hinton 2016)."""
    centred = x - x.mean(-1, keepdims=True)
    return centred * lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5)
