# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""A model run from unconstrained numbers, where the support of one site may depend on the values of others.

``b ~ Uniform(0, 1 - a)`` has another bijection for every value of ``a``. The map from all unconstrained
numbers to all values stays a bijection: in the model's order its Jacobian is block triangular, and the
diagonal blocks are the Jacobians of each site's bijection at the values of the sites before it. So the
log-determinants add up as if the supports were constant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers
from numpyro.distributions.transforms import biject_to
from numpyro.distributions.util import sum_rightmost

__all__ = ["constrain", "dependent_supports", "run_from"]


def run_from(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    numbers: Mapping[str, Array],
    params: Mapping[str, Any] | None = None,
    key: Array | None = None,
) -> dict[str, Any]:
    """The trace of a model whose latent values come from unconstrained numbers, site by site.

    Each is mapped by the bijection of its site's support, given the values of the sites before it. Param
    sites that ``params`` lacks are asked of the handlers around this call.

    :param numbers: unconstrained values by site; ``params``: values of param sites by name.
    """
    known = params or {}

    def place(site):
        if site["type"] == "sample" and site["name"] in numbers:
            return biject_to(site["fn"].support)(numbers[site["name"]])
        return known.get(site["name"]) if site["type"] == "param" else None

    key = jax.random.key(0) if key is None else key
    placed = handlers.substitute(handlers.seed(model, key), substitute_fn=place)
    with handlers.block(hide_fn=lambda site: site["type"] != "param" or site["name"] in known):
        return dict(handlers.trace(placed).get_trace(*args, **kwargs))


def constrain(fn: Any, number: Array) -> tuple[Array, Array]:
    """A site's value from its unconstrained number, and the log-determinant, of the site's batch shape."""
    transform = biject_to(fn.support)
    value = transform(number)
    log_det = transform.log_abs_det_jacobian(number, value)
    return value, sum_rightmost(log_det, jnp.ndim(log_det) - jnp.ndim(value) + fn.event_dim)


def dependent_supports(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    numbers: Mapping[str, Array],
    params: Mapping[str, Any],
) -> list[str]:
    """The sites whose support depends on other sites or on params, read off the program that makes it.

    :raises ValueError: for a support that depends on what the model draws beside ``numbers``, such as sites
        that a handler hides.
    """

    def ends(numbers, params, key):
        trace = run_from(model, args, kwargs, numbers, params, key)
        leaves = {name: jax.tree.leaves(trace[name]["fn"].support) for name in numbers}
        names.extend(name for name in numbers for leaf in leaves[name] if _is_array(leaf))
        return [leaf for name in numbers for leaf in leaves[name] if _is_array(leaf)]

    names: list[str] = []
    program = jax.make_jaxpr(ends)(dict(numbers), dict(params), jax.random.key(0)).jaxpr
    *known, key = program.invars

    def found(sources: list[Any], loops: bool) -> list[str]:
        reached = set(map(id, sources))
        for step in program.eqns:
            taken = any(id(variable) in reached for variable in step.invars)
            if taken and (loops or step.primitive.name not in ("scan", "while")):
                reached.update(map(id, step.outvars))
        ended = zip(names, program.outvars, strict=True)
        return list(dict.fromkeys(name for name, end in ended if id(end) in reached))

    # All that a loop gives is taken to depend on all that it gets; but keys go into every loop.
    if loose := found([key], loops=False):
        raise ValueError(
            f"the support of site {loose[0]!r} depends on sites that this guide does not draw: "
            "one guide must draw both"
        )
    return found(known, loops=True)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic))
