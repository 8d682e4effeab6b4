# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Rounds of simulations for one observation, each drawn where the round before found the posterior.

A round is a value: the simulations up to it, what was learned, and how good the proposal was. Methods differ
in what they propose, and in how they learn from simulations that do not come from the prior:

* ``"truncated"``: :class:`~numpyro_maf.sbi.methods.Truncated` proposals;
* ``"c"``: the :class:`~numpyro_maf.sbi.methods.Atomic` loss (APT);
* ``"a"``: :class:`~numpyro_maf.sbi.snpe_a.GaussianDivision` (SNPE-A);
* :func:`snle` and :func:`snre`: a learned :class:`~numpyro_maf.sbi.methods.Likelihood` or ratio.

All work with unconstrained vectors, so no proposal ever leaves the prior's support.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from jax.typing import ArrayLike

from numpyro_maf.codec import storable
from numpyro_maf.inference.sites import Sites
from numpyro_maf.pytrees import Described
from numpyro_maf.rng import as_key, as_shape, split
from numpyro_maf.sbi.densities import log_prior
from numpyro_maf.sbi.methods import Atomic, Likelihood, Method, Proposal, RatioBased, Truncated
from numpyro_maf.sbi.options import SnleOptions, SnpeOptions, SnreOptions
from numpyro_maf.sbi.posterior import Posterior, Setting, to_vectors
from numpyro_maf.sbi.preprocessing import Prepared
from numpyro_maf.sbi.simulations import Simulations, simulate
from numpyro_maf.sbi.snpe_a import GaussianDivision
from numpyro_maf.train.options import check_options
from numpyro_maf.train.state import NotFiniteError

__all__ = ["METHODS", "Round", "Sequential", "next_round", "snle", "snpe", "snre"]

METHODS: dict[str, Method] = {
    "truncated": Truncated(),
    "c": Atomic(),
    "a": GaussianDivision(),
    "nle": Likelihood(),
    "nre": RatioBased(),
}


@storable
@dataclass(frozen=True, eq=False, repr=False)
class Round(Described):
    """One round: what it was given and what it learned.

    :param sims: of this round and all before.
    :param posterior: given the observation; ``learned``: what it was made from.
    :param leakage: share of the posterior's draws that lie where this round did not simulate: outside the
        prior's support, or of truncated proposals outside the region.
    :param effective: effective sample size of the round's own simulations as draws of its posterior. If it is
        small, the next round will look elsewhere.
    :param acceptance: of truncated proposals, the share of the prior's draws in the region; else 1.
    :param threshold: of truncated proposals, the region's least log-density.
    :param stopped: whether an interrupt stopped the training.
    """

    sims: Simulations
    posterior: Any
    learned: Any
    leakage: float
    effective: float
    acceptance: float = 1.0
    threshold: float = -math.inf
    stopped: bool = False

    @property
    def verdict(self) -> str:
        """The figures of the round in a line."""
        return (
            f"{len(self.sims.failed)} simulations, acceptance {self.acceptance:.3f}, leakage "
            f"{self.leakage:.3f}, effective {self.effective:.0f}{', interrupted' if self.stopped else ''}"
        )

    def _describe(self):
        return [f"Round: {self.verdict}"]


@storable
@dataclass(frozen=True, eq=False, repr=False)
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

    def with_model(self, *args: Any, **kwargs: Any) -> Sequential:
        models = (r.posterior.with_model(*args, **kwargs) for r in self.rounds)
        return Sequential(tuple(replace(r, posterior=p) for r, p in zip(self.rounds, models)))

    def sample(self, key: ArrayLike, sample_shape: int | Sequence[int] = ()) -> dict[str, Any]:
        return self.last.sample(as_key(key), as_shape(sample_shape))

    def of_vectors(self, vector):
        return self.last.of_vectors(vector)

    def _describe(self):
        lines = [f"round {i}: {r.verdict}" for i, r in enumerate(self.rounds, 1)]
        return [f"Sequential posterior {self._about()}", *lines[-3:]]


def snpe(
    key: ArrayLike,
    model: Callable[..., Any],
    observation: dict[str, Any],
    *,
    rounds: int = 10,
    simulations: int = 1000,
    method: str | Method = "truncated",
    **options: Unpack[SnpeOptions],
) -> Sequential:
    """Learn the posterior given one observation in rounds of simulations.

    Interrupting keeps the rounds that are complete. With ``checkpoint``, a folder, the simulations of each
    round and its training are kept there, and the same call resumes, whatever ended it: its result is the
    same, bit by bit.

    :param key: a ``jax.random`` key.
    :param observation: values by observed site.
    :param rounds: how many, with ``simulations`` each.
    :param method: ``"truncated"``, ``"c"`` (APT), ``"a"`` (SNPE-A), or a
        :class:`~numpyro_maf.sbi.methods.Method`.
    :param options: of :func:`~numpyro_maf.npe` but ``latent``, and ``executor`` and ``timeout`` of
        :func:`~numpyro_maf.simulate`; ``"a"`` takes no ``builder``, ``ensemble``, ``regression`` or
        ``weights``.
    :raises ValueError: for an unknown method, and discrete sites.
    """
    if method in ("nle", "nre"):
        raise ValueError(
            "method must be one of 'truncated', 'c', 'a'; for likelihoods see snle, for ratios snre"
        )
    return _rounds("snpe", key, model, observation, rounds, simulations, method, options)


def snle(
    key: ArrayLike,
    model: Callable[..., Any],
    observation: dict[str, Any],
    *,
    rounds: int = 10,
    simulations: int = 1000,
    **options: Unpack[SnleOptions],
) -> Sequential:
    """As :func:`snpe`, learning the likelihood of the one observed site; draws come from :func:`smc`."""
    return _rounds("snle", key, model, observation, rounds, simulations, "nle", options)


def snre(
    key: ArrayLike,
    model: Callable[..., Any],
    observation: dict[str, Any],
    *,
    rounds: int = 10,
    simulations: int = 1000,
    **options: Unpack[SnreOptions],
) -> Sequential:
    """As :func:`snpe`, learning the ratio of likelihood and evidence; draws come from :func:`smc`."""
    return _rounds("snre", key, model, observation, rounds, simulations, "nre", options)


def _rounds(who, key, model, observation, rounds, simulations, method, options):
    settings = {name: options.pop(name) for name in ("epsilon", "num_particles") if name in options}
    method = _method(method, **settings)
    done: tuple[Round, ...] = ()
    _check(who, method, options)
    folder = options.pop("checkpoint", None)
    for i, round_key in enumerate(split(as_key(key), rounds), 1):
        now = method if i == rounds else method.early(simulations)
        own = folder and Path(folder) / f"round-{i}"
        try:
            new = next_round(round_key, model, observation, done, simulations, now, checkpoint=own, **options)
        except NotFiniteError as error:
            error.result = Sequential(done) if done else None
            raise
        except KeyboardInterrupt:
            if not done:
                raise
            break
        if not (new.stopped and done):
            done = (*done, new)
        if new.stopped:
            break
    if len(done) < rounds:
        warnings.warn(f"interrupted: keeping {len(done)} of {rounds} rounds", stacklevel=3)
    return Sequential(done)


def next_round(
    key: ArrayLike,
    model: Callable[..., Any],
    observation: dict[str, Any],
    before: tuple[Round, ...] = (),
    simulations: int = 1000,
    method: str | Method = "truncated",
    *,
    executor=None,
    timeout: float | None = None,
    model_args: tuple[Any, ...] = (),
    model_kwargs: dict[str, Any] | None = None,
    epsilon: float | None = None,
    progress: bool = True,
    num_particles: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Round:
    """One round, given those before it.

    An interrupt of the simulations raises; one of the training ends the round with the best so far.

    :param method: a name, as for :func:`snpe`, ``"nle"`` or ``"nre"``; or a
        :class:`~numpyro_maf.sbi.methods.Method`.
    :param epsilon: of truncated proposals, the posterior's mass outside the region, 0.0001 by default.
    :param num_particles: of :func:`smc`, for the methods ``"nle"`` and ``"nre"``, 10,000 by default.
    :param checkpoint: a folder for simulations and training, so that the same call resumes.
    """
    propose_key, run_key, prepare_key, learn_key, judge_key = split(as_key(key), 5)
    settings = dict(epsilon=epsilon, num_particles=num_particles)
    method = _method(method, **{name: value for name, value in settings.items() if value is not None})
    _check("next_round", method, options)
    if not isinstance(observation, Mapping):
        raise TypeError(f"observation must be a dictionary by site, got {type(observation).__name__}")
    setting = Setting(model, tuple(model_args), dict(model_kwargs or {}))
    last = before[-1] if before else None
    proposal = Proposal() if last is None else method.propose(propose_key, last, setting, simulations)
    sims = simulate(
        run_key, model, simulations, *setting.args, executor=executor, timeout=timeout, given=proposal.given,
        store=checkpoint and Path(checkpoint) / "simulations",
        missing=tuple(observation) if options.get("missing") else (), progress=progress, **setting.kwargs,
    )  # fmt: skip
    if sims.stopped:
        raise KeyboardInterrupt
    sims = sims if last is None else last.sims.joined(sims)
    names = ("failures", "missing", "weights", "validation")
    preparing = {"failures": method.failures} | {n: options.pop(n) for n in names if n in options}
    if preparing["failures"] == "exclude":
        preparing["failures"] = method.excluding
    prepared = Prepared.of(
        prepare_key, method.who, model, method.chosen(sims, simulations), tuple(observation),
        vectors=method.vectors, model_args=setting.args, model_kwargs=setting.kwargs,
        **preparing,
    )  # fmt: skip
    if checkpoint is not None:
        options["checkpoint"] = Path(checkpoint) / "training"
    posterior, found, stopped = method.learn(
        learn_key, prepared, observation, proposal, progress=progress, **options
    )
    leakage, effective = _judged(judge_key, posterior, proposal, sims.last(simulations))
    return Round(sims, posterior, found, leakage, effective, proposal.acceptance, proposal.threshold, stopped)


def _method(method: str | Method, **settings) -> Method:
    """The method of a name, or a method, with other settings."""
    found = METHODS.get(method) if isinstance(method, str) else method
    if not isinstance(found, Method):
        raise ValueError(f"method must be one of {list(METHODS)} or a Method, got {method!r}")
    unknown = sorted(set(settings) - {f.name for f in fields(found)})
    if unknown:
        raise ValueError(f"{type(found).__name__} takes no {unknown}")
    return replace(found, **settings)


def _check(who: str, method: Method, options) -> None:
    """Check the names of options, but for those of :func:`next_round` itself."""
    if "latent" in options:
        raise ValueError("rounds learn all latent sites, of which proposals are made: leave out latent=")
    own = ("executor", "timeout", "model_args", "model_kwargs")
    check_options(who, {k: v for k, v in options.items() if k not in own}, method.options)


def _judged(key, posterior, proposal, fresh):
    """Leakage and effective sample size of a round with these fresh simulations."""
    sites = posterior.sites
    draws = posterior.sample(key, (2000,))
    inside = np.array(to_vectors(sites, draws)[2])
    if proposal.region is not None:
        inside &= np.asarray(proposal.region.log_prob(draws)) >= proposal.threshold
    vectors = to_vectors(sites, fresh)[0]
    if proposal.source is None:
        source = log_prior(posterior.setting, sites, posterior.observation, vectors)
    else:
        source = proposal.source.of_vectors(vectors)
    weights = np.asarray(posterior.of_vectors(vectors) - source, np.float64)
    weights = np.where(np.isfinite(weights), weights, -np.inf)
    effective = np.exp(2 * np.logaddexp.reduce(weights) - np.logaddexp.reduce(2 * weights))
    return float(1 - inside.mean()), float(effective)
