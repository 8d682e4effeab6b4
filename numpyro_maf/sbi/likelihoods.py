# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Neural likelihood estimation: a conditional flow of a site's value given its parameters.

Papamakarios, Sterratt & Murray, *Sequential Neural Likelihood* (2019), of which this is one round.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from operator import attrgetter
from typing import Any, Unpack

import numpy as np
from jax.typing import ArrayLike

from numpyro_maf.flows.builders import made, nsf
from numpyro_maf.flows.domains import is_real, of_one_number
from numpyro_maf.flows.flow import Flow
from numpyro_maf.flows.supports import bijection
from numpyro_maf.rng import as_key, split
from numpyro_maf.sbi.kinds import kinds_of, of_real_columns, troubles
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
    builder: Callable[..., Flow] | None = None,
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

    Columns of x may be discrete: by the site's support where that is boolean or of integers, else by what was
    simulated, so that a choice beside a time is found. Then the likelihood is a MADE, whose ``log_prob`` is
    the probability of the discrete numbers times the density of the others: discrete columns come first,
    counts are :class:`~numpyro_maf.conditionals.Count`, positive and skewed numbers are taken on the scale of
    their logarithm.

    :param key: a ``jax.random`` key, or an integer.
    :param sims: of :func:`~numpyro_maf.simulate`, with parameters wherever they should be learned.
    :param builder: ``(key, features, *, context) -> Flow``; one that takes ``columns``, as :func:`made` does,
        gets them and an ``order``. None for splines (:func:`nsf`), or a MADE where a column is discrete.
    :param failures: what is done about simulations that failed or are not finite: ``"error"``, or
        ``"exclude"``, with which the likelihood is that of a simulation that succeeds.
    :param latent: names, where the model has more data sites that will be observed. None for all.
    :param model_args: of the model, with ``model_kwargs``; those of ``simulate`` by default.
    :param regression: as for :func:`~numpyro_maf.npe`, with ``validation`` and ``weights``: one for each
        simulation, or for each row.
    :param options: of :func:`~numpyro_maf.train.train`.
    :raises ValueError: when simulations failed, unless told what to do, and for sites that are not there.

    A warning names columns that are discrete where ``builder`` has a density only, and those in which a value
    repeats amid others, such as the end of a trial that timed out: no density describes it.
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
    key: ArrayLike, prepared: Prepared, *, builder: Callable[..., Any] | None = None, regression=None,
    **options: Any,
) -> FitResult:  # fmt: skip
    """As :func:`nle`, from prepared simulations, with the losses."""
    init_key, fit_key = split(key)
    ((site, support),) = prepared.supports.items()
    theta, x = prepared.theta, np.asarray(prepared.arrays[0]).reshape(len(prepared.theta), -1)
    counted = x[prepared.weights > 0]
    kinds = kinds_of(support, counted)
    flow: Any = _builder(builder, support, kinds, counted)(init_key, x.shape[-1], context=theta.shape[-1])
    _warn(site, flow, kinds, counted)
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


def _builder(builder, support, kinds, x) -> Callable[..., Flow]:
    """The builder for columns of these kinds: discrete ones come first where that can be chosen."""
    if not any(kinds):
        return builder or nsf
    chosen = builder or made
    bound = chosen.keywords if isinstance(chosen, partial) else {}
    if "columns" not in signature(chosen).parameters or "columns" in bound:
        return chosen
    given: dict[str, Any] = dict(columns=of_real_columns(support, kinds, x))
    if "order" in signature(chosen).parameters and bound.get("order") is None:
        given["order"] = tuple(sorted(range(len(kinds)), key=lambda d: kinds[d] is None))
    return partial(chosen, **given)


def _warn(site: str, flow: Flow, kinds, x) -> None:
    """Name the columns that a density does not fit."""
    smeared = [d for d, kind in enumerate(kinds) if kind is not None and not flow.is_discrete[d]]
    if smeared:
        which = ", ".join(f"column {d} as {type(kinds[d]).__name__}" for d in smeared[:3])
        warnings.warn(
            f"{site!r} is discrete ({which}), and the builder gives a density, which is not bounded where "
            "values repeat: leave out builder=, or use one that takes columns=, such as made",
            stacklevel=4,
        )
    for d, what in list(troubles(kinds, x).items())[:3]:
        warnings.warn(f"{site!r}, column {d}, {what}; its density there is not to be relied on", stacklevel=4)
