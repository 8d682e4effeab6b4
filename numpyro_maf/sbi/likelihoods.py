# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Neural likelihood estimation: a conditional flow of a site's value given its parameters.

Papamakarios, Sterratt & Murray, *Sequential Neural Likelihood* (2019), of which this is one round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, Unpack

import numpy as np
from jax.typing import ArrayLike

from numpyro_maf.flows.builders import nsf
from numpyro_maf.flows.domains import is_real, of_one_number
from numpyro_maf.flows.flow import Flow
from numpyro_maf.flows.supports import bijection
from numpyro_maf.rng import as_key, split
from numpyro_maf.sbi.options import LikelihoodOptions
from numpyro_maf.sbi.preprocessing import Prepared, training_options
from numpyro_maf.train.likelihood import FitResult, fit
from numpyro_maf.train.options import TrainOptions, check_options
from numpyro_maf.train.state import carrying

__all__ = ["fit_likelihood", "nle"]


def nle(
    key: ArrayLike,
    model: Callable[..., Any],
    sims: dict[str, Any],
    site: str = "x",
    *,
    builder: Callable[..., Flow] = nsf,
    failures: str = "error",
    latent: Sequence[str] | None = None,
    model_args: tuple[Any, ...] = (),
    model_kwargs: dict[str, Any] | None = None,
    regression: bool | None = None,
    validation: Any = 0.1,
    weights: ArrayLike | None = None,
    **options: Unpack[TrainOptions],
) -> Flow:
    """Learn a site's likelihood from simulations: a flow, ``likelihood(theta)`` being a distribution of x.

    Of a :class:`~numpyro_maf.Simulator`, theta is its own parameters side by side, ``(..., P)``, and every
    element of the plates it is in is a row to learn from. Of any other site, theta is all other sites that
    are not observed, or those of ``latent``, side by side in the model's order. x is the site's value as a
    vector; if its support depends on other sites, the flow has all real vectors. See :func:`learned` for what
    comes next.

    :param key: a ``jax.random`` key, or an integer.
    :param sims: of :func:`~numpyro_maf.simulate`, with parameters wherever they should be learned.
    :param builder: ``(key, features, *, context) -> Flow``.
    :param failures: what is done about simulations that failed or are not finite: ``"error"``, or
        ``"exclude"``, with which the likelihood is that of a simulation that succeeds.
    :param latent: names, where the model has more data sites that will be observed. None for all.
    :param model_args: of the model, with ``model_kwargs``; those of ``simulate`` by default.
    :param regression: as for :func:`~numpyro_maf.npe`, with ``validation`` and ``weights``: one for each
        simulation, or for each row.
    :param options: of :func:`~numpyro_maf.train.train`.
    :raises ValueError: when simulations failed, unless told what to do, and for sites that are not there.
    """
    check_options("nle", options, LikelihoodOptions)
    prepare_key, key = split(as_key(key))
    prepared = Prepared.of(
        prepare_key, "nle", model, sims, site, vectors=False, latent=latent, failures=failures,
        weights=weights, validation=validation, model_args=model_args, model_kwargs=model_kwargs,
    )  # fmt: skip
    with carrying(attrgetter("flow")):
        return fit_likelihood(key, prepared, builder=builder, regression=regression, **options).flow


def fit_likelihood(
    key: ArrayLike, prepared: Prepared, *, builder: Callable[..., Any] = nsf, regression=None, **options: Any
) -> FitResult:
    """As :func:`nle`, from prepared simulations, with the losses."""
    init_key, fit_key = split(key)
    ((site, support),) = prepared.supports.items()
    theta, x = prepared.theta, np.asarray(prepared.arrays[0]).reshape(len(prepared.theta), -1)
    flow = builder(init_key, x.shape[-1], context=theta.shape[-1])
    each, real = of_one_number(support), flow.is_real
    if not is_real(each) and not each.is_discrete and real:
        flow = flow.onto(each)
        edge = ~np.isfinite(np.asarray(bijection(each).inv(x))).all(-1)
        if edge.any():
            raise ValueError(
                f"{edge.sum()} of {len(x)} values of {site!r} lie on the edge of its support, or off it, "
                "where it has no density"
            )
    options = training_options(len(x), options)
    options |= dict(weights=prepared.weights, validation=prepared.held_out)
    return fit(fit_key, flow, x, theta, regression=regression if real else False, **options)
