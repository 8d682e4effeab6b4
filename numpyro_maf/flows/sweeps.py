# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

r"""The sweep: a masked network one dimension at a time, at the cost of one pass; and its derivative.

Let ``u = g(x)`` be the parallel direction of an autoregressive bijector: a masked network makes the
parameters of all D scalar maps from ``x`` at once. Its inverse makes ``x`` one dimension after the other.
The hidden units are sorted by degree, so the units that become computable with a dimension are the next few
rows of every weight matrix, and nothing computed before changes: :func:`sweep` computes each unit once. It
fills in blocks of dimensions. What earlier blocks contribute to a block is one matrix product, so most of
the arithmetic is large products, and the sequential part stays small and in cache.

**Derivatives of the inverse.** With ``p`` the parameters that the network makes of ``x``, small
changes of ``x`` and ``p`` obey, for each dimension,

.. math:: B\,dx + A\,dp = du, \qquad dp - N_x\,dx = N_\theta\,d\theta,

where ``A`` and ``B`` are the scalar map's slopes in ``p`` and ``x`` and :math:`N_x` is the linearised
network (through ``embed``, where a network sees several numbers of each value). This is triangular, so one
more sweep solves it, and a sweep through the reversed network solves its transpose. As a linear solve it is
a rule for both modes and every order; it stores one pass of activations and no trajectory. Reverse mode costs
a pass, a sweep and a pass back.
Arrays are units first, batch last, ``(H, B)``: the rows that a step needs are contiguous.

What is the same for the whole batch goes into products as ``(H, 1)``. XLA sees through a broadcast; on CPUs
a product that it fuses with a reduction reads past the end of an operand that is broadcast along the batch:
large batches came out wrong, silently (jaxlib 0.10.2 and 0.12.0.1).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from numpyro_maf.nn.init import ACTIVATIONS
from numpyro_maf.nn.masked import Layers

__all__ = ["sweep"]


# The sweep ------------------------------------------------------------------------------------


def sweep(layers: Layers, offsets, activate, emit, gains=None, data=(), *, rows, size, dtype):
    """Evaluate a masked network whose inputs are made from its own outputs, in one pass.

    For the dimensions in order: the units that see the inputs so far, then the outputs ``params`` of the
    dimension, then ``inputs, result = emit(params, *data)``, the dimension's own inputs to the network.

    :param layers: the masked matrices.
    :param offsets: added before each activation, ``(H1, n), …, (P, D, n)``, n the batch or 1.
    :param activate: ``activate(a, gain)`` of a hidden layer's rows, gain being those rows of ``gains``.
    :param emit: rows in, rows out: ``(P, k, B), *(…, k, B) -> (Q, k, B), (R, k, B)``.
    :param gains: None, or one ``(H, B)`` for each hidden layer.
    :param data: arrays ``(…, D, B)``, handed to ``emit`` by rows.
    :param rows: R, how many numbers ``emit`` results in for each dimension.
    :param size: number of events, B.
    :param dtype: of everything computed.
    :return: all inputs ``(Q, D, B)`` and all results ``(R, D, B)``.
    """
    depth = len(layers.degrees)
    features = layers.last.shape[1]
    inputs = jnp.zeros((layers.first.shape[1], features, size), dtype)
    results = jnp.zeros((rows, features, size), dtype)
    units = [jnp.zeros((len(ms), 1), dtype) for ms in layers.degrees]
    gains = (None,) * depth if gains is None else gains

    for block in _blocks(features, layers.degrees):
        (low, high), own = block.dims, block.units
        ranges = [slice(*r) for r in own]
        # What earlier blocks contribute, all at once.
        pre = [offset[r] for offset, r in zip(offsets, ranges)]
        out = offsets[-1][:, low:high]
        if low:
            pre[0] = pre[0] + _dot(layers.first[ranges[0], :, :low], inputs[:, :low])
        for l, weight in enumerate(layers.hidden):
            if done := own[l][0]:
                pre[l + 1] = pre[l + 1] + weight[ranges[l + 1], :done] @ units[l][:done]
        if done := own[-1][0]:
            out = out + layers.last[:, low:high, :done] @ units[-1][:done]
        if low and layers.direct is not None:
            out = out + jnp.tensordot(layers.direct[:, low:high, :, :low], inputs[:, :low], 2)
        # What the block contributes to itself, a group of dimensions at a time.
        local = Layers(
            first=layers.first[ranges[0], :, low:high],
            hidden=tuple(w[ranges[l + 1], ranges[l]] for l, w in enumerate(layers.hidden)),
            last=layers.last[:, low:high, ranges[-1]],
            degrees=(),
            direct=None if layers.direct is None else layers.direct[:, low:high, :, low:high],
        )
        local_gains = [g if g is None else g[r] for g, r in zip(gains, ranges)]
        local_data = [a[..., low:high, :] for a in data]
        made = _within_block(
            block, local, pre, out, activate, emit, local_gains, local_data, rows, size, dtype
        )
        inputs = inputs.at[:, low:high].set(made[0])
        results = results.at[:, low:high].set(made[1])
        units = [u if r.start == r.stop else _put(u, r, h) for u, r, h in zip(units, ranges, made[2])]
    return inputs, results


def _put(units, rows, made):
    """Rows set, by an array that may be wider."""
    width = jnp.broadcast_shapes(units.shape[1:], made.shape[1:])
    return jnp.broadcast_to(units, (len(units), *width)).at[rows].set(made)


def _dot(weight, inputs):
    """``(H, Q, D), (Q, D, B) -> (H, B)``."""
    return jnp.tensordot(weight, inputs, 2)


def _within_block(block, local, pre, out, activate, emit, gains, data, rows, size, dtype):
    """The sequential part of a sweep: one step for each group of dimensions in the block."""
    if len(block.starts) == 1:  # one group sees nothing of its block
        units: list = []
        for l, (above, gain) in enumerate(zip(pre, gains)):
            above = above + local.hidden[l - 1] @ units[-1] if l else above
            units.append(activate(above, gain).astype(dtype))
        params = out + local.last @ units[-1]
        made = emit(jnp.broadcast_to(params, (*params.shape[:-1], size)), *data)
        return *(a.astype(dtype) for a in made), units
    cut, put = lax.dynamic_slice_in_dim, lax.dynamic_update_slice_in_dim

    def step(carry, starts):
        inputs, results, units = carry
        dim, units = starts[0], list(units)
        for l, (row, count) in enumerate(zip(starts[1:], block.unit_counts)):
            if l == 0:
                below = _dot(cut(local.first, row, count), inputs)
            else:
                below = cut(local.hidden[l - 1], row, count) @ units[l - 1]
            gain = None if gains[l] is None else cut(gains[l], row, count)
            h = activate(cut(pre[l], row, count) + below, gain)
            units[l] = put(units[l], h.astype(dtype), row, 0)
        params = cut(out, dim, block.dim_count, 1)
        params = params + cut(local.last, dim, block.dim_count, 1) @ units[-1]
        if local.direct is not None:
            params = params + jnp.tensordot(cut(local.direct, dim, block.dim_count, 1), inputs, 2)
        made, result = emit(params, *(cut(a, dim, block.dim_count, a.ndim - 2) for a in data))
        inputs = put(inputs, made.astype(dtype), dim, 1)
        results = put(results, result.astype(dtype), dim, 1)
        return (inputs, results, tuple(units)), None

    count = block.dims[1] - block.dims[0]
    carry = (
        jnp.zeros((local.first.shape[1], count, size), dtype),
        jnp.zeros((rows, count, size), dtype),
        tuple(jnp.zeros((end - start, size), dtype) for start, end in block.units),
    )
    # Groups differ in size by one or so. A step takes as many rows as the largest needs: those of
    # later groups are made again in their turn, and masked where they are seen before it.
    return lax.scan(step, carry, np.array(block.starts))[0]


@dataclass(frozen=True)
class Block:
    """Consecutive groups of dimensions, and the hidden units that become computable with them."""

    dims: tuple[int, int]
    units: tuple[tuple[int, int], ...]  # one range for each hidden layer
    starts: tuple[tuple[int, ...], ...]  # by group, within the block: dimension, unit, unit, …
    dim_count: int  # the largest group's
    unit_counts: tuple[int, ...]


# Fewer products as against shorter steps: at large widths 4 to 16 blocks measured alike; at small ones two
# are as fast and compile in two thirds of the time.
MAX_BLOCKS, FEW_BLOCKS, SMALL_WIDTH = 4, 2, 32


@lru_cache(maxsize=256)
def _blocks(features: int, degrees) -> tuple[Block, ...]:
    """Group the dimensions that see the same units, and pack the groups into equal blocks."""
    heads = sorted({0} | {m for ms in degrees for m in ms if m < features})
    ends = [*heads[1:], features]
    unit_ends = [[bisect_left(ms, end) for ms in degrees] for end in ends]
    unit_heads = [[0] * len(degrees), *unit_ends[:-1]]
    per_block = math.ceil(len(heads) / (FEW_BLOCKS if features <= SMALL_WIDTH else MAX_BLOCKS))
    blocks = []
    for i in range(0, len(heads), per_block):
        groups = range(i, min(i + per_block, len(heads)))
        last = groups[-1]
        origin = (heads[i], *unit_heads[i])
        blocks.append(
            Block(
                dims=(heads[i], ends[last]),
                units=tuple(zip(unit_heads[i], unit_ends[last])),
                starts=tuple(
                    tuple(a - o for a, o in zip((heads[g], *unit_heads[g]), origin)) for g in groups
                ),
                dim_count=max(ends[g] - heads[g] for g in groups),
                unit_counts=tuple(
                    max(e[l] - h[l] for h, e in zip(unit_heads[i : last + 1], unit_ends[i : last + 1]))
                    for l in range(len(degrees))
                ),
            )
        )
    return tuple(blocks)


# One event a column: x is (D, B), inputs (Q, D, B), params (P, D, B), theta = (Layers, offsets) ------


def network(activation, theta, inputs):
    """The rows before each activation, and the parameters that the network makes of its inputs."""
    layers, offsets = theta
    *hidden, last = offsets
    before, h = [], inputs
    for layer, offset in enumerate(hidden):
        before.append(layers.product(layer, h) + offset)
        h = ACTIVATIONS[activation](before[-1])
    params = layers.product(len(hidden), h) + layers.skip(inputs) + last
    return before, jnp.broadcast_to(params, (*params.shape[:-1], _width(theta, inputs)))


def _width(theta, inputs):
    """The batch's size, B, where either may be 1 wide."""
    return jnp.broadcast_shapes(inputs.shape[-1:], theta[1][0].shape[-1:])[0]


def _linear_network(layers, gains, dinputs):
    """The network's linearisation: ``gains`` are the activations' slopes."""
    h = dinputs
    for layer, gain in enumerate(gains):
        h = gain * layers.product(layer, h)
    return layers.product(len(gains), h) + layers.skip(dinputs)


def _forward(scalar, activation, theta, x):
    """``u = g(x)``, and ``log du/dx`` of each dimension."""
    params = network(activation, theta, scalar.embed(x))[1]
    return scalar.forward(params, jnp.broadcast_to(x, params.shape[1:]))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _inverse(scalar, activation, theta, u):
    """``x`` with ``g(x) = u``, and ``log dx/du`` of each dimension."""
    layers, offsets = theta
    u = jnp.broadcast_to(u, (len(u), _width(theta, u)))

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
    du = jnp.broadcast_to(du, x.shape)
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
