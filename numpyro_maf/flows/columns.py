# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""The distribution that a MADE gives: columns of any kind, scored in one pass and drawn in one sweep."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from numpyro.distributions import constraints
from numpyro.distributions.batch_util import vmap_over
from numpyro.distributions.util import validate_sample

from numpyro_maf.flows.distributions import Stacking
from numpyro_maf.flows.layout import enter
from numpyro_maf.flows.linear import Standardize
from numpyro_maf.flows.shapes import zeros_of
from numpyro_maf.flows.sweeps import network, sweep
from numpyro_maf.nn.init import ACTIVATIONS
from numpyro_maf.nn.masked import masks_of
from numpyro_maf.rng import as_key, as_shape

__all__ = ["MADE", "Columns"]


class Columns(constraints.Constraint):
    """A constraint of its own for each column."""

    event_dim = 1

    def __init__(self, columns):
        self.columns = columns
        self.is_discrete = any(c.is_discrete for c in columns)

    def __call__(self, x: Any):
        return jnp.stack([c.support(x[..., d]) for d, c in enumerate(self.columns)], -1).all(-1)

    def feasible_like(self, prototype):
        parts = [c.support.feasible_like(prototype[..., d]) for d, c in enumerate(self.columns)]
        return jnp.stack(parts, -1).astype(jnp.result_type(prototype))

    def tree_flatten(self):
        return (), ((), {"columns": self.columns, "is_discrete": self.is_discrete})


class MADE(Stacking):
    """A masked autoregressive distribution, or the mixture over an ensemble of them.

    Values are integers where every column is discrete, floats otherwise.

    :param made: weights and columns, a :class:`~numpyro_maf.flows.mades.Made`.
    :param context: ``(..., C)``, or None; the batch axes become the batch shape.
    :param scale: a :class:`~numpyro_maf.Standardize` of the columns, or None.
    """

    arg_constraints: dict[str, Any] = {}
    pytree_data_fields = ("made", "context", "scale")

    def __init__(self, made, context=None, scale: Standardize | None = None, *, validate_args=None):
        self.made, self.context, self.scale = made, context, scale
        batch_shape = () if context is None else jnp.shape(context)[:-1]
        super().__init__(batch_shape, (len(made.columns),), validate_args=validate_args)
        self._remember()

    @property
    def is_discrete(self) -> bool:  # type: ignore[override]
        return self.support.is_discrete

    @constraints.dependent_property(event_dim=1)
    def support(self):
        """Of all columns; real vectors where each is real."""
        return self.made.support

    def _describe(self):
        kinds = ", ".join(dict.fromkeys(type(c).__name__ for c in self.made.columns))
        shapes = f"batch shape {self.batch_shape}, event shape {self.event_shape}"
        return [f"MADE({shapes})", f"  columns: {kinds}; {self.made.masks} member(s)"]

    def _array_leaves(self):
        return jax.tree.leaves((self.made, self.context, self.scale))

    @validate_sample
    def _log_prob(self, value, intermediates=None):
        log_probs = self.member_log_probs(value)
        if len(log_probs) == 1:
            return log_probs[0]
        weights = jax.nn.log_softmax(self.made.logits)
        return jax.nn.logsumexp(weights.reshape(-1, *(1,) * (log_probs.ndim - 1)) + log_probs, axis=0)

    def member_log_probs(self, value: ArrayLike, known: Any = None):
        """Log-density under each member of the ensemble, ``(..., D) -> (M, ...)``.

        :param known: ``(D,)`` or ``(..., D)`` booleans, the columns that count; None for all. It is a
            density of those where they come first in every member's order, or where the network was trained
            with other columns left out.
        """
        made = self.made
        value = jnp.asarray(value, jnp.result_type(value, *jax.tree.leaves(made.net)))
        total = zeros_of(value)
        if self.scale is not None:
            value, total = self.scale.inverse_and_log_det(value)
            if known is not None:
                total = -jnp.sum(jnp.where(known, jnp.log(self.scale.scale), 0), -1)
        counts: Any = np.ones((len(made.columns), 1))
        if known is not None:
            known = jnp.asarray(known, float)
            known = known if known.ndim == 1 else jnp.broadcast_to(known, jnp.shape(value))
            counts = jnp.moveaxis(known, -1, 0).reshape(len(made.columns), -1)
        kind = made._kinds[1][:, None]

        def score(member):
            *_, places, degrees = member
            masks = None if self._plain else masks_of(places, degrees)
            x, theta, restore = enter(made.net, self.context, None, value, "MADE", masks)
            _, params = network(made.net.activation, theta, made.embed(kind, x))
            x = jnp.broadcast_to(x, params.shape[1:])
            return restore.rows(jnp.where(jnp.asarray(counts) > 0, made.log_prob(kind, params, x), 0.0))

        return _over_members(score, made.members()) + total

    @property
    def _plain(self) -> bool:
        """Whether the network's own order is that of the only member."""
        return self.made.masks == 1 and self.made.order == tuple(range(len(self.made.columns)))

    def _sample(self, key, sample_shape=()):
        return self._sample_given(key, None, None, sample_shape)

    def is_ancestral(self, seen: Any) -> bool:
        """Whether :meth:`sample_given` is exact: every member makes the seen columns first."""
        known = set(np.flatnonzero(seen).tolist())
        return all(known == set(order[: len(known)].tolist()) for order in self.made.orders)

    def sample_given(
        self, key: ArrayLike, value: ArrayLike, known: Any, sample_shape: int | Sequence[int] = ()
    ):
        """Draws of the columns that are not known, given those that are: exact where these come first.

        :param value: ``(..., D)``, of which the known columns count.
        :param known: ``(D,)`` booleans. Value and known are None for unconditional draws.
        :return: ``sample_shape + batch_shape + (D,)``, the known columns as given.
        """
        return _drawn(self, as_key(key), value, known, as_shape(sample_shape))

    def _sample_given(self, key, value, known, sample_shape):
        made, features = self.made, len(self.made.columns)
        shape = (*sample_shape, *self.batch_shape)
        if value is not None:
            shape = jnp.broadcast_shapes(shape, jnp.shape(value)[:-1])
        member_key, uniform_key, normal_key = jax.random.split(key, 3)
        dtype = jnp.result_type(*jax.tree.leaves(made.net), float if self.context is None else self.context)
        given = jnp.zeros((*shape, features), dtype)
        logits = made.logits
        if value is not None:
            plain = value if self.scale is None else self.scale._inverse(value)
            given = given + jnp.where(jnp.asarray(known), plain, 0)
            if made.masks > 1 and made.member is None:
                # Members that make the known columns likely are likelier.
                logits = jnp.moveaxis(
                    self.member_log_probs(jnp.broadcast_to(value, given.shape), known), 0, -1
                )
                logits = logits + jax.nn.log_softmax(made.logits)
        numbers, orders, units, *_ = made.members()
        chosen = jnp.broadcast_to(numbers[0], shape)
        if len(numbers) > 1:
            chosen = jax.random.categorical(member_key, logits, shape=shape)
        size = int(np.prod(shape))
        uniform = jax.random.uniform(uniform_key, (features, size), dtype)
        normal = jax.random.normal(normal_key, (features, size), dtype)
        fixed = np.zeros(features, bool) if known is None else jnp.asarray(known)
        kinds = made._kinds[1]

        def draw(order, units):
            net = made.net if self._plain else made.net.permuted(order, units)
            x, (layers, offsets), restore = enter(net, self.context, None, given[..., order], "MADE")

            def emit(params, kind, fixed, x, uniform, normal):
                x = jnp.where(fixed, x, made.sample(kind, params, uniform, normal))
                return made.embed(kind, x), x[None]

            def activate(rows, _):
                return ACTIVATIONS[net.activation](rows)

            kind, keep = (jnp.asarray(a)[order][:, None] for a in (kinds, fixed))
            data = (kind, keep, x, uniform, normal)
            _, results = sweep(layers, offsets, activate, emit, data=data, rows=1, size=size, dtype=x.dtype)
            return restore(results[0][jnp.argsort(order)])

        def step(drawn, member):
            number, order, units = member
            return jnp.where((chosen == number)[..., None], draw(order, units), drawn), None

        if len(numbers) == 1:
            drawn = draw(*jax.tree.map(lambda a: a[0], (orders, units)))
        else:
            drawn, _ = lax.scan(step, given, (numbers, orders, units))
        if self.scale is not None:
            drawn = self.scale(drawn)
        if value is not None:
            drawn = jnp.where(jnp.asarray(known), value, drawn)
        return drawn.astype(int) if all(c.is_discrete for c in made.columns) else drawn


@partial(jax.jit, static_argnums=4)
def _drawn(d, key, value, known, sample_shape):
    return d._sample_given(key, value, known, sample_shape)


@vmap_over.register
def _vmap_over_made(d: MADE, made=None, context=None, scale=None):
    mapped = copy.copy(d)
    mapped.made, mapped.context, mapped.scale = made, context, scale
    return mapped


def _over_members(function, members):
    """``function`` of each member, stacked; without a loop where there is one."""
    if len(members[0]) == 1:
        return function(jax.tree.map(lambda a: a[0], members))[None]
    return lax.map(function, members)
