# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Named latent variables of a model as one unconstrained vector, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import register_dataclass
from jax.typing import ArrayLike
from numpyro.distributions.util import sum_rightmost

from numpyro_maf.codec import storable
from numpyro_maf.flows.domains import is_real, of_one_number
from numpyro_maf.flows.supports import bijection, categories
from numpyro_maf.inputs import as_numbers, nearest
from numpyro_maf.pytrees import Described, static
from numpyro_maf.traces import run_once

__all__ = ["Sites"]


@storable
@register_dataclass
@dataclass(frozen=True, repr=False)
class Sites(Described):
    """Names, shapes and supports of variables, and the bijection of all of them to the reals.

    Each variable is mapped by NumPyro's ``biject_to`` of its support, or by a normal distribution function if
    that is an interval: what is uniform becomes normal. Discrete variables stay as they are, from 0. The
    results follow one another in a vector ``(..., D)``.

    :param supports: one NumPyro constraint for each name.
    :param names: of the sites; ``shapes``: of their values, without sample axes.
    """

    supports: tuple[Any, ...]
    names: tuple[str, ...] = static()
    shapes: tuple[tuple[int, ...], ...] = static()

    @classmethod
    def of(
        cls,
        model: Callable[..., Any],
        names: Collection[str] | None = None,
        model_args: tuple[Any, ...] = (),
        model_kwargs: Mapping[str, Any] | None = None,
        discrete: bool = False,
    ) -> Sites:
        """The latent variables of a model, or those of ``names``, in the model's order.

        :param discrete: whether discrete ones are allowed: integers from a least one.
        :raises ValueError: for discrete variables, and supports that depend on other variables.
        """
        trace, other = (
            {k: s for k, s in run.items() if s["type"] == "sample" and not s["is_observed"]}
            for run in (run_once(model, model_args, model_kwargs, seed) for seed in (0, 1))
        )
        chosen = {k: s for k, s in trace.items() if names is None or k in names}
        if not chosen:
            raise ValueError(
                f"none of the model's latent sites {sorted(trace)} is among {sorted(names or [])}"
            )
        for name, site in chosen.items():
            if site["fn"].support.is_discrete and not (discrete and categories(site["fn"].support)):
                which = "has no least value" if discrete else "is discrete"
                raise ValueError(f"site {name!r} {which}; only continuous sites map to the reals")
            ends = [jax.tree.leaves(t[name]["fn"].support) for t in (trace, other)]
            if not all(np.array_equal(a, b) for a, b in zip(*ends)):
                raise ValueError(
                    f"the support of site {name!r} depends on other sites: sample a site of constant support "
                    "and compute this one from it, such as b = (1 - a) * u with u ~ Uniform(0, 1)"
                )
        return cls(
            tuple(s["fn"].support for s in chosen.values()),
            tuple(chosen),
            tuple(jnp.shape(s["value"]) for s in chosen.values()),
        )

    def _describe(self) -> list[str]:
        return [f"Sites: {self._listed()}"]

    def _listed(self) -> str:
        """Names and shapes, and supports other than the reals."""
        parts = zip(self.names, self.shapes, map(of_one_number, self.supports))
        listed = [f"{name} {shape}{'' if is_real(s) else f' {s}'}" for name, shape, s in parts]
        return ", ".join(listed)

    def select(self, names: Collection[str]) -> Sites:
        """Some of the sites, in their order.

        :raises ValueError: for names that are none of them.
        """
        if not names or set(names) - set(self.names):
            raise ValueError(f"the sites are {list(self.names)}, got {sorted(names)}")
        kept = [i for i, name in enumerate(self.names) if name in names]
        pick = lambda values: tuple(values[i] for i in kept)  # noqa: E731
        return Sites(pick(self.supports), pick(self.names), pick(self.shapes))

    @property
    def width(self) -> int:
        """D."""
        return sum(math.prod(shape) for _, _, shape in self.parts())

    def parts(self) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
        """Names, transforms and shapes on the unconstrained side."""
        for name, support, shape in zip(self.names, self.supports, self.shapes):
            transform = bijection(support)
            yield name, transform, transform.inverse_shape(shape)

    @property
    def columns(self) -> tuple[int, ...]:
        """For each of the D columns how many values it has: 0 for a real one, -1 for infinitely many."""
        parts = zip(self.parts(), self.supports)
        return tuple(n for (_, _, shape), s in parts for n in [categories(s)] * math.prod(shape))

    def _split(self, vector: Array) -> Iterator[tuple[str, Any, Array]]:
        start = 0
        for name, transform, shape in self.parts():
            size = math.prod(shape)
            part = vector[..., start : start + size]
            yield name, transform, part.reshape(*part.shape[:-1], *shape)
            start += size

    def constrain(self, vector: Array) -> dict[str, Array]:
        """``(..., D)`` to values by name, each on its support."""
        return {name: transform(part) for name, transform, part in self._split(vector)}

    def unconstrain(self, values: Mapping[str, ArrayLike]) -> Array:
        """Values by name, with equal leading axes, to ``(..., D)``.

        :raises ValueError: for missing names and shapes that do not end in the sites' own.
        """
        columns = []
        for (name, transform, inner), shape in zip(self.parts(), self.shapes):
            if name not in values:
                raise ValueError(f"no values for site {name!r}{nearest(name, values)}")
            value = jnp.asarray(as_numbers(repr(name), values[name]))
            batch = value.shape[: value.ndim - len(shape)]
            if value.shape != (*batch, *shape):
                raise ValueError(f"{name!r} must have shape (..., *{shape}), got {value.shape}")
            columns.append(transform.inv(value).reshape(*batch, math.prod(inner)))
        return jnp.concatenate(columns, -1)

    def contains(self, values: Mapping[str, ArrayLike]) -> Array:
        """Values by name, with equal leading axes, to booleans ``(...)``: whether all lie on their supports.

        Constraints among a value's numbers, that they sum to 1, say, hold but for rounding: not looked at.
        """
        inside: Any = True
        for name, support, shape in zip(self.names, self.supports, self.shapes):
            each, value = of_one_number(support), jnp.asarray(as_numbers(repr(name), values[name]))
            if each.event_dim == 0:
                there = each(value)
                inside &= there.all(tuple(range(there.ndim - len(shape), there.ndim)))
        return inside

    def log_det(self, vector: Array) -> Array:
        """``(..., D) -> (...)``: log absolute determinant of :meth:`constrain`'s Jacobian."""
        batch, total = vector.ndim - 1, jnp.zeros(vector.shape[:-1], vector.dtype)
        for _, transform, part in self._split(vector) if vector.size else ():
            log_det = transform.log_abs_det_jacobian(part, transform(part))
            total = total + sum_rightmost(log_det, jnp.ndim(log_det) - batch)
        return total
