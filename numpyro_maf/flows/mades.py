# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

r"""MADE: an autoregressive distribution of columns of any kind, one network pass to score, one sweep to draw.

Germain, Gregor, Murray & Larochelle, *MADE: Masked Autoencoder for Distribution Estimation* (2015).
:math:`p(x) = \prod_d p(x_d \mid x_{<d})`, each factor a :mod:`~numpyro_maf.conditionals` member whose
parameters a masked network makes of the columns before.

**Ensembles** (sections 4.2 and 4.3 there). The same weights under another order of the columns, or with
their hidden units in another order of degrees, are another distribution. A member is nothing but a
permutation of the weights; training draws one for each step, and the density is the mixture over all of them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import register_dataclass
from numpyro.distributions import constraints
from numpyro.distributions.batch_util import vmap_over
from numpyro.distributions.util import validate_sample

from numpyro_maf.flows.bijectors import check_order, zeros_of
from numpyro_maf.flows.conditionals import Conditional
from numpyro_maf.flows.distributions import Stacking
from numpyro_maf.flows.linear import Standardize
from numpyro_maf.flows.sweeps import enter, network, sweep
from numpyro_maf.nn.init import ACTIVATIONS
from numpyro_maf.nn.masked import MaskedMLP, masks_of
from numpyro_maf.pytrees import static

__all__ = ["MADE", "Made"]


AGNOSTIC = {"order": (True, False), "connectivity": (False, True), "both": (True, True)}


@register_dataclass
@dataclass(frozen=True, eq=False)
class Made:
    """The weights of a :class:`MADE` and what they mean. Made by :meth:`init`.

    :param net: the masked network.
    :param logits: ``(M,)``, of the members' weights in the ensemble.
    :param member: None for the whole ensemble, or the number of one member.
    :param columns: a conditional for each column.
    :param order: the columns in the order in which the first member makes them.
    :param agnostic: what differs between members: ``"order"``, ``"connectivity"`` or ``"both"``.
    """

    net: MaskedMLP
    logits: Any
    member: Any = None
    columns: tuple[Conditional, ...] = static(default=())
    order: tuple[int, ...] = static(default=())
    agnostic: str = static(default="both")

    @classmethod
    def init(cls, key, columns, *, context, hidden, activation, order, masks, agnostic, direct) -> Made:
        """Random weights; arguments as for :func:`numpyro_maf.made`."""
        columns = tuple(columns)
        order = tuple(range(len(columns))) if order is None else check_order(order, len(columns))
        if agnostic not in AGNOSTIC:
            raise ValueError(f"agnostic must be one of {sorted(AGNOSTIC)}, got {agnostic!r}")
        count = max(c.num_params for c in columns)
        initial = np.zeros((count, len(columns)))
        for d, column in enumerate(columns):
            initial[: column.num_params, d] = column.initial
        net = MaskedMLP.init(
            key, len(columns), count, hidden=hidden, context=context, activation=activation,
            inputs=max(c.inputs for c in columns), initial=initial[:, np.array(order)], direct=direct,
        )  # fmt: skip
        # The network's own order is that of the features: members permute it.
        back = np.argsort(order)
        net = net.permuted(back, [np.arange(h) for h in hidden])
        return cls(net, jnp.zeros(masks), None, columns, order, agnostic)

    @property
    def masks(self) -> int:
        """M, the number of members."""
        return self.logits.shape[-1]

    def randomized(self, key) -> Made:
        """One member of the ensemble, drawn at random."""
        if self.masks == 1:
            return self
        return replace(self, member=jax.random.randint(key, (), 0, self.masks))

    @property
    def orders(self) -> np.ndarray:
        """``(M, D)``: the columns in the order in which each member makes them."""
        return self._permutations[0]

    @property
    def _permutations(self):
        widths = tuple(w.shape[-2 if i else 0] for i, w in enumerate(self.net.weights[:-1]))
        return _permutations(self.order, widths, self.masks, self.agnostic)

    def members(self):
        """Of the members in use, stacked for a loop: numbers, orders and unit orders; places and degrees.

        The first two arrange the weights for a sweep, the last two make the masks for a pass.
        """
        orders, units = self._permutations
        places = np.argsort(orders, axis=1)
        degrees = tuple(np.asarray(m)[np.argsort(u, axis=1)] for m, u in zip(self.net.degrees, units))
        every = np.arange(self.masks), orders, units, places, degrees
        if self.member is None:
            return every
        return jax.tree.map(lambda a: jnp.asarray(a)[self.member][None], every)

    # Columns of several kinds: rows (k, B) with the kind of each ------------------------------------

    @property
    def _kinds(self) -> tuple[tuple[Conditional, ...], np.ndarray]:
        kinds = tuple(dict.fromkeys(self.columns))
        return kinds, np.array([kinds.index(c) for c in self.columns])

    def _select(self, kind, results):
        """Of one result for each kind, ``(..., k, B)``, that of each row's kind ``(k, 1)``."""
        chosen = results[0]
        for number, result in enumerate(results[1:], 1):
            chosen = jnp.where(kind == number, result, chosen)
        return chosen

    def embed(self, kind, x):
        """What the network sees of values: ``(k, 1), (k, B) -> (Q, k, B)``."""
        inputs = self.net.weights[0].shape[-2]
        parts = [c.embed(x) for c in self._kinds[0]]
        return self._select(kind, [jnp.pad(p, [(0, inputs - len(p)), (0, 0), (0, 0)]) for p in parts])

    def log_prob(self, kind, params, x):
        """``(k, 1), (P, k, B), (k, B) -> (k, B)``."""
        return self._select(kind, [c.log_prob(params[: c.num_params], x) for c in self._kinds[0]])

    def sample(self, kind, params, uniform, normal):
        """``(k, 1), (P, k, B), (k, B), (k, B) -> (k, B)``."""
        draws = [c.sample(params[: c.num_params], uniform, normal) for c in self._kinds[0]]
        return self._select(kind, draws)


@lru_cache(maxsize=64)
def _permutations(order, widths, masks: int, agnostic: str):
    """Orders ``(M, D)`` and unit orders ``(M, H)``, …; the first member's are the given and the plain one."""
    shuffle_order, shuffle_units = AGNOSTIC[agnostic]
    orders, units = [np.array(order)], [[np.arange(h)] for h in widths]
    for member in range(1, masks):
        rng = np.random.default_rng(member)
        drawn = [rng.permutation(order) for _ in range(20)] if shuffle_order else orders[:1]
        # The first that no member has yet, if there is one.
        had = {tuple(o) for o in orders}
        orders.append(next((o for o in drawn if tuple(o) not in had), drawn[0]))
        for rows, h in zip(units, widths):
            rows.append(rng.permutation(h) if shuffle_units else rows[0])
    return np.stack(orders), tuple(np.stack(rows) for rows in units)


class _Columns(constraints.Constraint):
    """A constraint of its own for each column."""

    event_dim = 1

    def __init__(self, columns):
        self.columns = columns
        self.is_discrete = any(c.is_discrete for c in columns)

    def __call__(self, x):
        return jnp.stack([c.support(x[..., d]) for d, c in enumerate(self.columns)], -1).all(-1)

    def feasible_like(self, prototype):
        parts = [c.support.feasible_like(prototype[..., d]) for d, c in enumerate(self.columns)]
        return jnp.stack(parts, -1).astype(jnp.result_type(prototype))

    def tree_flatten(self):
        return (), ((), {"columns": self.columns, "is_discrete": self.is_discrete})


class MADE(Stacking):
    """A masked autoregressive distribution, or the mixture over an ensemble of them.

    Values are integers where every column is discrete, floats otherwise.

    :param made: weights and columns, a :class:`Made`.
    :param context: ``(..., C)``, or None; the batch axes become the batch shape.
    :param scale: a :class:`~numpyro_maf.Standardize` of the columns, or None.
    """

    arg_constraints: dict[str, Any] = {}
    pytree_data_fields = ("made", "context", "scale")

    def __init__(self, made: Made, context=None, scale: Standardize | None = None, *, validate_args=None):
        self.made, self.context, self.scale = made, context, scale
        batch_shape = () if context is None else jnp.shape(context)[:-1]
        super().__init__(batch_shape, (len(made.columns),), validate_args=validate_args)
        self._remember()

    @property
    def is_discrete(self) -> bool:  # type: ignore[override]
        return self.support.is_discrete

    @constraints.dependent_property(event_dim=1)
    def support(self):
        """Of all columns; real vectors where each is continuous."""
        columns = self.made.columns
        if not any(c.is_discrete for c in columns):
            return constraints.real_vector
        if len(set(columns)) == 1:
            return constraints.independent(columns[0].support, 1)
        return _Columns(columns)

    def _array_leaves(self):
        return jax.tree.leaves((self.made, self.context, self.scale))

    @validate_sample
    def _log_prob(self, value, intermediates=None):
        log_probs = self.member_log_probs(value)
        if len(log_probs) == 1:
            return log_probs[0]
        weights = jax.nn.log_softmax(self.made.logits)
        return jax.nn.logsumexp(weights.reshape(-1, *(1,) * (log_probs.ndim - 1)) + log_probs, axis=0)

    def member_log_probs(self, value, known=None):
        """Log-density under each member of the ensemble, ``(..., D) -> (M, ...)``.

        :param known: ``(D,)`` booleans, the columns that count; None for all. It is a density of those where
            they come first in every member's order.
        """
        made = self.made
        value = jnp.asarray(value, jnp.result_type(value, *jax.tree.leaves(made.net)))
        total = zeros_of(value)
        if self.scale is not None:
            value, total = self.scale.inverse_and_log_det(value)
            if known is not None:
                total = -jnp.sum(jnp.where(known, jnp.log(self.scale.scale), 0), -1)
        counts = np.ones(len(made.columns)) if known is None else jnp.asarray(known, float)
        kind = made._kinds[1][:, None]

        def score(member):
            *_, places, degrees = member
            masks = None if self._plain else masks_of(places, degrees)
            x, theta, restore = enter(made.net, self.context, None, value, "MADE", masks)
            _, params = network(made.net.activation, theta, made.embed(kind, x))
            return restore.rows(made.log_prob(kind, params, x) * jnp.asarray(counts, x.dtype)[:, None])

        return _over_members(score, made.members()) + total

    @property
    def _plain(self) -> bool:
        """Whether the network's own order is that of the only member."""
        return self.made.masks == 1 and self.made.order == tuple(range(len(self.made.columns)))

    def _sample(self, key, sample_shape=()):
        return self.sample_given(key, None, None, sample_shape)

    def sample_given(self, key, value, known, sample_shape=()):
        """Draws of the columns that are not known, given those that are: exact where these come first.

        :param value: ``(..., D)``, of which the known columns count.
        :param known: ``(D,)`` booleans. Value and known are None for unconditional draws.
        :return: ``sample_shape + batch_shape + (D,)``, the known columns as given.
        """
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
