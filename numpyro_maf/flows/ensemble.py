# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Several flows of one structure, side by side, and their equal mixture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import logsumexp
from jax.tree_util import register_dataclass
from jax.typing import ArrayLike
from numpyro.distributions.batch_util import promote_batch_shape
from numpyro.distributions.util import validate_sample

from numpyro_maf.codec import storable
from numpyro_maf.flows.distributions import Stacking, at_once
from numpyro_maf.flows.flow import Flow
from numpyro_maf.rng import as_key, split

__all__ = ["Ensemble", "EnsembleDistribution", "each_member", "stack"]


def stack(trees: Sequence[Any]) -> Any:
    """Trees of one structure as one, a leading axis counting them."""
    return jax.device_put(jax.tree.map(lambda *leaves: np.stack(leaves), *trees))


def each_member(function: Callable[..., Any], *trees: Any) -> Any:
    """``vmap`` over the leading axis; without it where there is one member, which is faster on a CPU."""
    if len(jax.tree.leaves(trees[0])[0]) > 1:
        return jax.vmap(function)(*trees)
    return jax.tree.map(lambda a: a[None], function(*jax.tree.map(lambda a: a[0], trees)))


@storable
@register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class Ensemble(Flow):
    """M flows of one structure; every leaf has a leading member axis. Calling it gives their equal mixture.

    The spread of the members tells how much depends on the seed. It trains as one flow does.

    :param flows: the stacked flows; see :meth:`of` and :meth:`init`.
    """

    flows: Any

    @classmethod
    def of(cls, flows: Sequence[Flow]) -> Ensemble:
        """An ensemble of given flows.

        :raises ValueError: for no flows, and flows of unlike structure.
        """
        if not flows or len({jax.tree.structure(flow) for flow in flows}) > 1:
            raise ValueError("an ensemble needs one flow or more, all of one structure")
        return cls(stack(flows))

    @classmethod
    def init(cls, key: ArrayLike, make: Callable[[Any], Flow], members: int) -> Ensemble:
        """An ensemble of flows that a function makes, each of a key of its own.

        :param make: ``key -> Flow``; ``members``: M.
        """
        key = as_key(key)
        if isinstance(key, jax.core.Tracer):
            return cls(jax.vmap(make)(jax.random.split(key, members)))
        return cls.of([make(k) for k in split(key, members)])

    def __len__(self) -> int:
        return int(jnp.shape(jax.tree.leaves(self.flows)[0])[0])

    def __getitem__(self, member: int) -> Any:
        if not -len(self) <= member < len(self):
            raise IndexError(f"member {member} of an ensemble of {len(self)}")
        return jax.tree.map(lambda a: a[member], self.flows)

    @property
    def event_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.flows.event_shape

    @property
    def context(self) -> int:  # type: ignore[override]
        return self.flows.context

    @property
    def support(self):
        return self.flows.support

    @property
    def is_real(self) -> bool:
        return self.flows.is_real

    @property
    def is_discrete(self) -> np.ndarray:
        return self.flows.is_discrete

    @property
    def keeps_units(self) -> np.ndarray:
        return self.flows.keeps_units

    @property
    def recipe(self):  # type: ignore[override]
        return self.flows.recipe

    @property
    def event_scale(self):  # type: ignore[override]
        """The members' scalings, stacked."""
        return self.flows.event_scale

    @property
    def context_scale(self):  # type: ignore[override]
        """The members' scalings of the context, stacked."""
        return self.flows.context_scale

    @property
    def weights(self):
        return self.flows.weights

    def with_weights(self, weights: Any) -> Ensemble:
        return replace(self, flows=self.flows.with_weights(weights))

    def randomized(self, key: ArrayLike) -> Ensemble:
        keys = jax.random.split(key, len(self))
        return replace(self, flows=self.map(lambda flow, k: flow.randomized(k), keys))

    def inner_events(self, x: ArrayLike) -> np.ndarray:
        return self.flows.inner_events(x)

    def map(self, function: Callable[..., Any], *trees: Any) -> Any:
        """What a function makes of each member, and of its row of each tree: stacked."""
        return each_member(function, self.flows, *trees)

    def members(self, context: ArrayLike | None = None, *, each: bool = False) -> Any:
        """The members' distributions as one of batch shape ``(M, ...)``.

        :param context: as for one flow; with ``each=True`` it leads with a member axis, a context for each.
        """
        if each:
            return promote_batch_shape(jax.vmap(lambda flow, c: flow(c))(self.flows, context))
        return promote_batch_shape(jax.vmap(lambda flow: flow(context))(self.flows))

    def __call__(self, context: ArrayLike | None = None, *, each: bool = False) -> EnsembleDistribution:
        """The equal mixture of the members; arguments as for :meth:`members`."""
        contexts = context
        if context is not None and not each:
            contexts = jnp.broadcast_to(context, (len(self), *jnp.shape(context)))
        return EnsembleDistribution(self, contexts)

    def _describe(self):
        return [f"Ensemble of {len(self)}", *self[0]._describe()]


class EnsembleDistribution(Stacking):
    """The equal mixture of an ensemble's members.

    :param ensemble: the flows.
    :param contexts: ``(M, ..., C)``, one for each member, or None.
    """

    arg_constraints: dict[str, Any] = {}
    pytree_data_fields = ("ensemble", "contexts")

    def __init__(self, ensemble: Ensemble, contexts=None, *, validate_args=None):
        self.ensemble, self.contexts = ensemble, contexts
        batch_shape = () if contexts is None else jnp.shape(contexts)[1:-1]
        super().__init__(batch_shape, ensemble.event_shape, validate_args=validate_args)
        self._remember()

    @property
    def support(self):
        return self.ensemble.support

    @property
    def is_discrete(self) -> bool:  # type: ignore[override]
        return bool(self.ensemble.is_discrete.all())

    def _array_leaves(self):
        return jax.tree.leaves((self.ensemble, self.contexts))

    def _each(self, function, *rows):
        if self.contexts is None:
            return self.ensemble.map(lambda flow, *row: function(flow(), *row), *rows)
        return self.ensemble.map(lambda flow, c, *row: function(flow(c), *row), self.contexts, *rows)

    def member_log_probs(self, value: ArrayLike) -> jax.Array:
        """Log-density under each member, ``(..., *event_shape) -> (M, ...)``."""
        return self._each(lambda d: d.log_prob(value))

    def member_samples(self, key: ArrayLike, sample_shape: int | Sequence[int] = ()) -> jax.Array:
        """Draws of each member, ``(M, *sample_shape, *batch_shape, *event_shape)``."""
        keys = jax.random.split(as_key(key), len(self.ensemble))
        return self._each(lambda d, k: d.sample(k, sample_shape), keys)

    @validate_sample
    def _log_prob(self, value, intermediates=None):
        return self._mixed(value)

    @at_once
    def _mixed(self, value):
        log_probs = self.member_log_probs(value)
        return log_probs[0] if len(log_probs) == 1 else logsumexp(log_probs, 0) - jnp.log(len(log_probs))

    @at_once
    def _sample(self, key, sample_shape):
        draw_key, member_key = jax.random.split(key)
        draws = self.member_samples(draw_key, sample_shape)
        if len(draws) == 1:
            return draws[0]
        batch = (*sample_shape, *self.batch_shape)
        chosen = jax.random.randint(member_key, batch, 0, len(draws))
        chosen = chosen.reshape(1, *batch, *[1] * len(self.event_shape))
        return jnp.take_along_axis(draws, chosen, 0)[0]

    def is_ancestral(self, seen: Any) -> bool:
        """Whether :meth:`sample_given` is exact: only for one member, whose flow is so."""
        return len(self.ensemble) == 1 and self._only().is_ancestral(seen)

    def sample_given(
        self, key: ArrayLike, value: ArrayLike, seen: Any, sample_shape: int | Sequence[int] = ()
    ):
        """As the only member's own.

        :raises ValueError: for more than one member.
        """
        if len(self.ensemble) > 1:
            raise ValueError("exact conditional draws take an ensemble of one")
        return self._only().sample_given(key, value, seen, sample_shape)

    def _only(self) -> dist.Distribution | Any:
        return self.ensemble[0](None if self.contexts is None else self.contexts[0])

    def _describe(self):
        shapes = f"batch shape {self.batch_shape}, event shape {self.event_shape}"
        return [f"EnsembleDistribution({shapes})", f"  equal mixture of {len(self.ensemble)} members"]
