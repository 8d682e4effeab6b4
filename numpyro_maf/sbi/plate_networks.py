# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Networks of posteriors that follow plates: summaries from the inside out, flows from the outside in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_maf.flows.ensemble import each_member
from numpyro_maf.nn.embeddings import dense, dense_init
from numpyro_maf.rng import split
from numpyro_maf.sbi.plates import PlateTree

__all__ = ["SUMMARY", "PlateLoss", "context_of", "encoders_of", "summaries"]

SUMMARY, _HIDDEN = 32, (64, 64)  # widths of a summary, and of its network's hidden layers
_ROWS = 16  # of a plate, are scored at a step


# Summaries, from the innermost plates outwards --------------------------------------------------------


def encoders_of(tree: PlateTree, arrays, missing: bool, key) -> list[Any]:
    """Random weights of the summaries' networks."""
    networks = []
    for number, (level, own_key) in enumerate(zip(tree.levels, split(key, len(tree.levels)))):
        inner = [math.prod(np.shape(arrays[name])[1 + len(level.plates) :]) for name in level.observed]
        width = (1 + missing) * sum(inner) + (SUMMARY + 1) * len(tree.inside(number))
        networks.append(dense_init(own_key, (width or 1, *_HIDDEN, SUMMARY)))
    return networks


def summaries(tree: PlateTree, sizes, weights, seen, counts, rows: int) -> list[Any]:
    """For each level, ``(B, *plates, C)``: of the sites in its rows and of everything inside of them.

    :param seen: by observed site, standardised numbers and which are there or None, ``(B, *plates, ...)``.
    :param counts: by plate, ``(B,)``, how many of its rows are there.
    """
    codes: list[Any] = [None] * len(tree.levels)
    there: list[Any] = [None] * len(tree.levels)
    for number in reversed(range(len(tree.levels))):
        level = tree.levels[number]
        depth = 1 + len(level.plates)
        shape = (rows, *(sizes[plate] for plate in level.plates))
        parts, some = [], []
        for name in level.observed:
            z, present = seen[name]
            parts.append(z.reshape(*shape, -1))
            if present is not None:
                parts.append(present.reshape(*shape, -1).astype(z.dtype))
            some.append(jnp.ones(shape, bool) if present is None else present.reshape(*shape, -1).any(-1))
        for child in tree.inside(number):
            extra = tuple(range(depth, 1 + len(tree.levels[child].plates)))
            count = there[child].sum(extra)
            total = (jax.nn.silu(codes[child]) * there[child][..., None]).sum(extra)
            parts += [total / jnp.maximum(count, 1)[..., None], jnp.log1p(count)[..., None]]
            some.append(count > 0)
        codes[number] = dense(weights[number], jnp.concatenate(parts or [jnp.ones((*shape, 1))], -1))
        known: Any = jnp.stack(some or [jnp.ones(shape, bool)]).any(0)
        for axis, plate in enumerate(level.plates, 1):
            if plate in counts:
                own = counts[plate].reshape(-1, *[1] * (depth - 1))
                places = jnp.arange(sizes[plate]).reshape(-1, *[1] * (depth - 1 - axis))
                known = known & (places < own)
        there[number] = known.astype(codes[number].dtype)
    return codes


# Flows, from the outermost plates inwards ---------------------------------------------------------------


def context_of(tree: PlateTree, flows, codes, vectors, number: int):
    """What a level's flow is given: the vectors of the levels around it, in their units, and the summary."""
    code, depth = codes[number], len(tree.levels[number].plates)
    parts = []
    for around in tree.latent_around(number):
        scale, z = flows[str(around)].event_scale, vectors[around]
        z = (z - scale.loc) / scale.scale
        free = depth - len(tree.levels[around].plates)
        parts.append(z.reshape(*z.shape[:-1], *[1] * free, z.shape[-1]))
    parts.append(code)
    shape = jnp.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return jnp.concatenate([jnp.broadcast_to(part, (*shape, part.shape[-1])) for part in parts], -1)


@dataclass(frozen=True)
class PlateLoss:
    """The negative log-density of latent vectors: of each level the mean over rows, averaged over members.

    The mean over at most 16 rows, drawn anew at each step, has the same least point as the sum over all.
    """

    tree: PlateTree
    sizes: tuple[tuple[str, int], ...]
    counted: tuple[str, ...]

    def __call__(self, params: Any, fixed: Any, key: ArrayLike, vector, *arrays: Any):
        (weights, encoders), (flows, view, sites) = params, fixed
        count = len(arrays) - len(self.counted)
        seen = dict(zip(view.names, view(arrays[:count])))
        counts, columns = dict(zip(self.counted, arrays[count:])), self.tree.columns(sites)
        vectors = {number: vector[:, columns[number]] for number in self.tree.latent_levels}

        def member(flows, weights, encoders, key):
            flows = {n: flow.with_weights(weights[n]).randomized(key) for n, flow in flows.items()}
            codes = summaries(self.tree, dict(self.sizes), encoders, seen, counts, len(vector))
            total = 0.0
            for number in self.tree.latent_levels:
                context = context_of(self.tree, flows, codes, vectors, number)
                own = vectors[number]
                shape = own.shape[1:-1]
                own, context = (a.reshape(len(vector), -1, a.shape[-1]) for a in (own, context))
                mask = self._there(number, shape, counts, len(vector))
                if own.shape[1] > _ROWS:
                    chosen = jax.random.permutation(key, own.shape[1])[:_ROWS]
                    own, context, mask = own[:, chosen], context[:, chosen], mask[:, chosen]
                losses = -flows[str(number)](context).log_prob(own)
                total += (mask * losses).sum(1) / jnp.maximum(mask.sum(1), 1)
            return total

        flows = {number: flow.flows for number, flow in flows.items()}
        members = len(jax.tree.leaves(encoders)[0])
        return each_member(member, flows, weights, encoders, jax.random.split(key, members)).mean(0)

    def _there(self, number, shape, counts, rows):
        """``(B, R)``: 1 for the rows of a level that are there, 0 for those that fill up."""
        mask = jnp.ones((rows, *shape))
        for axis, plate in enumerate(self.tree.levels[number].plates):
            if plate in counts:
                places = jnp.arange(shape[axis]).reshape(-1, *[1] * (len(shape) - axis - 1))
                mask = mask * (places < counts[plate].reshape(-1, *[1] * len(shape)))
        return mask.reshape(rows, -1)
