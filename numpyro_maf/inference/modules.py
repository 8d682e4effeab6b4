# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""A flow's weights as NumPyro sites: parameters to optimise, or random variables with priors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax.flatten_util import ravel_pytree

from numpyro_maf.flows.flow import Flow

__all__ = ["flow_module", "random_flow_module"]


def flow_module(name: str, flow: Flow | Callable[..., Flow], *, frozen: bool = False) -> Flow:
    """Declare a flow's weights as the param site ``name$params``, and return the flow that has them.

    Base and scalings stay fixed. MCMC does not train param sites: it takes their initial values, so train
    first and hand the trained flow in, or use :func:`random_flow_module`.

    :param name: prefix of the site's name.
    :param flow: a flow, whose weights are the initial values, or a function ``key -> Flow``.
    :param frozen: True for a flow, trained before, whose weights stay as they are: no site is declared.
    """
    template, init = _template(flow)
    if frozen:
        if not isinstance(flow, Flow):
            raise TypeError("frozen=True takes a Flow, whose weights are known, not a function")
        return flow
    return template.with_weights(numpyro.param(f"{name}$params", init))


def flat_flow_module(name: str, flow: Callable[..., Flow]) -> Flow:
    """As :func:`flow_module`, but the value of the param site is one vector.

    ``SteinVI`` and its predictive distribution want an array at each param site. Weights given as a pytree,
    such as a flow's own, are taken as well.

    :param name: prefix of the site's name; ``flow``: a function ``key -> Flow``.
    """
    template, init = _template(flow)
    vector, unravel = ravel_pytree(template.weights)
    value = numpyro.param(f"{name}$params", lambda key: ravel_pytree(init(key))[0])
    value = ravel_pytree(value)[0].astype(vector.dtype)
    return template.with_weights(unravel(value))


def flat_param(name: str, structure: Any, init: Callable[[Any], Any]) -> Any:
    """A pytree of parameters, of a given structure, whose param site holds a tuple of its arrays.

    ``SteinVI`` looks into tuples, but into no other pytree.
    """
    leaves = numpyro.param(name, lambda key: tuple(jax.tree.leaves(init(key))))
    return jax.tree.unflatten(structure, jax.tree.leaves(leaves))


def random_flow_module(
    name: str, flow: Flow | Callable[..., Flow], prior: dist.Distribution | Callable[..., dist.Distribution]
) -> Flow:
    """Declare every weight of a flow as a random variable: a Bayesian flow.

    Each array becomes one sample site, named ``name/`` and its path in ``flow.weights``, such as
    ``prior/[0].net.weights[1]``.

    :param name: prefix of the sites' names.
    :param flow: a flow, or a function ``key -> Flow``, for the structure.
    :param prior: a scalar distribution for every weight; or a function ``(path, shape)`` that gives a
        distribution of that event shape, or a scalar one.
    :raises ValueError: when a prior's shape does not fit its weights.
    """
    template, _ = _template(flow)
    leaves, structure = jax.tree_util.tree_flatten_with_path(template.weights)
    weights = []
    for path, leaf in leaves:
        site, shape = jax.tree_util.keystr(path), jnp.shape(leaf)
        d = prior if isinstance(prior, dist.Distribution) else prior(site, shape)
        if d.shape() == () and shape:
            d = d.expand(shape).to_event(len(shape))
        if d.event_shape != shape or d.batch_shape:
            raise ValueError(
                f"the prior of {site} must be scalar or have event shape {shape}, got batch shape "
                f"{d.batch_shape} and event shape {d.event_shape}"
            )
        weights.append(numpyro.sample(f"{name}/{site}", d))
    return template.with_weights(jax.tree.unflatten(structure, weights))


def _template(flow: Flow | Callable[..., Flow]) -> tuple[Flow, Callable[[Any], Any]]:
    """A flow for its structure and fixed parts, and the initialiser of its weights."""
    if isinstance(flow, Flow):
        return flow, lambda key: flow.weights
    if not callable(flow) or isinstance(flow, dist.Distribution):
        raise TypeError(f"expected a Flow or a function key -> Flow, got {type(flow).__name__}")
    # A builder's fixed parts do not depend on the key; compilation drops the weights made here.
    return flow(jax.random.key(0)), lambda key: flow(key).weights
