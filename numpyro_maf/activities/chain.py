# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

r"""The chain over activities, and how much it believes each expert.

.. math::

    p(z_t | z_{t-1}) = (1 - r_{z_{t-1}})\,[z_t = z_{t-1}] + r_{z_{t-1}}\, d_t(z_t), \quad
    d_t(z) \propto r_z\, s_t(z), \qquad
    \log\phi_t(z) = a \log p(x_t | z) + b\,(\log q_t(z) - \log s_t(z))

with the schedule s, the emission p and the recogniser q. What is drawn again soon is drawn the more
often, so that without evidence the probabilities are the schedule's. Neighbouring slots repeat each
other's evidence, so that a chain which multiplies them as if they were independent is certain, and wrong.
The rate of re-drawing r, the exponents a and b and the chance that an expert is mistaken are therefore
learned from days that the experts have not seen, by the log-probability that the smoothed posterior gives
to each slot's label: with a = 0, b = r = 1 the answer is the recogniser's, with b = 0 that of a tempered
hidden Markov model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import register_dataclass

from numpyro_maf.activities.experts import Tables
from numpyro_maf.codec import storable
from numpyro_maf.hmm import HMM

__all__ = ["RedrawChain", "calibrate", "calibrating", "smoothed"]

STRETCH = 256  # slots of a stretch that is calibrated on
MOST_STRETCHES = 256
# Where calibration starts: long memory of weak evidence, and each slot by itself.
STARTS = {
    "pace": (0.1, 0.9, 0.5),
    "generative": (0.05, 0.02, 0.3),
    "discriminative": (0.1, 0.9, 0.5),
    "doubt": (0.01, 0.01, 0.05),
}


@storable
@register_dataclass
@dataclass(frozen=True)
class RedrawChain:
    """What was learned of the chain.

    :param pace: ``(K,)``, r; ``generative``: a; ``discriminative``: b; ``doubt``: the chance that the
        recogniser is mistaken; ``surprise``: the chance that the readings say nothing of the activity.
    """

    pace: Any
    generative: Any
    discriminative: Any
    doubt: Any
    surprise: Any

    def potential(self, schedule, emission, recogniser):
        """``(..., T, K)`` logs each: what stands for the emission's log-density in the chain."""
        anybody = jax.nn.logsumexp(emission + schedule, -1, keepdims=True)
        surprise, doubt = (jnp.asarray(a)[..., None, None] for a in (self.surprise, self.doubt))
        emission = jnp.logaddexp(jnp.log1p(-surprise) + emission - anybody, jnp.log(surprise))
        recogniser = jnp.logaddexp(jnp.log1p(-doubt) + recogniser - schedule, jnp.log(doubt))
        a, b = (jnp.asarray(w)[..., None, None] for w in (self.generative, self.discriminative))
        return a * emission + b * recogniser

    def step(self, tables: Tables) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Chances, rates of re-drawing and potential of the only slot of tables, ``(K,)`` each."""
        chance = np.exp(tables.schedule[0] - np.logaddexp.reduce(tables.schedule[0]))
        table = np.asarray(_potential(self, tables.schedule, tables.emission, tables.recogniser))[0]
        return chance, np.asarray(self.pace), np.exp(table - table.max())

    def advance(self, before: np.ndarray, tables: Tables) -> np.ndarray:
        """``(K,)``: the filtered probabilities of the only slot of tables, given those of the slot before."""
        chance, pace, weight = self.step(tables)
        after = (1 - pace) * before + np.asarray(_drawn(chance, pace)) * (pace * before).sum()
        return after * weight / (after * weight).sum()

    def hmm(self, schedule, emission, recogniser, starts=None, observed=None, label=None) -> HMM:
        """The chain over the slots.

        :param starts: ``(T,)``, where nothing is known of the slot before.
        :param label: ``(T,)``, states that are known, -1 where not.
        """
        chance = jnp.exp(jax.nn.log_softmax(schedule, -1))
        pace = jnp.asarray(self.pace)[..., None, :, None]
        if starts is not None:
            pace = jnp.where(starts[1:, None, None], 1.0, pace)
        drawn = _drawn(chance[..., 1:, :], jnp.swapaxes(pace, -1, -2)[..., 0, :])
        transition = (1 - pace) * jnp.eye(chance.shape[-1]) + pace * drawn[..., None, :]
        table = self.potential(schedule, emission, recogniser)
        if label is not None:
            known = (label[:, None] < 0) | (label[:, None] == jnp.arange(chance.shape[-1]))
            table = jnp.where(known, table, -jnp.inf)
        return HMM(chance[..., 0, :], transition, table, observed)


_potential = jax.jit(RedrawChain.potential)


def _drawn(chance, pace):
    """What is drawn when an activity is drawn again, ``(..., K)``: the schedule times the rate."""
    drawn = chance * pace
    return drawn / drawn.sum(-1, keepdims=True)


# The chain re-draws from the schedule, whatever was before: so a step costs O(K), not O(K^2) ------------


def _weights(chain, schedule, emission, recogniser, starts, label=None):
    """What is drawn, rates of re-drawing, and potentials scaled to at most 1, ``(T, K)`` each."""
    chance = jnp.exp(jax.nn.log_softmax(schedule, -1))
    table = chain.potential(schedule, emission, recogniser)
    if label is not None:
        known = (label[:, None] < 0) | (label[:, None] == jnp.arange(chance.shape[-1]))
        table = jnp.where(known, table, -jnp.inf)
    pace = jnp.where(starts.at[0].set(True)[:, None], 1.0, chain.pace)
    return _drawn(chance, pace), pace, jnp.exp(table - table.max(-1, keepdims=True))


def _filtered(chance, pace, weight, before=None):
    """``(T, K)``: the probability of each activity given the slots so far."""
    before = jnp.full(chance.shape[-1], 1 / chance.shape[-1]) if before is None else before

    def step(before, now):
        chance, pace, weight = now
        after = ((1 - pace) * before + chance * (pace * before).sum()) * weight
        after = after / after.sum()
        return after, after

    return jax.lax.scan(step, before, (chance, pace, weight))[1]


def _probabilities(chain, schedule, emission, recogniser, starts, label=None):
    """``(T, K)``: the probability of each activity given all slots."""
    chance, pace, weight = _weights(chain, schedule, emission, recogniser, starts, label)

    def back(later, now):
        chance, pace, weight = now
        ahead = weight * later
        earlier = (1 - pace) * ahead + pace * (chance * ahead).sum()
        return earlier / earlier.max(), later

    last = jnp.ones(chance.shape[-1])
    later = jax.lax.scan(back, last, (chance, pace, weight), reverse=True)[1]
    joint = _filtered(chance, pace, weight) * later
    return joint / joint.sum(-1, keepdims=True)


def _path(chain, schedule, emission, recogniser, starts, label=None):
    """``(T,)``: the most probable path (Viterbi). To stay is likelier than to re-draw the same activity."""
    chance, pace, weight = jax.tree.map(
        jnp.log, _weights(chain, schedule, emission, recogniser, starts, label)
    )
    states = jnp.arange(chance.shape[-1])

    def step(best, now):
        chance, pace, weight = now
        stay = best + jnp.logaddexp(jnp.log(-jnp.expm1(jnp.minimum(pace, -1e-7))), pace + chance)
        source = (best + pace).argmax()
        move = (best + pace).max() + chance
        after = jnp.maximum(stay, move) + weight
        return after - after.max(), jnp.where(stay >= move, states, source)

    last, pointers = jax.lax.scan(step, jnp.zeros(len(states)), (chance, pace, weight))

    def back(state, pointer):
        return pointer[state], state

    return jax.lax.scan(back, last.argmax(), pointers, reverse=True)[1]


_ALL = {"probabilities": jax.jit(_probabilities), "path": jax.jit(_path)}
_ALL["filtered"] = jax.jit(lambda *a: _filtered(*_weights(*a)))


def smoothed(
    chain: RedrawChain, tables: Tables, starts, *, label=None, what: str = "probabilities"
) -> np.ndarray:
    """``(T, K)`` probabilities given all slots, those given the slots so far, or the best path ``(T,)``.

    :param label: ``(T,)``, what is known, -1 where nothing is.
    :param what: ``"probabilities"``, ``"filtered"`` or ``"path"``.
    """
    total = len(starts)
    label = np.full(total, -1) if label is None else np.asarray(label)
    room = -(-total // 4096) * 4096 if total > 256 else 256  # lengths about alike share one program

    def filled(a, filler):
        return np.concatenate([a, np.full((room - total, *a.shape[1:]), filler, a.dtype)])

    # What follows the end is a stretch of its own, that says nothing of those before.
    parts = [
        filled(np.asarray(a, np.float32), 0) for a in (tables.schedule, tables.emission, tables.recogniser)
    ]
    first = filled(np.asarray(starts, bool), True)
    return np.asarray(_ALL[what](chain, *parts, first, filled(label.astype(np.int32), -1)))[:total]


def calibrate(
    tables: Tables, activity, starts, *, start: RedrawChain | None = None, steps: int = 80
) -> tuple[RedrawChain, float]:
    """The chain that predicts the known labels best, and its mean log-loss.

    :param tables: by experts that have not seen the slots; ``activity``: ``(T,)``, -1 where unknown. Slots
        are those that :func:`calibrating` chooses; each STRETCH of them is a chain.
    :param start: one of the places to start from.
    """
    stacks, labels, first = _stretches(tables, activity, starts)
    params = _started(tables.schedule.shape[-1])
    if start is not None:
        params = jax.tree.map(lambda first, rest: jnp.concatenate([first, rest[1:]]), _params(start), params)
    fitted, losses = _fitted(params, stacks, labels, first, steps)
    losses = np.where(np.isfinite(losses), losses, np.inf)
    best = int(losses.argmin())
    return jax.tree.map(lambda a: a[best], _chain(fitted)), float(losses[best])


def _started(states: int) -> dict[str, Any]:
    chains = [
        RedrawChain(np.full(states, r), a, b, doubt, doubt)
        for r, a, b, doubt in zip(*(STARTS[n] for n in ("pace", "generative", "discriminative", "doubt")))
    ]
    return jax.tree.map(lambda *p: jnp.concatenate(p), *map(_params, chains))


def _params(chain: RedrawChain) -> dict[str, Any]:
    """Unbounded numbers behind one chain, with a leading axis."""

    def logit(p):
        p = np.clip(np.asarray(p, float), 1e-6, 1 - 1e-6)
        return np.log(p) - np.log1p(-p)

    def positive(a):
        return np.log(np.expm1(np.maximum(np.asarray(a, float), 1e-6)))

    numbers = {
        "pace": logit(chain.pace),
        "generative": positive(chain.generative),
        "discriminative": positive(chain.discriminative),
        "doubt": logit(2 * np.asarray(chain.doubt)),
        "surprise": logit(2 * np.asarray(chain.surprise)),
    }
    return {name: jnp.asarray(value, jnp.float32)[None] for name, value in numbers.items()}


def _chain(params) -> RedrawChain:
    sigmoid, positive = jax.nn.sigmoid, jax.nn.softplus
    return RedrawChain(
        sigmoid(params["pace"]), positive(params["generative"]), positive(params["discriminative"]),
        1e-6 + 0.5 * sigmoid(params["doubt"]), 1e-6 + 0.5 * sigmoid(params["surprise"]),
    )  # fmt: skip


def _judged(params, stacks, labels, first):
    """Mean log-loss of each of several chains, with weak priors."""

    def one(params):
        chain = _chain(params)

        def stretch(parts, label, start):
            schedule, emission, recogniser = parts
            p = _probabilities(chain, schedule, emission, recogniser, start)
            own = jnp.take_along_axis(p, jnp.maximum(label, 0)[:, None], -1)[:, 0]
            return jnp.where(label < 0, 0.0, jnp.log(jnp.maximum(own, 1e-9))).sum()

        total = jax.vmap(stretch)(stacks, labels, first).sum()
        count = (labels >= 0).sum()
        weak = 1e-3 * (params["pace"] - params["pace"].mean()) ** 2
        return -total / jnp.maximum(count, 1) + weak.mean()

    return jax.vmap(one)(params)


@partial(jax.jit, static_argnums=4)
def _fitted(params, stacks, labels, first, steps):
    optimizer = optax.adam(optax.cosine_decay_schedule(0.15, steps))

    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda p: _judged(p, stacks, labels, first).sum())(params)
        grads = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0.0), grads)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)
    return params, _judged(params, stacks, labels, first)


def calibrating(activity: np.ndarray) -> np.ndarray:
    """``(T,)``: which slots to calibrate on: stretches with labels; of very many, some spread out."""
    number = np.arange(len(activity)) // STRETCH
    chosen = np.unique(number[activity >= 0])
    if len(chosen) > MOST_STRETCHES:
        chosen = chosen[np.linspace(0, len(chosen) - 1, MOST_STRETCHES).round().astype(int)]
    return np.isin(number, chosen)


def _stretches(tables, activity, starts):
    """Tables, labels and starts of stretches of one length."""
    total = len(activity)
    count = -(-total // STRETCH)
    room = -(-count // 16) * 16  # so that records of about the same length share one program

    def cut(a, filler):
        rest = np.full((room * STRETCH - total, *a.shape[1:]), filler, a.dtype)
        return jnp.asarray(np.concatenate([a, rest]).reshape(room, STRETCH, *a.shape[1:]))

    flat = np.float32(-np.log(tables.schedule.shape[-1]))
    stacks = tuple(
        cut(a.astype(np.float32), f)
        for a, f in ((tables.schedule, flat), (tables.emission, np.float32(0)), (tables.recogniser, flat))
    )
    return stacks, cut(np.asarray(activity, np.int32), -1), cut(np.asarray(starts), False)
