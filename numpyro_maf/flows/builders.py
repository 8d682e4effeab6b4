# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Builders: who conditions on whom, a scalar map, a direction, and how the layers are mixed.

Each takes a key, the width of the events, ``(H, W, C)`` for images, and keywords, and gives a
:class:`~numpyro_maf.Flow`. Arguments not described with a builder are as for :func:`maf`.
"""

from __future__ import annotations

import math

import jax
import numpy as np

from numpyro_maf.flows import conditionals, images
from numpyro_maf.flows.autoregressive import Autoregressive, InverseAutoregressive, MaskedAutoregressive
from numpyro_maf.flows.bijectors import Bijector, check_order
from numpyro_maf.flows.coupling import Coupling, Elementwise
from numpyro_maf.flows.flow import builder
from numpyro_maf.flows.linear import ActNorm, LULinear, Permute
from numpyro_maf.flows.mades import Made
from numpyro_maf.flows.ode import FFJORD
from numpyro_maf.flows.scalars import Additive, Affine, Compose, MixtureCDF
from numpyro_maf.flows.splines import CircularSpline, PiecewiseQuadratic, RQSpline
from numpyro_maf.nn.conv import ConvNet
from numpyro_maf.rng import split

__all__ = [
    "circular",
    "elementwise",
    "ffjord",
    "flowpp",
    "glow",
    "iaf",
    "made",
    "maf",
    "nice",
    "nis",
    "nsf",
    "realnvp",
]


# Autoregressive ---------------------------------------------------------------------------------


@builder
def maf(
    key, features, *, context=0, transforms=5, hidden=(64, 64), scalar=Affine(), activation="silu",
    base=None, logit=None, order=None, mixing="reverse",
):  # fmt: skip
    """Masked autoregressive flow: scoring is parallel, sampling sweeps.

    Papamakarios, Pavlakou & Murray (2017): ``u_d = (x_d - m(x_<d)) exp(-s(x_<d))`` in each transform, or any
    other scalar map ``u_d = f(x_d; p(x_<d))``. With ``base=made(key, features, columns=Mixture(10))`` it is
    MAF MoG, with ``scalar=MixtureCDF()`` a flow of distribution functions. Choose it to fit a density to
    data.

    :param key: a ``jax.random`` key for the initial weights.
    :param features: D, the width of the events, 1 or more; or ``(H, W, C)``.
    :param context: C, the width of the context, 0 for none. For classes, their number: give them one-hot.
    :param transforms: how many autoregressive transforms.
    :param hidden: widths of each network's hidden layers.
    :param scalar: the scalar map, such as ``Affine()``, ``Additive()``, ``RQSpline()`` or ``MixtureCDF()``.
    :param activation: ``"silu"``, ``"relu"``, ``"gelu"``, ``"elu"`` or ``"tanh"``. All but relu give a
        smooth density, as HMC prefers.
    :param base: a distribution with event shape ``(D,)``, never trained; a flow, which is; None for the
        standard normal. A base that is bounded, as Uniform or Beta, is first mapped to the reals.
    :param logit: None; or alpha, for events in the unit box, on the logit of which the flow works.
    :param order: the order of the features in the first transform; None for ``0, 1, …``.
    :param mixing: ``"reverse"`` the order from one transform to the next, take fixed ``"random"``
        ones, or ``"linear"``: random ones with an LU linear map between transforms.
    :raises ValueError: for an argument out of range; the message names it.
    """
    return _autoregressive(
        MaskedAutoregressive, key, features, transforms, order, mixing,
        context=context, hidden=hidden, scalar=scalar, activation=activation,
    )  # fmt: skip


@builder
def iaf(
    key, features, *, context=0, transforms=5, hidden=(64, 64), scalar=Affine(), activation="silu",
    base=None, logit=None, order=None, mixing="reverse",
):  # fmt: skip
    """Inverse autoregressive flow: sampling is parallel, scoring others' samples sweeps.

    Kingma et al. (2016), eq. 10-11: ``x_d = u_d exp(s(u_<d)) + m(u_<d)``, with any scalar map. Choose it as a
    guide, or as the student of :func:`~numpyro_maf.distill`.
    """
    return _autoregressive(
        InverseAutoregressive, key, features, transforms, order, mixing,
        context=context, hidden=hidden, scalar=scalar, activation=activation,
    )  # fmt: skip


@builder
def nsf(
    key, features, *, context=0, transforms=3, hidden=(64, 64), scalar=RQSpline(), activation="silu",
    base=None, logit=None, order=None, mixing="reverse", coupling=False, levels=2,
):  # fmt: skip
    """Neural spline flow: multimodal and sharp-edged densities in few transforms.

    Durkan, Bekasov, Murray & Papamakarios (2019). Autoregressive, RQ-NSF (AR): scoring is parallel, sampling
    sweeps. With ``coupling=True``, RQ-NSF (C): both directions are parallel, at some cost in fit. The
    scalar maps are rational-quadratic splines, ``RQSpline(bins=..., bound=...)``. The paper's networks
    are mixed by ``mixing="linear"``. Choose it first for low-dimensional densities.

    :param coupling: couplings, as in :func:`realnvp`, whose ``mixing`` then counts.
    """
    if coupling:
        if order is not None:
            raise ValueError("order is for autoregressive flows, coupling=True has none")
        options = dict(context=context, hidden=hidden, scalar=scalar, activation=activation)
        mixing = "random" if mixing == "reverse" else mixing
        return _coupling(key, features, transforms, levels, mixing, **options)
    return _autoregressive(
        MaskedAutoregressive, key, features, transforms, order, mixing,
        context=context, hidden=hidden, scalar=scalar, activation=activation,
    )  # fmt: skip


@builder
def circular(
    key, features, *, context=0, transforms=3, hidden=(64, 64), scalar=CircularSpline(), activation="silu",
    base=None, order=None, mixing="reverse",
):  # fmt: skip
    """Autoregressive flow of angles, in ``[-pi, pi)``: scoring is parallel, sampling sweeps.

    Rezende et al., *Normalizing Flows on Tori and Spheres* (2020). Densities are periodic in every angle;
    the base is uniform. Choose it for directions, times of day and torsions.
    """
    _expect(scalar, "circle", "circular", "CircularSpline()")
    return _autoregressive(
        MaskedAutoregressive, key, features, transforms, order, mixing,
        context=context, hidden=hidden, scalar=scalar, activation=activation,
    )  # fmt: skip


def _autoregressive(scheme: type[Autoregressive], key, features, transforms, order, mixing, **options):
    width = math.prod(features)
    first = tuple(range(width)) if order is None else check_order(order, width)
    if mixing not in ("reverse", "random", "linear"):
        raise ValueError(f"mixing must be 'reverse', 'random' or 'linear', got {mixing!r}")
    made: list[Bijector] = []
    for i, k in enumerate(split(key, transforms)):
        if mixing == "reverse":
            this = first[:: (-1) ** i]
        else:
            # Orders are static, so they cannot come from a key, which may be traced.
            this = tuple(np.random.default_rng(i).permutation(width).tolist()) if i else first
        if i and mixing == "linear":
            made.append(LULinear.init(jax.random.fold_in(k, 1), width))
        made.append(scheme.init(k, width, order=this, **options))
    return tuple(made)


@builder
def made(
    key, features, *, columns=conditionals.Normal(), context=0, hidden=(64, 64), activation="silu",
    order=None, masks=1, agnostic="both", direct=True,
):  # fmt: skip
    """Masked autoencoder for distribution estimation: scoring is one pass, sampling one sweep.

    Germain, Gregor, Murray & Larochelle (2015): ``p(x) = prod_d p(x_d | x_<d)``. Calling the flow gives a
    :class:`~numpyro_maf.MADE`. Choose it for binary and categorical data and tables of mixed columns; with
    ``columns=Mixture(10)`` also as the base of another flow. One ``Normal()`` a column has one mode given the
    columns before, so it does not reach two moons, which ``Mixture(10)`` does.

    :param columns: a member of :mod:`~numpyro_maf.conditionals` for all columns, or a tuple of one for each:
        ``Normal()``, ``Mixture(10)``, ``Bernoulli()``, ``Categorical(3)``.
    :param masks: M, how many orders and connectivities; training draws one for each step, the density is the
        mixture of all. :func:`~numpyro_maf.fit_mixture` learns its weights.
    :param agnostic: what differs between them: ``"order"`` (section 4.2), ``"connectivity"``
        (section 4.3) or ``"both"``.
    :param direct: connect columns to the conditionals of later ones directly too, beside the hidden layers.
    """
    if len(features) > 1:
        raise ValueError(f"made takes vectors, features must be an integer, got {features!r}")
    each = (columns,) * features[0] if isinstance(columns, conditionals.Conditional) else columns
    if not isinstance(each, tuple) or not all(isinstance(c, conditionals.Conditional) for c in each):
        raise TypeError(f"columns must be a Conditional such as Normal() or a tuple of them, got {columns!r}")
    if len(each) != features[0]:
        raise ValueError(f"columns must hold {features[0]} conditionals, got {len(each)}")
    options = dict(context=context, hidden=hidden, activation=activation, order=order)
    return Made.init(key, each, masks=masks, agnostic=agnostic, direct=direct, **options)


# Coupling ---------------------------------------------------------------------------------------


@builder
def realnvp(
    key, features, *, context=0, transforms=8, hidden=(64, 64), scalar=Affine(), activation="silu",
    base=None, logit=None, mixing="random", levels=2,
):  # fmt: skip
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
    return _coupling(key, features, transforms, levels, mixing, **options)


@builder
def nice(
    key, features, *, context=0, transforms=4, hidden=(64, 64), activation="silu",
    base=None, logit=None, mixing="alternate", levels=1,
):  # fmt: skip
    """Couplings with shifts, and a diagonal scaling at the end: both directions are parallel.

    Dinh, Krueger & Bengio, *NICE* (2015): ``u_B = x_B - m(x_A)``, volume preserving but for the
    scaling of section 3.3. It cannot widen one place and narrow another, so it does not reach most
    densities (two moons: 0.02 nats are out of its reach): choose it as a baseline. ``levels`` as for
    :func:`realnvp`.
    """
    options = dict(context=context, hidden=hidden, scalar=Additive(), activation=activation)
    scaling = Elementwise.init(
        key, math.prod(features), context=context, hidden=hidden, activation=activation
    )
    return scaling, *_coupling(key, features, transforms, levels, mixing, **options)


@builder
def nis(
    key, features, *, context=0, transforms=4, hidden=(64, 64), scalar=PiecewiseQuadratic(),
    activation="silu", base=None, mixing="random",
):  # fmt: skip
    """Couplings on the unit box, of neural importance sampling: both directions are parallel.

    Mueller et al., *Neural Importance Sampling* (2019): the scalar maps are piecewise-quadratic distribution
    functions, or ``PiecewiseLinear()`` ones; the base is uniform. Choose it for integrands and densities on
    ``[0, 1]^D``, whose edges it represents exactly.
    """
    _expect(scalar, "unit", "nis", "PiecewiseQuadratic()")
    options = dict(context=context, hidden=hidden, scalar=scalar, activation=activation)
    return _coupling(key, features, transforms, 1, mixing, **options)


@builder
def glow(
    key, features, *, context=0, transforms=8, hidden=(64, 64), scalar=Affine(), activation="silu",
    base=None, logit=None, levels=2,
):  # fmt: skip
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
    if len(features) == 1:
        plan = ["channels"] * transforms
    options = dict(context=context, hidden=hidden, scalar=scalar, activation=activation)
    return _steps(key, features, plan, normalize=True, linear=True, **options)


@builder
def flowpp(
    key, features, *, context=0, transforms=4, hidden=(32, 32), scalar=Compose((MixtureCDF(8), Affine())),
    activation="silu", base=None, logit=None, heads=4,
):  # fmt: skip
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
    if len(features) == 1:
        plan = ["channels"] * transforms
    options = dict(context=context, hidden=hidden, scalar=scalar, activation=activation, heads=heads)
    return _steps(key, features, plan, normalize=True, linear=True, **options)


def _coupling(key, features, transforms, levels, mixing, **options):
    """RealNVP's architecture for vectors and images."""
    if mixing not in ("alternate", "random", "linear"):
        raise ValueError(f"mixing must be 'alternate', 'random' or 'linear', got {mixing!r}")
    board = ["checkerboard"] * transforms
    level = [*board, "squeeze", *["channels"] * transforms, "split"]
    plan = level * (levels - 1) + board
    if len(features) == 1:
        plan = ["channels"] * transforms
    return _steps(key, features, plan, linear=mixing == "linear", random=mixing == "random", **options)


def _steps(
    key, features, plan, *, context, hidden, scalar, activation, heads=None, normalize=False, linear=False,
    random=False,
):  # fmt: skip
    """Bijectors of a plan, see :func:`~numpyro_maf.flows.images.layers`: normalise, mix, couple."""
    vector = len(features) == 1

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

    return images.layers((1, 1, *features) if vector else features, plan, step, random)


# Continuous -------------------------------------------------------------------------------------


@builder
def ffjord(
    key, features, *, context=0, transforms=1, hidden=(64, 64), activation="tanh", base=None, logit=None,
    trace=None, adjoint="recursive", rtol=1e-5, atol=1e-5,
):  # fmt: skip
    """Free-form continuous flow: both directions solve an ordinary differential equation, equally slow.

    Grathwohl et al., *FFJORD* (2019): ``dx/dt = f(x, t)``, and the log-density changes by minus the trace of
    ``df/dx``. Needs diffrax: the extra ``ode``. Choose it for smooth densities of few dimensions where no
    order and no split of the features is wanted, and time does not matter.

    :param trace: ``"exact"``; ``"hutchinson"``, an unbiased estimate for many dimensions; None for exact
        up to 10 features.
    :param adjoint: ``"recursive"``, exact gradients of the solver's steps, or ``"backsolve"``, fixed memory.
    :param rtol: relative tolerance of the solver; ``atol``: absolute tolerance.
    """
    width = math.prod(features)
    options = dict(context=context, hidden=hidden, activation=activation)
    options |= dict(
        trace=trace or ("exact" if width <= 10 else "hutchinson"), adjoint=adjoint, rtol=rtol, atol=atol
    )
    return tuple(FFJORD.init(k, width, **options) for k in split(key, transforms))


# Elementwise ------------------------------------------------------------------------------------


@builder
def elementwise(
    key, features, *, context=0, transforms=1, hidden=(64, 64), scalar=RQSpline(), activation="silu",
    base=None, logit=None,
):  # fmt: skip
    """Independent dimensions, each through scalar maps of its own: both directions are parallel.

    With ``scalar=Affine()`` an affine flow. It has no dependence between dimensions, so it does not reach
    two moons. Choose it for marginals, and for what is independent given the context.

    :param hidden: of the network of the context, if any.
    """
    options = dict(context=context, hidden=hidden, scalar=scalar, activation=activation)
    keys = split(key, transforms)
    return tuple(Elementwise.init(k, math.prod(features), **options) for k in keys)


def _expect(scalar, support: str, name: str, example: str) -> None:
    if scalar.support != support:
        raise ValueError(f"{name} takes a scalar map of support {support!r} such as {example}, got {scalar}")
