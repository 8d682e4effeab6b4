# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

r"""A hidden Markov chain over a table of emission log-densities.

The table, ``log_density[t, k]`` = log p(observation at step t | state k), comes from any emission
distribution, a flow for instance, in one parallel pass over all steps. Everything here is exact
(Rabiner 1989, *A tutorial on hidden Markov models*, sections III.A-C), in log space, normalised at every
step, with the normalisers added pairwise: thousands of float32 steps keep their precision. Each method is
compiled once for each shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array, lax
from jax.typing import ArrayLike
from numpyro.distributions import constraints
from numpyro.distributions.util import validate_sample

from numpyro_maf.inputs import as_labels, as_numbers
from numpyro_maf.pytrees import Described
from numpyro_maf.rng import as_key, as_shape

__all__ = ["HMM"]


class HMM(Described, dist.Distribution):
    r"""The joint density of a path of hidden states and the observations behind a table.

    A value is a path, ``(T,)`` integers in ``0, …, K-1``, where -1 says unknown:

    - ``log_prob(path)`` is log p(the known states, observations), the unknown ones summed out. So labels
      for all, some or none of the steps train the same model:
      ``numpyro.sample("activity", HMM(...), obs=labels)``.
    - ``log_prob()`` is the evidence, log p(observations), for ``numpyro.factor``.
    - ``log_prob(path) - log_prob()`` is the posterior of the path: a conditional random field's objective.
    - :meth:`sample` draws paths from the posterior; :attr:`mode` is the most probable one (Viterbi);
      :attr:`marginals` are the smoothing probabilities of each step.

    All but samples and ``mode`` are differentiable. Leading axes are batch axes, for plates of homes or days.

    Where no path is possible, or a number is NaN under ``jit``, the evidence is -inf or NaN, ``mode`` and
    samples are -1 at every step, and probabilities are NaN.

    :param initial: ``(..., K)``, probabilities of the first state.
    :param transition: ``(K, K)``, or ``(..., S, K, K)`` with S = T - 1 for one matrix a step or 1 for the
        same at all steps; rows are probabilities of the next state.
    :param log_density: ``(..., T, K)``; -inf says impossible.
    :param observed: ``(..., T)`` booleans; False says that the step's observation is missing and its row of
        the table does not count.
    :param missing: whether a row of the table that holds a NaN, or says that no state is possible, counts as
        missing: NumPyro's log-densities of NaN are -inf.
    :raises ValueError: for shapes that do not agree, for an observed step with NaN in its row or without a
        possible state, which the message names, and, when validation is on, for probabilities that are none.
    """

    arg_constraints = {
        "initial": constraints.simplex,
        "transition": constraints.independent(constraints.simplex, 1),
        "log_density": constraints.dependent(is_discrete=False, event_dim=2),
        "observed": constraints.dependent(is_discrete=True, event_dim=1),
    }

    def __init__(
        self,
        initial: ArrayLike,
        transition: ArrayLike,
        log_density: ArrayLike,
        observed: ArrayLike | None = None,
        *,
        missing: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        initial = jnp.asarray(as_numbers("initial", initial))
        matrices = as_numbers("transition", transition)
        shape = np.shape(matrices)
        transition = jnp.asarray(matrices[None] if len(shape) == 2 else matrices)
        log_density = jnp.asarray(as_numbers("log_density", log_density, missing=True))
        steps_states = jnp.shape(log_density)[-2:]
        if len(steps_states) != 2 or steps_states[0] < 1:
            raise ValueError(f"log_density must be (..., T, K) with T >= 1, got {jnp.shape(log_density)}")
        steps, states = steps_states
        if jnp.shape(initial)[-1:] != (states,):
            raise ValueError(f"initial must be (..., {states}), got {jnp.shape(initial)}")
        if jnp.shape(transition)[-2:] != (states, states):
            raise ValueError(f"transition must end in ({states}, {states}), got {shape}")
        if transition.shape[-3] == 0 == steps - 1:  # no step at all: any matrix will do
            lead = transition.shape[:-3]
            transition = jnp.broadcast_to(jnp.eye(states), (*lead, 1, states, states))
        if transition.shape[-3] not in (1, steps - 1):
            raise ValueError(
                f"transition must be ({states}, {states}) or (..., S, {states}, {states}) with "
                f"S = {steps - 1} or 1, got {shape}"
            )
        observed = jnp.asarray(
            np.ones(steps, bool) if observed is None else _booleans("observed", observed), bool
        )
        if jnp.shape(observed)[-1:] != (steps,):
            raise ValueError(f"observed must be (..., {steps}), got {jnp.shape(observed)}")
        if missing:
            observed = observed & (log_density.max(-1) > -jnp.inf)
        _check_table(log_density, observed)
        self.initial, self.transition = initial, transition
        self.log_density, self.observed = log_density, observed
        batch_shape = jnp.broadcast_shapes(
            jnp.shape(initial)[:-1],
            transition.shape[:-3],
            jnp.shape(log_density)[:-2],
            jnp.shape(observed)[:-1],
        )
        super().__init__(batch_shape, (steps,), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.integer_interval(-1, self._states - 1), 1)

    @property
    def _states(self) -> int:
        return self.initial.shape[-1]

    def _describe(self) -> list[str]:
        known = (
            "" if isinstance(self.observed, jax.core.Tracer) else f", {np.mean(self.observed):.0%} observed"
        )
        matrices = "one transition matrix" if self.transition.shape[-3] == 1 else "a transition matrix a step"
        first = f"HMM of {self._states} states over {self.event_shape[0]} steps{known}"
        return [first, f"  batch shape {self.batch_shape}, {matrices}"]

    def log_prob(self, value: ArrayLike | None = None, intermediates: Any = None) -> Array:
        """``(..., T) -> (...)``: see the class. Without a value, the evidence."""
        if value is None:
            return self._evidence()
        value = as_numbers("path", value)
        if not isinstance(value, jax.core.Tracer) and np.isnan(np.asarray(value)).any():
            raise ValueError("path holds NaN; -1 says that a state is not known")
        return self._known(value)

    @validate_sample
    def _known(self, value: ArrayLike) -> Array:
        if jnp.shape(value)[-1:] != self.event_shape:
            raise ValueError(f"a path must be (..., {self.event_shape[0]}), got {jnp.shape(value)}")
        return self._evidence(jnp.asarray(value))

    @property
    @jax.jit
    def marginals(self) -> Array:
        """``(..., T, K)``: the probability of each state at each step, given all observations.

        They are the derivative of the evidence by the table.
        """
        table = self._table()
        evidence, pull = jax.vjp(self._summed, table)
        return jnp.where(_possible(evidence)[..., None, None], pull(jnp.ones_like(evidence))[0], jnp.nan)

    @property
    @jax.jit
    def filtered(self) -> Array:
        """``(..., T, K)``: the probability of each state at each step, given observations so far."""
        filtered, normalisers = self._forward(self._table())
        so_far = jnp.cumsum(~_possible(normalisers), 0) == 0
        return jnp.moveaxis(jnp.where(so_far[..., None], jnp.exp(filtered), jnp.nan), 0, -2)

    @property
    @jax.jit
    def mode(self) -> Array:
        """``(..., T)``: the most probable path (Viterbi)."""

        def step(best, inputs):
            transition, emission = inputs
            scores = best[..., :, None] + transition
            return scores.max(-2) + emission, scores.argmax(-2)

        emissions = jnp.moveaxis(self._table(), -2, 0)
        first = _log(self.initial) + emissions[0]
        last, pointers = self._scan(step, first, emissions[1:])

        def back(state, pointer):
            state = jnp.take_along_axis(pointer, state[..., None], -1)[..., 0]
            return state, state

        end = last.argmax(-1)
        _, path = lax.scan(back, end, pointers, reverse=True)
        path = jnp.moveaxis(jnp.concatenate([path, end[None]]), 0, -1)
        return jnp.where(_possible(last.max(-1))[..., None], path, -1)

    def sample(self, key: ArrayLike, sample_shape: int | Sequence[int] = ()) -> Array:
        """Paths from the posterior, by filtering forwards and sampling backwards."""
        return self._paths(as_key(key), (*as_shape(sample_shape), *self.batch_shape))

    @partial(jax.jit, static_argnums=2)
    def _paths(self, key: Array, shape: tuple[int, ...]) -> Array:
        filtered, normalisers = self._forward(self._table())
        keys = jax.random.split(key, len(filtered))

        def back(state, inputs):
            transition, log_filtered, key = inputs
            column = jnp.take_along_axis(
                jnp.broadcast_to(transition, (*shape, *transition.shape[-2:])),
                state[..., None, None],
                -1,
            )[..., 0]
            state = jax.random.categorical(key, log_filtered + column, shape=shape)
            return state, state

        end = jax.random.categorical(keys[-1], filtered[-1], shape=shape)
        _, path = self._scan(back, end, filtered[:-1], keys[:-1], reverse=True)
        path = jnp.moveaxis(jnp.concatenate([path, end[None]]), 0, -1)
        return jnp.where(_possible(normalisers).all(0)[..., None], path, -1)

    def _table(self) -> Array:
        """``(..., T, K)``: emission log-densities, 0 where the observation is missing."""
        table = jnp.where(self.observed[..., None], self.log_density, 0.0)
        return jnp.broadcast_to(table, (*self.batch_shape, *self.event_shape, self._states))

    # Recursions; time leads in what they scan over -----------------------------------------

    def _scan(self, step: Callable[..., Any], init: Any, *xs: Array, reverse: bool = False) -> Any:
        """Scan with the log transition matrix of each step before the other inputs."""
        transition = jnp.moveaxis(_log(self.transition), -3, 0)
        if transition.shape[0] == 1:
            fixed = transition[0]
            return lax.scan(lambda c, x: step(c, (fixed, *x)), init, xs, reverse=reverse)
        return lax.scan(step, init, (transition, *xs), reverse=reverse)

    def _forward(self, table: Array) -> tuple[Array, Array]:
        """Filtered log-probabilities ``(T, ..., K)`` and log-normalisers ``(T, ...)``."""

        def normalise(joint):
            normaliser = _logsumexp(joint, -1)
            return joint - jnp.where(jnp.isfinite(normaliser), normaliser, 0.0)[..., None], normaliser

        def step(before, inputs):
            transition, emission = inputs
            predicted = _logsumexp(before[..., :, None] + transition, -2)
            after, normaliser = normalise(predicted + emission)
            return after, (after, normaliser)

        emissions = jnp.moveaxis(table, -2, 0)
        first, normaliser = normalise(_log(self.initial) + emissions[0])
        _, (rest, normalisers) = self._scan(step, first, emissions[1:])
        filtered = jnp.concatenate([first[None], rest])
        return filtered, jnp.concatenate([normaliser[None], normalisers])

    def _summed(self, table: Array) -> Array:
        return _pairwise_sum(self._forward(table)[1])

    @jax.jit
    def _evidence(self, path: Array | None = None) -> Array:
        """log p(the known states of a path, observations)."""
        table = self._table()
        if path is not None:
            known = (path < 0)[..., None] | (path[..., None] == jnp.arange(self._states))
            table = jnp.where(known, table, -jnp.inf)
        return self._summed(table)


def _booleans(name: str, value: ArrayLike) -> Any:
    """Booleans, or 0 and 1; of tracers the numbers cannot be looked at."""
    value = as_numbers(name, value)
    return value if isinstance(value, jax.core.Tracer) else as_labels(name, value, 2)


def _check_table(log_density: Array, observed: Array) -> None:
    """Refuse what is no observation of any state; of tracers the numbers cannot be looked at."""
    if isinstance(log_density, jax.core.Tracer) or isinstance(observed, jax.core.Tracer):
        return
    table = np.asarray(log_density)
    wrong = ~(table.max(-1) > -np.inf) | (table == np.inf).any(-1)  # the maximum with a NaN is NaN
    wrong = wrong & np.asarray(observed)
    if wrong.any():
        step = int(np.argwhere(wrong)[0][-1])
        raise ValueError(
            f"log_density is NaN or allows no state at step {step} ({int(wrong.sum())} steps in all); mark "
            "steps without an observation by observed=, or pass missing=True to take such rows as missing"
        )


def _possible(evidence: Array) -> Array:
    """Whether a log-probability is that of something."""
    return evidence > -jnp.inf  # False for NaN


def _log(p: Array) -> Array:
    """Log of probabilities; -inf at 0, with gradient 0 instead of NaN."""
    return jnp.where(p > 0, jnp.log(jnp.where(p > 0, p, 1.0)), -jnp.inf)


def _logsumexp(a: Array, axis: int) -> Array:
    """As in JAX, with gradient 0 instead of NaN where all is -inf."""
    possible = jnp.any((a > -jnp.inf) | jnp.isnan(a), axis, keepdims=True)
    return jnp.where(
        jnp.squeeze(possible, axis),
        jax.nn.logsumexp(jnp.where(possible, a, 0.0), axis=axis),
        -jnp.inf,
    )


def _pairwise_sum(a: Array) -> Array:
    """Sum over the first axis by halves: rounding grows with log T, not T."""
    while len(a) > 1:
        half = (len(a) + 1) // 2
        rest = a[half:]
        a = a[:half].at[: len(rest)].add(rest)
    return a[0]
