# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Ways from a model and an observation to draws of its posterior, each with a verdict of its own.

A route is a function of a key and a :class:`Task`. It gives a :class:`Found`, or raises with the reason why
it cannot be gone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from inspect import signature
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer import MCMC, NUTS
from numpyro.infer.autoguide import AutoContinuous

from numpyro_maf.answers.comparison import Evidence
from numpyro_maf.flows.builders import made
from numpyro_maf.inference.checks import GuideCheck
from numpyro_maf.inference.guide_runs import GuideRun, fit_guide
from numpyro_maf.rng import split
from numpyro_maf.sbi import Simulations, nle, npe, simulate
from numpyro_maf.sbi.posterior import Setting
from numpyro_maf.sbi.simulator import parameters
from numpyro_maf.sbi.tempering import run_smc
from numpyro_maf.traces import run_once

__all__ = [
    "AGREE", "Found", "Task", "amortised", "densities_by", "gap", "guided", "likelihood", "sampled",
    "simulated", "tempered", "weighed",
]  # fmt: skip

AGREE = 0.25  # standard deviations within which two ways have to agree


@dataclass(frozen=True)
class Task:
    """A question: a model, what was observed, and how much may be spent on the answer.

    :param setting: the model; ``observation``: by site.
    :param simulations: how many, of models without a density; ``num_samples``: draws of the answer.
    :param checkpoint: a folder, or None; ``progress``: whether to show bars.
    :param running: ``executor`` and ``timeout`` of :func:`~numpyro_maf.simulate`.
    :param learning: ``builder``, ``embedding`` and options of training.
    """

    setting: Setting
    observation: dict[str, Any]
    simulations: int = 10_000
    num_samples: int = 4000
    guide: Any = None
    checkpoint: Path | None = None
    progress: bool = True
    running: dict[str, Any] = field(default_factory=dict)
    learning: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def model(self) -> Callable[..., Any]:
        """The model with its sites observed."""
        return self.setting.conditioned(self.observation)

    @cached_property
    def sites(self) -> dict[str, Any]:
        """The sample sites of a run, with the observation."""
        trace = run_once(self.model, self.setting.args, self.setting.kwargs)
        return {name: site for name, site in trace.items() if site["type"] == "sample"}

    @property
    def latent(self) -> dict[str, Any]:
        """The latent sites."""
        return {name: site for name, site in self.sites.items() if not site["is_observed"]}

    @property
    def simulators(self) -> list[str]:
        """Names of the sites that have a simulator in place of a density."""
        return [name for name, site in self.sites.items() if parameters(site["fn"]) is not None]

    @property
    def discrete(self) -> list[str]:
        """Names of discrete latent sites."""
        return [name for name, site in self.latent.items() if site["fn"].support.is_discrete]

    @property
    def gaps(self) -> dict[str, np.ndarray]:
        """Which numbers of observed sites are NaN, missing; only sites where some are."""
        holes = {name: np.isnan(value) for name, value in self.observation.items() if _may_be_nan(value)}
        return {name: hole for name, hole in holes.items() if hole.any()}

    @property
    def width(self) -> int:
        """How many latent numbers there are."""
        return sum(int(np.size(site["value"])) for site in self.latent.values())

    def place(self, name: str) -> Path | None:
        """A folder for a stage, or None."""
        return None if self.checkpoint is None else self.checkpoint / name


@dataclass(frozen=True, eq=False)
class Found:
    """Draws and what is known of them.

    :param draws: by site, ``(S, *shape)``.
    :param verdict: a sentence; ``trusted``: whether it says yes.
    :param stopped: whether an interrupt ended it.
    """

    draws: dict[str, Any]
    verdict: str
    trusted: bool
    evidence: Evidence | None = None
    posterior: Any = None
    stopped: bool = False


# Models with a density ----------------------------------------------------------------------------


def guided(key, task: Task) -> tuple[Found, GuideRun]:
    """A guide, whose draws are weighed by the model."""
    fit_key, draw_key = split(key)
    setting = task.setting
    model = partial(task.model, **setting.kwargs)  # whose names may be those of options
    run = fit_guide(
        fit_key, model, *setting.args, guide=task.guide, checkpoint=task.place("guide"),
        progress=task.progress,
    )  # fmt: skip
    stopped = run.trained is not None and run.trained.stopped == "interrupted"
    if run.check is None:
        return Found(run.sample(draw_key, task.num_samples), run.verdict, False, stopped=stopped), run
    return weighed(draw_key, task, run.check, stopped), run


def weighed(key, task: Task, check: GuideCheck, stopped: bool = False) -> Found:
    """Draws resampled by their weights.

    k-hat reads the tail of the weights whatever their spread. Where all draws count nearly alike, by an
    effective size above 95% and no weight of five times the mean, they are trusted in any case.
    """
    largest = np.exp(check.psis.log_weights.max()) * len(check.psis.log_weights)
    alike = check.psis.ess > 0.95 * len(check.psis.log_weights) and largest < 5
    trusted = bool(check.khat < check.psis.threshold or alike)
    draws = check.resample(key, task.num_samples)
    draws = {name: value for name, value in draws.items() if name in task.latent}
    ess, count = check.psis.ess, len(check.psis.log_weights)
    figures = f"corrected by importance, k-hat {check.khat:.2f}, effective {ess:.0f} of {count} draws"
    evidence = Evidence.of(check)
    if trusted:
        evidence = replace(evidence, doubt="")
    return Found(draws, figures if trusted else check.verdict, trusted, evidence, check, stopped)


def tempered(key, task: Task, likelihoods: dict[str, Any] | None = None) -> Found:
    """Sequential Monte Carlo from the prior, twice: whether the two agree says whether it arrived."""
    setting, half = task.setting, max(task.num_samples // 2, 2000)
    options: dict[str, Any] = dict(num_particles=half, progress=task.progress)
    both = [run_smc(k, setting, task.observation, likelihoods or {}, **options) for k in split(key)]
    one, other = (found.sample(0, half) for found in both)
    apart, where = gap(one, other)
    logs = np.array([found.log_evidence for found in both])
    errors = np.array([found.log_evidence_error for found in both])
    error = max(float(np.sqrt((errors**2).sum())) / 2, abs(logs[0] - logs[1]) / 2)
    trusted = apart < AGREE and abs(logs[0] - logs[1]) < 1
    differ = f"by {apart:.2f} sd in {where} and {abs(logs[0] - logs[1]):.2f} nats of evidence"
    verdict = f"two runs of tempering agree: they differ {differ}"
    if not trusted:
        verdict = f"do not use it: two runs of tempering disagree, {differ}"
    log = float(np.logaddexp.reduce(logs) - np.log(2))
    doubt = "" if trusted else "two runs of tempering disagree"
    lost = max(both, key=lambda found: found.beyond)
    if lost.is_lost:
        trusted, doubt, verdict = False, lost.lost, f"do not use it: {lost.lost}"
    evidence = Evidence(log, float(error), doubt, both[0].observation)
    draws = {name: np.concatenate([one[name], other[name]]) for name in one}
    return Found(draws, verdict, bool(trusted), evidence, both[0])


def sampled(key, task: Task, run: GuideRun | None) -> Found:
    """NUTS, in the coordinates of a guide if there is one, and read by R-hat."""
    setting, model = task.setting, task.model
    neutra = run.neutra() if run is not None and isinstance(run.guide, AutoContinuous) else None
    model = model if neutra is None else neutra.reparam(model)
    mcmc = MCMC(
        NUTS(model), num_warmup=1000, num_samples=max(task.num_samples // 4, 250), num_chains=4,
        chain_method="vectorized", progress_bar=task.progress,
    )  # fmt: skip
    mcmc.run(jnp.asarray(key), *setting.args, **setting.kwargs)
    chains = mcmc.get_samples(group_by_chain=True)
    numbers = {name: np.asarray(value) for name, value in chains.items() if name in mcmc.last_state.z}
    rhat = max(float(np.nanmax(split_gelman_rubin(value))) for value in numbers.values())
    ess = min(float(np.nanmin(effective_sample_size(value))) for value in numbers.values())
    samples = mcmc.get_samples()
    if neutra is not None:
        (vector,) = (samples[name] for name in mcmc.last_state.z)
        samples = neutra.transform_sample(vector)
    draws = {name: samples[name] for name in task.latent}
    figures = f"R-hat {rhat:.3f}, effective {ess:.0f} draws, in four chains"
    trusted = rhat < 1.02 and ess > 100
    verdict = f"sampled by NUTS, {figures}" if trusted else f"do not use it: NUTS has not mixed, {figures}"
    return Found(draws, verdict, trusted)


# Models with a simulator ----------------------------------------------------------------------------


def simulated(key, task: Task) -> Simulations:
    """Simulations of the model, without the numbers that the observation has not."""
    setting, gaps = task.setting, task.gaps
    options = task.running | dict(
        store=task.place("simulations"), progress=task.progress, missing=tuple(gaps)
    )
    sims = simulate(key, setting.model, task.simulations, *setting.args, **options, **setting.kwargs)
    if not gaps:
        return sims
    holes = {name: np.where(hole, np.nan, np.asarray(sims[name])) for name, hole in gaps.items()}
    return Simulations(dict(sims) | holes, sims.errors, sims.args, sims.kwargs, sims.stopped)


def amortised(key, task: Task, sims: Simulations) -> Found:
    """A neural posterior, which no density corrects."""
    learn_key, draw_key = split(key)
    learning = {n: v for n, v in task.learning.items() if v is not None}
    learning |= dict(missing=True) if task.gaps else {}
    neural = npe(
        learn_key, task.setting.model, sims, tuple(task.observation), checkpoint=task.place("posterior"),
        progress=task.progress, latent=tuple(task.latent), **learning,
    )  # fmt: skip
    posterior = neural(task.observation, warn=False)
    surprise = posterior.surprise
    trusted = surprise.share >= 1e-3
    notes = [surprise.verdict] if not trusted else []
    if neural.losses.improving:
        notes.append("training reached its limit while still improving")
    verdict = "; ".join(notes) or "a neural posterior, which no density corrects"
    draws = posterior.sample(draw_key, task.num_samples)
    return Found(draws, verdict, trusted, None, posterior, neural.losses.stopped == "interrupted")


def likelihood(key, task: Task, sims: Simulations) -> Found:
    """A learned likelihood of each simulator, and tempering."""
    learn_key, temper_key = split(key)
    learning = {n: v for n, v in task.learning.items() if n != "embedding" and v is not None}
    if "builder" in learning:
        learning["builder"] = densities_by(learning["builder"])
    learned = {}
    for site, own in zip(task.simulators, split(learn_key, len(task.simulators))):
        learned[site] = nle(
            own, task.setting.model, sims, site, checkpoint=task.place(f"likelihood-{site}"),
            progress=task.progress, **learning,
        )  # fmt: skip
    return tempered(temper_key, task, learned)


def densities_by(builder: Callable[..., Any]) -> Callable[..., Any]:
    """A builder of densities, which serves posteriors too, with a MADE where columns are discrete."""
    if "columns" in signature(builder).parameters:
        return builder

    def build(key, features, *, context=0, columns=None, order=None):
        if columns is None:
            return builder(key, features, context=context)
        return made(key, features, context=context, columns=columns, order=order)

    return build


def _may_be_nan(value) -> bool:
    return np.issubdtype(np.asarray(value).dtype, np.floating)


def gap(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, str]:
    """How far means, or standard deviations, of two sets of draws lie apart, and of which site most.

    :return: in standard deviations, and the name.
    """
    worst, where = 0.0, next(iter(one))
    for name in one:
        a, b = (np.asarray(draws[name], np.float64).reshape(len(draws[name]), -1) for draws in (one, other))
        sd = np.sqrt((a.var(0) + b.var(0)) / 2)
        differences: Any = np.abs([a.mean(0) - b.mean(0), a.std(0) - b.std(0)]) / np.where(sd > 0, sd, 1)
        apart = float(np.max(np.where(np.isnan(differences), np.inf, differences), initial=0))
        if apart > worst:
            worst, where = apart, name
    return worst, where
