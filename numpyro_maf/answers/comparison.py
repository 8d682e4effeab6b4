# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Models compared by their evidence: how probable each makes the observation, on the average of its prior."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from numpyro_maf.inference.checks import GuideCheck
from numpyro_maf.inference.guide_runs import GuideRun
from numpyro_maf.inputs import nearest
from numpyro_maf.pytrees import Described
from numpyro_maf.sbi import ParticlePosterior, Ratio, Sequential

__all__ = ["Comparison", "Evidence", "compare"]


@dataclass(frozen=True)
class Evidence:
    """The logarithm of a model's evidence.

    :param log: in nats; ``error``: its standard error.
    :param doubt: why it cannot be trusted; empty if it can.
    :param seen: the observed values by site.
    """

    log: float
    error: float
    doubt: str = ""
    seen: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, found: Any) -> Evidence:
        """The evidence in what inference gave.

        :raises TypeError: for something without an evidence; the message says how to get one.
        :raises ValueError: for a learned ratio, whose evidence is relative to its own model.
        """
        if isinstance(found, Sequential):
            return cls.of(found.last)
        if isinstance(found, GuideRun):
            if found.check is None:
                raise TypeError(f"the guide has no evidence: {found.verdict}")
            return cls.of(found.check)
        if isinstance(found, GuideCheck):
            doubt = ""
            if not found.khat < found.psis.threshold:
                doubt = f"k-hat is {found.khat:.2f}"
            elif not math.isfinite(found.log_evidence):
                doubt = "variables outside the rows were held"
            return cls(found.log_evidence, found.log_evidence_error, doubt, found.observation)
        if isinstance(found, ParticlePosterior):
            if any(isinstance(value, Ratio) for value in found.likelihoods.values()):
                raise ValueError(
                    "a ratio is relative to its own model's evidence, so that it compares no models: learn a "
                    "likelihood with nle"
                )
            return cls(found.log_evidence, found.log_evidence_error, "", found.observation)
        if isinstance(getattr(found, "evidence", None), cls):
            return found.evidence
        raise TypeError(
            f"compare takes what has an evidence: of infer, smc, snle, fit_guide, check_guide, or "
            f"posterior.importance(key); got {type(found).__name__}"
        )


@dataclass(frozen=True, repr=False)
class Comparison(Described):
    """The result of :func:`compare`, the most probable model first.

    :param evidences: by name.
    """

    evidences: dict[str, Evidence]

    @property
    def probabilities(self) -> dict[str, float]:
        """Of each model, if all are equally probable before."""
        logs = np.array([e.log for e in self.evidences.values()])
        return dict(zip(self.evidences, map(float, np.exp(logs - np.logaddexp.reduce(logs)))))

    def log_odds(self, one: str, other: str) -> tuple[float, float]:
        """Log evidence of one model less that of another (the log Bayes factor), and its standard error.

        :raises ValueError: for a name that is none of them.
        """
        for name in (one, other):
            if name not in self.evidences:
                raise ValueError(f"there is no model {name!r}{nearest(name, self.evidences)}")
        a, b = self.evidences[one], self.evidences[other]
        return a.log - b.log, math.hypot(a.error, b.error)

    @property
    def verdict(self) -> str:
        """One sentence: which model is more probable, and whether that is sure."""
        names = list(self.evidences)
        doubts = [f"{name}: {e.doubt}" for name, e in self.evidences.items() if e.doubt]
        if doubts:
            return f"do not rely on it: {'; '.join(doubts)}"
        if len(names) == 1:
            return "there is one model only"
        odds, error = self.log_odds(*names[:2])
        ratio = f"{math.exp(odds):.3g} to 1" if odds < 700 else f"exp({odds:.0f}) to 1"
        figures = f"odds of {names[0]} against {names[1]} are {ratio}, in logs {odds:.2f} +- {error:.2f}"
        if odds < 2 * error:
            return f"undecided: {figures}"
        strength = "hardly" if odds < 1 else "clearly" if odds < 5 else "by far"  # Kass & Raftery (1995)
        return f"{names[0]} is {strength} more probable: {figures}"

    def _describe(self) -> list[str]:
        width = max(map(len, self.evidences))
        lines = [
            f"  {name:{width}}  log evidence {e.log:10.3f} +- {e.error:.3f}  probability {p:.3f}"
            for (name, e), p in zip(self.evidences.items(), self.probabilities.values())
        ]
        return [f"Comparison: {self.verdict}", *lines[:4]]


def compare(found: Mapping[str, Any]) -> Comparison:
    """Compare models by their evidence for the same observation.

    The evidence of a model is the mean of the likelihood over its prior, so a wide prior costs. It is
    compared as it was estimated: by importance weights of a guide or a posterior, or by tempering.

    :param found: by name of the model, what :func:`~numpyro_maf.infer`, :func:`~numpyro_maf.smc`,
        :func:`~numpyro_maf.snle`, :func:`~numpyro_maf.fit_guide`, :func:`~numpyro_maf.check_guide` or
        ``posterior.importance`` gave.
    :raises TypeError: for something without an evidence.
    :raises ValueError: for no models, for learned ratios, and for posteriors given other observations.
    """
    if not isinstance(found, Mapping) or not found:
        raise ValueError("compare takes a dictionary of at least one result by name of its model")
    evidences = {name: Evidence.of(value) for name, value in found.items()}
    first = next(iter(evidences))
    for name, evidence in evidences.items():
        one, other = evidences[first].seen, evidence.seen
        if not all(_same(one[site], other[site]) for site in one if site in other):
            raise ValueError(f"{name!r} and {first!r} have seen other data: evidences of the same compare")
    order = sorted(evidences, key=lambda name: -evidences[name].log)
    result = Comparison({name: evidences[name] for name in order})
    if any(e.doubt for e in evidences.values()):
        warnings.warn(f"evidences cannot be trusted: {result.verdict}", stacklevel=2)
    return result


def _same(one: Any, other: Any) -> bool:
    """Whether two values are the same in the precision of models."""
    one, other = (np.asarray(value, jnp.result_type(float)) for value in (one, other))
    return np.array_equal(one, other, equal_nan=True)
