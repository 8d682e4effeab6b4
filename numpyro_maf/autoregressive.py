# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

r"""Who conditions on whom: autoregressive and elementwise bijectors, for any scalar map.

Let ``u = g(x)`` be the parallel direction of an autoregressive bijector: a masked network makes the
parameters of all D scalar maps from ``x`` at once. Its inverse makes ``x`` one dimension after the
other, but each hidden unit only once (:func:`numpyro_maf.nets.sweep`), at the cost of about one pass.

**Derivatives of the inverse.** With ``p`` the parameters that the network makes of ``x``, small
changes of ``x`` and ``p`` obey, for each dimension,

.. math:: B\,dx + A\,dp = du, \qquad dp - N_x\,dx = N_\theta\,d\theta,

where ``A`` and ``B`` are the scalar map's slopes in ``p`` and ``x`` and :math:`N_x` is the linearised
network. This is triangular, so one more sweep solves it, and a sweep through the reversed network solves
its transpose. Given to JAX as a linear solve, it is a rule for forward and reverse mode of every order; it
stores one pass's activations and no trajectory. Reverse mode costs a pass, a sweep and a pass back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from numpyro_maf.bijectors import Bijector, check_order, check_width, static
from numpyro_maf.nets import ACTIVATIONS, MLP, MaskedMLP, sweep
from numpyro_maf.scalars import Affine, Scalar

__all__ = ["Autoregressive", "Elementwise", "InverseAutoregressive", "MaskedAutoregressive"]


@dataclass(frozen=True, eq=False)
class Autoregressive(Bijector):
    """Each dimension is mapped by a scalar map whose parameters see the dimensions before (abstract).

    :param net: a :class:`~numpyro_maf.nets.MaskedMLP` with ``scalar.num_params`` outputs.
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
            key, features, scalar.num_params, hidden=hidden, context=context, activation=activation
        )
        return cls(net, scalar=scalar, order=order)

    def bind(self, context):
        """The same bijector with this context, ``(..., C)``; the batch axes become its batch shape."""
        return replace(self, context=context)

    @property
    def batch_shape(self):
        return () if self.context is None else jnp.shape(self.context)[:-1]

    def _parallel(self, x):
        x, theta, restore = self._enter(x)
        _, params = _network(self.net.activation, theta, x)
        return restore(*self.scalar.forward(params, x))

    def _sweep(self, u):
        u, theta, restore = self._enter(u)
        return restore(*_inverse(self.scalar, self.net.activation, theta, u))

    def _enter(self, x):
        """Events last to ``(D, B)`` in order, weights and offsets, and the way back."""
        name, net = type(self).__name__, self.net
        if net.weights[0].ndim != 2:
            raise ValueError(
                f"{name} has weights with extra leading axes, {net.weights[0].shape}, as come back from "
                "vmap or scan. Call it under vmap, or use a FlowDistribution, which keeps count."
            )
        check_width(x, net.features, name)
        _check_context(self.context, net.context, name)
        batch = jnp.broadcast_shapes(jnp.shape(x)[:-1], self.batch_shape)
        size = int(np.prod(batch))
        dtype = jnp.result_type(x, *jax.tree.leaves(net), float if self.context is None else self.context)
        x = jnp.broadcast_to(x, (*batch, net.features)).astype(dtype).reshape(size, -1).T
        if self.order is not None:
            x = x[np.array(self.order)]
        first, *rest = net.offsets(self.context)
        if first.ndim > 1 and first.size > first.shape[-1]:
            first = jnp.broadcast_to(first, (*batch, first.shape[-1]))
        first = first.reshape(-1, first.shape[-1]).T
        theta = net.layers(), (first, *(offset[..., None] for offset in rest))

        def restore(y, log_slopes):
            if self.order is not None:
                y = y[np.argsort(self.order)]
            return y.T.reshape(*batch, net.features), log_slopes.sum(0).reshape(batch)

        return x, theta, restore


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


@dataclass(frozen=True, eq=False)
class Elementwise(Bijector):
    """Each dimension is mapped by a scalar map of its own; both directions are parallel.

    :param params: ``(P, D)``, free parameters.
    :param net: None, or an :class:`~numpyro_maf.nets.MLP` from the context to ``P * D`` more,
        added to ``params``.
    :param context: ``(..., C)``, or None.
    :param scalar: the scalar map, applied forward from base to data.
    """

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
            net = MLP.init(key, context, count * features, hidden=hidden, activation=activation)
        return cls(jnp.zeros((count, features)), net, scalar=scalar)

    bind = Autoregressive.bind
    batch_shape = Autoregressive.batch_shape

    def _params(self, x):
        check_width(x, self.params.shape[-1], "Elementwise")
        _check_context(self.context, 0 if self.net is None else self.net.inputs, "Elementwise")
        if self.net is None:
            return self.params.reshape(self.params.shape[0], *(1,) * (x.ndim - 1), -1)
        more = self.net(self.context)
        more = more.reshape(*more.shape[:-1], *self.params.shape)
        params = jnp.moveaxis(self.params + more, -2, 0)
        missing = x.ndim - (params.ndim - 1)
        return params.reshape(params.shape[0], *(1,) * missing, *params.shape[1:])

    def forward_and_log_det(self, x):
        return self._apply(self.scalar.forward, x)

    def inverse_and_log_det(self, y):
        return self._apply(self.scalar.inverse, y)

    def _apply(self, function, x):
        x = jnp.broadcast_to(x, self.forward_shape(jnp.shape(x)))
        params = jnp.broadcast_to(self._params(x), (self.scalar.num_params, *x.shape))
        y, log_slopes = function(params, x)
        return y, log_slopes.sum(-1)


def _check_context(context, width: int, name: str) -> None:
    """Raise ValueError unless the context is what a network of that context width expects."""
    shape = None if context is None else jnp.shape(context)
    if (shape[-1:] if shape is not None else ()) != ((width,) if width else ()) or (shape == ()):
        expected = f"a context of width {width}" if width else "no context"
        raise ValueError(f"{name} expects {expected}, got {'none' if shape is None else f'shape {shape}'}")


# One event a column: x is (D, B), params (P, D, B), theta = (Layers, offsets) ---------------------


def _network(activation, theta, x):
    """The rows before each activation, and the parameters that the network makes of ``x``."""
    layers, offsets = theta
    *hidden, last = offsets
    before, h = [], x
    for layer, offset in enumerate(hidden):
        before.append(layers.product(layer, h) + offset)
        h = ACTIVATIONS[activation](before[-1])
    return before, layers.product(len(hidden), h) + last


def _linear_network(layers, gains, dx):
    """The network's linearisation: ``gains`` are the activations' slopes."""
    h = dx
    for layer, gain in enumerate(gains):
        h = gain * layers.product(layer, h)
    return layers.product(len(gains), h)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _inverse(scalar, activation, theta, u):
    """``x`` with ``g(x) = u``, and ``log dx/du`` of each dimension."""
    layers, offsets = theta

    def emit(params, u):
        x, log_slope = scalar.inverse(params, u)
        return x[None], log_slope[None]

    def activate(rows, _):
        return ACTIVATIONS[activation](rows)

    x, log_slopes = sweep(layers, offsets, activate, emit, data=(u,), rows=1, size=u.shape[-1], dtype=u.dtype)
    return x[0], log_slopes[0]


@_inverse.defjvp
def _inverse_jvp(scalar, activation, primals, tangents):
    (theta, u), (dtheta, du) = primals, tangents
    layers = theta[0]
    x, log_slopes = _inverse(scalar, activation, theta, u)

    def network(theta):
        before, params = _network(activation, theta, x)
        return params, before

    params, dparams, before = jax.jvp(network, (theta,), (dtheta,), has_aux=True)
    gains = [jax.jvp(ACTIVATIONS[activation], (a,), (jnp.ones_like(a),))[1] for a in before]
    _, scalar_vjp = jax.vjp(scalar.forward, params, x)
    one, zero = jnp.ones_like(x), jnp.zeros_like(x)
    (a, b), (c, e) = scalar_vjp((one, zero)), scalar_vjp((zero, one))
    given = jnp.concatenate([du[None], dparams])  # one array: JAX transposes all of it or nothing
    dx, *dp = _solve_linearised(layers, gains, a, b, given)
    return (x, log_slopes), (dx, -(jnp.sum(c * jnp.stack(dp), 0) + e * dx))


def _solve_linearised(layers, gains, a, b, given):
    """Solve ``b dx + a dp = du, dp - N_x dx = dparams``, for ``(1 + P, D, B)`` of stacked numbers."""
    sizes = dict(size=b.shape[-1], dtype=b.dtype)

    def zeros(layers, last):
        return (*(jnp.zeros((len(ms), 1), b.dtype) for ms in layers.degrees), last)

    def scale(rows, gain):
        return gain * rows

    def matvec(unknown):
        dx, dp = unknown[0], unknown[1:]
        du = b * dx + jnp.sum(a * dp, 0)
        return jnp.concatenate([du[None], dp - _linear_network(layers, gains, dx)])

    def solve(_, given):
        def emit(dp, a, b, du):
            return ((du - jnp.sum(a * dp, 0)) / b)[None], dp

        data = (a, b, given[0])
        solved = sweep(layers, zeros(layers, given[1:]), scale, emit, gains, data, rows=len(a), **sizes)
        return jnp.concatenate(solved)

    def transpose_solve(_, given):
        back, given = layers.reversed(), given[:, ::-1]

        def emit(cx, a, b, cp):
            cu = cx / b
            return cp - a * cu, cu

        data = (a[:, ::-1], b[::-1], given[1:])
        back_gains = [gain[::-1] for gain in gains[::-1]]
        cparams, cu = sweep(back, zeros(back, given[:1]), scale, emit, back_gains, data, rows=1, **sizes)
        return jnp.concatenate([cu, cparams])[:, ::-1]

    return lax.custom_linear_solve(matvec, given, solve, transpose_solve)
