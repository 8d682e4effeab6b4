# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

r"""Who conditions on whom: autoregressive, coupling and elementwise bijectors, for any scalar map.

Let ``u = g(x)`` be the parallel direction of an autoregressive bijector: a masked network makes the
parameters of all D scalar maps from ``x`` at once. Its inverse makes ``x`` one dimension after the
other, but each hidden unit only once (:func:`numpyro_maf.nets.sweep`), at the cost of about one pass.

**Derivatives of the inverse.** With ``p`` the parameters that the network makes of ``x``, small
changes of ``x`` and ``p`` obey, for each dimension,

.. math:: B\,dx + A\,dp = du, \qquad dp - N_x\,dx = N_\theta\,d\theta,

where ``A`` and ``B`` are the scalar map's slopes in ``p`` and ``x`` and :math:`N_x` is the linearised
network (through ``embed``, where a network sees several numbers of each value). This is triangular, so one
more sweep solves it, and a sweep through the reversed network solves its transpose. Given to JAX as a linear
solve, it is a rule for forward and reverse mode of every order; it stores one pass's activations and no
trajectory. Reverse mode costs a pass, a sweep and a pass back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from numpyro_maf.bijectors import EVENTS, Bijector, check_order, check_width, static
from numpyro_maf.conditioners import MLP
from numpyro_maf.nets import ACTIVATIONS, MaskedMLP, sweep
from numpyro_maf.scalars import Affine, Scalar

__all__ = ["Autoregressive", "Coupling", "Elementwise", "InverseAutoregressive", "MaskedAutoregressive"]


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
class Autoregressive(Conditioned):
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


@dataclass(frozen=True, eq=False)
class Elementwise(Conditioned):
    """Each dimension is mapped by a scalar map of its own; both directions are parallel.

    :param params: ``(P, D)``, free parameters.
    :param net: None, or an :class:`~numpyro_maf.nets.MLP` from the context to ``P * D`` more,
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
    :param features: D.
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
            features; None for an :class:`~numpyro_maf.conditioners.MLP`. Other arguments as for the builders.
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


def check_context(context, width: int, name: str) -> None:
    """Raise ValueError unless the context is what a network of that context width expects."""
    shape = None if context is None else jnp.shape(context)
    if (shape[-1:] if shape is not None else ()) != ((width,) if width else ()) or (shape == ()):
        expected = f"a context of width {width}" if width else "no context"
        raise ValueError(f"{name} expects {expected}, got {'none' if shape is None else f'shape {shape}'}")


# One event a column: x is (D, B), inputs (Q, D, B), params (P, D, B), theta = (Layers, offsets) ------


@dataclass(frozen=True)
class Restore:
    """The way back from columns to events of a batch shape."""

    batch: tuple[int, ...]
    order: tuple[int, ...] | None

    def __call__(self, y):
        """``(D, B) -> (..., D)``, in the features' own order."""
        if self.order is not None:
            y = y[np.argsort(self.order)]
        return y.T.reshape(*self.batch, -1)

    def rows(self, values):
        """``(D, B) -> (...)``: the sum over the dimensions."""
        return values.sum(0).reshape(self.batch)


def enter(net: MaskedMLP, context, order, x, name: str, masks=None):
    """Events ``(..., D)`` as columns in order, weights and offsets, and the way back.

    With other masks for the weights if they are given.

    :raises ValueError: for events or a context of another width, and weights with extra axes.
    """
    if net.weights[0].ndim != 3:
        raise ValueError(
            f"{name} has weights with extra leading axes, {net.weights[0].shape}, as come back from "
            "vmap or scan. Call it under vmap, or use a FlowDistribution, which keeps count."
        )
    check_width(x, net.features, name)
    check_context(context, net.context, name)
    batch = jnp.broadcast_shapes(jnp.shape(x)[:-1], () if context is None else jnp.shape(context)[:-1])
    size = int(np.prod(batch))
    dtype = jnp.result_type(x, *jax.tree.leaves(net), float if context is None else context)
    x = jnp.broadcast_to(x, (*batch, net.features)).astype(dtype).reshape(size, -1).T
    if order is not None:
        x = x[np.array(order)]
    first, *rest = net.offsets(context)
    if first.ndim > 1 and first.size > first.shape[-1]:
        first = jnp.broadcast_to(first, (*batch, first.shape[-1]))
    first = first.reshape(-1, first.shape[-1]).T
    theta = net.layers(masks), (first, *(offset[..., None] for offset in rest))
    return x, theta, Restore(batch, order)


def network(activation, theta, inputs):
    """The rows before each activation, and the parameters that the network makes of its inputs."""
    layers, offsets = theta
    *hidden, last = offsets
    before, h = [], inputs
    for layer, offset in enumerate(hidden):
        before.append(layers.product(layer, h) + offset)
        h = ACTIVATIONS[activation](before[-1])
    return before, layers.product(len(hidden), h) + layers.skip(inputs) + last


def _linear_network(layers, gains, dinputs):
    """The network's linearisation: ``gains`` are the activations' slopes."""
    h = dinputs
    for layer, gain in enumerate(gains):
        h = gain * layers.product(layer, h)
    return layers.product(len(gains), h) + layers.skip(dinputs)


def _forward(scalar, activation, theta, x):
    """``u = g(x)``, and ``log du/dx`` of each dimension."""
    return scalar.forward(network(activation, theta, scalar.embed(x))[1], x)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _inverse(scalar, activation, theta, u):
    """``x`` with ``g(x) = u``, and ``log dx/du`` of each dimension."""
    layers, offsets = theta

    def emit(params, u):
        x, log_slope = scalar.inverse(params, u)
        return scalar.embed(x), jnp.stack([x, log_slope])

    def activate(rows, _):
        return ACTIVATIONS[activation](rows)

    _, results = sweep(layers, offsets, activate, emit, data=(u,), rows=2, size=u.shape[-1], dtype=u.dtype)
    return results[0], results[1]


@_inverse.defjvp
def _inverse_jvp(scalar, activation, primals, tangents):
    (theta, u), (dtheta, du) = primals, tangents
    layers = theta[0]
    x, log_slopes = _inverse(scalar, activation, theta, u)

    inputs, slopes = jax.jvp(scalar.embed, (x,), (jnp.ones_like(x),))

    def run(theta):
        before, params = network(activation, theta, inputs)
        return params, before

    params, dparams, before = jax.jvp(run, (theta,), (dtheta,), has_aux=True)
    gains = [jax.jvp(ACTIVATIONS[activation], (a,), (jnp.ones_like(a),))[1] for a in before]
    _, scalar_vjp = jax.vjp(scalar.forward, params, x)
    one, zero = jnp.ones_like(x), jnp.zeros_like(x)
    (a, b), (c, e) = scalar_vjp((one, zero)), scalar_vjp((zero, one))
    given = jnp.concatenate([du[None], dparams])  # one array: JAX transposes all of it or nothing
    dx, *dp = _solve_linearised(layers, gains, slopes, a, b, given)
    return (x, log_slopes), (dx, -(jnp.sum(c * jnp.stack(dp), 0) + e * dx))


def _solve_linearised(layers, gains, slopes, a, b, given):
    """Solve ``b dx + a dp = du, dp - N_x dx = dparams``, for ``(1 + P, D, B)`` of stacked numbers.

    ``slopes``, ``(Q, D, B)``, are those of the network's inputs in ``x``.
    """
    sizes = dict(size=b.shape[-1], dtype=b.dtype)

    def zeros(layers, last):
        return (*(jnp.zeros((len(ms), 1), b.dtype) for ms in layers.degrees), last)

    def scale(rows, gain):
        return gain * rows

    def matvec(unknown):
        dx, dp = unknown[0], unknown[1:]
        du = b * dx + jnp.sum(a * dp, 0)
        return jnp.concatenate([du[None], dp - _linear_network(layers, gains, slopes * dx)])

    def solve(_, given):
        def emit(dp, a, b, slopes, du):
            dx = (du - jnp.sum(a * dp, 0)) / b
            return slopes * dx, jnp.concatenate([dx[None], dp])

        data = (a, b, slopes, given[0])
        return sweep(layers, zeros(layers, given[1:]), scale, emit, gains, data, rows=1 + len(a), **sizes)[1]

    def transpose_solve(_, given):
        back, given = layers.reversed(), given[:, ::-1]

        def emit(cinputs, a, b, slopes, cp, cx):
            cu = (cx + jnp.sum(slopes * cinputs, 0)) / b
            return cp - a * cu, cu[None]

        data = (a[:, ::-1], b[::-1], slopes[:, ::-1], given[1:], given[0])
        back_gains = [gain[::-1] for gain in gains[::-1]]
        nothing = jnp.zeros_like(slopes[..., :1])
        cparams, cu = sweep(back, zeros(back, nothing), scale, emit, back_gains, data, rows=1, **sizes)
        return jnp.concatenate([cu, cparams])[:, ::-1]

    return lax.custom_linear_solve(matvec, given, solve, transpose_solve)


# Outside of any jit one compilation takes the place of one for each operation; inside they dissolve.
_compiled_forward, _compiled_inverse = (
    jax.jit(f, static_argnums=(0, 1), inline=True) for f in (_forward, _inverse)
)
