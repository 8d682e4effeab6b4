# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Log prior and log likelihood of a model, simulators left out or learned, at unconstrained vectors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from numpyro import handlers

from numpyro_maf.inputs import by_site, check_finite, nearest
from numpyro_maf.sbi.handlers import learned
from numpyro_maf.sbi.passes import runs
from numpyro_maf.sbi.posterior import Setting
from numpyro_maf.traces import run_once

__all__ = ["Densities", "checked_observation", "log_prior", "prior_draws"]


@dataclass(frozen=True)
class Densities:
    """Log prior and log likelihood of a vector ``(D,)``, in the vector's own measure; static under ``jit``.

    :param setting: the model; ``likelihood``: False for 0 in place of the second.
    """

    setting: Setting
    likelihood: bool = True

    def __call__(self, parts, vector):
        """From sites, learned likelihoods and the observation, and a vector."""
        sites, likelihoods, observation = parts
        setting = self.setting
        model = handlers.condition(learned(setting.model, likelihoods), data=observation)
        seeded = handlers.substitute(handlers.seed(model, jax.random.key(0)), data=sites.constrain(vector))
        with handlers.block():
            trace = handlers.trace(seeded).get_trace(*setting.args, **setting.kwargs)
        prior, likelihood = sites.log_det(vector), jnp.zeros(())
        for name, site in trace.items():
            if site["type"] != "sample" or not (self.likelihood or name in sites.names):
                continue
            log_prob = jnp.sum(site["fn"].log_prob(site["value"]))
            log_prob = log_prob if site["scale"] is None else site["scale"] * log_prob
            if name in sites.names:
                prior = prior + log_prob
            else:
                likelihood = likelihood + log_prob
        return prior, likelihood


@partial(jax.jit, static_argnums=0)
def _log_prior(densities, parts, vectors):
    return jax.vmap(partial(densities, parts))(vectors)[0]


def log_prior(setting, sites, observation, vectors) -> Any:
    """Of vectors ``(N, D)``, in their own measure; observed sites need no density."""
    return _log_prior(Densities(setting, likelihood=False), (sites, {}, observation), vectors)


def prior_draws(setting, observation, key, count) -> dict[str, Any]:
    """Latent sites of runs in which observed ones are not simulated."""
    return _prior_runs(setting, observation, jax.random.split(key, count))


@partial(jax.jit, static_argnums=0)
def _prior_runs(setting, observation, keys):
    model = handlers.condition(setting.model, data=observation)
    return runs(model, setting.args, setting.kwargs)(False, keys, {})[0]


def checked_observation(setting: Setting, values: Any) -> dict[str, Any]:
    """Values of observed sites as arrays.

    :raises TypeError: for anything but a dictionary of arrays of real numbers.
    :raises ValueError: for names that are no sites of the model, other shapes, and numbers that are not
        finite.
    """
    values = {k: jnp.asarray(v) for k, v in by_site("observation", values).items()}
    try:
        trace = run_once(setting.conditioned(values), setting.args, setting.kwargs)
    except TypeError as error:  # a shape that the model cannot work with
        shapes = {name: value.shape for name, value in values.items()}
        raise ValueError(f"the model fails on an observation of shapes {shapes}: {error}") from error
    for name, value in values.items():
        if name not in trace:
            raise ValueError(f"observation: the model has no site {name!r}{nearest(name, trace)}")
        shape = trace[name]["fn"].shape()
        if value.shape != shape:
            raise ValueError(f"observation[{name!r}] must be {shape}, got {value.shape}")
        check_finite(f"observation[{name!r}]", value)
    return values
