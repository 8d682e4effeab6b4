# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Supports of events, and whether two of them meet: the range of one bijector and the domain of the next."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from numpyro.distributions import constraints
from numpyro.distributions.transforms import biject_to

__all__ = ["EVENTS", "check_meeting", "check_values", "fits", "is_real", "name_of", "of_one_number"]

# Supports of events by the support of their numbers: singletons, as NumPyro compares them by identity.
EVENTS: dict[str, Any] = {
    "real": constraints.real_vector,
    "unit": constraints.independent(constraints.unit_interval, 1),
    "circle": constraints.independent(constraints.circular, 1),
}


def is_real(support) -> bool:
    """Whether a support is all of the reals, event axes aside."""
    return of_one_number(support) is constraints.real


def of_one_number(support):
    """A support without its event axes."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _ends(support) -> tuple[Any, Any] | None:
    """Lower and upper end of a support of single numbers; None for supports of another kind."""
    if support is constraints.real:
        return -np.inf, np.inf
    low, high = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    if support.is_discrete or support.event_dim or low is high is None:
        return None
    return -np.inf if low is None else low, np.inf if high is None else high


def fits(support, domain) -> bool:
    """Whether all values of a support lie in a domain, as far as can be known before a program runs."""
    if support is domain:
        return True
    if support.is_discrete:
        return False
    inner, outer = of_one_number(support), of_one_number(domain)
    ends, limits = _ends(inner), _ends(outer)
    if limits is None:
        return type(inner) is type(outer)
    if ends is None:
        return outer is constraints.real and _keeps_its_shape(inner)
    if any(isinstance(end, jax.core.Tracer) for end in (*ends, *limits)):
        return True
    (low, high), (least, most) = (tuple(map(np.asarray, pair)) for pair in (ends, limits))
    return bool((low >= least - 1e-6).all() and (high <= most + 1e-6).all())


def _keeps_its_shape(support) -> bool:
    """False for supports such as a simplex, whose values have fewer degrees of freedom than numbers."""
    shape = (3,) * max(support.event_dim, 1)
    try:
        return biject_to(support).inverse_shape(shape) == shape
    except (NotImplementedError, ValueError):
        return True


def check_meeting(support, domain, what: str, where: str) -> None:
    """Raise ValueError unless all values of a support lie in the domain of what they are given to."""
    if not fits(support, domain):
        raise ValueError(f"{what} lives on {name_of(support)}, {where} maps from {name_of(domain)}")


def check_values(name: str, support, values, *, edges: bool = True) -> None:
    """Raise ValueError unless all values that are finite lie on a support.

    :param values: ``(N, ...)``.
    :param edges: whether the ends of an interval that is open belong to it, where rounding may put values.
    """
    each, values = of_one_number(support), np.asarray(values)
    ends = _ends(each) if edges else None
    if each is constraints.real:
        return
    if ends is not None:
        low, high = (np.asarray(end, float) for end in ends)
        slack = (
            1e-6 * np.where(np.isfinite(low), np.abs(low), 0),
            1e-6 * np.where(np.isfinite(high), np.abs(high), 0),
        )
        off = (values < low - slack[0]) | (values > high + slack[1])
    elif isinstance(each, type(constraints.simplex)):
        off = (values < 0).any(-1) | (np.abs(values.sum(-1) - 1) > 1e-3)
    else:
        off = ~np.asarray(each(values))
    rank = values.ndim - off.ndim
    off &= np.isfinite(values).all(tuple(range(-rank, 0)))
    if off.any():
        rows = int(off.reshape(len(off), -1).any(1).sum())
        raise ValueError(
            f"{name} lies outside its support, {name_of(support)}, in {rows} of {len(values)} rows, for one "
            f"{values[off][0]}: leave out those rows, or correct the model"
        )


def name_of(support) -> str:
    """A support in words."""
    each = of_one_number(support)
    ends = _ends(each)
    if each is constraints.real:
        return "the reals"
    if ends is None or any(isinstance(end, jax.core.Tracer) or np.ndim(end) for end in ends):
        return type(each).__name__.lstrip("_").lower()
    return "[{:.4g}, {:.4g}]".format(*ends)
