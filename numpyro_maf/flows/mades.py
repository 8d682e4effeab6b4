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

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass
from jax.typing import ArrayLike
from numpyro.distributions import constraints

from numpyro_maf.codec import storable
from numpyro_maf.flows.columns import MADE, Columns
from numpyro_maf.flows.conditionals import Conditional
from numpyro_maf.flows.flow import Flow, Recipe
from numpyro_maf.flows.linear import Standardize
from numpyro_maf.flows.shapes import check_order
from numpyro_maf.nn.masked import MaskedMLP
from numpyro_maf.pytrees import static

__all__ = ["Made"]

AGNOSTIC = {"order": (True, False), "connectivity": (False, True), "both": (True, True)}


@storable
@register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class Made(Flow):
    """The weights of a :class:`MADE`, and what they mean. Made by :func:`~numpyro_maf.made`.

    :param net: the masked network.
    :param logits: ``(M,)``, of the members' weights in the ensemble.
    :param event_scale: from standardised to original columns; None where all are discrete.
    :param context_scale: the same for the context; None without context.
    :param member: None for the whole ensemble, or the number of one member.
    :param columns: a conditional for each column.
    :param order: the columns in the order in which the first member makes them.
    :param agnostic: what differs between members: ``"order"``, ``"connectivity"`` or ``"both"``.
    """

    net: MaskedMLP
    logits: Any
    event_scale: Standardize | None = None
    context_scale: Standardize | None = None
    member: Any = None
    columns: tuple[Conditional, ...] = static(default=())
    order: tuple[int, ...] = static(default=())
    agnostic: str = static(default="both")
    recipe: Recipe | None = static(default=None)

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
        scaled = not all(c.is_discrete for c in columns)
        return cls(
            net,
            jnp.zeros(masks),
            Standardize.identity(len(columns)) if scaled else None,
            Standardize.identity(context) if context else None,
            columns=columns,
            order=order,
            agnostic=agnostic,
        )

    @property
    def event_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (len(self.columns),)

    @property
    def context(self) -> int:  # type: ignore[override]
        return self.net.context

    @property
    def is_discrete(self) -> np.ndarray:
        return np.array([c.is_discrete for c in self.columns])

    @property
    def keeps_units(self) -> np.ndarray:
        return np.array([c.keeps_units for c in self.columns])

    @property
    def support(self):
        """Of all columns; real vectors where each is real."""
        if all(c.support is constraints.real for c in self.columns):
            return constraints.real_vector
        if len(set(self.columns)) == 1:
            return constraints.independent(self.columns[0].support, 1)
        return Columns(self.columns)

    @property
    def weights(self):
        """The network, and the logits of the ensemble's weights."""
        return self.net, self.logits

    def with_weights(self, weights: Any) -> Made:
        return replace(self, net=weights[0], logits=weights[1])

    def __call__(self, context: ArrayLike | None = None) -> MADE:
        scaled = self.scaled_context(context)
        return MADE(replace(self, event_scale=None, context_scale=None), scaled, self.event_scale)

    @property
    def masks(self) -> int:
        """M, the number of members."""
        return self.logits.shape[-1]

    def randomized(self, key: ArrayLike) -> Made:
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

    def embed(self, kind, x: ArrayLike):
        """What the network sees of values: ``(k, 1), (k, B) -> (Q, k, B)``."""
        inputs = self.net.weights[0].shape[-2]
        parts = [c.embed(x) for c in self._kinds[0]]
        return self._select(kind, [jnp.pad(p, [(0, inputs - len(p)), (0, 0), (0, 0)]) for p in parts])

    def log_prob(self, kind, params: Any, x: ArrayLike):
        """``(k, 1), (P, k, B), (k, B) -> (k, B)``."""
        return self._select(kind, [c.log_prob(params[: c.num_params], x) for c in self._kinds[0]])

    def sample(self, kind, params: Any, uniform, normal):
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
