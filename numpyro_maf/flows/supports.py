# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Supports of events, and the fixed bijections between them and the reals."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri
from jax.scipy.stats import norm
from numpyro.distributions import constraints
from numpyro.distributions.transforms import IndependentTransform, Transform, biject_to
from numpyro.distributions.util import array_equiv

from numpyro_maf.flows.bijectors import Bijector, Inverse
from numpyro_maf.flows.domains import EVENTS, of_one_number
from numpyro_maf.flows.shapes import check_width, zeros_of
from numpyro_maf.pytrees import static

__all__ = [
    "Box",
    "Each",
    "Logit",
    "Probit",
    "Reshape",
    "bijection",
    "categories",
]


@lru_cache(maxsize=64)
def _box(alpha: float):
    """What :class:`Logit` maps to the reals: the unit box, or a little more."""
    return constraints.independent(constraints.interval(*_ends(alpha)), 1) if alpha else EVENTS["unit"]


def _each(support):
    """Vectors of numbers with a support, the same object for the same singleton."""
    return _POSITIVE if support is constraints.positive else constraints.independent(support, 1)


_POSITIVE = constraints.independent(constraints.positive, 1)


def _ends(alpha: float) -> tuple[float, float]:
    margin = alpha / (1 - 2 * alpha)
    return -margin, 1 + margin


@lru_cache(maxsize=64)
def _shaped(kind: str, alpha: float, ndim: int):
    """The support of events with more axes."""
    vectors = _box(alpha) if kind == "box" else EVENTS[kind]
    return constraints.independent(vectors.base_constraint, ndim)


@dataclass(frozen=True, eq=False)
class Logit(Bijector):
    """``y = logit(alpha + (1 - 2 alpha) x)``: from the unit box to the reals.

    The preprocessing of pixels in Dinh et al. (2017), section 4.1, and Papamakarios et al. (2017).

    :param alpha: 0, or a little more so that 0 and 1 stay finite.
    """

    alpha: float = static(default=0.0)

    @property
    def domain(self):
        return _box(float(self.alpha))

    def __post_init__(self):
        if not 0 <= self.alpha < 0.5:
            raise ValueError(f"Logit needs 0 <= alpha < 0.5, got {self.alpha!r}")

    def inputs_of(self, known):
        return known

    def forward_and_log_det(self, x):
        # What cannot be told from the lower end in this precision is taken for a quarter of its rounding.
        p = _open(self.alpha + (1 - 2 * self.alpha) * x, self.alpha / 4)
        y = jnp.log(p) - jnp.log1p(-p)
        return y, -self._log_slope(y).sum(-1)

    def inverse_and_log_det(self, y):
        x = (_open(jax.nn.sigmoid(y)) - self.alpha) / (1 - 2 * self.alpha)
        x = jnp.clip(x, *_ends(self.alpha))  # where rounding may lead out
        return x, self._log_slope(y).sum(-1)

    def _log_slope(self, y):
        """Log dx/dy."""
        return jax.nn.log_sigmoid(y) + jax.nn.log_sigmoid(-y) - np.log1p(-2 * self.alpha)


@dataclass(frozen=True, eq=False)
class Probit(Bijector):
    """The standard normal's quantile function: from the unit box to the reals."""

    domain = EVENTS["unit"]

    def inputs_of(self, known):
        return known

    def forward_and_log_det(self, x):
        y = ndtri(_open(x))
        return y, -norm.logpdf(y).sum(-1)

    def inverse_and_log_det(self, y):
        return _open(ndtr(y)), norm.logpdf(y).sum(-1)


@dataclass(frozen=True, eq=False)
class Box(Bijector):
    """``y = (x - low) / (high - low)``: from an interval of each number to the unit box.

    :param low: lower ends, ``(D,)`` or a number; ``high``: upper ends.
    """

    low: Any
    high: Any

    @property
    def domain(self):
        return constraints.independent(constraints.interval(self.low, self.high), 1)

    codomain = EVENTS["unit"]

    def inputs_of(self, known):
        return known

    def forward_and_log_det(self, x):
        width = jnp.broadcast_to(jnp.asarray(self.high) - self.low, jnp.shape(x))
        return (x - self.low) / width, -jnp.log(width).sum(-1)

    def inverse_and_log_det(self, y):
        width = jnp.broadcast_to(jnp.asarray(self.high) - self.low, jnp.shape(y))
        return self.low + width * y, jnp.log(width).sum(-1)


@dataclass(frozen=True, eq=False)
class Each(Bijector):
    """From the reals to a support of single numbers, for each feature, by NumPyro's ``biject_to``.

    An interval is reached by the normal distribution function.

    :param support: such as ``constraints.positive``.
    """

    support: Any

    @property
    def transform(self):
        """The transform of single numbers."""
        return bijection(self.support)

    @property
    def codomain(self):
        return _each(self.support)

    def inputs_of(self, known):
        return known

    def forward_and_log_det(self, x):
        y = self.transform(x)
        return y, self.transform.log_abs_det_jacobian(x, y).sum(-1)

    def inverse_and_log_det(self, y):
        x = self.transform._inverse(y)
        return x, -self.transform.log_abs_det_jacobian(x, y).sum(-1)


def _open(p, rounding=0.0):
    """Probabilities off 0 and 1, where rounding may put them, so far that slopes stay finite too.

    :param rounding: in units of the relative precision, how well small probabilities are known.
    """
    info = jnp.finfo(jnp.result_type(p, float))
    return jnp.clip(p, jnp.maximum(info.tiny**0.8, rounding * info.eps), 1 - info.eps / 2)


@dataclass(frozen=True, eq=False)
class Reshape(Bijector):
    """From vectors to events of another shape, the last axis fastest.

    :param shape: of the event.
    :param kind: of its numbers: ``"real"``, ``"unit"``, ``"circle"``, or ``"box"`` for what a
        :class:`Logit` of this ``alpha`` maps to the reals.
    """

    shape: tuple[int, ...] = static()
    kind: str = static(default="real")
    alpha: float = static(default=0.0)

    @property
    def domain(self):
        return _box(self.alpha) if self.kind == "box" else EVENTS[self.kind]

    @property
    def codomain(self):
        return _shaped(self.kind, self.alpha, len(self.shape))

    def inputs_of(self, known):
        return known

    def forward_shape(self, shape):
        return (*shape[:-1], *self.shape)

    def inverse_shape(self, shape):
        return (*shape[: len(shape) - len(self.shape)], int(np.prod(self.shape)))

    def forward_and_log_det(self, x):
        check_width(x, int(np.prod(self.shape)), "Reshape")
        return x.reshape(self.forward_shape(x.shape)), zeros_of(x)

    def inverse_and_log_det(self, y):
        if jnp.shape(y)[-len(self.shape) :] != self.shape:
            raise ValueError(f"Reshape expects events of shape {self.shape}, got {jnp.shape(y)}")
        x = y.reshape(self.inverse_shape(y.shape))
        return x, zeros_of(x)


def to_reals(support, link: str = "logit") -> tuple[Bijector, ...]:
    """Fixed bijectors from a support of single numbers to the reals.

    :param link: of numbers in an interval: ``"logit"`` or ``"probit"``.
    :raises ValueError: for a support whose numbers depend on each other, and discrete ones.
    """
    each = of_one_number(support)
    if each is constraints.real:
        return ()
    if each.event_dim or each.is_discrete:
        raise ValueError(f"base must have a support of each number by itself or all reals, got {each}")
    if isinstance(each, constraints.interval):
        box = () if each is constraints.unit_interval else (Box(each.lower_bound, each.upper_bound),)
        return *box, Probit() if link == "probit" else Logit()
    return (Inverse(Each(each)),)


def categories(support) -> int:
    """How many values a number with this support can have: 0 for a real one, -1 for infinitely many."""
    support = of_one_number(support)
    if support is constraints.boolean:
        return 2
    if isinstance(support, constraints.integer_interval):
        return int(np.max(np.asarray(support.upper_bound) - np.asarray(support.lower_bound))) + 1
    return -1 if isinstance(support, constraints.integer_greater_than) else 0


def bijection(support):
    """From the reals, or for a discrete variable from 0, 1, …, to a support."""
    event_dim, each = support.event_dim, of_one_number(support)
    if isinstance(each, (constraints.integer_interval, constraints.integer_greater_than)) or (
        each is constraints.boolean
    ):
        return _Shift(getattr(each, "lower_bound", 0))
    if isinstance(each, constraints.interval):
        inner = _NormalCDF(each.lower_bound, each.upper_bound)
        return IndependentTransform(inner, event_dim) if event_dim else inner
    return biject_to(support)


class _NormalCDF(Transform):
    """From the reals to an interval by the normal distribution function."""

    domain = constraints.real

    def __init__(self, low, high):
        self.low, self.high = low, high

    @property
    def codomain(self):
        return constraints.interval(self.low, self.high)

    def __call__(self, x):
        return jnp.clip(self.low + (self.high - self.low) * ndtr(x), self.low, self.high)  # rounding

    def _inverse(self, y):
        width = self.high - self.low
        # A share is known as well as the number is beside the lower end.
        return ndtri(_open((y - self.low) / width, abs(self.low / width) / 4))

    def log_abs_det_jacobian(self, x, y, intermediates=None):
        return jnp.log(self.high - self.low) + norm.logpdf(x)

    def tree_flatten(self):
        return (self.low, self.high), (("low", "high"), {})

    def eq(self, other, static=False):
        return isinstance(other, _NormalCDF) and array_equiv((self.low, self.high), (other.low, other.high))


class _Shift(Transform):
    """Integers as numbers from 0."""

    domain = codomain = constraints.real

    def __init__(self, low):
        self.low = low

    def __call__(self, x):
        return jnp.round(x).astype(int) + self.low

    def _inverse(self, y):
        return (y - self.low).astype(float)

    def log_abs_det_jacobian(self, x, y, intermediates=None):
        return jnp.zeros_like(x)

    def tree_flatten(self):
        return (self.low,), (("low",), {})

    def eq(self, other, static=False):
        return isinstance(other, _Shift) and array_equiv(self.low, other.low)
