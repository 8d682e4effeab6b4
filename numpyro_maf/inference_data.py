# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Draws by site as ArviZ's data, with dimensions named by the model's plates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from numpyro_maf._arviz import import_arviz
from numpyro_maf.inputs import rows_by_site
from numpyro_maf.traces import run_once

__all__ = ["to_arviz"]


def to_arviz(
    samples: Any,
    model: Callable[..., Any],
    model_args: tuple[Any, ...] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    *,
    prior: Mapping[str, ArrayLike] | None = None,
    posterior_predictive: Mapping[str, ArrayLike] | None = None,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
) -> Any:
    """ArviZ's InferenceData (ArviZ 0) or DataTree (ArviZ 1) of draws by site: of an SVI guide, say.

    Each plate becomes a dimension, with ``0, 1, …`` as coordinates; observed sites become ``observed_data``.
    The sites of a learned prior (:func:`~numpyro_maf.sample_sites`) are shown by name, not as one vector.

    :param samples: by site, ``(S, *shape)``, as ``guide.sample_posterior`` gives them; or a ``MCMC`` that has
        run, whose chains stay chains; of a reparametrised model the auxiliary sites are left out.
    :param model: run once with ``model_args`` and ``model_kwargs`` for its plates and data.
    :param prior: draws by site as well; ``posterior_predictive``: of the observed sites.
    :param coords: by dimension; ``dims``: names of event dimensions by site; both beside the plates'.
    :raises ValueError: for sites with unequal numbers of draws.
    """
    arviz = import_arviz()
    trace = run_once(model, model_args, model_kwargs)
    observed = {
        name: np.asarray(site["value"])
        for name, site in trace.items()
        if site["type"] == "sample" and site["is_observed"]
    }
    groups: dict[str, Any] = {
        "posterior": samples,
        "prior": prior,
        "posterior_predictive": posterior_predictive,
    }
    shapes = {name: np.shape(site["value"]) for name, site in trace.items()}
    learned = {name: site["infer"]["learned_sites"] for name, site in trace.items()
               if "learned_sites" in site.get("infer", {})}  # fmt: skip
    groups = {
        name: _by_name(_chains("samples" if name == "posterior" else name, group, shapes), learned)
        for name, group in groups.items()
        if group
    }
    if observed:
        groups["observed_data"] = observed
    names = {}
    for name, site in trace.items():
        if site["type"] == "sample":
            names[name] = _dims(site, (dims or {}).get(name))
    names |= {name: list(given) for name, given in (dims or {}).items() if name not in names}
    sizes = {
        frame.name: frame.size
        for site in trace.values()
        if site["type"] == "sample"
        for frame in site["cond_indep_stack"]
    }
    places = {name: np.arange(size) for name, size in sizes.items()} | dict(coords or {})
    options: dict[str, Any] = dict(dims=names, coords=places)
    if int(arviz.__version__.split(".")[0]) >= 1:
        return arviz.from_dict(groups, **options)
    return arviz.from_dict(**(groups | options))


def _chains(group: str, samples: Any, expected: dict[str, Any]) -> dict[str, np.ndarray]:
    """Chain axis, draws, which must be equally many, and the model's shapes."""
    chains = 1
    if hasattr(samples, "get_samples"):
        own = samples.get_samples(group_by_chain=True)
        own = {name: value for name, value in own.items() if name in expected} or own
        chains = len(next(iter(own.values())))
        samples = {name: np.reshape(value, (-1, *value.shape[2:])) for name, value in own.items()}
    arrays = rows_by_site(group, samples, what="draws")
    for name, value in arrays.items():
        if value.shape[1:] != expected.get(name, value.shape[1:]):
            raise ValueError(f"{group}[{name!r}] must be (S, *{expected[name]}), got {value.shape}")
    return {name: value.reshape(chains, -1, *value.shape[1:]) for name, value in arrays.items()}


def _by_name(group: dict[str, np.ndarray], learned: dict[str, Any]) -> dict[str, np.ndarray]:
    """The same, with the sites of learned priors in place of their vectors."""
    for vector, sites in learned.items():
        if vector in group:
            values = {name: np.asarray(value) for name, value in sites.constrain(group[vector]).items()}
            group = {name: value for name, value in group.items() if name != vector}
            group = values | group
    return group


def _dims(site: dict[str, Any], event_dims: Sequence[str] | None) -> list[str]:
    """A site's dimensions: plates by their place from the right, events as given or numbered."""
    rank, event = np.ndim(site["value"]), site["fn"].event_dim
    names = [f"{site['name']}_dim_{i}" for i in range(rank)]
    for frame in site["cond_indep_stack"]:
        names[rank - event + frame.dim] = frame.name
    if event_dims is not None:
        if len(event_dims) != event:
            raise ValueError(f"site {site['name']!r} has {event} event dimensions, got dims {event_dims}")
        names[rank - event :] = event_dims
    return names
