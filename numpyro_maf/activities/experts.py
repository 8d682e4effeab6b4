# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

r"""Three things that are learned of a home, in ensembles: schedule, emission, recogniser.

- *schedule*: :math:`s_t(z)`, the probability of each activity by time of day and weekend.
- *emission*: :math:`p(x_t | z)`, a masked autoregressive flow over columns of all kinds, continuous, binary,
  counts and names (MADE with mixtures of normals, Bernoulli and categorical conditionals). Readings that are
  missing are left out of the product over columns; training leaves out some at random, so that each
  conditional knows the columns that are there.
- *recogniser*: :math:`q_t(z)`, the probability of each activity given what the sensors did before and after,
  by a linear map and a small network.

Generative and discriminative models have different faults (Ng & Jordan 2002, *On discriminative vs.
generative classifiers*); :mod:`~numpyro_maf.activities.chain` weighs them by days that neither has seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.special import ndtri
from jax.tree_util import register_dataclass

from numpyro_maf.activities.features import Features, blocks
from numpyro_maf.activities.records import Record
from numpyro_maf.activities.sensors import MOST_COUNT, Sensor
from numpyro_maf.codec import storable
from numpyro_maf.flows import conditionals
from numpyro_maf.flows.builders import made
from numpyro_maf.nn.mlp import MLP
from numpyro_maf.pytrees import static
from numpyro_maf.rng import split
from numpyro_maf.train.loop import train

__all__ = ["TABLES", "Experts", "Tables", "learn_experts", "record_tables", "tables_of"]

CHUNK = 4096  # slots that are scored at a time
DROP_FUTURE, DROP_FEATURE = 0.25, 0.1
DROP_SENSORS = {0.0: 0.6, 0.2: 0.25, 0.7: 0.1, 1.0: 0.05}  # shares of sensors that are left out, how often


@storable
@register_dataclass
@dataclass(frozen=True)
class Experts:
    """An ensemble of M members; all weights have a leading member axis.

    :param schedule: ``(M, H, K)``; ``linear``: ``(M, I, K)``; ``network`` and ``emission``: stacked.
    :param owner: ``(F,)``, the sensor of each feature; ``ahead``: ``(F,)``, whether it looks ahead.
    """

    schedule: Any
    linear: Any
    network: Any
    emission: Any
    owner: Any
    ahead: Any
    states: int = static()
    hourly: bool = static(default=True)

    @classmethod
    def init(cls, key, sensors, features: Features, states: int, members: int, hourly: bool, hidden: int):
        """Random weights."""
        inputs = features.memory.shape[1] + len(sensors) + 1 + features.basis.shape[1]

        def member(key):
            first, second = split(key)
            network = MLP.init(first, inputs, (1, states), hidden=(hidden,))
            context = states + len(sensors) + (2 if hourly else 0)
            columns = tuple(_conditional(s) for s in sensors)
            return network, made(second, len(sensors), columns=columns, context=context, hidden=(hidden,))

        network, emission = jax.tree.map(lambda *a: jnp.stack(a), *(member(k) for k in split(key, members)))
        schedule = jnp.zeros((members, features.basis.shape[1], states))
        linear = jnp.zeros((members, inputs, states))
        return cls(schedule, linear, network, emission, features.owner, features.ahead, states, hourly)

    @property
    def weights(self):
        return self.schedule, self.linear, self.network, self.emission.weights

    def with_weights(self, weights) -> Experts:
        schedule, linear, network, emission = weights
        emission = self.emission.with_weights(emission)
        return replace(self, schedule=schedule, linear=linear, network=network, emission=emission)

    def group(self, members: slice) -> Experts:
        """Some of the members."""
        parts = self.schedule, self.linear, self.network, self.emission
        schedule, linear, network, emission = jax.tree.map(lambda a: a[members], parts)
        return replace(self, schedule=schedule, linear=linear, network=network, emission=emission)

    def trace(self, sensors: int) -> None:
        """Trace the tables of a row of so many sensors; weights of the wrong shapes raise."""
        widths = sensors, sensors, len(self.owner), sensors, self.schedule.shape[1]
        now, known, memory, there, basis = (jax.ShapeDtypeStruct((1, w), jnp.float32) for w in widths)
        future = jax.ShapeDtypeStruct((1,), jnp.float32)
        jax.eval_shape(_scored, self, now, known, memory, there, future, basis)

    # What each says of rows -------------------------------------------------------------------

    def scheduled(self, basis):
        """``(B, H) -> (M, B, K)``: log-probabilities by time."""
        return jax.nn.log_softmax(jnp.einsum("mhk,bh->mbk", self.schedule, basis))

    def recognised(self, memory, there, future, basis):
        """Log-probabilities by what the sensors did, ``(M, B, K)``.

        :param there: ``(B, S)`` and ``future``: ``(B,)``: 1 where known, 0 where missing.
        """
        shared = jnp.concatenate([there, there.max(-1, keepdims=True)], -1)
        keep = shared[:, self.owner] * jnp.where(self.ahead, future[:, None], 1.0)
        inputs = jnp.concatenate([memory * keep, 1 - there, 1 - future[:, None], basis], -1)
        logits = jnp.einsum("bi,mik->mbk", inputs, self.linear)
        logits = logits + jax.vmap(lambda net: net(None, inputs)[..., 0, :])(self.network)
        return jax.nn.log_softmax(logits)

    def emitted(self, now, known, activity, basis):
        """``(M, B)``: log-density of the known readings given an activity of each row.

        :param activity: ``(B,)`` or ``(M, B)``.
        """
        activity = jnp.broadcast_to(activity, (len(self.schedule), len(now)))

        def member(flow, activity):
            d = flow(self.context(activity, known, basis))
            return d.member_log_probs(now * known, known)[0]

        return jax.vmap(member)(self.emission, activity)

    def context(self, activity, known, basis):
        """``(B, C)``, what the emission is given: activity, missing readings and, if ``hourly``, the hour."""
        hour = basis[:, jnp.array([1, 1 + (basis.shape[1] - 2) // 2])] if self.hourly else basis[:, :0]
        return jnp.concatenate([jax.nn.one_hot(activity, self.states), 1 - known, hour], -1)


@dataclass(frozen=True)
class Tables:
    """What experts say of T slots and K activities.

    :param schedule: ``(T, K)`` log-probabilities; ``emission``: ``(T, K)`` log-densities; ``recogniser``:
        ``(T, K)`` log-probabilities.
    """

    schedule: np.ndarray
    emission: np.ndarray
    recogniser: np.ndarray


TABLES = ("schedule", "emission", "recogniser")


@jax.jit
def _scored(experts: Experts, now, known, memory, there, future, basis):
    count = len(experts.schedule)
    of_all = jax.vmap(lambda k: experts.emitted(now, known, k, basis), out_axes=-1)(
        jnp.arange(experts.states)
    )
    schedule = jax.nn.logsumexp(experts.scheduled(basis), 0) - jnp.log(count)
    recogniser = jax.nn.log_softmax(experts.recognised(memory, there, future, basis).mean(0))
    # Without any reading the recogniser knows what the schedule knows, and nothing that could add up.
    recogniser = jnp.where(there.max(-1, keepdims=True) > 0, recogniser, schedule)
    return schedule, jax.nn.logsumexp(of_all, 0) - jnp.log(count), recogniser


def tables_of(experts: Experts, features: Features, *, future: bool = True, known=None, there=None) -> Tables:
    """The experts' tables of all slots, in chunks of one shape.

    :param future: whether features that look ahead count.
    :param known: ``(T, S)`` and ``there``: instead of the features' own.
    """
    known = features.known if known is None else known
    there = features.there if there is None else there
    if not future:
        known = known & ~features.now_ahead
    total = len(features.now)
    results = []
    size = CHUNK if total > 64 else 64
    for start in range(0, total, size):
        rows = slice(start, start + size)
        parts = features.now[rows], known[rows], features.memory[rows], there[rows], features.basis[rows]
        now, known_, memory, there_, basis = (_padded(np.asarray(a, np.float32), size) for a in parts)
        ahead = np.full(size, float(future), np.float32)
        got = _scored(experts, now, known_, memory, there_, ahead, basis)
        results.append([np.asarray(a)[: min(size, total - start)] for a in got])
    return Tables(*(np.concatenate(a) for a in zip(*results)))


def record_tables(
    experts: Sequence[Experts],
    record: Record,
    sensors: Sequence[Sensor],
    *,
    future: bool = True,
    rows: np.ndarray | None = None,
) -> list[Tables]:
    """Of each of several ensembles, the tables of a record of any length, or those of the slots of a mask."""
    chosen = np.ones(len(record), bool) if rows is None else rows
    of_blocks = (f.rows(chosen[where]) for where, f in blocks(record, sensors) if chosen[where].any())
    parts = [[tables_of(e, f, future=future) for e in experts] for f in of_blocks]
    return [
        Tables(*(np.concatenate([getattr(t, n) for t in of_one]) for n in TABLES)) for of_one in zip(*parts)
    ]


def _padded(a, size):
    return a if len(a) == size else np.concatenate([a, np.zeros((size - len(a), *a.shape[1:]), a.dtype)])


def _conditional(sensor: Sensor) -> conditionals.Conditional:
    """What the emission makes of a column."""
    if sensor.kind == "binary":
        return conditionals.Bernoulli()
    if sensor.kind == "count":
        return conditionals.Categorical(MOST_COUNT + 1)
    if sensor.kind == "categorical":
        return conditionals.Categorical(max(sensor.states, 2))
    return conditionals.Mixture(3)


# Learning -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """What is minimised: minus the log-probabilities that all three give to a row, with readings left out.

    :param continuous: which columns of the emission are continuous; noise on them regularises the density
        (Rothfuss et al. 2019, arXiv:1907.08982). ``ahead``: which of them look ahead.
    """

    continuous: tuple[bool, ...]
    ahead: tuple[bool, ...]
    noise: float

    def __call__(self, weights, fixed, key, now, known, memory, there, basis, activity, seen, balance):
        experts, ridge, shrink = fixed
        experts = experts.with_weights(weights)
        rows, sensors = now.shape
        widths = np.cumsum([1, 1, sensors, memory.shape[1]])
        uniform = jax.random.uniform(key, (rows, widths[-1] + sensors))  # all at once: so it compiles sooner
        which, ahead, each, feature, place = jnp.split(uniform, widths, -1)
        rates, chances = np.array([*DROP_SENSORS]), np.cumsum([*DROP_SENSORS.values()])[:-1]
        keep = each >= jnp.array(rates)[(which >= chances).sum(-1, keepdims=True)]
        future = 1.0 * (ahead[:, 0] >= DROP_FUTURE)
        memory = memory * (feature >= DROP_FEATURE)
        normal = ndtri(place.clip(1e-6, 1 - 1e-6))
        noisy = now + self.noise * normal * jnp.array(self.continuous)
        activity, seen = activity.T, seen.T

        def of(log_probs):
            return jnp.take_along_axis(log_probs, activity[..., None], -1)[..., 0]

        known = known * keep * jnp.where(jnp.array(self.ahead), future[:, None], 1.0)
        emitted = experts.emitted(noisy, known, activity, basis) * balance
        recognised = of(experts.recognised(memory, there * keep, future, basis))
        scheduled = of(experts.scheduled(basis))
        penalty = ridge * (jnp.sum(experts.linear**2) + sum(jnp.sum(w**2) for w in experts.network.weights))
        penalty = penalty + shrink * jnp.sum(experts.schedule[:, 1:] ** 2)
        return -((emitted + recognised + scheduled) * seen).sum(0) + penalty


def learn_experts(
    key, start: Experts, sensors, features: Features, activity, seen, *, steps, noise, ridge, progress
) -> Experts:
    """Train all members at once.

    :param activity: ``(T, M)`` labels, one for each member; ``seen``: ``(T, M)``, weights of its rows. Rows
        without any weight are replaced by others, so that more labels need no other program.
    """
    rows = np.resize(np.flatnonzero(seen.any(1)), len(seen))
    shares = np.bincount(activity[rows].ravel(), seen[rows].ravel(), minlength=start.states)
    shares = shares / shares.sum()
    balance = np.minimum(np.sqrt(1 / (start.states * np.maximum(shares, 1e-6))), 10.0)[activity[rows, 0]]
    data = [
        *(np.asarray(a[rows], np.float32) for a in (features.now, features.known, features.memory)),
        *(np.asarray(a[rows], np.float32) for a in (features.there, features.basis)),
        activity[rows].astype(np.int32), seen[rows].astype(np.float32), balance.astype(np.float32),
    ]  # fmt: skip
    batch = min(512, len(rows))
    epochs = max(int(np.ceil(steps * batch / len(rows))), 1)
    effective = max(float(seen.sum(0).mean()), 1.0)
    optimizer = optax.chain(
        optax.clip_by_global_norm(10.0),
        optax.adam(optax.cosine_decay_schedule(1e-2, epochs * -(-len(rows) // batch))),
    )
    fixed = start, 0.5 * ridge / effective, 0.5 / effective
    continuous = tuple(not s.is_event for s in sensors)
    trained = train(
        key, Loss(continuous, tuple(features.now_ahead.tolist()), noise), start.weights, data, fixed,
        weights=np.ones(len(rows)), held_out=np.zeros(len(rows), bool), batch_size=batch,
        max_epochs=epochs, patience=epochs, optimizer=optimizer, progress=progress,
    )  # fmt: skip
    return start.with_weights(trained.params)
