# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Builders of coupling flows: both directions are parallel. Other arguments are as for :func:`maf`."""

from __future__ import annotations

import math

import jax
import numpy as np

from numpyro_maf.flows import images
from numpyro_maf.flows.assembly import Base, Features, KeyLike, Parts, builder, event_shape
from numpyro_maf.flows.bijectors import Bijector
from numpyro_maf.flows.coupling import Coupling, Elementwise
from numpyro_maf.flows.linear import ActNorm, LULinear, Permute
from numpyro_maf.flows.scalars import Additive, Affine, Compose, MixtureCDF, Scalar
from numpyro_maf.flows.splines import PiecewiseQuadratic
from numpyro_maf.nn.conv import ConvNet
from numpyro_maf.pytrees import short
from numpyro_maf.rng import split

__all__ = ["flowpp", "glow", "nice", "nis", "realnvp"]


@builder
def realnvp(
    key: KeyLike,
    features: Features,
    *,
    context: int = 0,
    transforms: int = 8,
    hidden: tuple[int, ...] = (64, 64),
    scalar: Scalar = Affine(),
    activation: str = "silu",
    base: Base = None,
    logit: float | None = None,
    mixing: str = "random",
    levels: int = 2,
) -> Parts:
    """Couplings with affine maps: both directions are parallel.

    Dinh, Sohl-Dickstein & Bengio, *Density Estimation using Real NVP* (2017), eq. 4-5:
    ``u_B = (x_B - m(x_A)) exp(-s(x_A))``, ``u_A = x_A``. Choose it where sampling and scoring must
    both be fast, and for images.

    :param features: D, or ``(H, W, C)``: at every level but the last a checkerboard and a channel part and a
        split (there, section 3.6), at the last a checkerboard part; networks are then residual convolutions
        with ``hidden[0]`` channels and ``len(hidden)`` blocks.
    :param transforms: how many couplings, of images in each part.
    :param mixing: halves of the features: fixed ``"random"`` ones, ``"alternate"`` ones, or those with an
        LU linear map before each coupling: ``"linear"``.
    :param levels: scales of an image.
    """
    options = dict(context=context, hidden=hidden, scalar=scalar, activation=activation)
    return coupling_layers(key, features, transforms, levels, mixing, **options)


@builder
def nice(
    key: KeyLike,
    features: Features,
    *,
    context: int = 0,
    transforms: int = 4,
    hidden: tuple[int, ...] = (64, 64),
    activation: str = "silu",
    base: Base = None,
    logit: float | None = None,
    mixing: str = "alternate",
    levels: int = 1,
) -> Parts:
    """Couplings with shifts, and a diagonal scaling at the end: both directions are parallel.

    Dinh, Krueger & Bengio, *NICE* (2015): ``u_B = x_B - m(x_A)``, volume preserving but for the
    scaling of section 3.3. It cannot widen one place and narrow another, so it does not reach most
    densities (two moons: 0.02 nats are out of its reach): choose it as a baseline. ``levels`` as for
    :func:`realnvp`.
    """
    options = dict(context=context, hidden=hidden, scalar=Additive(), activation=activation)
    scaling = Elementwise.init(
        key, math.prod(event_shape(features)), context=context, hidden=hidden, activation=activation
    )
    return scaling, *coupling_layers(key, features, transforms, levels, mixing, **options)


@builder
def nis(
    key: KeyLike,
    features: Features,
    *,
    context: int = 0,
    transforms: int = 4,
    hidden: tuple[int, ...] = (64, 64),
    scalar: Scalar = PiecewiseQuadratic(),
    activation: str = "silu",
    base: Base = None,
    mixing: str = "random",
) -> Parts:
    """Couplings on the unit box, of neural importance sampling: both directions are parallel.

    Mueller et al., *Neural Importance Sampling* (2019): the scalar maps are piecewise-quadratic distribution
    functions, or ``PiecewiseLinear()`` ones; the base is uniform. Choose it for integrands and densities on
    ``[0, 1]^D``, whose edges it represents exactly.
    """
    expect_support(scalar, "unit", "nis", "PiecewiseQuadratic()")
    options = dict(context=context, hidden=hidden, scalar=scalar, activation=activation)
    return coupling_layers(key, features, transforms, 1, mixing, **options)


@builder
def glow(
    key: KeyLike,
    features: Features,
    *,
    context: int = 0,
    transforms: int = 8,
    hidden: tuple[int, ...] = (64, 64),
    scalar: Scalar = Affine(),
    activation: str = "silu",
    base: Base = None,
    logit: float | None = None,
    levels: int = 2,
) -> Parts:
    """Steps of normalisation, an invertible linear map and a coupling: both directions are parallel.

    Kingma & Dhariwal, *Glow* (2018), figure 2: ActNorm, a 1x1 convolution as an LU product after a
    permutation, affine coupling. ``flow.initialized(x)`` gives ActNorm its data-dependent start. Choose it
    for images, and for vectors without a natural order.

    :param transforms: how many steps, of images at each level.
    :param levels: of images: each squeezes and takes its steps; a split goes between. Otherwise as for
        :func:`realnvp`.
    """
    level = ("squeeze", *["channels"] * transforms)
    plan = [word for _ in range(levels - 1) for word in (*level, "split")] + [*level]
    if len(event_shape(features)) == 1:
        plan = ["channels"] * transforms
    options = dict(context=context, hidden=hidden, scalar=scalar, activation=activation)
    return _steps(key, features, plan, normalize=True, linear=True, **options)


@builder
def flowpp(
    key: KeyLike,
    features: Features,
    *,
    context: int = 0,
    transforms: int = 4,
    hidden: tuple[int, ...] = (32, 32),
    scalar: Scalar = Compose((MixtureCDF(8), Affine())),
    activation: str = "silu",
    base: Base = None,
    logit: float | None = None,
    heads: int = 4,
) -> Parts:
    """Glow's steps with mixture-of-logistics maps and self-attention: scoring is parallel, sampling bisects.

    Ho, Chen, Srinivas, Duan & Abbeel, *Flow++* (2019), eq. 4-5: ``u = logit(F(x)) exp(a) + b``, F the
    distribution function of a mixture of logistics. Networks are gated convolutions with gated
    self-attention, on vectors attention alone. Sampling solves one monotone equation a number, all in
    parallel. Choose it for images where the fit counts most.

    :param transforms: how many steps, of images in each of three parts: checkerboard, channels,
        checkerboard, with a squeeze before the second (there, section 4.1).
    :param hidden: the width, once for every block.
    :param heads: of the attention, a divisor of the width.
    """
    plan = (
        ["checkerboard"] * transforms
        + ["squeeze"]
        + ["channels"] * transforms
        + ["checkerboard"] * transforms
    )
    if len(event_shape(features)) == 1:
        plan = ["channels"] * transforms
    options = dict(context=context, hidden=hidden, scalar=scalar, activation=activation, heads=heads)
    return _steps(key, features, plan, normalize=True, linear=True, **options)


def coupling_layers(key, features, transforms, levels, mixing, **options):
    """RealNVP's architecture for vectors and images."""
    if mixing not in ("alternate", "random", "linear"):
        raise ValueError(f"mixing must be 'alternate', 'random' or 'linear', got {mixing!r}")
    check_mixing(mixing, options["scalar"])
    board = ["checkerboard"] * transforms
    level = [*board, "squeeze", *["channels"] * transforms, "split"]
    plan = level * (levels - 1) + board
    if len(event_shape(features)) == 1:
        plan = ["channels"] * transforms
    return _steps(key, features, plan, linear=mixing == "linear", random=mixing == "random", **options)


def _steps(
    key, features, plan, *, context, hidden, scalar, activation, heads=None, normalize=False, linear=False,
    random=False,
):  # fmt: skip
    """Bijectors of a plan, see :func:`~numpyro_maf.flows.images.layers`: normalise, mix, couple."""
    vector = len(event_shape(features)) == 1
    if normalize and scalar.support != "real":
        raise ValueError(
            f"scalar must be a map of the reals, as normalisation and linear maps are, got {short(scalar)}"
        )

    def conditioner(shape):
        if vector and heads is None:
            return None
        shape = (math.prod(shape), 1, 1) if vector else shape
        return lambda key, seen, moved, context, scalar: ConvNet.init(
            key, shape, seen, moved, scalar.num_params, inputs=scalar.inputs, context=context,
            width=hidden[0], blocks=len(hidden), heads=heads or 0, activation=activation,
            initial=scalar.initial,
        )  # fmt: skip

    def step(number, shape, moved):
        linear_key, coupling_key = split(jax.random.fold_in(key, number))
        size, channels = math.prod(shape), shape[-1]
        made: list[Bijector] = [ActNorm.init(channels)] if normalize else []
        if linear and channels > 1:
            order = np.random.default_rng(number).permutation(channels)
            order = np.arange(size).reshape(-1, channels)[:, order]
            made += [Permute(tuple(order.ravel().tolist())), LULinear.init(linear_key, channels)]
        coupling = Coupling.init(
            coupling_key, size, moved=moved, context=context, hidden=hidden, scalar=scalar,
            activation=activation, net=conditioner(shape),
        )  # fmt: skip
        return [*made, coupling]

    return images.layers(
        (1, 1, *event_shape(features)) if vector else event_shape(features), plan, step, random
    )


def check_mixing(mixing: str, scalar: Scalar) -> None:
    """Refuse linear mixing of numbers that live in a box or on a circle.

    :raises ValueError: for ``mixing="linear"`` with a scalar map whose support is not the reals.
    """
    if mixing == "linear" and scalar.support != "real":
        raise ValueError(
            f"mixing='linear' takes numbers off the {scalar.support} interval where {short(scalar)} works; "
            "choose another mixing"
        )


def expect_support(scalar, support: str, name: str, example: str) -> None:
    """Refuse a scalar map of another support.

    :param support: ``"real"``, ``"unit"`` or ``"circle"``; ``name``: of the builder; ``example``: a map to
        name in the message.
    :raises ValueError: for another support.
    """
    if scalar.support != support:
        raise ValueError(f"{name} takes a scalar map of support {support!r} such as {example}, got {scalar}")
