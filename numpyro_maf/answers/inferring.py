# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""One call from any NumPyro model and an observation to draws, with a verdict that can be quoted."""

from __future__ import annotations

import math
import os
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from numpyro_maf.answers.comparison import Evidence
from numpyro_maf.answers.routes import (
    AGREE,
    Found,
    Task,
    amortised,
    gap,
    guided,
    likelihood,
    sampled,
    simulated,
    tempered,
    weighed,
)  # fmt: skip
from numpyro_maf.inference_data import to_arviz
from numpyro_maf.inputs import by_site, nearest
from numpyro_maf.pytrees import Described
from numpyro_maf.rng import as_key, as_shape, some_rows, split
from numpyro_maf.sbi import Simulations, simulate
from numpyro_maf.sbi.posterior import Setting
from numpyro_maf.traces import run_once

__all__ = ["Answer", "Stage", "infer"]

_TEMPER = 30  # latent numbers up to which tempering from the prior is tried


@dataclass(frozen=True)
class Stage:
    """One step on the way to an answer.

    :param name: what ran; ``why``: why; ``outcome``: what came of it; ``seconds``: how long it took.
    """

    name: str
    why: str
    outcome: str
    seconds: float


@dataclass(frozen=True, eq=False, repr=False)
class Answer(Described):
    """The posterior of a model given an observation; made by :func:`infer`.

    :param draws: by latent site, ``(S, *shape)``, equally probable.
    :param verdict: a sentence that may be quoted; ``trusted``: whether it says that the draws can be used.
    :param stages: what ran, in order, and why.
    :param evidence: of the model, or None where no stage estimated it.
    :param posterior: what the draws came from: a check of a guide, a posterior, or None.
    :param setting: the model; ``observation``: by site.
    """

    draws: dict[str, Any]
    verdict: str
    trusted: bool
    stages: tuple[Stage, ...]
    evidence: Evidence | None
    posterior: Any
    setting: Setting
    observation: dict[str, Any]

    @property
    def log_evidence(self) -> float:
        """Log evidence in nats; NaN without an estimate."""
        return math.nan if self.evidence is None else self.evidence.log

    @property
    def log_evidence_error(self) -> float:
        """Its standard error."""
        return math.nan if self.evidence is None else self.evidence.error

    def sample(self, key: ArrayLike, sample_shape: int | Sequence[int] = ()) -> dict[str, Any]:
        """Draws by site, ``sample_shape + site.shape``: each once as long as there are enough, then again."""
        shape, size = as_shape(sample_shape), len(next(iter(self.draws.values())))
        rows = some_rows(as_key(key), size, math.prod(shape))
        values = {name: np.asarray(value)[rows] for name, value in self.draws.items()}
        return {name: value.reshape(*shape, *value.shape[1:]) for name, value in values.items()}

    def predictive(self, key: ArrayLike, num_samples: int = 1000, **options: Any) -> Simulations:
        """Draws, and what the model makes of each: latent and observed sites, ``(S, ...)``.

        :param options: of :func:`~numpyro_maf.simulate`, such as ``executor``.
        """
        draw_key, run_key = split(as_key(key))
        options = {"progress": False, **options, **self.setting.kwargs}
        return simulate(
            run_key, self.setting.model, num_samples, *self.setting.args,
            given=self.sample(draw_key, num_samples), **options,
        )  # fmt: skip

    def to_arviz(self, key: ArrayLike = 0, num_samples: int = 1000, **options: Any) -> Any:
        """Draws with prior and posterior predictive groups as ArviZ's data.

        :param options: ``coords`` and ``dims`` of :func:`~numpyro_maf.to_arviz`.
        """
        prior_key, key = split(as_key(key))
        setting = self.setting
        runs = self.predictive(key, num_samples)
        prior = simulate(
            prior_key, setting.model, num_samples, *setting.args, progress=False, **setting.kwargs
        )
        return to_arviz(
            {name: runs[name] for name in self.draws}, setting.conditioned(self.observation), setting.args,
            setting.kwargs, prior={name: prior[name] for name in self.draws},
            posterior_predictive={name: runs[name] for name in self.observation} or None, **options,
        )  # fmt: skip

    def _describe(self) -> list[str]:
        sites = ", ".join(self.draws)
        lines = [f"Answer: {sites} given {', '.join(self.observation) or 'the data in the model'}"]
        lines += [f"  {line}" for line in textwrap.wrap(self.verdict, 96)[:2]]
        lines.append(f"  stages: {', then '.join(stage.name for stage in self.stages)}")
        if self.evidence is not None:
            lines.append(f"  log evidence {self.log_evidence:.3f} +- {self.log_evidence_error:.3f}")
        return lines


def infer(
    key: ArrayLike,
    model: Callable[..., Any],
    observation: Mapping[str, Any],
    *,
    simulations: int = 10_000,
    num_samples: int = 4000,
    model_args: tuple[Any, ...] = (),
    model_kwargs: dict[str, Any] | None = None,
    guide: Any = None,
    builder: Any = None,
    embedding: Any = None,
    executor: Any = None,
    timeout: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **options: Any,
) -> Answer:
    """Draws of the posterior of any NumPyro model, corrected where that is possible, with a verdict.

    Where all sites have a density, a guide is trained and its draws are weighed by the model. Up to 30 latent
    numbers, tempering then starts from the prior, twice, and finds modes that the guide may have missed:
    where the two disagree, its draws are the answer. NUTS runs where nothing before holds.

    Where a site is a :class:`~numpyro_maf.Simulator`, a neural posterior is learned from simulations, and a
    likelihood of each simulator, row by row in plates, which is tempered. Two routes that disagree are
    reported, not averaged. Interrupting gives what there is so far.

    :param key: a ``jax.random`` key, or an integer.
    :param model: any NumPyro model, called with ``model_args`` and ``model_kwargs``.
    :param observation: values by site; may be empty if the model observes by itself. At a simulator's site
        NaN stands for numbers that are missing; then the neural posterior is the only route.
    :param simulations: how many, of models with a simulator or with discrete latent sites.
    :param num_samples: draws of the answer.
    :param guide: as for :func:`~numpyro_maf.fit_guide`.
    :param builder: of the flows that are learned from simulations, with ``embedding`` as for
        :func:`~numpyro_maf.npe`. A likelihood of discrete columns is a MADE whatever builds the rest.
    :param executor: of simulations, with ``timeout``; see :func:`~numpyro_maf.simulate`.
    :param checkpoint: a folder for simulations and trainings, by which the same call resumes.
    :param progress: show progress bars.
    :param options: of training from simulations, see :func:`~numpyro_maf.train.train`.
    :raises TypeError: for an observation that is no dictionary of numbers.
    :raises ValueError: for sites that the model has not, or of other shapes; without latent sites.
    :raises RuntimeError: when no route leads anywhere, with the reason of each.
    """
    setting = Setting(model, tuple(model_args), dict(model_kwargs or {}))
    values = by_site("observation", observation, missing=True)
    trace = run_once(model, setting.args, setting.kwargs)
    for name, value in values.items():
        if name not in trace or trace[name]["type"] != "sample":
            raise ValueError(f"the model has no site {name!r}{nearest(name, trace)}")
        if np.shape(value) != np.shape(trace[name]["value"]):
            expected = np.shape(trace[name]["value"])
            raise ValueError(f"{name!r} has shape {np.shape(value)}, the model's has {expected}")
    task = Task(
        setting, values, simulations, num_samples, guide, None if checkpoint is None else Path(checkpoint),
        progress, dict(executor=executor, timeout=timeout),
        dict(builder=builder, embedding=embedding) | options,
    )  # fmt: skip
    if not task.latent:
        raise ValueError("the model has no latent sites: there is nothing to infer")
    for name in task.gaps:
        if name not in task.simulators:
            raise ValueError(
                f"{name!r} has numbers that are missing (NaN), and a site with a density takes none: leave "
                "them out of the model, or mask it, numpyro.handlers.mask"
            )
    way = _by_simulation if task.simulators or task.discrete else _by_density
    journey = _Journey()
    try:
        found = way(as_key(key), task, journey)
    except KeyboardInterrupt:
        if journey.best is None:
            raise
        last = journey.best
        found = replace(last, verdict=f"{last.verdict}; interrupted in {journey.stages[-1].name}")
    return Answer(
        found.draws, found.verdict, found.trusted, tuple(journey.stages), found.evidence, found.posterior,
        setting, values,
    )  # fmt: skip


class _Journey:
    """The stages so far; one that fails is a stage, too."""

    def __init__(self):
        self.stages: list[Stage] = []
        self.best: Found | None = None  # the latest

    def go(self, name: str, why: str, route: Callable[[], Any]) -> Any:
        """What a route gives, or None if it cannot be gone."""
        began, outcome, found = time.perf_counter(), "", None
        try:
            found = route()
        except KeyboardInterrupt:
            if self.best is None:
                raise
            outcome = "interrupted"
        except Exception as error:  # what was found before is not lost by it
            outcome = f"failed: {type(error).__name__}: {error}"
        first = found[0] if isinstance(found, tuple) else found
        outcome = outcome or getattr(first, "verdict", "done")
        self.stages.append(Stage(name, why, outcome, time.perf_counter() - began))
        if isinstance(first, Found):
            self.best = first
        if outcome == "interrupted":
            raise KeyboardInterrupt
        return found

    def failed(self) -> RuntimeError:
        tried = "; ".join(f"{stage.name}: {stage.outcome}" for stage in self.stages)
        return RuntimeError(f"no route led to draws of the posterior. {tried}")


def _by_density(key, task: Task, journey: _Journey) -> Found:
    """Guide and importance weights; tempering, which sees other modes; NUTS where neither holds."""
    guide_key, temper_key, nuts_key = split(key, 3)
    guide = run = prior = None
    given = journey.go("guide", "all sites have a density", lambda: guided(guide_key, task))
    if given is not None:
        guide, run = given
        if guide.stopped:
            return guide
    if task.width <= _TEMPER:
        prior = journey.go("tempering", "a guide misses modes", lambda: tempered(temper_key, task))
    if prior is not None and prior.trusted:
        return prior if guide is None else _compared(guide, prior)
    if guide is not None and guide.trusted:
        return replace(guide, verdict=f"{guide.verdict}; a mode that no draw reached does not show")
    found = journey.go("NUTS", "nothing before holds", lambda: sampled(nuts_key, task, run)) or prior or guide
    if found is None:
        raise journey.failed()
    return found


def _compared(guide: Found, prior: Found) -> Found:
    """A guide's weighed draws if tempering finds the same, else those of tempering."""
    apart, where = gap(guide.draws, prior.draws)
    nats = math.nan
    if guide.evidence is not None and prior.evidence is not None:
        nats = abs(guide.evidence.log - prior.evidence.log)
    if guide.trusted and apart < AGREE and nats < 0.5:
        return replace(guide, verdict=f"{guide.verdict}; tempering agrees within {apart:.2f} sd")
    reason = "the guide's weights do not hold"
    if guide.trusted:
        reason = f"the guide has missed a part: it differs by {apart:.2f} sd in {where} and {nats:.2f} nats"
    return replace(prior, verdict=f"{prior.verdict}; {reason}")


def _by_simulation(key, task: Task, journey: _Journey) -> Found:
    """A neural posterior and learned likelihoods, compared; weights where the model has a density."""
    run_key, neural_key, likelihood_key, weigh_key = split(key, 4)
    why = f"{', '.join(task.simulators)} has no density" if task.simulators else "there are discrete sites"
    sims = journey.go("simulations", why, lambda: simulated(run_key, task))
    if sims is None:
        raise journey.failed()
    neural = journey.go("neural posterior", why, lambda: amortised(neural_key, task, sims))
    if neural is not None and neural.stopped:
        return neural
    if not task.simulators:
        if neural is None:
            raise journey.failed()
        keys = split(weigh_key)
        check = lambda: weighed(keys[0], task, neural.posterior.importance(keys[1]))  # noqa: E731
        return journey.go("importance", "the model has a density", check) or neural
    second = None
    seen = all(name in task.observation and name not in task.gaps for name in task.simulators)
    if not task.discrete and seen:
        reason = "a second route, by rows where the model has plates"
        second = journey.go(
            "likelihood and tempering", reason, lambda: likelihood(likelihood_key, task, sims)
        )
    if second is None and neural is None:
        raise journey.failed()
    if second is None or neural is None:
        one: Any = neural or second
        return Found(one.draws, f"one route only: {one.verdict}", one.trusted, one.evidence, one.posterior)
    apart, where = gap(neural.draws, second.draws)
    rows = any(np.prod(task.sites[name]["fn"].batch_shape, dtype=int) > 1 for name in task.simulators)
    best = second if rows else neural
    doubts = [found.verdict for found in (neural, second) if not found.trusted]
    if apart > AGREE:
        doubts.append(f"two routes disagree by {apart:.2f} sd in {where}: do not use")
    verdict = f"two routes agree within {apart:.2f} sd: a neural posterior, and a learned likelihood tempered"
    evidence = second.evidence
    if doubts and evidence is not None:
        evidence = replace(evidence, doubt=evidence.doubt or "; ".join(doubts))
    return Found(best.draws, "; ".join(doubts) or verdict, not doubts, evidence, best.posterior)
