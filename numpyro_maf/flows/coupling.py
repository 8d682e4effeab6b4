# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Coupling and elementwise bijectors, for any scalar map: both directions are parallel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from numpyro_maf.flows.bijectors import Bijector
from numpyro_maf.flows.domains import EVENTS
from numpyro_maf.flows.scalars import Affine, Scalar
from numpyro_maf.flows.shapes import check_context, check_width
from numpyro_maf.nn.mlp import MLP
from numpyro_maf.pytrees import static

__all__ = ["Coupling", "Elementwise"]


@dataclass(frozen=True, eq=False)
class Conditioned(Bijector):
    """Scalar maps for all dimensions, with parameters from a network that may see a context (abstract)."""

    @property
    def domain(self):  # type: ignore[override]
        return EVENTS[self.scalar.support]

    codomain = domain

    def bind(self, context):
        """The same bijector with this context, ``(..., C)``; the batch axes become its batch shape."""
        return replace(self, context=context)  # type: ignore[call-arg]  # each has this field

    @property
    def batch_shape(self):
        return () if self.context is None else jnp.shape(self.context)[:-1]


@dataclass(frozen=True, eq=False)
class Elementwise(Conditioned):
    """Each dimension is mapped by a scalar map of its own; both directions are parallel.

    :param params: ``(P, D)``, free parameters.
    :param net: None, or an :class:`~numpyro_maf.nn.mlp.MLP` from the context to ``P * D`` more,
        added to ``params``.
    :param context: ``(..., C)``, or None.
    :param scalar: the scalar map, applied forward from data to base.
    """

    parallel = "inverse"

    params: Any
    net: MLP | None = None
    context: Any = None
    scalar: Scalar = static(default=Affine())

    @classmethod
    def init(cls, key, features, *, context=0, hidden=(64, 64), scalar=Affine(), activation="silu"):
        """The identity, or near it with context; arguments as for the builders."""
        count = scalar.num_params
        net = None
        if context:
            net = MLP.init(key, context, (count, features), hidden=hidden, activation=activation)
        params = jnp.broadcast_to(jnp.asarray(scalar.initial, float)[:, None], (count, features))
        return cls(params, net, scalar=scalar)

    def inputs_of(self, known):
        return known

    def _params(self, x):
        check_width(x, self.params.shape[-1], "Elementwise")
        check_context(self.context, 0 if self.net is None else self.net.inputs, "Elementwise")
        if self.net is None:
            return self.params.reshape(self.params.shape[0], *(1,) * (x.ndim - 1), -1)
        params = jnp.moveaxis(self.params + self.net(None, self.context), -2, 0)
        missing = x.ndim - (params.ndim - 1)
        return params.reshape(params.shape[0], *(1,) * missing, *params.shape[1:])

    def forward_and_log_det(self, x):
        return self._apply(self.scalar.inverse, x)

    def inverse_and_log_det(self, y):
        return self._apply(self.scalar.forward, y)

    def _apply(self, function, x):
        x = jnp.broadcast_to(x, self.forward_shape(jnp.shape(x)))
        params = jnp.broadcast_to(self._params(x), (self.scalar.num_params, *x.shape))
        y, log_slopes = function(params, x)
        return y, log_slopes.sum(-1)


@dataclass(frozen=True, eq=False)
class Coupling(Conditioned):
    """Some features are mapped by scalar maps whose parameters see the others, which pass unchanged.

    NICE (Dinh et al. 2015, section 3.2) with ``Additive``, RealNVP (Dinh et al. 2017, eq. 4-5) with
    ``Affine``, and so on. Both directions are parallel.

    :param net: a conditioner, ``net(seen, context)``: ``(..., Q, n)``, the features that are seen, each as
        ``scalar.inputs`` numbers, and ``(..., C)`` or None, to ``(..., P, m)``.
    :param context: ``(..., C)``, or None.
    :param scalar: the scalar map, applied forward from data to base.
    :param moved: the features that are mapped, ascending.
    :param features: width of the events, D.
    :param context_width: C, 0 for none.
    """

    net: Any
    context: Any = None
    scalar: Scalar = static(default=Affine())
    moved: tuple[int, ...] = static(default=())
    features: int = static(default=1)
    context_width: int = static(default=0)

    parallel = "inverse"

    @classmethod
    def init(
        cls, key, features, *, moved=None, context=0, hidden=(64, 64), scalar=Affine(), activation="silu",
        net=None,
    ):  # fmt: skip
        """A bijector with random weights near the identity.

        :param moved: None for the second half of the features.
        :param net: a function ``(key, seen, moved, context, scalar) -> conditioner`` of the two tuples of
            features; None for an :class:`~numpyro_maf.nn.mlp.MLP`. Other arguments as for the builders.
        """
        moved = tuple(range(features // 2, features)) if moved is None else tuple(sorted(moved))
        if not moved or len(set(moved)) < len(moved) or not set(moved) <= set(range(features)):
            raise ValueError(f"moved must name one or more of the features 0..{features - 1}, got {moved}")
        seen = tuple(sorted(set(range(features)) - set(moved)))
        if net is None:
            inputs, outputs = scalar.inputs * len(seen) + context, (scalar.num_params, len(moved))
            made = MLP.init(
                key, inputs, outputs, hidden=hidden, activation=activation, initial=scalar.initial
            )
        else:
            made = net(key, seen, moved, context, scalar)
        return cls(made, None, scalar, moved, features, context)

    @property
    def seen(self) -> tuple[int, ...]:
        """The features that pass unchanged, ascending."""
        return tuple(sorted(set(range(self.features)) - set(self.moved)))

    def inputs_of(self, known):
        return known if known.isdisjoint(self.moved) or known.issuperset(self.seen) else None

    def forward_and_log_det(self, x):
        return self._apply(self.scalar.inverse, x)

    def inverse_and_log_det(self, y):
        return self._apply(self.scalar.forward, y)

    def _apply(self, function, x):
        check_width(x, self.features, "Coupling")
        check_context(self.context, self.context_width, "Coupling")
        x = jnp.broadcast_to(x, self.forward_shape(jnp.shape(x)))
        seen, moved = np.array(self.seen, int), np.array(self.moved)
        embedded = jnp.moveaxis(self.scalar.embed(x[..., seen]), 0, -2)
        params = jnp.moveaxis(self.net(embedded, self.context), -2, 0)
        y, log_slopes = function(params, x[..., moved])
        return x.astype(y.dtype).at[..., moved].set(y), log_slopes.sum(-1)
