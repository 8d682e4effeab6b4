# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Methods of rounds: how parameters are proposed, and what is learned from simulations of these.

A method is an object. A new one is a subclass of :class:`Method` in a file of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_maf.rng import split
from numpyro_maf.sbi.densities import log_prior, prior_draws
from numpyro_maf.sbi.likelihoods import fit_likelihood
from numpyro_maf.sbi.neural_posterior import fit_posterior
from numpyro_maf.sbi.options import AtomicOptions, LikelihoodOptions, PosteriorOptions, RatioOptions
from numpyro_maf.sbi.posterior import Posterior, Setting, to_vectors
from numpyro_maf.sbi.preprocessing import Prepared
from numpyro_maf.sbi.ratios import fit_ratio
from numpyro_maf.sbi.simulations import Simulations
from numpyro_maf.sbi.tempering import smc

__all__ = ["Atomic", "Likelihood", "Method", "Proposal", "RatioBased", "Truncated"]


@dataclass(frozen=True, eq=False)
class Proposal:
    """The parameters that a round simulates. Without arguments they are the prior's.

    :param given: values by site, ``(N, ...)``; None for the prior's own draws.
    :param source: the posterior that they were drawn from; None for the prior, whole or in part.
    :param region: the posterior whose log-density is at least ``threshold`` in the part of the prior that
        they were drawn from; None for the whole.
    :param acceptance: share of the prior's draws in the region.
    """

    given: dict[str, Any] | None = None
    source: Posterior | None = None
    region: Posterior | None = None
    threshold: float = -math.inf
    acceptance: float = 1.0


@dataclass(frozen=True)
class Method:
    """How rounds propose parameters, and what they learn from simulations of these (abstract)."""

    who: ClassVar[str]  # for messages
    vectors: ClassVar[bool] = True  # whether to learn from unconstrained vectors, or from parameters
    failures: ClassVar[str] = "exclude"  # what is done about failed simulations
    excluding: ClassVar[str] = "exclude"  # what ``failures="exclude"`` means: an option of Prepared.of
    options: ClassVar[type]  # a TypedDict of the options that the method takes

    def propose(self, key, last, setting: Setting, count: int) -> Proposal:
        """Parameters for ``count`` simulations: draws of the posterior of the round before, ``last``."""
        return Proposal(last.posterior.sample(key, (count,)), last.posterior)

    def chosen(self, sims: Simulations, fresh: int) -> Simulations:
        """The simulations to learn from, of all so far, the last ``fresh`` of which are new."""
        return sims

    def learn(
        self, key, prepared: Prepared, observation, proposal: Proposal, **options
    ) -> tuple[Posterior, Any, bool]:
        """The posterior given the observation, what it was made from, and whether training was stopped."""
        raise NotImplementedError

    def early(self, count: int) -> Method:
        """The method for rounds before the last, whose posterior proposes ``count`` simulations."""
        return self


@dataclass(frozen=True)
class Truncated(Method):
    """The prior cut to where the posterior has density, so that the posterior's own loss stays right.

    Deistler, Goncalves & Macke, *Truncated proposals* (2022). A small region is drawn from by importance
    resampling of the posterior's draws.

    :param epsilon: the posterior's mass outside the region.
    """

    epsilon: float = 1e-4
    who: ClassVar[str] = "npe"
    options: ClassVar[type] = PosteriorOptions

    def propose(self, key, last, setting, count):
        draw_key, prior_key, choice_key = split(key, 3)
        posterior = last.posterior
        sites = posterior.sites
        own = posterior.sample(draw_key, (10_000,))
        threshold = float(jnp.quantile(posterior.log_prob(own), self.epsilon))
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
            return Proposal(rows, None, posterior, threshold, inside / tried)
        vectors = to_vectors(sites, own)[0]
        prior = log_prior(setting, sites, posterior.observation, vectors)
        ratio = prior - posterior.of_vectors(vectors)
        weights = jnp.where(posterior.log_prob(own) >= threshold, ratio, -jnp.inf)
        chosen = np.asarray(jax.random.categorical(choice_key, weights, shape=(count,)))
        rows = {name: np.asarray(value)[chosen] for name, value in own.items()}
        return Proposal(rows, None, posterior, threshold, inside / tried)

    def learn(self, key, prepared, observation, proposal, **options):
        found = fit_posterior(key, prepared, **options)
        return found(observation, warn=proposal.region is None), found, bool(found.losses.stopped)


@dataclass(frozen=True)
class Atomic(Method):
    """Draws of the posterior, and the atomic loss, which is right for any proposal (APT).

    Greenberg, Nonnenmacher & Macke, *Automatic posterior transformation* (2019). Draws may lie where
    simulations fail, which data without failures do not tell. So failures are errors; with
    ``failures="exclude"`` the parameters of failed simulations are atoms too.

    :param atoms: number of parameters among which the posterior has to tell x's own.
    """

    atoms: int = 10
    who: ClassVar[str] = "APT"
    failures: ClassVar[str] = "error"
    excluding: ClassVar[str] = "keep"
    options: ClassVar[type] = AtomicOptions

    def learn(self, key, prepared, observation, proposal, **options):
        atoms = 0 if proposal.source is None else self.atoms
        found = fit_posterior(key, prepared, atoms=atoms, **options)
        return found(observation, warn=not atoms), found, bool(found.losses.stopped)


@dataclass(frozen=True)
class _Tempered(Method):
    """Draws of a posterior that is found by SMC from a learned likelihood or ratio (abstract)."""

    num_particles: int = 10_000
    vectors: ClassVar[bool] = False
    failures: ClassVar[str] = "error"

    def early(self, count):
        return replace(self, num_particles=min(self.num_particles, max(count, 2000)))

    def fit(self, key, prepared: Prepared, options) -> tuple[Any, bool]:
        """What is learned, and whether training was stopped."""
        raise NotImplementedError

    def learn(self, key, prepared, observation, proposal, **options):
        if len(observation) != 1:
            raise ValueError(f"{self.who} learns of one observed site, got {list(observation)}")
        fit_key, smc_key = split(key)
        found, stopped = self.fit(fit_key, prepared, options)
        setting, (site,) = prepared.setting, observation
        posterior = smc(
            smc_key, setting.model, observation, {site: found}, num_particles=self.num_particles,
            model_args=setting.args, model_kwargs=setting.kwargs, progress=options.get("progress", True),
        )  # fmt: skip
        return posterior, found, stopped


@dataclass(frozen=True)
class Likelihood(_Tempered):
    """Draws of the posterior, and a learned likelihood, which needs no correction.

    Papamakarios, Sterratt & Murray, *Sequential Neural Likelihood* (2019).
    """

    who: ClassVar[str] = "nle"
    options: ClassVar[type] = LikelihoodOptions

    def fit(self, key, prepared, options):
        result = fit_likelihood(key, prepared, **options)
        return result.flow, bool(result.stopped)


@dataclass(frozen=True)
class RatioBased(_Tempered):
    """Draws of the posterior, and a learned ratio, which needs no correction.

    Hermans, Begy & Louppe, *Likelihood-free MCMC with amortized ratio estimators* (2020).
    """

    who: ClassVar[str] = "nre"
    options: ClassVar[type] = RatioOptions

    def fit(self, key, prepared, options):
        found, losses = fit_ratio(key, prepared, **options)
        return found, bool(losses.stopped)
