# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Autoregressive bijectors: the parallel direction is one network pass, the other one is one sweep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpyro_maf.flows.coupling import Conditioned
from numpyro_maf.flows.layout import enter
from numpyro_maf.flows.scalars import Affine, Scalar
from numpyro_maf.flows.shapes import check_order
from numpyro_maf.flows.sweeps import _compiled_forward, _compiled_inverse
from numpyro_maf.nn.masked import MaskedMLP
from numpyro_maf.pytrees import static

__all__ = ["Autoregressive", "InverseAutoregressive", "MaskedAutoregressive"]


@dataclass(frozen=True, eq=False)
class Autoregressive(Conditioned):
    """Each dimension is mapped by a scalar map whose parameters see the dimensions before (abstract).

    :param net: a :class:`~numpyro_maf.nn.masked.MaskedMLP` with ``scalar.num_params`` outputs.
    :param context: ``(..., C)``, or None for a network without context.
    :param scalar: the scalar map, applied forward in the parallel direction.
    :param order: the features in the order in which they are made; None for ``0, 1, …``.
    """

    net: MaskedMLP
    context: Any = None
    scalar: Scalar = static(default=Affine())
    order: tuple[int, ...] | None = static(default=None)

    def __post_init__(self):
        if self.order is not None:
            object.__setattr__(self, "order", check_order(self.order, self.net.features))

    @classmethod
    def init(
        cls,
        key,
        features,
        *,
        context=0,
        hidden=(64, 64),
        scalar=Affine(),
        activation="silu",
        order=None,
    ):
        """A bijector with random weights near the identity; arguments as for the builders."""
        net = MaskedMLP.init(
            key, features, scalar.num_params, hidden=hidden, context=context, activation=activation,
            inputs=scalar.inputs, initial=scalar.initial,
        )  # fmt: skip
        return cls(net, scalar=scalar, order=order)

    def inputs_of(self, known):
        order = range(self.net.features) if self.order is None else self.order
        return known if known == set(order[: len(known)]) else None

    def _parallel(self, x):
        x, theta, restore = self._enter(x)
        return restore(*_compiled_forward(self.scalar, self.net.activation, theta, x))

    def _sweep(self, u):
        u, theta, restore = self._enter(u)
        return restore(*_compiled_inverse(self.scalar, self.net.activation, theta, u))

    def _enter(self, x):
        """Events last to ``(D, B)`` in order, weights and offsets, and the way back."""
        x, theta, restore = enter(self.net, self.context, self.order, x, type(self).__name__)
        return x, theta, lambda y, log_slopes: (restore(y), restore.rows(log_slopes))


@dataclass(frozen=True, eq=False)
class MaskedAutoregressive(Autoregressive):
    """MAF's transform, base to data: scoring is parallel, sampling sweeps.

    Papamakarios, Pavlakou & Murray, *Masked Autoregressive Flow for Density Estimation* (2017), eq. 3-5,
    with any scalar map. Arguments as for :class:`Autoregressive`.
    """

    parallel = "inverse"

    def forward_and_log_det(self, x):
        return self._sweep(x)

    def inverse_and_log_det(self, y):
        return self._parallel(y)


@dataclass(frozen=True, eq=False)
class InverseAutoregressive(Autoregressive):
    """IAF's transform, base to data: sampling is parallel, scoring of others' samples sweeps.

    Kingma et al., *Improving Variational Inference with Inverse Autoregressive Flow* (2016), eq. 10-11,
    with any scalar map. Arguments as for :class:`Autoregressive`.
    """

    parallel = "forward"

    def forward_and_log_det(self, x):
        return self._parallel(x)

    def inverse_and_log_det(self, y):
        return self._sweep(y)
