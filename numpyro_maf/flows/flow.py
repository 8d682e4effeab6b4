# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Flows: callable pytrees whose leaves are weights, and the distributions they give.

``flow = maf(key, features)`` makes a :class:`Flow`; ``flow()``, or ``flow(context)``, is an ordinary NumPyro
distribution. Two kinds are built: :class:`BijectorFlow`, bijectors after a base, and
:class:`~numpyro_maf.flows.mades.Made`; an :class:`~numpyro_maf.Ensemble` holds several of one structure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.tree_util import register_dataclass
from jax.typing import ArrayLike

from numpyro_maf import codec
from numpyro_maf.codec import storable
from numpyro_maf.flows.bijectors import Bijector, Chain
from numpyro_maf.flows.distributions import FlowDistribution
from numpyro_maf.flows.domains import EVENTS, is_real
from numpyro_maf.flows.linear import Regression, Standardize
from numpyro_maf.flows.supports import Each
from numpyro_maf.inputs import as_numbers, checked_rows
from numpyro_maf.pytrees import Described, short, static

__all__ = ["BijectorFlow", "Flow", "Recipe"]


@storable
@dataclass(frozen=True)
class Recipe:
    """How a flow was made: the name of its builder and the builder's options, but for key and base."""

    builder: str
    options: tuple[tuple[str, Any], ...] = ()

    def __getitem__(self, name: str) -> Any:
        return dict(self.options)[name]

    @property
    def call(self) -> str:
        """The call that makes such a flow, short options only."""
        given = dict(self.options)
        shown = [f"{k}={short(given[k])}" for k in _SHOWN if given.get(k) not in (None, 0)]
        return f"{self.builder}({', '.join(shown)})"


_SHOWN = ("features", "context", "transforms", "hidden", "scalar", "columns", "logit", "mixing")


class _Kind(type):
    """The class of flows' classes: NumPyro's message about what is no distribution names the remedy."""

    @property
    def __name__(cls) -> str:  # type: ignore[override]
        return f"{type.__dict__['__name__'].__get__(cls)}, a flow. For its distribution call it: flow()"


class Flow(Described, metaclass=_Kind):
    """A density to learn: a callable pytree of weights (abstract). Made by a builder.

    ``flow()`` or ``flow(context)`` gives a NumPyro distribution. Training changes :attr:`weights`; the two
    scalings are leaves too, but fixed.
    """

    event_shape: tuple[int, ...]  # ``(D,)``, or ``(H, W, C)`` of images
    context: int  # width of the context, 0 for none
    event_scale: Standardize | None  # from standardised to original events; None for boxes and the torus
    context_scale: Standardize | None
    recipe: Recipe | None

    @property
    def features(self) -> int:
        """Width of the events, of images the number of their pixels and channels."""
        return math.prod(self.event_shape)

    @property
    def support(self) -> Any:
        """NumPyro's constraint of the events."""
        raise NotImplementedError

    @property
    def is_real(self) -> bool:
        """Whether events are plain real vectors, which may be regressed and taken onto a support."""
        return False

    @property
    def is_discrete(self) -> np.ndarray:
        """``(D,)`` booleans: which numbers of an event are discrete."""
        return np.zeros(self.features, bool)

    @property
    def keeps_units(self) -> np.ndarray:
        """``(D,)`` booleans: which numbers of an event are not standardised: discrete ones, among others."""
        return self.is_discrete

    @property
    def weights(self) -> Any:
        """What training changes: a pytree of arrays."""
        raise NotImplementedError

    def with_weights(self, weights: Any) -> Any:
        """The same flow with other :attr:`weights`, such as those of a NumPyro param site."""
        raise NotImplementedError

    def randomized(self, key: ArrayLike) -> Any:
        """With the random choices that its parts make in training made anew: masks, probes of a trace."""
        return self

    def initialized(self, x: ArrayLike, context: ArrayLike | None = None) -> Any:
        """With data-dependent parameters set from events: what an :class:`~numpyro_maf.ActNorm` asks for.

        :param x: ``(N, *event_shape)``, a batch of a hundred or more.
        :param context: ``(N, C)`` for a flow with context.
        """
        return self

    def inner_events(self, x: ArrayLike) -> np.ndarray:
        """Events taken back to where :attr:`event_scale` acts: ``(N, *event_shape) -> (N, D)``."""
        return np.asarray(x)

    def __call__(self, context: ArrayLike | None = None) -> Any:
        """The distribution, given ``context`` of shape ``(..., C)`` if the flow takes one.

        :raises ValueError: when the context is missing, unexpected or of the wrong width.
        """
        raise NotImplementedError

    @property
    def spec(self) -> dict[str, Any]:
        """The structure as JSON-able values; :func:`~numpyro_maf.from_spec` is the way back.

        :raises TypeError: for a flow that no builder made, and a base that is none of NumPyro's own.
        """
        if self.recipe is None:
            raise TypeError("a flow that no builder made has no spec; save it to a file")
        options = {name: codec.write(value) for name, value in self.recipe.options}
        return {"builder": self.recipe.builder, **options}

    def sample(self, *args: Any, **kwargs: Any) -> NoReturn:
        """A flow is not a distribution: ``flow()`` is.

        :raises TypeError: always.
        """
        raise TypeError("a flow is not a distribution; call it: flow(), or flow(context)")

    log_prob = sample

    def scaled_context(self, context: ArrayLike | None):
        """A checked context in standardised units, or None.

        :raises ValueError: when the context is missing, unexpected or of the wrong width.
        """
        if self.context == 0 and context is not None:
            raise ValueError(f"the flow takes no context, got one of shape {jnp.shape(context)}")
        if self.context and context is None:
            raise ValueError(f"the flow expects a context of width {self.context}, got none")
        if context is None:
            return None
        context = as_numbers("context", context)
        shape = jnp.shape(context)
        if not shape or shape[-1] != self.context:
            given = shape[-1] if shape else "() (a scalar)"
            raise ValueError(f"context has width {given}, flow expects {self.context}")
        return self.context_scale._inverse(context)  # type: ignore[union-attr]

    def _describe(self):
        made = "made by hand" if self.recipe is None else self.recipe.call
        count = sum(np.size(leaf) for leaf in jax.tree.leaves(self.weights))
        return [f"Flow {made}", f"  {count:,} weights; call it for its distribution: flow()"]


@storable
@register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class BijectorFlow(Flow):
    """Bijectors after a base: a normalizing flow. Calling it gives a :class:`FlowDistribution`.

    :param bijectors: from base to data, without context; trained.
    :param event_scale: from standardised to original events; None for events in a box or on a torus.
    :param context_scale: the same for the context; None without context.
    :param base: a distribution of events, which is fixed; a flow, which is trained too; or None for the
        standard normal, in a box or on a torus the uniform distribution.
    :param inner: fixed bijectors from a bounded base to the reals.
    :param outer: fixed bijectors after the scaling: to a support, to images.
    :param regression: a linear regression of the events on the context, trained too; None without.
    """

    bijectors: tuple[Bijector, ...]
    event_scale: Standardize | None
    context_scale: Standardize | None
    base: Any = None
    inner: tuple[Bijector, ...] = ()
    outer: tuple[Bijector, ...] = ()
    regression: Regression | None = None
    event_shape: tuple[int, ...] = static(default=(1,))
    context: int = static(default=0)
    recipe: Recipe | None = static(default=None)

    @property
    def support(self):
        return (*self.bijectors, *self.outer)[-1].codomain

    @property
    def is_real(self) -> bool:
        return self.event_scale is not None and not self.outer

    @property
    def spec(self):
        base: Any = codec.write(None if isinstance(self.base, Flow) else self.base)
        spec = {**super().spec, "base": {"flow": self.base.spec} if isinstance(self.base, Flow) else base}
        if self.outer and isinstance(self.outer[0], Each):
            spec["support"] = codec.write(self.outer[0].support)
        return spec if self.regression is None else {**spec, "regression": True}

    @property
    def weights(self):
        """The bijectors' arrays, then the regression's; with them those of a base that is a flow."""
        own = self.bijectors if self.regression is None else (*self.bijectors, self.regression)
        return (own, self.base.weights) if isinstance(self.base, Flow) else own

    def with_weights(self, weights: Any) -> BijectorFlow:
        base = self.base
        if isinstance(base, Flow):
            weights, base = weights[0], base.with_weights(weights[1])
        regression = None if self.regression is None else weights[-1]
        return replace(self, bijectors=weights[: len(self.bijectors)], base=base, regression=regression)

    def randomized(self, key: ArrayLike) -> BijectorFlow:
        base_key, *keys = jax.random.split(key, 1 + len(self.bijectors))
        base = self.base.randomized(base_key) if isinstance(self.base, Flow) else self.base
        bijectors = tuple(b.randomized(k) for b, k in zip(self.bijectors, keys))
        return replace(self, bijectors=bijectors, base=base)

    def initialized(self, x: ArrayLike, context: ArrayLike | None = None) -> BijectorFlow:
        """With data-dependent parameters set from events: what an :class:`~numpyro_maf.ActNorm` asks for.

        Going from data to base, each one gets the parameters with which its results have mean 0 and variance
        1 over the batch (Kingma & Dhariwal 2018, section 3.1).
        """
        if not isinstance(x, jax.core.Tracer):
            x = checked_rows("x", x, self.event_shape)
        scaled = None if context is None else self.scaled_context(context)
        scale = [] if self.event_scale is None else [self.event_scale]
        residual = [] if self.regression is None else [self.regression.bind(scaled)]
        for transform in (*self.outer[::-1], *scale, *residual):
            x = transform.inv(x)
        return replace(self, bijectors=Chain(self.bijectors).initialized(x, scaled).bijectors)

    def inner_events(self, x: ArrayLike) -> np.ndarray:
        for transform in self.outer[::-1]:
            x = transform.inv(x)
        return np.asarray(x)

    def onto(self, support: Any) -> BijectorFlow:
        """With events whose numbers have a support other than the reals: ``flow.onto(constraints.positive)``.

        :param support: NumPyro's ``positive``, an ``interval``, ``greater_than``, …, of single numbers.
        :raises ValueError: for a flow whose events are no real vectors, and a support of another kind.
        """
        if not self.is_real:
            raise ValueError("onto takes a flow of real vectors")
        if support.is_discrete or support.event_dim:
            raise ValueError(f"onto takes a support of single real numbers, got {support}")
        return replace(self, outer=(Each(support),))

    def regressed(self, x: ArrayLike, context: ArrayLike | None) -> BijectorFlow:
        """With a linear regression of the events on the context between its transforms and the data.

        What the transforms then learn is the residual. The regression is trained with them, from its estimate
        by ridge regression on.

        :param x: ``(N, D)``; ``context``: ``(N, C)``.
        :raises ValueError: for a flow without context or without transforms of reals, or one that has a
            regression.
        """
        if not self.context or self.event_scale is None or self.regression is not None:
            raise ValueError("regressed takes a flow of real vectors with context and without a regression")
        x = checked_rows("x", x, self.event_shape)
        context = checked_rows("context", context, (self.context,), len(x))
        rows = _undone((*self.outer[::-1], self.event_scale), x)
        layer = Regression.init(self.features, self.context)
        scaled = _undone((self.context_scale,), context)
        return self.with_regression(layer.initialized(rows, scaled))

    def with_regression(self, layer: Regression) -> BijectorFlow:
        """With this linear regression; see :meth:`regressed`."""
        return replace(self, regression=layer)

    def __call__(self, context: ArrayLike | None = None) -> FlowDistribution:
        scaled, base = self.scaled_context(context), self.base
        trained = [*self.bijectors, *([] if self.regression is None else [self.regression])]
        bijectors = trained if scaled is None else [b.bind(scaled) for b in trained]
        if isinstance(base, Flow):
            base = base(scaled if base.context else None)
        elif base is None:
            domain = bijectors[0].domain
            ends = (-math.pi, math.pi) if domain is EVENTS["circle"] else (0.0, 1.0)
            base = dist.Normal(0.0, 1.0) if is_real(domain) else dist.Uniform(*ends)
            base = base.expand((self.features,)).to_event(1)
        scale = [] if self.event_scale is None else [self.event_scale]
        return FlowDistribution(base, [*self.inner, *bijectors, *scale, *self.outer])


@jax.jit
def _undone(transforms, x):
    """Inverses of transforms, one after the other."""
    for transform in transforms:
        x = transform.inv(x)
    return x
