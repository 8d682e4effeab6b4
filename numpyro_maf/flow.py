# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Flows: callable pytrees whose leaves are weights, and the distributions they give.

``flow = maf(key, features)`` makes a :class:`Flow`; ``flow()``, or ``flow(context)``, is a
:class:`FlowDistribution`, an ordinary NumPyro ``TransformedDistribution``. Builders combine who conditions
on whom, a scalar map and a direction; each takes the same first arguments and keywords.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.tree_util import register_dataclass
from numpyro.distributions import constraints
from numpyro.distributions.batch_util import promote_batch_shape, vmap_over
from numpyro.distributions.transforms import ComposeTransform, biject_to
from numpyro.distributions.util import sum_rightmost, validate_sample

from numpyro_maf.autoregressive import (
    Autoregressive,
    Elementwise,
    InverseAutoregressive,
    MaskedAutoregressive,
)
from numpyro_maf.bijectors import Bijector, Standardize, check_order, static
from numpyro_maf.nets import check_hidden
from numpyro_maf.scalars import Affine, RQSpline, Scalar, scalar_from_spec

__all__ = ["BUILDERS", "Flow", "FlowDistribution", "elementwise", "iaf", "maf", "nsf"]


class FlowDistribution(dist.TransformedDistribution):
    """A base distribution through bijectors, scored in one pass of each.

    Leaves may have gained leading axes since construction, as they do on the way out of ``vmap`` and of
    NumPyro's ``scan``: those are batch axes, and every method vectorises over them.

    :param base_distribution: a NumPyro distribution.
    :param transforms: one NumPyro transform or a list of them; bijectors are scored in one pass.
    """

    pytree_aux_fields = ("_ranks", "_own_batch_shape")

    def __init__(self, base_distribution, transforms, *, validate_args=None):
        super().__init__(base_distribution, transforms, validate_args=validate_args)
        self._ranks = tuple(map(jnp.ndim, self._leaves()))
        self._own_batch_shape = self.batch_shape

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self):
        """All reals, or the image of the base's support where that is smaller."""
        return self._codomain if _is_real(self.base_dist.support) else _Image(self)

    @property
    def _codomain(self):
        return dist.TransformedDistribution.support.__get__(self)

    def log_prob(self, value, intermediates=None):
        """``(..., D) -> (...)``: one pass of each bijector; none with ``sample_with_intermediates``'s."""
        if self._stacked:
            return self._stacked_log_prob(value)
        if intermediates is not None:
            return super().log_prob(value, intermediates)
        return self._log_prob(value)

    @validate_sample
    def _log_prob(self, value):
        log_prob, event_dim = 0.0, self.event_dim
        for transform in reversed(self.transforms):
            if isinstance(transform, Bijector):
                value, log_det = transform.inverse_and_log_det(value)
            else:
                y, value = value, transform.inv(value)
                log_det = -transform.log_abs_det_jacobian(value, y)
            extra = event_dim - transform.codomain.event_dim
            log_prob = log_prob + sum_rightmost(log_det, extra)
            event_dim = transform.domain.event_dim + extra
        base = self.base_dist.log_prob(value)
        if not _is_real(self.base_dist.support):
            base = jnp.where(self.base_dist.support(value), base, -jnp.inf)
        return log_prob + sum_rightmost(base, event_dim - self.base_dist.event_dim)

    def sample(self, key, sample_shape=()):
        """``sample_shape + batch_shape + (D,)`` draws."""
        if self._stacked:
            return self._stacked_sample(key, sample_shape)
        return super().sample(key, sample_shape)

    rsample = sample

    def sample_with_intermediates(self, key, sample_shape=()):
        if self._stacked:
            return self._stacked_sample(key, sample_shape), []
        return super().sample_with_intermediates(key, sample_shape)

    # Leading axes that the leaves have gained ---------------------------------------------

    def _leaves(self):
        return jax.tree.leaves((self.base_dist, self.transforms))

    @property
    def _stacked(self) -> tuple[int, ...]:
        """The shape of the leading axes that every leaf has gained since construction."""
        shapes = [jnp.shape(leaf) for leaf in self._leaves()]
        gained = {len(shape) - rank for shape, rank in zip(shapes, self._ranks)}
        if len(gained) != 1 or min(gained) < 0:
            raise ValueError(
                "the leaves of a FlowDistribution differ in the axes they gained since it was made: "
                f"{sorted(gained)}; map over all of them alike"
            )
        return shapes[0][: gained.pop()]

    def _peel(self):
        """Without the first gained axis, which has length 1."""
        return jax.tree.map(lambda leaf: leaf[0], self)

    def _stacked_sample(self, key, sample_shape):
        axis, count = len(sample_shape), self._stacked[0]
        if count == 1:
            return jnp.expand_dims(self._peel().sample(key, sample_shape), axis)
        keys = jax.random.split(key, count)
        draw = partial(FlowDistribution.sample, sample_shape=sample_shape)
        return jax.vmap(draw, out_axes=axis)(self, keys)

    def _stacked_log_prob(self, value):
        batch_ndim = len(self._stacked) + len(self._own_batch_shape)
        missing = batch_ndim + self.event_dim - jnp.ndim(value)
        value = jnp.reshape(value, (1,) * missing + jnp.shape(value))
        axis = value.ndim - self.event_dim - batch_ndim
        if self._stacked[0] == 1:
            return self._peel().log_prob(value)
        if value.shape[axis] == 1:
            value = jnp.repeat(value, self._stacked[0], axis)
        return jax.vmap(FlowDistribution.log_prob, in_axes=(0, axis), out_axes=axis)(self, value)


class _Image(constraints.Constraint):
    """What a flow makes of a base whose support is not all of the reals."""

    event_dim = 1

    def __init__(self, flow_distribution):
        self.distribution = flow_distribution

    def __call__(self, x):
        for transform in reversed(self.distribution.transforms):
            x = transform.inv(x)
        return self.distribution.base_dist.support(x)

    def feasible_like(self, prototype):
        d = self.distribution
        x = d.base_dist.support.feasible_like(jnp.broadcast_to(prototype, jnp.shape(prototype)))
        for transform in d.transforms:
            x = transform(x)
        return x

    def tree_flatten(self):
        return (self.distribution,), (("distribution",), {})


@biject_to.register(_Image)
def _biject_to_image(constraint):
    d = constraint.distribution
    return ComposeTransform([biject_to(d.base_dist.support), *d.transforms])


@promote_batch_shape.register
def _promote_flow(d: FlowDistribution):
    promoted = copy.copy(d)
    promoted._batch_shape = d._stacked + d._own_batch_shape
    return promoted


@vmap_over.register
def _vmap_over_bijector(bijector: Bijector, **axes):
    mapped = copy.copy(bijector)
    for name in bijector.tree_flatten()[1][0]:
        object.__setattr__(mapped, name, axes.get(name))
    return mapped


def _is_real(support) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real


@register_dataclass
@dataclass(frozen=True, eq=False)
class Flow:
    """A normalizing flow: weights as leaves, configuration static. Made by a builder.

    ``flow()`` or ``flow(context)`` is a :class:`FlowDistribution`. The leaves of ``bijectors`` are what
    training changes; ``base`` and the two scalings are leaves too, but fixed: :func:`numpyro_maf.fit`
    and :func:`numpyro_maf.flow_module` leave them alone.

    :param bijectors: from base to data, without context.
    :param event_scale: from standardised to original events.
    :param context_scale: the same for the context; None without context.
    :param base: a distribution of events, or None for the standard normal.
    :param config: the builder's name and arguments, as JSON.
    """

    bijectors: Any
    event_scale: Standardize
    context_scale: Standardize | None
    base: Any
    config: str = static()

    @property
    def _options(self) -> dict[str, Any]:
        return json.loads(self.config)

    @property
    def features(self) -> int:
        """Width of the events."""
        return self._options["features"]

    @property
    def context(self) -> int:
        """Width of the context, 0 for none."""
        return self._options["context"]

    @property
    def spec(self) -> dict[str, Any]:
        """The structure as JSON-able values; :func:`from_spec` is the way back.

        :raises TypeError: for a base that is not made of NumPyro's own distributions.
        """
        return {**self._options, "base": _base_to_spec(self.base)}

    def __call__(self, context=None) -> FlowDistribution:
        """The distribution, given ``context`` of shape ``(..., C)`` if the flow takes one.

        :raises ValueError: when the context is missing, unexpected or of the wrong width.
        """
        if self.context == 0 and context is not None:
            raise ValueError(f"the flow takes no context, got one of shape {jnp.shape(context)}")
        if self.context and context is None:
            raise ValueError(f"the flow expects a context of width {self.context}, got none")
        bijectors = self.bijectors
        if context is not None:
            shape = jnp.shape(context)
            if not shape or shape[-1] != self.context:
                raise ValueError(
                    f"context has width {shape[-1] if shape else '() (a scalar)'}, "
                    f"flow expects {self.context}"
                )
            context = self.context_scale._inverse(context)  # type: ignore[union-attr]
            bijectors = tuple(b.bind(context) if hasattr(b, "bind") else b for b in bijectors)
        base = self.base
        if base is None:
            base = dist.Normal(0.0, 1.0).expand((self.features,)).to_event(1)
        return FlowDistribution(base, [*bijectors, self.event_scale])


# Builders ---------------------------------------------------------------------------------------


def _build(
    builder: str,
    scheme: type[Autoregressive] | type[Elementwise],
    key,
    features: int,
    *,
    context: int,
    transforms: int,
    hidden,
    scalar: Scalar,
    activation: str,
    base,
    order=None,
    mixing: str | None = None,
) -> Flow:
    for name, value, least in [
        ("features", features, 1), ("context", context, 0), ("transforms", transforms, 1)
    ]:  # fmt: skip
        if not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    if not isinstance(scalar, Scalar):
        raise TypeError(f"scalar must be a Scalar such as Affine(), got {scalar!r}")
    if base is not None and not isinstance(base, dist.Distribution):
        raise TypeError(f"base must be a NumPyro distribution or None, got {base!r}")
    if base is not None and (base.batch_shape, base.event_shape) != ((), (features,)):
        raise ValueError(
            f"base must have batch shape () and event shape ({features},), got {base.batch_shape} and "
            f"{base.event_shape}; scalar distributions need .expand([{features}]).to_event(1)"
        )
    hidden = check_hidden(hidden, activation)
    options: dict[str, Any] = dict(context=context, hidden=hidden, scalar=scalar)
    options["activation"] = activation
    orders: Any = [{}] * transforms
    if scheme is not Elementwise:
        orders = [{"order": o} for o in _orders(features, transforms, order, mixing)]
    keys = jax.random.split(key, transforms)
    config = dict(builder=builder, features=features, transforms=transforms, **options)
    config["scalar"] = scalar.spec
    if scheme is not Elementwise:
        config |= dict(order=order, mixing=mixing)
    return Flow(
        bijectors=tuple(scheme.init(k, features, **options, **o) for k, o in zip(keys, orders)),
        event_scale=Standardize(jnp.zeros(features), jnp.ones(features)),
        context_scale=Standardize(jnp.zeros(context), jnp.ones(context)) if context else None,
        base=base,
        config=json.dumps(config, sort_keys=True),
    )


def _orders(features: int, transforms: int, order, mixing):
    """The order of each transform: reversed from one to the next, or fixed random ones."""
    first = tuple(range(features)) if order is None else check_order(order, features)
    if mixing == "reverse":
        return [first[:: (-1) ** i] for i in range(transforms)]
    if mixing == "random":
        # Orders are static, so they cannot come from a key, which may be traced.
        shuffles = (np.random.default_rng(i).permutation(features) for i in range(1, transforms))
        return [first, *(tuple(s.tolist()) for s in shuffles)]
    raise ValueError(f"mixing must be 'reverse' or 'random', got {mixing!r}")


def maf(
    key, features, *, context=0, transforms=5, hidden=(64, 64), scalar=Affine(), activation="silu",
    base=None, order=None, mixing="reverse",
) -> Flow:  # fmt: skip
    """Masked autoregressive flow: scoring is parallel, sampling sweeps; to fit densities to data.

    Papamakarios, Pavlakou & Murray (2017), with any scalar map.

    :param key: a ``jax.random`` key for the initial weights.
    :param features: D, the width of the events, 1 or more.
    :param context: C, the width of the context, 0 for none.
    :param transforms: how many autoregressive transforms.
    :param hidden: widths of each network's hidden layers.
    :param scalar: the scalar map: ``Affine()``, ``Additive()``, ``RQSpline()``.
    :param activation: ``"silu"``, ``"relu"``, ``"gelu"``, ``"elu"`` or ``"tanh"``. All but relu give a
        smooth density, as HMC prefers.
    :param base: a distribution with event shape ``(D,)``; None for the standard normal. Never trained.
    :param order: the order of the features in the first transform; None for ``0, 1, …``.
    :param mixing: ``"reverse"`` the order from one transform to the next, or take fixed ``"random"``
        ones.
    :raises ValueError: for an argument out of range; the message names it.
    """
    return _build(
        "maf", MaskedAutoregressive, key, features, context=context, transforms=transforms,
        hidden=hidden, scalar=scalar, activation=activation, base=base, order=order, mixing=mixing,
    )  # fmt: skip


def iaf(
    key, features, *, context=0, transforms=5, hidden=(64, 64), scalar=Affine(), activation="silu",
    base=None, order=None, mixing="reverse",
) -> Flow:  # fmt: skip
    """Inverse autoregressive flow: sampling is parallel, scoring others' samples sweeps; for guides.

    Kingma et al. (2016), with any scalar map. Arguments as for :func:`maf`.
    """
    return _build(
        "iaf", InverseAutoregressive, key, features, context=context, transforms=transforms,
        hidden=hidden, scalar=scalar, activation=activation, base=base, order=order, mixing=mixing,
    )  # fmt: skip


def nsf(
    key, features, *, context=0, transforms=3, hidden=(64, 64), scalar=RQSpline(), activation="silu",
    base=None, order=None, mixing="reverse",
) -> Flow:  # fmt: skip
    """Neural spline flow, autoregressive: a MAF whose scalar maps are rational-quadratic splines.

    Durkan, Bekasov, Murray & Papamakarios (2019), RQ-NSF (AR). Multimodal and sharp-edged densities in few
    transforms. Arguments as for :func:`maf`; ``scalar=RQSpline(bins=..., bound=...)``.
    """
    return _build(
        "nsf", MaskedAutoregressive, key, features, context=context, transforms=transforms,
        hidden=hidden, scalar=scalar, activation=activation, base=base, order=order, mixing=mixing,
    )  # fmt: skip


def elementwise(
    key, features, *, context=0, transforms=1, hidden=(64, 64), scalar=RQSpline(), activation="silu",
    base=None,
) -> Flow:  # fmt: skip
    """Independent dimensions, each through scalar maps of its own; both directions are parallel.

    Arguments as for :func:`maf`; ``hidden`` is that of the network of the context, if any.
    """
    return _build(
        "elementwise", Elementwise, key, features, context=context, transforms=transforms,
        hidden=hidden, scalar=scalar, activation=activation, base=base,
    )  # fmt: skip


BUILDERS: dict[str, Callable[..., Flow]] = {f.__name__: f for f in (maf, iaf, nsf, elementwise)}


def from_spec(spec: dict[str, Any], key=None) -> Flow:
    """A flow of the structure that :attr:`Flow.spec` describes, with fresh weights.

    :param spec: as :attr:`Flow.spec` gives it, or as it comes back from JSON.
    :param key: for the weights; None for a fixed one.
    :raises ValueError: for a builder that is none of :data:`BUILDERS`.
    """
    options = dict(spec)
    name = options.pop("builder", None)
    if name not in BUILDERS:
        raise ValueError(f"unknown builder {name!r}, expected one of {sorted(BUILDERS)}")
    options["scalar"] = scalar_from_spec(options["scalar"])
    options["base"] = _base_from_spec(options["base"])
    if options.get("order") is not None:
        options["order"] = tuple(options["order"])
    return BUILDERS[name](jax.random.key(0) if key is None else key, **options)


def _base_to_spec(base):
    """A distribution as JSON-able values: its class and arguments by name."""
    if base is None:
        return None
    if isinstance(base, dist.Independent):
        inner = _base_to_spec(base.base_dist)
        return {"to_event": base.reinterpreted_batch_ndims, "of": inner}
    if isinstance(base, dist.ExpandedDistribution):
        return {"expand": list(base.batch_shape), "of": _base_to_spec(base.base_dist)}
    name = type(base).__name__
    if getattr(dist, name, None) is not type(base):
        raise TypeError(
            f"a base of type {name} cannot be described; use NumPyro's own distributions, "
            "with .expand and .to_event"
        )
    arguments = {key: np.asarray(value, jnp.result_type(value)) for key, value in base.get_args().items()}
    return {
        "distribution": name,
        "arguments": {k: {"dtype": str(v.dtype), "value": v.tolist()} for k, v in arguments.items()},
    }


def _base_from_spec(spec):
    if spec is None:
        return None
    if "to_event" in spec:
        return _base_from_spec(spec["of"]).to_event(spec["to_event"])
    if "expand" in spec:
        return _base_from_spec(spec["of"]).expand(spec["expand"])
    kind = getattr(dist, spec["distribution"], None)
    if not (isinstance(kind, type) and issubclass(kind, dist.Distribution)):
        raise ValueError(f"unknown distribution {spec['distribution']!r}")
    return kind(**{k: jnp.asarray(v["value"], v["dtype"]) for k, v in spec["arguments"].items()})
