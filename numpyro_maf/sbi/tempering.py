# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

r"""Posterior draws of a model with learned likelihoods, by sequential Monte Carlo from the prior.

Particles go from prior to posterior through :math:`p(\theta) p(x \mid \theta)^\beta`, beta rising as far as
half of them stay effective (Del Moral, Doucet & Jasra 2006). After each resampling they move by differential
evolution (ter Braak & Vrugt 2008): along differences of other particles, which carry from mode to mode.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import logsumexp
from jax.typing import ArrayLike
from tqdm.auto import tqdm

from numpyro_maf.codec import storable
from numpyro_maf.inference.sites import Sites
from numpyro_maf.rng import as_key, as_shape, some_rows, split
from numpyro_maf.sbi.densities import Densities, checked_observation, prior_draws
from numpyro_maf.sbi.handlers import check_supported
from numpyro_maf.sbi.posterior import Posterior, Setting, from_vectors, not_stored, to_vectors

__all__ = ["ParticlePosterior", "run_smc", "smc"]

_FAR = 15.0  # nats


@storable
@dataclass(frozen=True, eq=False, repr=False)
class ParticlePosterior(Posterior):
    """A posterior known by its unnormalised density and by draws; made by :func:`smc`.

    :param sites: the latent sites; ``setting``: the model; ``likelihoods``: the learned ones, by site.
    :param observation: by site.
    :param particles: ``(N, D)``, equally probable.
    :param log_evidence: of the observation, an estimate; ``log_evidence_error``: its standard error, of
        particles that move well.
    :param beyond: how many nats the prior density of the median particle is less than that of the prior's
        farthest draw; 0 if it is not.
    """

    sites: Sites
    likelihoods: dict[str, Any]
    observation: dict[str, Any]
    particles: Any
    log_evidence: float
    log_evidence_error: float = math.nan
    beyond: float = field(default=0.0, metadata={"added": True})
    setting: Setting = not_stored()

    def sample(self, key: ArrayLike, sample_shape: int | Sequence[int] = ()) -> dict[str, Any]:
        """Draws by site: particles, each once as long as there are enough, and then again."""
        sample_shape, n = as_shape(sample_shape), len(self.particles)
        rows = np.asarray(self.particles)[some_rows(as_key(key), n, math.prod(sample_shape))]
        return from_vectors(self.sites, rows.reshape(*sample_shape, rows.shape[-1]))

    def of_vectors(self, vector):
        parts = self.sites, self.likelihoods, self.observation
        flat = vector.reshape(-1, vector.shape[-1])
        prior, likelihood = _score(Densities(self.setting), parts, flat)
        return (prior + likelihood).reshape(vector.shape[:-1]) - self.log_evidence

    @property
    def is_lost(self) -> bool:
        """Whether particles are where the prior draws nothing."""
        return self.beyond > _FAR

    @property
    def lost(self) -> str:
        """A sentence about that."""
        return (
            f"the particles are where the prior draws nothing, {self.beyond:.0f} nats beyond its farthest "
            "draw: prior and data disagree, a density is wrong for such numbers, by rounding, say, or a "
            "learned one is an extrapolation"
        )

    def _describe(self):
        evidence = f"log evidence {self.log_evidence:.3f} (standard error {self.log_evidence_error:.3f})"
        figures = f"{len(self.particles):,} particles, {evidence}"
        return [f"ParticlePosterior {self._about()}", figures]


def smc(
    key: ArrayLike,
    model: Callable[..., Any],
    observation: dict[str, Any],
    likelihoods: dict[str, Any] | None = None,
    *,
    model_args: tuple[Any, ...] = (),
    model_kwargs: dict[str, Any] | None = None,
    num_particles: int = 10_000,
    moves: int = 10,
    last_moves: int = 50,
    progress: bool = True,
) -> ParticlePosterior:
    """The posterior of a model whose densities are known or learned, many modes included.

    :param key: a ``jax.random`` key, or an integer.
    :param model: every observed site needs a density, or a learned one.
    :param observation: values by site.
    :param likelihoods: by site, as for :func:`~numpyro_maf.learned`.
    :param num_particles: number of particles, N.
    :param moves: of each particle at each temperature, and ``last_moves`` at the last.

    A warning says where the particles end far from all draws of the prior.
    """
    setting = Setting(model, tuple(model_args), dict(model_kwargs or {}))
    observation = checked_observation(setting, observation)
    posterior = run_smc(
        as_key(key), setting, observation, dict(likelihoods or {}), num_particles=num_particles, moves=moves,
        last_moves=last_moves, progress=progress,
    )  # fmt: skip
    if posterior.is_lost:
        warnings.warn(posterior.lost, stacklevel=2)
    return posterior


def run_smc(
    key, setting: Setting, observation, likelihoods: dict[str, Any], *, num_particles: int = 10_000,
    moves: int = 10, last_moves: int = 50, progress: bool = True,
) -> ParticlePosterior:  # fmt: skip
    """As :func:`smc`; what is compiled for a setting serves it again."""
    sites = Sites.of(setting.conditioned(observation), None, setting.args, setting.kwargs)
    for name in likelihoods.keys() & observation.keys():
        check_supported(name, likelihoods[name], observation[name])
    prior_key, key = split(key)
    drawn = prior_draws(setting, observation, prior_key, num_particles)
    parts = sites, likelihoods, {name: jnp.asarray(value) for name, value in observation.items()}
    densities, start = Densities(setting), to_vectors(sites, drawn)[0]
    particles, log_evidence, error = temper(
        key, densities, parts, start, moves=moves, last_moves=last_moves, progress=progress
    )
    first, last = (np.asarray(_score(densities, parts, rows)[0], float) for rows in (start, particles))
    beyond = max(float(np.min(first, where=np.isfinite(first), initial=np.inf) - np.median(last)), 0.0)
    return ParticlePosterior(sites, likelihoods, parts[2], particles, log_evidence, error, beyond, setting)


def temper(key: ArrayLike, densities, parts, particles, *, moves=10, last_moves=50, progress=True):
    """Particles of the prior to particles of the posterior, the log evidence, and its standard error.

    The error is that of the weights at each temperature, whose relative variances add up.
    """
    scores = _score(densities, parts, particles)
    beta, log_evidence, variance = 0.0, 0.0, 0.0
    with tqdm(total=1.0, disable=not progress, desc="smc", bar_format="{desc}: {percentage:.0f}%") as bar:
        while beta < 1:
            key, resample_key, move_key = jax.random.split(key, 3)
            new, gain, lost, particles, scores = _advance(resample_key, beta, particles, scores)
            log_evidence, rise, beta = log_evidence + float(gain), float(new) - beta, float(new)
            variance += float(lost)
            count = moves if beta < 1 else last_moves
            particles, scores = _move(densities, count, parts, move_key, beta, particles, scores)
            bar.update(rise)
    return particles, log_evidence, math.sqrt(variance)


@partial(jax.jit, static_argnums=0)
def _score(densities, parts, particles):
    prior, likelihood = jax.vmap(partial(densities, parts))(particles)
    return jnp.nan_to_num(prior, nan=-jnp.inf), jnp.nan_to_num(likelihood, nan=-jnp.inf)


@jax.jit
def _advance(key, beta, particles, scores):
    """The next beta; the rise of the log evidence and its variance; particles resampled for it."""
    likelihood = jnp.maximum(scores[1], -1e30)

    def effective(step):
        w = step * likelihood
        return jnp.exp(2 * logsumexp(w) - logsumexp(2 * w)) / len(w)

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        enough = effective(middle) > 0.5
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, _ = lax.fori_loop(0, 60, halve, (0.0, 1.0 - beta))
    step = jnp.where(effective(1.0 - beta) > 0.5, 1.0 - beta, jnp.maximum(low, 1e-7))
    weights = step * likelihood
    gain = logsumexp(weights) - jnp.log(len(weights))
    lost = (1 / effective(step) - 1) / len(weights)
    shares = jnp.cumsum(jax.nn.softmax(weights))
    points = (jnp.arange(len(weights)) + jax.random.uniform(key)) / len(weights)
    rows = jnp.clip(jnp.searchsorted(shares, points * shares[-1]), 0, len(weights) - 1)
    new = jnp.where(step >= 1.0 - beta, 1.0, beta + step)
    return new, gain, lost, particles[rows], jax.tree.map(lambda s: s[rows], scores)


@partial(jax.jit, static_argnums=0)
def _move(densities, count, parts, key, beta, particles, scores):
    """Metropolis steps along differences of particles of the other half, which waits meanwhile."""
    half, width = len(particles) // 2, particles.shape[1]

    def step(i, state):
        turn = i % 2
        particles, prior, likelihood = jax.tree.map(lambda a: jnp.roll(a, half * turn, 0), state)
        pair_key, scale_key, noise_key, jump_key, accept_key = jax.random.split(jax.random.fold_in(key, i), 5)
        mine, others = particles[:half], particles[half:]
        first, second = jax.random.randint(pair_key, (2, half), 0, len(others))
        # Mostly the scale that suits a Gaussian; now and then the whole difference, from mode to mode.
        size = 2.38 / np.sqrt(2 * width) * jnp.exp(0.5 * jax.random.normal(scale_key, (half, 1)))
        size = jnp.where(jax.random.uniform(jump_key, (half, 1)) < 0.15, 1.0, size)
        spread = 0.02 * others.std(0)
        noise = spread * jax.random.normal(noise_key, mine.shape)
        proposed = mine + size * (others[first] - others[second]) + noise
        new = _score(densities, parts, proposed)
        rise = new[0] - prior[:half] + beta * (new[1] - likelihood[:half])
        taken = jnp.log(jax.random.uniform(accept_key, (half,))) < rise
        kept = [
            a.at[:half].set(jnp.where(taken.reshape(-1, *[1] * (a.ndim - 1)), b, a[:half]))
            for a, b in zip((particles, prior, likelihood), (proposed, *new))
        ]
        return tuple(jax.tree.map(lambda a: jnp.roll(a, -half * turn, 0), kept))

    particles, *scores = lax.fori_loop(0, 2 * count, step, (particles, *scores))
    return particles, tuple(scores)
