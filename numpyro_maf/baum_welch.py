# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Expectation maximisation of a hidden Markov chain (Baum & Welch; Rabiner 1989, section III.C)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_maf.hmm import HMM
from numpyro_maf.inputs import as_labels

__all__ = ["fit_hmm"]


def fit_hmm(
    initial: ArrayLike,
    transition: ArrayLike,
    emission: ArrayLike | Callable[[Any], Any],
    *,
    path: ArrayLike | None = None,
    observed: ArrayLike | None = None,
    iterations: int = 50,
    tolerance: float = 1e-5,
    pseudo_count: float = 0.0,
) -> HMM:
    """The chain, and its emission, that make the observations likeliest near a start.

    Each iteration computes the probability of each state at each step given all observations, and then the
    initial and transition probabilities, and the emission, that are likeliest given those. The evidence never
    falls (with ``pseudo_count=0`` and an emission that maximises).

    :param initial: ``(K,)`` and ``transition``: ``(K, K)``, where to start.
    :param emission: a table ``(..., T, K)`` of log-densities; or a function that gives one, of the
        probabilities ``(..., T, K)`` of the states: it fits the emission to them. It is first called with
        None.
    :param path: ``(..., T)``, states that are known, -1 where not: semi-supervised learning.
    :param observed: ``(..., T)``, as for :class:`~numpyro_maf.HMM`.
    :param iterations: at most so many.
    :param tolerance: stop when an iteration raises the evidence of a step by less than this.
    :param pseudo_count: added to the expected count of each start and move.
    :return: the HMM of the last iteration; its ``log_prob()`` is the evidence.
    :raises ValueError: for an evidence that is not finite, with the iteration, and as HMM does.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    table = emission(None) if callable(emission) else emission
    last = -np.inf
    for iteration in range(iterations + 1):
        d = HMM(initial, transition, table, observed)
        if d.transition.ndim != 3 or d.transition.shape[0] != 1 or d.initial.ndim != 1:
            raise ValueError("fit_hmm learns one initial (K,) and one transition (K, K) for all sequences")
        known = None if path is None else as_labels("path", path, d.log_density.shape[-1], least=-1)
        evidence, starts, moves, states = _expected(d, known)
        total = float(evidence.sum())
        if not np.isfinite(total):
            raise ValueError(f"the evidence is {total} at iteration {iteration}: no path is possible")
        if iteration == iterations or total - last < tolerance * np.prod(d.log_density.shape[:-1]):
            return d
        last = total
        initial = _shares(starts + pseudo_count)
        transition = _shares(moves + pseudo_count, np.asarray(d.transition[0]))
        if callable(emission):
            table = emission(states)
    return d


@jax.jit
def _expected(d: HMM, path):
    """Evidence; its derivatives are expected starts ``(K,)``, moves ``(K, K)``, states ``(..., T, K)``."""

    def evidence(log_initial, log_transition, table):
        # Scaling a probability by e^c adds c for each time that it is used.
        initial, transition = d.initial * jnp.exp(log_initial), d.transition * jnp.exp(log_transition)
        return HMM(initial, transition, d.log_density + table, d.observed).log_prob(path)

    zeros = jnp.zeros_like(d.initial), jnp.zeros_like(d.transition), jnp.zeros_like(d._table())
    value, pull = jax.vjp(evidence, *zeros)
    starts, moves, states = pull(jnp.ones_like(value))
    return value, starts, moves[0], states


def _shares(counts, otherwise=None) -> np.ndarray:
    """Rows that sum to one; those without a count stay as they were."""
    counts = np.maximum(np.asarray(counts, float), 0.0)
    total = counts.sum(-1, keepdims=True)
    shares = counts / np.where(total > 0, total, 1.0)
    return shares if otherwise is None else np.where(total > 0, shares, otherwise)
