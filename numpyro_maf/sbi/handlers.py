# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""A handler that puts learned likelihoods in a model in place of its simulators."""

from __future__ import annotations

import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions.transforms import ReshapeTransform
from numpyro.primitives import Messenger

from numpyro_maf.flows.domains import of_one_number
from numpyro_maf.flows.flow import Flow
from numpyro_maf.inputs import nearest
from numpyro_maf.sbi.ratios import Ratio, RatioDistribution
from numpyro_maf.sbi.simulator import parameters, swap

__all__ = ["check_supported", "learned"]

THREADS = (
    "another thread runs a NumPyro model at the same time, and NumPyro keeps one stack of handlers for all "
    "threads: take a threading.Lock around each run of a model, or use processes"
)


class learned(Messenger):
    """A model with learned likelihoods or ratios at some of its sites, as NUTS and SVI take it.

    Whatever plates and ``to_event`` did to a :class:`~numpyro_maf.Simulator` is done to what replaces it.
    ``learned(model, {"x": likelihood})`` is called as the model is. NumPyro keeps one stack of handlers for
    all threads, so one thread at a time runs models; two that meet here are told so.

    :param fn: the model.
    :param likelihoods: by site, of :func:`nle` or :func:`nre`.
    :raises ValueError: when the model runs without coming to one of these sites.
    :raises RuntimeError: when another thread runs a model meanwhile.
    """

    def __init__(self, fn=None, likelihoods: dict[str, Any] | None = None):
        self.likelihoods = dict(likelihoods or {})
        self.latent: list[Any] = []
        self.left: set[str] = set()
        self.seen: set[str] = set()
        for name, value in self.likelihoods.items():
            if not isinstance(value, (Flow, Ratio)):
                raise TypeError(f"{name!r} must be what nle or nre gave, got {type(value).__name__}")
            if isinstance(value, Ratio) and len(value.view.names) > 1:
                raise ValueError(
                    f"a ratio of several sites, {list(value.view.names)}, stands at none of them: add "
                    "ratio(theta, values) by numpyro.factor"
                )
        super().__init__(fn)

    def __enter__(self):
        self.latent, self.left, self.thread = [], set(self.likelihoods), threading.get_ident()
        return super().__enter__()

    def __exit__(self, *how):
        try:
            super().__exit__(*how)
            if how[0] is None and self.left:
                name = min(self.left)
                raise ValueError(f"the model has no site {name!r} to learn{nearest(name, self.seen)}")
        except (AssertionError, IndexError) as error:  # NumPyro's, when the stack is not as it was
            raise RuntimeError(THREADS) from error

    def process_message(self, msg):
        if threading.get_ident() != self.thread:
            raise RuntimeError(THREADS)
        if msg["type"] == "sample":
            self.seen.add(msg["name"])
        if msg["type"] != "sample" or msg["name"] not in self.likelihoods:
            return
        self.left.discard(msg["name"])
        likelihood, fn = self.likelihoods[msg["name"]], msg["fn"]
        if msg["is_observed"]:
            check_supported(msg["name"], likelihood, msg["value"])
        if parameters(fn) is not None:
            msg["fn"] = swap(fn, lambda s: _at(likelihood, s.theta, s.event_shape, s.each))
        else:
            theta = jnp.concatenate([jnp.ravel(value) for value in self.latent])
            msg["fn"] = _at(likelihood, theta, fn.shape(), of_one_number(fn.support))

    def postprocess_message(self, msg):
        if msg["type"] == "sample" and not msg["is_observed"] and msg["name"] not in self.likelihoods:
            self.latent.append(msg["value"])


def check_supported(name: str, likelihood, value) -> None:
    """Refuse values of a site that its learned likelihood has not: a category that was never simulated.

    :raises ValueError: for such values; tracers are not looked at.
    """
    seen = isinstance(likelihood, Flow) and not isinstance(value, jax.core.Tracer)
    if not seen or np.size(value) % likelihood.features:
        return
    with jax.ensure_compile_time_eval():
        rows = jnp.asarray(value, jnp.result_type(float)).reshape(-1, likelihood.features)
        off = ~np.asarray(likelihood.support(rows))
    if off.any():
        raise ValueError(
            f"{int(off.sum())} of {len(rows)} values of {name!r} are none that its learned likelihood knows, "
            f"for one {np.asarray(rows)[off][0].tolist()}: no simulation had such a value, or it lies off "
            "the support"
        )


def _at(likelihood, theta, event_shape, support):
    """The distribution of a site given its parameters."""
    if theta.shape[-1] != likelihood.context:
        raise ValueError(
            f"the likelihood takes {likelihood.context} parameters, the site has {theta.shape[-1]}; which "
            "sites it takes is for nle(latent=...) to say"
        )
    if isinstance(likelihood, Ratio):
        return RatioDistribution(likelihood, theta, event_shape, support)
    d: Any = likelihood(theta)
    if event_shape == d.event_shape:
        return d
    return dist.TransformedDistribution(d, ReshapeTransform(event_shape, d.event_shape))
