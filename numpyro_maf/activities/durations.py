# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""How long activities last and what follows them: a semi-Markov chain, to forecast and to draw days."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.tree_util import register_dataclass

from numpyro_maf.activities.records import Record
from numpyro_maf.codec import storable
from numpyro_maf.pytrees import static
from numpyro_maf.semi_markov import HSMM

__all__ = ["Dynamics"]

LONGEST = 960  # minutes that a visit lasts at most
MOST_LENGTHS = 960  # lengths that are told apart
SMOOTHING = 0.3  # standard deviation of the kernel on log-lengths


@storable
@register_dataclass
@dataclass(frozen=True)
class Dynamics:
    """Lengths of visits and moves, counted in the labels.

    :param durations: ``(K, D)``, the chance that a visit lasts 1, …, D steps of the chain.
    :param moves: ``(K, K)``, the chance of the next activity; ``share``: ``(K,)``, of all visits.
    :param minutes: a step of the chain.
    """

    durations: Any
    moves: Any
    share: Any
    minutes: float = static(default=1.0)

    @classmethod
    def of(cls, data: Record, states: int) -> Dynamics:
        """Counted in a record; lengths have a kernel of 30% around each that was seen, and a weak prior."""
        step = max(data.step, LONGEST / MOST_LENGTHS)
        visits = _visits(data)
        lengths = np.arange(1, max(int(LONGEST / step), 2) + 1)
        logs = np.log(lengths)
        pooled = np.log(np.maximum([v[2] * data.step / step for v in visits], 1.0)) if visits else np.zeros(1)
        durations = np.empty((states, len(lengths)))
        moves, share = np.full((states, states), 0.0), np.zeros(states)
        for k in range(states):
            # A visit that a gap or an unknown slot cuts off lasted at least so long.
            mine = [
                (np.log(max(n * data.step / step, 1.0)), cut) for state, _, n, cut in visits if state == k
            ]
            density = 0.2 * _kernel(logs, pooled.mean(), max(pooled.std(), 1.0))
            for log_length, cut in mine:
                kernel = _kernel(logs, log_length, SMOOTHING)
                density = density + (0.3 if cut and len(mine) > 3 else 1.0) * kernel
            durations[k] = density / density.sum()
            share[k] = max(len(mine), 0.1)
        share = share / share.sum()
        for state, following, _, _ in visits:
            if following >= 0:
                moves[state, following] += 1
        others = share[None] * (1 - np.eye(states))
        others = others / np.maximum(others.sum(1, keepdims=True), 1e-12)
        moves = (moves + others) / (moves + others).sum(1, keepdims=True)
        f = np.float32
        return cls(durations.astype(f), moves.astype(f), share.astype(f), float(step))

    def moves_at(self, schedule: np.ndarray) -> np.ndarray:
        """``(T, K, K)``: the chance of the next activity by time, from log-probabilities ``(T, K)``.

        What follows is likelier at the hours at which it is likelier.
        """
        chance = np.exp(schedule)
        ratio = (chance + 1e-3) / (chance.mean(0) + 1e-3)
        by_time = np.asarray(self.moves)[None] * ratio[:, None, :]
        return (by_time / by_time.sum(-1, keepdims=True)).astype(np.float32)

    def ahead(self, probability: np.ndarray, schedule: np.ndarray, age: np.ndarray | None = None) -> HSMM:
        """The chain over the steps to come, of which nothing is observed.

        :param probability: ``(K,)``, of the activity at the first step; ``schedule``: ``(T, K)`` logs.
        :param age: ``(K,)``, how many steps each went on before; None for visits that begin.
        """
        durations = np.asarray(self.durations)
        remaining = np.zeros_like(durations)
        for k, past in enumerate(np.zeros(len(durations)) if age is None else age):
            left = durations[k, int(min(past, durations.shape[1] - 1)) :]
            remaining[k, : len(left)] = left / left.sum() if left.sum() > 0 else np.arange(len(left)) == 0
        table = np.zeros(schedule.shape, np.float32)
        moves = self.moves_at(schedule[1:]) if len(schedule) > 1 else self.moves
        return HSMM(
            probability / probability.sum(), moves, table, durations, np.zeros(len(table), bool),
            remaining=remaining,
        )  # fmt: skip


def _kernel(logs, centre, width):
    return np.exp(-0.5 * ((logs - centre) / width) ** 2 - logs)


def _visits(data: Record) -> list[tuple[int, int, int, bool]]:
    """Activity, the next one or -1, slots, and whether the visit was cut off, of each run of labels."""
    found = []
    for stretch in data.stretches:
        labels = _bridged(data.label[stretch], max(int(5 / data.step), 1))
        change = np.flatnonzero(np.r_[True, labels[1:] != labels[:-1]])
        runs = list(zip(change, [*change[1:], len(labels)]))
        for i, (a, b) in enumerate(runs):
            if labels[a] < 0:
                continue
            following, missing = -1, 0
            for c, d in runs[i + 1 :]:
                if labels[c] >= 0:
                    following = int(labels[c]) if missing * data.step <= 5 else -1
                    break
                missing += d - c
            cut = i == 0 or following < 0
            found.append((int(labels[a]), following if following != labels[a] else -1, int(b - a), cut))
    return found


def _bridged(labels: np.ndarray, most: int) -> np.ndarray:
    """Labels in which short unknown gaps inside a visit are filled."""
    labels = labels.copy()
    known = np.flatnonzero(labels >= 0)
    for a, b in zip(known[:-1], known[1:]):
        if 1 < b - a <= most + 1 and labels[a] == labels[b]:
            labels[a:b] = labels[a]
    return labels
