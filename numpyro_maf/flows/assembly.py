# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""From a function that makes bijectors to a builder of flows: arguments are checked, and domains meet."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any, ParamSpec, TypeAlias, TypeVar, overload

import jax
import numpy as np
import numpyro.distributions as dist

from numpyro_maf import codec
from numpyro_maf.flows.bijectors import Bijector, Chain, Inverse
from numpyro_maf.flows.domains import fits, is_real, name_of
from numpyro_maf.flows.flow import BijectorFlow, Flow, Recipe
from numpyro_maf.flows.linear import Regression, Standardize
from numpyro_maf.flows.scalars import Scalar
from numpyro_maf.flows.supports import Logit, Reshape, to_reals
from numpyro_maf.nn.init import check_hidden
from numpyro_maf.pytrees import short
from numpyro_maf.rng import as_key

__all__ = ["BUILDERS", "builder", "from_spec"]

BUILDERS: dict[str, Callable[..., Any]] = {}
KeyLike: TypeAlias = "int | jax.Array"
Features: TypeAlias = "int | tuple[int, ...]"
Base: TypeAlias = "dist.Distribution | Flow | None"
Parts: TypeAlias = tuple[Bijector, ...]
P = ParamSpec("P")
F = TypeVar("F", bound=Flow)


def event_shape(features: Features) -> tuple[int, ...]:
    """``(D,)`` of the width of vectors; the shape of images as it is."""
    return features if isinstance(features, tuple) else (features,)


@overload
def builder(make: Callable[P, Parts]) -> Callable[P, BijectorFlow]: ...


@overload
def builder(make: Callable[P, F]) -> Callable[P, F]: ...


def builder(make: Callable[..., Any]) -> Callable[..., Any]:
    """Turn a function of a key and options, which makes bijectors, into a builder of flows.

    The options are checked, kept as the flow's recipe, and named by the function's signature.
    ``make`` gives a tuple of bijectors, from base to data, or a :class:`~numpyro_maf.Flow`.
    """
    signature = inspect.signature(make)
    name = make.__name__

    @wraps(make)
    def build(*args, **kwargs) -> Any:
        unknown = sorted(set(kwargs) - set(signature.parameters))
        if unknown:
            near = difflib.get_close_matches(unknown[0], signature.parameters, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{name} got an unknown option {unknown[0]!r}{hint}")
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        options = dict(given.arguments)
        options["key"] = as_key(options["key"])
        _check_options(options)
        given.arguments.update(options)
        parts: Any = make(*given.args, **given.kwargs)
        base, shape = options.pop("base", None), options["features"]
        del options["key"]
        options["features"] = shape[0] if len(shape) == 1 else shape
        recipe = Recipe(name, tuple(sorted(options.items())))
        if isinstance(parts, Flow):
            return replace(parts, recipe=recipe)  # type: ignore[type-var]  # all flows are dataclasses
        return _assembled(parts, base, shape, options, recipe)

    BUILDERS[name] = build
    return build


def _assembled(parts: tuple[Bijector, ...], base, shape, options, recipe) -> BijectorFlow:
    """A flow of bijectors from base to data; whatever leaves its domain is refused."""
    width, context, scalar = math.prod(shape), options["context"], options.get("scalar")
    chain, real = Chain(parts), is_real(parts[0].domain)
    alpha = options.get("logit")
    for first, second in zip(parts, parts[1:]):
        if not fits(second.domain, first.codomain):
            raise ValueError(f"{type(second).__name__} may take numbers out of the domain of {short(scalar)}")
    if alpha is not None and not real:
        raise ValueError(
            f"logit takes the reals to the box, but scalar={short(scalar)} does not reach all reals"
        )
    inner: tuple[Bijector, ...] = ()
    if base is not None:
        inner = _from_base(base, context, chain.domain, getattr(scalar, "link", "logit"))
    outer: list[Bijector] = [] if alpha is None else [Inverse(Logit(alpha))]
    if len(shape) > 1:
        kind = "box" if alpha is not None else getattr(scalar, "support", "real")
        outer.append(Reshape(shape, kind, float(alpha or 0.0)))
    return BijectorFlow(
        bijectors=parts,
        event_scale=Standardize.identity(width) if real else None,
        context_scale=Standardize.identity(context) if context else None,
        base=base,
        inner=inner,
        outer=tuple(outer),
        event_shape=shape,
        context=context,
        recipe=recipe,
    )


def _from_base(base, context: int, domain, link: str) -> tuple[Bijector, ...]:
    """Fixed bijectors from a base to the domain of the first bijector."""
    if isinstance(base, Flow) and base.context not in (0, context):
        raise ValueError(f"base must take no context or one of width {context}, got {base.context}")
    if is_real(domain):
        return to_reals(base.support, link)
    if not fits(base.support, domain) or not fits(domain, base.support):
        raise ValueError(
            f"base must live on {name_of(domain)}, where the scalar maps do, and fill it; it lives on "
            f"{name_of(base.support)}"
        )
    return ()


def _check_options(options: dict[str, Any]) -> None:
    """Check what builders have in common, in place: features and hidden become tuples."""
    features = options["features"]
    shape = event_shape(features)
    whole = all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n >= 1 for n in shape)
    if len(shape) not in (1, 3) or not whole:
        what = (
            "integers (H, W, C) of at least 1" if isinstance(features, tuple) else "an integer of at least 1"
        )
        raise ValueError(f"features must be {what}, got {features!r}")
    options["features"] = tuple(int(n) for n in shape)
    for name, least in [("context", 0), ("transforms", 1), ("levels", 1), ("masks", 1), ("heads", 0)]:
        value = options.get(name, least)
        if not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if name in options:
            options[name] = int(value)
    if not isinstance(options.get("scalar", Scalar()), Scalar):
        raise TypeError(f"scalar must be a Scalar such as Affine(), got {options['scalar']!r}")
    options["hidden"] = check_hidden(options["hidden"], options["activation"])
    if options.get("order") is not None:
        options["order"] = tuple(options["order"])
    if options.get("logit") is not None:
        Logit(options["logit"])  # checks its argument
    _check_base(options.get("base"), shape)


def _check_base(base, shape) -> None:
    width = math.prod(shape)
    if isinstance(base, Flow):
        if base.event_shape != (width,):
            raise ValueError(f"base must have events {width} wide, got {base.event_shape}")
        if base.is_discrete.any():
            raise ValueError("base must have continuous columns, got a MADE with discrete ones")
    elif base is not None and not isinstance(base, dist.Distribution):
        raise TypeError(f"base must be a NumPyro distribution, a Flow or None, got {base!r}")
    elif base is not None and (base.batch_shape, base.event_shape) != ((), (width,)):
        raise ValueError(
            f"base must have batch shape () and event shape ({width},), got {base.batch_shape} and "
            f"{base.event_shape}; scalar distributions need .expand([{width}]).to_event(1)"
        )
    elif base is not None and base.support.is_discrete:
        raise ValueError(f"base must be continuous, got {base}")


def from_spec(spec: dict[str, Any], key=None) -> Any:
    """A flow of the structure that :attr:`Flow.spec` describes, with fresh weights.

    :param spec: as :attr:`Flow.spec` gives it, or as it comes back from JSON.
    :param key: for the weights; None for a fixed one.
    :raises ValueError: for a builder that is none of :data:`BUILDERS`.
    """
    options = dict(spec)
    name = options.pop("builder", None)
    if name not in BUILDERS:
        raise ValueError(f"unknown builder {name!r}, expected one of {sorted(BUILDERS)}")
    base, support = options.pop("base", None), options.pop("support", None)
    regressed = options.pop("regression", False)
    options = {name: codec.read(value) for name, value in options.items()}
    if base is not None:
        options["base"] = from_spec(base["flow"]) if "flow" in base else codec.read(base)
    flow = BUILDERS[name](jax.random.key(0) if key is None else key, **options)
    flow = flow if support is None else flow.onto(codec.read(support))
    return flow.with_regression(Regression.init(flow.features, flow.context)) if regressed else flow
