# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Rounds of simulations for one observation, each drawn where the round before found the posterior.

A round is a value: what was simulated up to it, what was learned, and how good the proposal was. Methods
differ in how they propose and what they make of simulations that do not come from the prior:

* ``"truncated"``: the prior cut to where the posterior has density (Deistler, Goncalves & Macke 2022), so the
  posterior's own loss stays right;
* ``"c"``: the posterior itself, with the atomic loss that its density relative to the prior decides among
  parameters (Greenberg, Nonnenmacher & Macke 2019, APT);
* ``"a"``: the posterior itself, a mixture of Gaussians, divided by the Gaussian it was drawn from
  (Papamakarios & Murray 2016);
* :func:`snle` and :func:`snre`: the posterior itself; a likelihood or a ratio needs no correction
  (Papamakarios, Sterratt & Murray 2019; Hermans, Begy & Louppe 2020).

All work with unconstrained vectors, so no proposal ever leaves the prior's support.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp

from numpyro_maf.inference.sites import Sites
from numpyro_maf.rng import as_key, split
from numpyro_maf.sbi.densities import log_prior, prior_draws
from numpyro_maf.sbi.gaussian import fit_gaussians
from numpyro_maf.sbi.likelihood import nle, nre
from numpyro_maf.sbi.neural import npe
from numpyro_maf.sbi.posterior import Posterior, Setting
from numpyro_maf.sbi.simulations import Simulations, simulate
from numpyro_maf.sbi.tempering import smc

__all__ = ["Round", "Sequential", "next_round", "snle", "snpe", "snre"]

METHODS = ("truncated", "c", "a", "nle", "nre")


@dataclass(frozen=True, eq=False)
class Round:
    """What one round was given and what it learned.

    :param sims: of this round and all before.
    :param posterior: given the observation; ``learned``: what it was made from.
    :param leakage: share of the posterior's draws that lie where this round did not simulate: outside the
        prior's support, or of truncated proposals outside the region.
    :param effective: how many of the round's own simulations count as draws of its posterior, by their
        weights: few, and the next round will look elsewhere.
    :param acceptance: of truncated proposals, the share of the prior's draws in the region; else 1.
    :param threshold: of truncated proposals, the region's least log-density.
    """

    sims: Simulations
    posterior: Any
    learned: Any
    leakage: float
    effective: float
    acceptance: float = 1.0
    threshold: float = -math.inf


@dataclass(frozen=True, eq=False)
class Sequential(Posterior):
    """The posterior of the last of some :attr:`rounds`."""

    rounds: tuple[Round, ...]

    @property
    def last(self) -> Posterior:
        return self.rounds[-1].posterior

    @property
    def sites(self) -> Sites:  # type: ignore[override]
        return self.last.sites

    @property
    def setting(self) -> Setting:  # type: ignore[override]
        return self.last.setting

    @property
    def observation(self) -> dict[str, Any]:  # type: ignore[override]
        return self.last.observation

    def sample(self, key, sample_shape=()):
        return self.last.sample(key, sample_shape)

    def log_prob(self, values):
        return self.last.log_prob(values)

    def __str__(self):
        lines = [
            f"round {i}: {len(r.sims.failed)} simulations, acceptance {r.acceptance:.3f}, leakage "
            f"{r.leakage:.3f}, effective {r.effective:.0f}"
            for i, r in enumerate(self.rounds, 1)
        ]
        return "\n".join(lines)


def snpe(
    key,
    model: Callable,
    observation: dict[str, Any],
    *,
    rounds: int = 10,
    simulations: int = 1000,
    method: str = "truncated",
    **options,
) -> Sequential:
    """Learn the posterior given one observation in rounds of simulations.

    Interrupting keeps the rounds that are complete.

    :param key: a ``jax.random`` key.
    :param observation: values by observed site.
    :param rounds: how many, with ``simulations`` each.
    :param method: ``"truncated"``, ``"c"`` (APT) or ``"a"``; see the module.
    :param options: of :func:`~numpyro_maf.npe` but ``latent``, and ``executor`` and ``timeout`` of
        :func:`~numpyro_maf.simulate`; ``"a"`` takes no ``builder``, ``ensemble``, ``regression`` or
        ``weights``.
    :raises ValueError: for an unknown method, and discrete sites.
    """
    if method not in METHODS[:3]:
        raise ValueError(f"method must be one of {METHODS[:3]}, got {method!r}")
    return _rounds(key, model, observation, rounds, simulations, method, options)


def snle(key, model, observation, *, rounds: int = 10, simulations: int = 1000, **options) -> Sequential:
    """As :func:`snpe`, learning the likelihood of the one observed site; draws come from :func:`smc`."""
    return _rounds(key, model, observation, rounds, simulations, "nle", options)


def snre(key, model, observation, *, rounds: int = 10, simulations: int = 1000, **options) -> Sequential:
    """As :func:`snpe`, learning the ratio of likelihood and evidence; draws come from :func:`smc`."""
    return _rounds(key, model, observation, rounds, simulations, "nre", options)


def _rounds(key, model, observation, rounds, simulations, method, options):
    done: tuple[Round, ...] = ()
    for k in split(as_key(key), rounds):
        if method in ("nle", "nre") and len(done) < rounds - 1:
            few = {"num_particles": max(simulations, 2000), **options}  # these are proposals only
        else:
            few = options
        try:
            done = (*done, next_round(k, model, observation, done, simulations, method, **few))
        except KeyboardInterrupt:
            if not done:
                raise
            break
    return Sequential(done)


def next_round(
    key,
    model: Callable,
    observation: dict[str, Any],
    before: tuple[Round, ...] = (),
    simulations: int = 1000,
    method: str = "truncated",
    *,
    executor=None,
    timeout=None,
    model_args=(),
    model_kwargs=None,
    epsilon: float = 1e-4,
    progress: bool = True,
    num_particles: int = 10_000,
    **options,
) -> Round:
    """One round, given those before it.

    :param epsilon: of truncated proposals, the posterior's mass outside the region.
    :param num_particles: of :func:`smc`, for the methods ``"nle"`` and ``"nre"``.
    """
    setting = Setting(model, tuple(model_args), dict(model_kwargs or {}))
    observed = tuple(observation)
    propose_key, run_key, train_key, draw_key, smc_key = split(as_key(key), 5)
    last = before[-1] if before else None
    _check(method, options)
    missing = observed if options.get("missing") else ()
    acceptance, threshold, given = 1.0, -math.inf, None
    if last is not None and method == "truncated":
        given, acceptance, threshold = _truncated(propose_key, last, setting, simulations, epsilon)
    source: Any = None
    if last is not None and method != "truncated":
        source = last.posterior.merged if method == "a" else last.posterior
        given = source.sample(propose_key, (simulations,))
    sims = simulate(
        run_key, model, simulations, *setting.args, executor=executor, timeout=timeout, given=given,
        missing=missing, progress=progress, **setting.kwargs,
    )  # fmt: skip
    fresh = len(sims.failed)
    sims = sims if last is None else _joined(last.sims, sims)
    called = dict(model_args=setting.args, model_kwargs=setting.kwargs, progress=progress, **options)
    if method in ("nle", "nre"):
        if len(observed) != 1:
            raise ValueError(f"{method} learns of one observed site, got {list(observed)}")
        found: Any = (nle if method == "nle" else nre)(train_key, model, sims, observed[0], **called)
        posterior: Posterior = smc(
            smc_key, model, observation, {observed[0]: found}, num_particles=num_particles,
            model_args=setting.args, model_kwargs=setting.kwargs, progress=progress,
        )  # fmt: skip
    elif method == "a":
        found = fit_gaussians(
            train_key, model, sims, observed, proposal=last and last.posterior.merged, fresh=fresh, **called
        )
        posterior = found(observation)
    else:
        if method == "c" and last is not None:
            called["atoms"] = 10
        found = npe(train_key, model, sims, observed, **called)
        posterior = found(observation, warn=last is None)
    region = (last.posterior, threshold) if last and method == "truncated" else None
    leakage, effective = _judged(draw_key, posterior, source, region, sims, fresh)
    return Round(sims, posterior, found, leakage, effective, acceptance, threshold)


def _truncated(key, last, setting, count, epsilon):
    """Draws of the prior with posterior log-density above the ``epsilon`` quantile of its own draws.

    Where the region is too small to be hit, by importance resampling of the posterior's draws.
    """
    draw_key, prior_key, choice_key = split(key, 3)
    posterior = last.posterior
    sites = posterior.sites
    own = posterior.sample(draw_key, (10_000,))
    threshold = float(jnp.quantile(posterior.log_prob(own), epsilon))
    kept, tried, inside = [], 0, 0
    while inside < count and tried < 50 * 20_000:
        prior_key, now = jax.random.split(prior_key)
        drawn = prior_draws(setting, posterior.observation, now, 20_000)
        drawn = {name: drawn[name] for name in sites.names}
        fits = np.asarray(posterior.log_prob(drawn) >= threshold)
        kept.append({name: np.asarray(value)[fits] for name, value in drawn.items()})
        tried, inside = tried + 20_000, inside + int(fits.sum())
        if tried >= 40_000 and inside < count * tried / (50 * 20_000):
            break
    if inside >= count:
        rows = {name: np.concatenate([k[name] for k in kept])[:count] for name in sites.names}
        return rows, inside / tried, threshold
    prior = log_prior(setting, sites, posterior.observation, sites.unconstrain(own))
    vectors = sites.unconstrain(own)
    density = posterior.log_prob(own) + sites.log_det(vectors)
    weights = jnp.where(posterior.log_prob(own) >= threshold, prior - density, -jnp.inf)
    chosen = np.asarray(jax.random.categorical(choice_key, weights, shape=(count,)))
    return {name: np.asarray(value)[chosen] for name, value in own.items()}, inside / tried, threshold


def _check(method, options):
    """Whether a method of rounds takes these options."""
    if "latent" in options:
        raise ValueError("rounds learn all latent sites, of which proposals are made: leave out latent=")
    unknown = {"builder", "ensemble", "regression", "weights"} & set(options)
    if method == "a" and unknown:
        raise ValueError(f"SNPE-A learns mixtures of Gaussians and takes no {sorted(unknown)}")


def _judged(key, posterior, source, region, sims, fresh):
    """Leakage and effective sample size of a round.

    :param source: what the round's parameters were drawn from; None for the prior or a ``region`` of it, a
        posterior and the least log-density.
    """
    sites = posterior.sites
    draws = posterior.sample(key, (2000,))
    inside = np.array(sites.contains(draws))
    if region is not None:
        inside &= np.asarray(region[0].log_prob(draws)) >= region[1]
    new = {name: jnp.asarray(np.asarray(sims[name])[-fresh:]) for name in sites.names}
    vectors = sites.unconstrain(new)
    density = posterior.log_prob(new) + sites.log_det(vectors)
    if source is None:
        weights = density - log_prior(posterior.setting, sites, posterior.observation, vectors)
    else:
        weights = density - (source.log_prob(new) + sites.log_det(vectors))
    weights = jnp.where(jnp.isfinite(weights), weights, -jnp.inf)
    effective = jnp.exp(2 * logsumexp(weights) - logsumexp(2 * weights))
    return float(1 - inside.mean()), float(effective)


def _joined(first, second):
    """All simulations of both."""
    count = len(first.failed)
    values = {name: np.concatenate([first[name], second[name]]) for name in first}
    errors = first.errors | {count + row: what for row, what in second.errors.items()}
    return Simulations(values, errors, first.args, first.kwargs)
