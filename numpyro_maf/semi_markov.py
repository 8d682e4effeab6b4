# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

r"""A hidden semi-Markov chain: each visit to a state has a length of its own distribution.

A state and the number of steps that its visit has left are together Markov (the explicit-duration model of
Ferguson 1980; Yu 2010, *Hidden semi-Markov models*, section 2). A step costs O(K D + K^2) instead of the
O(K^2 D^2) of the expanded chain, because within a visit only the number that is left goes down.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from numpyro.distributions import constraints

from numpyro_maf.hmm import HMM, _log, _logsumexp, _possible
from numpyro_maf.inputs import as_numbers
from numpyro_maf.rng import as_key, as_shape

__all__ = ["HSMM"]


class HSMM(HMM):
    """The joint density of a path and the observations, with a distribution of the length of each visit.

    It is used as :class:`~numpyro_maf.HMM` is: ``log_prob`` of known, partly known and unknown paths,
    ``marginals``, ``filtered``, ``mode`` and samples are exact. The last visit may go on beyond the last
    step.

    :param initial: ``(..., K)``, probabilities of the first state.
    :param transition: as for HMM, probabilities of the state after a visit. A state may follow itself: that
        is a new visit.
    :param log_density: ``(..., T, K)``.
    :param durations: ``(K, D)``: row k gives the probabilities that a visit to k lasts 1, …, D steps.
    :param remaining: ``(K, D)``: row k gives the probabilities that a first visit to k lasts 1, …, D steps,
        the first included; None for ``durations``, if the visit begins at the first step.
    :param observed: as for HMM, and so are ``missing`` and the errors.
    :raises ValueError: also for durations of another shape, or that are no probabilities.
    """

    arg_constraints = {
        **HMM.arg_constraints,
        "durations": constraints.independent(constraints.simplex, 1),
        "remaining": constraints.independent(constraints.simplex, 1),
    }

    pytree_data_fields = ("durations", "remaining")

    def __init__(
        self,
        initial: ArrayLike,
        transition: ArrayLike,
        log_density: ArrayLike,
        durations: ArrayLike,
        observed: ArrayLike | None = None,
        *,
        remaining: ArrayLike | None = None,
        missing: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        durations = jnp.asarray(as_numbers("durations", durations))
        states = jnp.shape(log_density)[-1]
        if durations.ndim != 2 or durations.shape[0] != states or not durations.shape[1]:
            raise ValueError(f"durations must be ({states}, D), a row for each state, got {durations.shape}")
        remaining = durations if remaining is None else jnp.asarray(as_numbers("remaining", remaining))
        if remaining.shape != durations.shape:
            raise ValueError(f"remaining must be {durations.shape}, as durations, got {remaining.shape}")
        self.durations, self.remaining = durations, remaining
        super().__init__(
            initial, transition, log_density, observed, missing=missing, validate_args=validate_args
        )

    def _describe(self) -> list[str]:
        first, *rest = super()._describe()
        return [
            first.replace("HMM of", "HSMM of"),
            *rest,
            f"  visits of up to {self.durations.shape[1]} steps",
        ]

    @property
    @jax.jit
    def filtered(self) -> Array:
        filtered, normalisers = self._forward(self._table())
        so_far = jnp.cumsum(~_possible(normalisers), 0) == 0
        return jnp.moveaxis(jnp.where(so_far[..., None], jnp.exp(filtered).sum(-1), jnp.nan), 0, -2)

    @property
    @jax.jit
    def mode(self) -> Array:
        """``(..., T)``: the states of the most probable sequence of visits (Viterbi)."""

        def step(best, inputs):
            transition, emission = inputs
            moves = best[..., :, None, 0] + transition
            entered = moves.max(-2)[..., None] + _log(self.durations)
            on = _shifted(best)
            came = jnp.where(entered > on, moves.argmax(-2)[..., None], -1)  # -1: the visit went on
            return jnp.maximum(entered, on) + emission[..., None], came

        emissions = jnp.moveaxis(self._table(), -2, 0)
        first = self._first() + emissions[0][..., None]
        last, pointers = self._scan(step, first, emissions[1:])
        length = self.durations.shape[1]

        def back(place, pointer):
            state, left = place
            came = jnp.take_along_axis(
                pointer.reshape(*pointer.shape[:-2], -1), (state * length + left)[..., None], -1
            )[..., 0]
            before = jnp.where(came >= 0, came, state), jnp.where(came >= 0, 0, left + 1)
            return before, before[0]

        flat = last.reshape(*last.shape[:-2], -1).argmax(-1)
        end = flat // length, flat % length
        _, path = jax.lax.scan(back, end, pointers, reverse=True)
        path = jnp.moveaxis(jnp.concatenate([path, end[0][None]]), 0, -1)
        return jnp.where(_possible(last.max((-1, -2)))[..., None], path, -1)

    def sample(self, key: ArrayLike, sample_shape: int | Sequence[int] = ()) -> Array:
        """Paths from the posterior, by filtering forwards and sampling backwards."""
        return self._visits(as_key(key), (*as_shape(sample_shape), *self.batch_shape))

    @partial(jax.jit, static_argnums=2)
    def _visits(self, key: Array, shape: tuple[int, ...]) -> Array:
        filtered, normalisers = self._forward(self._table())
        keys = jax.random.split(key, len(filtered))
        length = self.durations.shape[1]

        def pick(a, index):
            a = jnp.broadcast_to(a, (*shape, *a.shape[len(self.batch_shape) :]))
            return jnp.take_along_axis(a, index[..., None], -1)[..., 0]

        def back(place, inputs):
            transition, log_filtered, key = inputs
            state, left = place
            lengths = jnp.broadcast_to(_log(self.durations), (*self.batch_shape, *self.durations.shape))
            begins = pick(lengths.reshape(*self.batch_shape, -1), state * length + left)
            column = jnp.take_along_axis(
                jnp.broadcast_to(transition, (*shape, *transition.shape[-2:])), state[..., None, None], -1
            )[..., 0]
            entered = log_filtered[..., 0] + column + begins[..., None]
            on = pick(_shifted(log_filtered).reshape(*self.batch_shape, -1), state * length + left)
            choice = jax.random.categorical(key, jnp.concatenate([entered, on[..., None]], -1), shape=shape)
            goes_on = choice == entered.shape[-1]
            before = jnp.where(goes_on, state, choice), jnp.where(goes_on, left + 1, 0)
            return before, before[0]

        flat = jax.random.categorical(keys[-1], filtered[-1].reshape(*self.batch_shape, -1), shape=shape)
        end = flat // length, flat % length
        _, path = self._scan(back, end, filtered[:-1], keys[:-1], reverse=True)
        path = jnp.moveaxis(jnp.concatenate([path, end[0][None]]), 0, -1)
        return jnp.where(_possible(normalisers).all(0)[..., None], path, -1)

    def _first(self) -> Array:
        """``(..., K, D)``: log-probabilities of the first state and the steps left."""
        return _log(self.initial[..., None] * self.remaining)

    def _forward(self, table: Array) -> tuple[Array, Array]:
        """Filtered log-probabilities of state and steps left ``(T, ..., K, D)``, and log-normalisers."""

        def normalise(joint):
            normaliser = _logsumexp(joint.reshape(*joint.shape[:-2], -1), -1)
            finite = jnp.where(jnp.isfinite(normaliser), normaliser, 0.0)
            return joint - finite[..., None, None], normaliser

        def step(before, inputs):
            transition, emission = inputs
            entered = _logsumexp(before[..., :, None, 0] + transition, -2)[..., None] + _log(self.durations)
            both = jnp.stack([entered, _shifted(before)])
            after, normaliser = normalise(_logsumexp(both, 0) + emission[..., None])
            return after, (after, normaliser)

        emissions = jnp.moveaxis(table, -2, 0)
        first, normaliser = normalise(self._first() + emissions[0][..., None])
        _, (rest, normalisers) = self._scan(step, first, emissions[1:])
        return jnp.concatenate([first[None], rest]), jnp.concatenate([normaliser[None], normalisers])


def _shifted(log_probs: Array) -> Array:
    """One step later within the visits: of d + 1 steps left, d are."""
    return jnp.concatenate([log_probs[..., 1:], jnp.full_like(log_probs[..., :1], -jnp.inf)], -1)
