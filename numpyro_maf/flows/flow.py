# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Flows: callable pytrees whose leaves are weights, and the distributions they give.

``flow = maf(key, features)`` makes a :class:`Flow`; ``flow()``, or ``flow(context)``, is a
:class:`FlowDistribution`, an ordinary NumPyro ``TransformedDistribution``.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.tree_util import register_dataclass
from numpyro.distributions import constraints
from numpyro.distributions.transforms import AffineTransform, biject_to

from numpyro_maf.flows.bijectors import Bijector, Chain, Inverse
from numpyro_maf.flows.distributions import FlowDistribution
from numpyro_maf.flows.linear import Regression, Standardize
from numpyro_maf.flows.mades import MADE, Made
from numpyro_maf.flows.parametric import Parametric, parametric_from_spec
from numpyro_maf.flows.scalars import Scalar
from numpyro_maf.flows.supports import (
    EVENTS,
    Each,
    Logit,
    Probit,
    Reshape,
    bijection,
    is_real,
    of_one_number,
    support_from_spec,
    support_to_spec,
)
from numpyro_maf.nn.init import check_hidden
from numpyro_maf.pytrees import static

__all__ = ["BUILDERS", "Flow", "builder", "from_spec"]


@register_dataclass
@dataclass(frozen=True, eq=False)
class Flow:
    """A normalizing flow: weights as leaves, configuration static. Made by a builder.

    ``flow()`` or ``flow(context)`` is a :class:`FlowDistribution`, or a :class:`~numpyro_maf.MADE`. Training
    changes :attr:`weights`; a base that is a distribution and the two scalings are leaves too, but fixed.

    :param bijectors: from base to data, without context.
    :param event_scale: from standardised to original events; None for events in a box or on a torus.
    :param context_scale: the same for the context; None without context.
    :param base: a distribution of events, a flow or a :class:`~numpyro_maf.flows.mades.Made` that is
        trained too, or None for the standard normal, in a box or on a torus the uniform distribution.
    :param config: the builder's name and arguments, as JSON.
    """

    bijectors: Any
    event_scale: Standardize | None
    context_scale: Standardize | None
    base: Any
    config: str = static()

    @property
    def _options(self) -> dict[str, Any]:
        return json.loads(self.config)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """``(D,)``, or ``(H, W, C)`` of images."""
        shape = self._options["features"]
        return tuple(shape) if isinstance(shape, list) else (shape,)

    @property
    def features(self) -> int:
        """Width of the events, of images the number of their pixels and channels."""
        return math.prod(self.event_shape)

    @property
    def context(self) -> int:
        """Width of the context, 0 for none."""
        return self._options["context"]

    @property
    def spec(self) -> dict[str, Any]:
        """The structure as JSON-able values; :func:`from_spec` is the way back.

        :raises TypeError: for a base that is not made of NumPyro's own distributions.
        """
        base = {"flow": self.base.spec} if isinstance(self.base, Flow) else self.base
        return {**self._options, "base": None if isinstance(base, Made) else _base_to_spec(base)}

    @property
    def weights(self):
        """What training changes: the bijectors' arrays, and those of a base that is trained too."""
        if isinstance(self.base, Flow):
            return self.bijectors, self.base.weights
        return self.base if isinstance(self.base, Made) else self.bijectors

    def with_weights(self, weights) -> Flow:
        """The same flow with other :attr:`weights`, such as those of a NumPyro param site."""
        if isinstance(self.base, Flow):
            return replace(self, bijectors=weights[0], base=self.base.with_weights(weights[1]))
        name = "base" if isinstance(self.base, Made) else "bijectors"
        return replace(self, **{name: weights})

    def randomized(self, key) -> Flow:
        """With the random choices that its parts make in training made anew: masks, probes of a trace."""
        base_key, *keys = jax.random.split(key, 1 + len(self.bijectors))
        base = self.base.randomized(base_key) if isinstance(self.base, (Flow, Made)) else self.base
        bijectors = tuple(b.randomized(k) for b, k in zip(self.bijectors, keys))
        return replace(self, bijectors=bijectors, base=base)

    def initialized(self, x, context=None) -> Flow:
        """With data-dependent parameters set from events: what an :class:`~numpyro_maf.ActNorm` asks for.

        Going from data to base, each one gets the parameters with which its results have mean 0 and variance
        1 over the batch (Kingma & Dhariwal 2018, section 3.1).

        :param x: ``(N, *event_shape)``, a batch of a hundred or more.
        :param context: ``(N, C)`` for a flow with context.
        """
        for transform in (*self.outer[::-1], *([self.event_scale] if self.event_scale else [])):
            x = transform.inv(x)
        scaled = None if context is None else self._scaled(context)
        return replace(self, bijectors=Chain(self.bijectors).initialized(x, scaled).bijectors)

    def onto(self, support) -> Flow:
        """With events whose numbers have a support other than the reals: ``flow.onto(constraints.positive)``.

        :param support: NumPyro's ``positive``, an ``interval``, ``greater_than``, …, of single numbers.
        :raises ValueError: for a flow whose events are no real vectors already.
        """
        if len(self.event_shape) > 1 or self.event_scale is None or self.outer:
            raise ValueError("onto takes a flow of real vectors")
        config = json.dumps({**self._options, "support": support_to_spec(support)}, sort_keys=True)
        return replace(self, config=config)

    def regressed(self, x, context) -> Flow:
        """With a linear regression of the events on the context between its transforms and the data.

        What the transforms then learn is the residual. The regression is trained with them, from its estimate
        by ridge regression on.

        :param x: ``(N, D)``; ``context``: ``(N, C)``.
        :raises ValueError: for a flow without context or without transforms of reals, or one that has a
            regression.
        """
        if not self.context or not self.bijectors or self.event_scale is None or self.regression is not None:
            raise ValueError("regressed takes a flow of real vectors with context and without a regression")
        rows = _undone((*self.outer[::-1], self.event_scale), np.asarray(x))
        layer = Regression.init(self.features, self.context)
        scaled = _undone((self.context_scale,), self._checked(np.asarray(context)))
        return self.with_regression(layer.initialized(rows, scaled))

    def with_regression(self, layer: Regression) -> Flow:
        """With this linear regression; see :meth:`regressed`."""
        config = json.dumps({**self._options, "regression": True}, sort_keys=True)
        return replace(self, bijectors=(*self.bijectors, layer), config=config)

    @property
    def regression(self) -> Regression | None:
        """The linear regression that :meth:`regressed` added."""
        return self.bijectors[-1] if self._options.get("regression") else None

    @property
    def outer(self) -> tuple[Bijector, ...]:
        """Fixed transforms after the scaling: out of the reals to a support, from vectors to images."""
        alpha, shape = self._options.get("logit"), self.event_shape
        if "support" in self._options:
            return (Each(bijection(support_from_spec(self._options["support"]))),)
        outer: list[Bijector] = [] if alpha is None else [Inverse(Logit(alpha))]
        if len(shape) > 1:
            outer.append(Reshape(shape) if alpha is None else Reshape(shape, "box", float(alpha)))
        return tuple(outer)

    @property
    def _prefix(self) -> tuple[Any, ...]:
        """From a bounded base to the reals, where the scalar maps live."""
        base = self.base
        if not isinstance(base, dist.Distribution) or is_real(base.support):
            return ()
        if self.bijectors and not is_real(self.bijectors[0].domain):
            return ()
        support = of_one_number(base.support)
        if not isinstance(support, constraints.interval):
            return (biject_to(base.support).inv,)
        low, high = support.lower_bound, support.upper_bound
        to_box = AffineTransform(low, high - low, domain=constraints.unit_interval).inv
        gaussian = (self._options.get("scalar") or {}).get("kernel") == "gaussian"
        return to_box, Probit() if gaussian else Logit()

    def _scaled(self, context):
        return self.context_scale._inverse(self._checked(context))  # type: ignore[union-attr]

    def _checked(self, context):
        shape = jnp.shape(context)
        if not shape or shape[-1] != self.context:
            raise ValueError(
                f"context has width {shape[-1] if shape else '() (a scalar)'}, flow expects {self.context}"
            )
        return context

    def __call__(self, context=None) -> FlowDistribution | MADE:
        """The distribution, given ``context`` of shape ``(..., C)`` if the flow takes one.

        :raises ValueError: when the context is missing, unexpected or of the wrong width.
        """
        if self.context == 0 and context is not None:
            raise ValueError(f"the flow takes no context, got one of shape {jnp.shape(context)}")
        if self.context and context is None:
            raise ValueError(f"the flow expects a context of width {self.context}, got none")
        scaled = None if context is None else self._scaled(context)
        if isinstance(self.base, Made):
            return MADE(self.base, scaled, self.event_scale)
        bijectors = self.bijectors if scaled is None else tuple(b.bind(scaled) for b in self.bijectors)
        base = self.base
        if isinstance(base, Flow):
            base = base(scaled if base.context else None)
        elif base is None:
            domain = bijectors[0].domain
            ends = (-math.pi, math.pi) if domain is EVENTS["circle"] else (0.0, 1.0)
            base = dist.Normal(0.0, 1.0) if is_real(domain) else dist.Uniform(*ends)
            base = base.expand((self.features,)).to_event(1)
        scale = [] if self.event_scale is None else [self.event_scale]
        return FlowDistribution(base, [*self._prefix, *bijectors, *scale, *self.outer])


@jax.jit
def _undone(transforms, x):
    """Inverses of transforms, one after the other."""
    for transform in transforms:
        x = transform.inv(x)
    return x


# Builders are registered here -----------------------------------------------------------------------

BUILDERS: dict[str, Callable[..., Flow]] = {}


def builder(make: Callable) -> Callable[..., Flow]:
    """Turn a function of a key and options, which makes bijectors, into a builder of flows.

    The options are checked, kept as the flow's configuration, and named by the function's signature.
    ``make`` gives a tuple of bijectors, from base to data, or a :class:`~numpyro_maf.flows.mades.Made`.
    """
    signature = inspect.signature(make)

    @wraps(make)
    def build(*args, **kwargs) -> Flow:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        options = dict(given.arguments)
        del options["key"]
        _check_options(options)
        base = options.pop("base", None)
        given.arguments.update(options)
        parts = make(*given.args, **given.kwargs)
        config = {"builder": make.__name__, **options}
        width, context = math.prod(options["features"]), options["context"]
        config["features"] = width if len(options["features"]) == 1 else options["features"]
        if isinstance(parts, Made):
            continuous = not all(c.is_discrete for c in parts.columns)
            parts, base = (), parts
        else:
            continuous = is_real(parts[0].domain)
        if isinstance(base, Flow) and base.context not in (0, context):
            raise ValueError(f"base must take no context or one of width {context}, got {base.context}")
        return Flow(
            bijectors=parts,
            event_scale=Standardize.identity(width) if continuous else None,
            context_scale=Standardize.identity(context) if context else None,
            base=base,
            config=json.dumps(config, sort_keys=True, default=_to_json),
        )

    BUILDERS[make.__name__] = build
    return build


def _to_json(value):
    if isinstance(value, Parametric):
        return value.spec
    if isinstance(value, np.integer):
        return int(value)
    raise TypeError(f"cannot describe {value!r} in a flow's configuration")


def _check_options(options: dict[str, Any]) -> None:
    """Check what builders have in common, in place: features and hidden become tuples."""
    features = options["features"]
    shape = features if isinstance(features, tuple) else (features,)
    if len(shape) not in (1, 3) or not all(isinstance(n, (int, np.integer)) and n >= 1 for n in shape):
        what = (
            "integers (H, W, C) of at least 1" if isinstance(features, tuple) else "an integer of at least 1"
        )
        raise ValueError(f"features must be {what}, got {features!r}")
    options["features"] = tuple(int(n) for n in shape)
    for name, least in [("context", 0), ("transforms", 1), ("levels", 1), ("masks", 1), ("heads", 0)]:
        value = options.get(name, least)
        if not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    if not isinstance(options.get("scalar", Scalar()), Scalar):
        raise TypeError(f"scalar must be a Scalar such as Affine(), got {options['scalar']!r}")
    options["hidden"] = check_hidden(options["hidden"], options["activation"])
    alpha = options.get("logit")
    if alpha is not None:
        Logit(alpha)  # checks its argument
    _check_base(options.get("base"), shape)


def _check_base(base, shape) -> None:
    width = math.prod(shape)
    if isinstance(base, Flow):
        if base.event_shape != (width,):
            raise ValueError(f"base must have events {width} wide, got {base.event_shape}")
        if isinstance(base.base, Made) and any(c.is_discrete for c in base.base.columns):
            raise ValueError("base must have continuous columns, got a MADE with discrete ones")
    elif base is not None and not isinstance(base, dist.Distribution):
        raise TypeError(f"base must be a NumPyro distribution, a Flow or None, got {base!r}")
    elif base is not None and (base.batch_shape, base.event_shape) != ((), (width,)):
        raise ValueError(
            f"base must have batch shape () and event shape ({width},), got {base.batch_shape} and "
            f"{base.event_shape}; scalar distributions need .expand([{width}]).to_event(1)"
        )


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
    base, regressed = _base_from_spec(options.pop("base")), options.pop("regression", False)
    support = options.pop("support", None)
    options = {name: _from_json(value) for name, value in options.items()}
    if base is not None:
        options["base"] = base
    flow = BUILDERS[name](jax.random.key(0) if key is None else key, **options)
    flow = flow if support is None else flow.onto(support_from_spec(support))
    return flow.with_regression(Regression.init(flow.features, flow.context)) if regressed else flow


def _from_json(value):
    if isinstance(value, list):
        return tuple(map(_from_json, value))
    if isinstance(value, dict):
        return parametric_from_spec(value)
    return value


def _base_to_spec(base):
    """A distribution as JSON-able values: its class and arguments by name."""
    if base is None or isinstance(base, dict):
        return base
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
    if "flow" in spec:
        return from_spec(spec["flow"])
    if "to_event" in spec:
        return _base_from_spec(spec["of"]).to_event(spec["to_event"])
    if "expand" in spec:
        return _base_from_spec(spec["of"]).expand(spec["expand"])
    kind = getattr(dist, spec["distribution"], None)
    if not (isinstance(kind, type) and issubclass(kind, dist.Distribution)):
        raise ValueError(f"unknown distribution {spec['distribution']!r}")
    return kind(**{k: jnp.asarray(v["value"], v["dtype"]) for k, v in spec["arguments"].items()})
