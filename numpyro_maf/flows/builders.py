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

from numpyro_maf.flows import conditionals
from numpyro_maf.flows.assembly import Base, Features, KeyLike, Parts, builder, event_shape
from numpyro_maf.flows.autoregressive import Autoregressive, InverseAutoregressive, MaskedAutoregressive
from numpyro_maf.flows.bijectors import Bijector
from numpyro_maf.flows.conditionals import Conditional
from numpyro_maf.flows.coupling import Elementwise
from numpyro_maf.flows.coupling_builders import check_mixing, coupling_layers, expect_support
from numpyro_maf.flows.linear import LULinear
from numpyro_maf.flows.mades import Made
from numpyro_maf.flows.ode import FFJORD
from numpyro_maf.flows.scalars import Affine, Scalar
from numpyro_maf.flows.shapes import check_order
from numpyro_maf.flows.splines import CircularSpline, RQSpline
from numpyro_maf.rng import split

__all__ = ["circular", "elementwise", "ffjord", "iaf", "made", "maf", "nsf"]


@builder
def maf(
    key: KeyLike,
    features: Features,
    *,
    context: int = 0,
    transforms: int = 5,
    hidden: tuple[int, ...] = (64, 64),
    scalar: Scalar = Affine(),
    activation: str = "silu",
    base: Base = None,
    logit: float | None = None,
    order: tuple[int, ...] | None = None,
    mixing: str = "reverse",
) -> Parts:
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
    key: KeyLike,
    features: Features,
    *,
    context: int = 0,
    transforms: int = 5,
    hidden: tuple[int, ...] = (64, 64),
    scalar: Scalar = Affine(),
    activation: str = "silu",
    base: Base = None,
    logit: float | None = None,
    order: tuple[int, ...] | None = None,
    mixing: str = "reverse",
) -> Parts:
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
    key: KeyLike,
    features: Features,
    *,
    context: int = 0,
    transforms: int = 3,
    hidden: tuple[int, ...] = (64, 64),
    scalar: Scalar = RQSpline(),
    activation: str = "silu",
    base: Base = None,
    logit: float | None = None,
    order: tuple[int, ...] | None = None,
    mixing: str = "reverse",
    coupling: bool = False,
    levels: int = 2,
) -> Parts:
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
        return coupling_layers(key, features, transforms, levels, mixing, **options)
    return _autoregressive(
        MaskedAutoregressive, key, features, transforms, order, mixing,
        context=context, hidden=hidden, scalar=scalar, activation=activation,
    )  # fmt: skip


@builder
def circular(
    key: KeyLike,
    features: Features,
    *,
    context: int = 0,
    transforms: int = 3,
    hidden: tuple[int, ...] = (64, 64),
    scalar: Scalar = CircularSpline(),
    activation: str = "silu",
    base: Base = None,
    order: tuple[int, ...] | None = None,
    mixing: str = "reverse",
) -> Parts:
    """Autoregressive flow of angles, in ``[-pi, pi)``: scoring is parallel, sampling sweeps.

    Rezende et al., *Normalizing Flows on Tori and Spheres* (2020). Densities are periodic in every angle;
    the base is uniform. Choose it for directions, times of day and torsions.
    """
    expect_support(scalar, "circle", "circular", "CircularSpline()")
    return _autoregressive(
        MaskedAutoregressive, key, features, transforms, order, mixing,
        context=context, hidden=hidden, scalar=scalar, activation=activation,
    )  # fmt: skip


def _autoregressive(scheme: type[Autoregressive], key, features, transforms, order, mixing, **options):
    width = math.prod(event_shape(features))
    first = tuple(range(width)) if order is None else check_order(order, width)
    if mixing not in ("reverse", "random", "linear"):
        raise ValueError(f"mixing must be 'reverse', 'random' or 'linear', got {mixing!r}")
    check_mixing(mixing, options["scalar"])
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
    key: KeyLike,
    features: Features,
    *,
    columns: Conditional | tuple[Conditional, ...] = conditionals.Normal(),
    context: int = 0,
    hidden: tuple[int, ...] = (64, 64),
    activation: str = "silu",
    order: tuple[int, ...] | None = None,
    masks: int = 1,
    agnostic: str = "both",
    direct: bool = True,
) -> Made:
    """Masked autoencoder for distribution estimation: scoring is one pass, sampling one sweep.

    Germain, Gregor, Murray & Larochelle (2015): ``p(x) = prod_d p(x_d | x_<d)``. Calling the flow gives a
    :class:`~numpyro_maf.MADE`. Choose it for binary and categorical data and tables of mixed columns; with
    ``columns=Mixture(10)`` also as the base of another flow. One ``Normal()`` a column has one mode given the
    columns before, so it does not reach two moons, which ``Mixture(10)`` does.

    :param columns: a member of :mod:`~numpyro_maf.conditionals` for all columns, or a tuple of one for each:
        ``Normal()``, ``Mixture(10)``, ``LogMixture()``, ``Bernoulli()``, ``Categorical(3)``, ``Count()``.
    :param masks: M, how many orders and connectivities; training draws one for each step, the density is the
        mixture of all. :func:`~numpyro_maf.fit_mixture` learns its weights.
    :param agnostic: what differs between them: ``"order"`` (section 4.2), ``"connectivity"``
        (section 4.3) or ``"both"``.
    :param direct: connect columns to the conditionals of later ones directly too, beside the hidden layers.
    """
    if len(event_shape(features)) > 1:
        raise ValueError(f"made takes vectors, features must be an integer, got {features!r}")
    (width,) = event_shape(features)
    each = (columns,) * width if isinstance(columns, conditionals.Conditional) else columns
    if not isinstance(each, tuple) or not all(isinstance(c, conditionals.Conditional) for c in each):
        raise TypeError(f"columns must be a Conditional such as Normal() or a tuple of them, got {columns!r}")
    if len(each) != width:
        raise ValueError(f"columns must hold {width} conditionals, got {len(each)}")
    options = dict(context=context, hidden=hidden, activation=activation, order=order)
    return Made.init(key, each, masks=masks, agnostic=agnostic, direct=direct, **options)


@builder
def elementwise(
    key: KeyLike,
    features: Features,
    *,
    context: int = 0,
    transforms: int = 1,
    hidden: tuple[int, ...] = (64, 64),
    scalar: Scalar = RQSpline(),
    activation: str = "silu",
    base: Base = None,
    logit: float | None = None,
) -> Parts:
    """Independent dimensions, each through scalar maps of its own: both directions are parallel.

    With ``scalar=Affine()`` an affine flow. It has no dependence between dimensions, so it does not reach
    two moons. Choose it for marginals, and for what is independent given the context.

    :param hidden: of the network of the context, if any.
    """
    options = dict(context=context, hidden=hidden, scalar=scalar, activation=activation)
    keys = split(key, transforms)
    return tuple(Elementwise.init(k, math.prod(event_shape(features)), **options) for k in keys)


@builder
def ffjord(
    key: KeyLike,
    features: Features,
    *,
    context: int = 0,
    transforms: int = 1,
    hidden: tuple[int, ...] = (64, 64),
    activation: str = "tanh",
    base: Base = None,
    logit: float | None = None,
    trace: str | None = None,
    adjoint: str = "recursive",
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Parts:
    """Free-form continuous flow: both directions solve an ordinary differential equation, equally slow.

    Grathwohl et al., *FFJORD* (2019): ``dx/dt = f(x, t)``, and the log-density changes by minus the trace of
    ``df/dx``. Needs diffrax: the extra ``ode``. Choose it for smooth densities of few dimensions where no
    order and no split of the features is wanted, and time does not matter.

    :param trace: ``"exact"``; ``"hutchinson"``, an unbiased estimate for many dimensions; None for exact
        up to 10 features.
    :param adjoint: ``"recursive"``, exact gradients of the solver's steps; ``"backsolve"``, fixed memory; or
        ``"direct"``, derivatives in forward mode too.
    :param rtol: relative tolerance of the solver; ``atol``: absolute tolerance.
    """
    width = math.prod(event_shape(features))
    options = dict(context=context, hidden=hidden, activation=activation)
    options |= dict(
        trace=trace or ("exact" if width <= 10 else "hutchinson"), adjoint=adjoint, rtol=rtol, atol=atol
    )
    return tuple(FFJORD.init(k, width, **options) for k in split(key, transforms))
