# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Scalar maps made of bins: splines on an interval, on the circle and on the unit interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_maf.flows.scalars import Scalar

__all__ = ["CircularSpline", "PiecewiseLinear", "PiecewiseQuadratic", "RQSpline"]


@dataclass(frozen=True)
class RQSpline(Scalar):
    """Monotone rational-quadratic spline on ``[-bound, bound]``, the identity outside.

    Durkan, Bekasov, Murray & Papamakarios, *Neural Spline Flows* (2019), section 3.1: eq. 4 for the
    value, eq. 5 for the derivative and eq. 6-8 for the inverse, one root of a quadratic.

    :param bins: number of bins.
    :param bound: half the width of the box. Standardised data need 4 to 6.
    :param min_bin: the least width and height of a bin, as a share of the box.
    :param min_slope: the least derivative at a knot.
    """

    bins: int = 8
    bound: float = 5.0
    min_bin: float = 1e-3
    min_slope: float = 1e-3

    def __post_init__(self):
        _check_bins(self)
        if self.bound <= 0 or not 0 <= self.min_slope < 1:
            raise ValueError(f"RQSpline needs bound > 0 and 0 <= min_slope < 1, got {self}")

    @property
    def num_params(self) -> int:
        return 3 * self.bins - 1

    def _table(self, params):
        k = self.bins
        inner = _slopes(params[2 * k :], self.min_slope)
        one = jnp.ones_like(inner[:1])  # at both ends, where the identity takes over
        return _rational_table(params[: 2 * k], 2 * self.bound, self.min_bin, [one, inner, one])

    def forward(self, params, x):
        inside = jnp.abs(x) < self.bound
        at = jnp.where(inside, x, 0.0)  # double where: no NaN gradient from the branch not taken
        y, log_slope = _rational_forward(self._table(params), at + self.bound)
        return jnp.where(inside, y - self.bound, x), jnp.where(inside, log_slope, 0.0)

    def inverse(self, params, y):
        inside = jnp.abs(y) < self.bound
        at = jnp.where(inside, y, 0.0)
        x, log_slope = _rational_inverse(self._table(params), at + self.bound)
        return jnp.where(inside, x - self.bound, y), jnp.where(inside, log_slope, 0.0)


@dataclass(frozen=True)
class CircularSpline(Scalar):
    """Rational-quadratic spline of the circle ``[-pi, pi)``, then a rotation; slopes agree at the seam.

    Rezende et al., *Normalizing Flows on Tori and Spheres* (2020), section 2.1.3. Networks see an angle by
    its cosine and sine, so densities are periodic in everything.

    :param bins: number of bins.
    :param min_bin: the least width and height of a bin, as a share of the circle.
    :param min_slope: the least derivative at a knot.
    """

    support: ClassVar[str] = "circle"
    inputs: ClassVar[int] = 2

    bins: int = 8
    min_bin: float = 1e-3
    min_slope: float = 1e-3

    def __post_init__(self):
        _check_bins(self)
        if not 0 <= self.min_slope < 1:
            raise ValueError(f"CircularSpline needs 0 <= min_slope < 1, got {self}")

    @property
    def num_params(self) -> int:
        return 3 * self.bins + 1

    def _table(self, params):
        k = self.bins
        slopes = _slopes(params[2 * k : 3 * k], self.min_slope)
        return _rational_table(params[: 2 * k], 2 * math.pi, self.min_bin, [slopes, slopes[:1]])

    def forward(self, params, x):
        y, log_slope = _rational_forward(self._table(params), _wrap(x) + math.pi)
        return _wrap(y - math.pi + params[-1]), log_slope

    def inverse(self, params, y):
        x, log_slope = _rational_inverse(self._table(params), _wrap(y - params[-1]) + math.pi)
        return jnp.minimum(x - math.pi, math.pi), log_slope

    def embed(self, x):
        return jnp.stack([jnp.cos(x), jnp.sin(x)])


@dataclass(frozen=True)
class PiecewiseLinear(Scalar):
    """A distribution function on [0, 1] with a piecewise constant density, the identity outside.

    Mueller et al., *Neural Importance Sampling* (2019), section 4.2, eq. 6: equal bins.

    :param bins: number of bins.
    :param min_density: the least density.
    """

    support: ClassVar[str] = "unit"

    bins: int = 16
    min_density: float = 1e-3

    def __post_init__(self):
        _check_density(self)

    @property
    def num_params(self) -> int:
        return self.bins

    def _sizes(self, params):
        """Widths and heights of the bins, ``(2, K, ...)``."""
        heights = _shares(params, self.min_density / self.bins)
        return jnp.stack([jnp.full_like(heights, 1 / self.bins), heights])

    def forward(self, params, x):
        inside = (x >= 0) & (x <= 1)
        sizes = self._sizes(params)
        (x0, y0), (w, h) = _split(sizes, *_locate(sizes[0], jnp.where(inside, x, 0.5)))
        y = y0 + (x - x0) / w * h
        return jnp.where(inside, _within(y), x), jnp.where(inside, jnp.log(h / w), 0.0)

    def inverse(self, params, y):
        inside = (y >= 0) & (y <= 1)
        sizes = self._sizes(params)
        (x0, y0), (w, h) = _split(sizes, *_locate(sizes[1], jnp.where(inside, y, 0.5)))
        x = x0 + (y - y0) / h * w
        return jnp.where(inside, _within(x), y), jnp.where(inside, jnp.log(w / h), 0.0)


@dataclass(frozen=True)
class PiecewiseQuadratic(Scalar):
    """A distribution function on [0, 1] with a piecewise linear density, the identity outside.

    Mueller et al., *Neural Importance Sampling* (2019), section 4.3, eq. 11-13: bins of any width.

    :param bins: number of bins.
    :param min_bin: the least width of a bin.
    :param min_density: the least density.
    """

    support: ClassVar[str] = "unit"

    bins: int = 16
    min_bin: float = 1e-3
    min_density: float = 1e-3

    def __post_init__(self):
        _check_bins(self)
        _check_density(self)

    @property
    def num_params(self) -> int:
        return 2 * self.bins + 1

    def _table(self, params):
        """Of the bins, with the densities at their ends."""
        k = self.bins
        widths = _shares(params[:k], self.min_bin)
        vertices = jnp.exp(params[k:] - params[k:].max(0))
        vertices = vertices / jnp.sum((vertices[:-1] + vertices[1:]) / 2 * widths, 0)
        vertices = self.min_density + (1 - self.min_density) * vertices
        ends = jnp.stack([vertices[:-1], vertices[1:]])
        return jnp.stack([widths, ends.mean(0) * widths]), ends

    def forward(self, params, x):
        inside = (x >= 0) & (x <= 1)
        at = jnp.where(inside, x, 0.5)
        (x0, y0), (w, _), (v0, v1) = _pick(self._table(params), 0, at)
        t = _within((at - x0) / w)
        y = y0 + t * w * (v0 + t * (v1 - v0) / 2)
        return jnp.where(inside, _within(y), x), jnp.where(inside, jnp.log(v0 + t * (v1 - v0)), 0.0)

    def inverse(self, params, y):
        inside = (y >= 0) & (y <= 1)
        at = jnp.where(inside, y, 0.5)
        (x0, y0), (w, h), (v0, v1) = _pick(self._table(params), 1, at)
        # The density at the root, and from it the root that stays accurate as the density gets flat.
        rise = h / w * _within((at - y0) / h)
        least = jnp.minimum(v0, v1) ** 2  # but for rounding
        density = jnp.sqrt(jnp.maximum(v0**2 + 2 * (v1 - v0) * rise, least))
        x = x0 + w * 2 * rise / (v0 + density)
        return jnp.where(inside, _within(x), y), jnp.where(inside, -jnp.log(density), 0.0)


# Bins: tables (K, ...) ------------------------------------------------------------------------------


def _check_bins(scalar):
    if scalar.bins < 2 or not 0 <= scalar.bins * scalar.min_bin < 1:
        raise ValueError(f"{type(scalar).__name__} needs bins >= 2 and 0 <= bins * min_bin < 1, got {scalar}")


def _check_density(scalar):
    if scalar.bins < 2 or not 0 < scalar.min_density < 1:
        raise ValueError(f"{type(scalar).__name__} needs bins >= 2 and 0 < min_density < 1, got {scalar}")


def _shares(raw, least: float, axis: int = 0):
    """K unbounded numbers as shares of one, none below ``least``."""
    return least + (1 - raw.shape[axis] * least) * jax.nn.softmax(raw, axis=axis)


def _locate(sizes, value):
    """Which of consecutive bins ``(K, ...)``, from 0 on, come before ``value``, and which one holds it."""
    passed = value >= jnp.cumsum(lax.stop_gradient(sizes[:-1]), axis=0)
    yes, no = jnp.ones_like(passed[:1]), jnp.zeros_like(passed[:1])
    before = jnp.concatenate([passed, no])
    return before, jnp.concatenate([yes, passed]) & ~before


def _total(bins, table):
    """Sums of a table ``(n, K, ...)`` over some of the bins."""
    # A mask and a sum are several times faster on a CPU than a gather along the bins.
    return jnp.sum(jnp.where(bins, table, 0), axis=1)


def _split(sizes, before, here):
    """Where the bin that holds a value begins, and its own sizes, of ``(n, K, ...)``."""
    return _total(before, sizes), _total(here, sizes)


def _pick(table, axis: int, value):
    """The bin that holds a value of x (axis 0) or y (axis 1): beginnings, sizes and ends, two numbers each.

    A table is widths and heights of bins, and something at both of their ends, ``(2, K, ...)`` each.
    """
    sizes, ends = table
    before, here = _locate(sizes[axis], value)
    return *_split(sizes, before, here), _total(here, ends)


def _wrap(angle):
    """The same angle in ``[-pi, pi)``."""
    return jnp.mod(angle + math.pi, 2 * math.pi) - math.pi


# Rational-quadratic bins ----------------------------------------------------------------------------


def _slopes(raw, least: float):
    """Derivatives at knots from unbounded numbers: 1 at 0, none below ``least``."""
    return least + jax.nn.softplus(raw + math.log(math.expm1(1 - least)))


def _rational_table(raw, size: float, min_bin: float, slopes):
    """Of bins, with the slopes at their ends, that fill an interval of this size, from 0 on, on both axes."""
    slopes = jnp.concatenate(slopes)
    raw = raw.reshape(2, len(raw) // 2, *raw.shape[1:])
    return size * _shares(raw, min_bin, axis=1), jnp.stack([slopes[:-1], slopes[1:]])


def _within(t):
    """A number in ``[0, 1]`` but for rounding, such as a position in a bin, without the rounding.

    With its own gradient, which clipping would set to 0 at both ends.
    """
    return t + lax.stop_gradient(jnp.clip(t, 0, 1) - t)


def _below(t, slope, d0, d1):
    """The denominator of eq. 4 and 5, a sum of positive terms: nothing cancels."""
    return slope * (t**2 + (1 - t) ** 2) + (d0 + d1) * t * (1 - t)


def _rational_log_slope(t, slope, d0, d1):
    """Log of eq. 5 at the relative position ``t``."""
    mixed = d1 * t**2 + 2 * slope * t * (1 - t) + d0 * (1 - t) ** 2
    return 2 * jnp.log(slope) + jnp.log(mixed) - 2 * jnp.log(_below(t, slope, d0, d1))


def _rational_forward(table, x):
    (x0, y0), (w, h), (d0, d1) = _pick(table, 0, x)
    slope, t = h / w, _within((x - x0) / w)
    y = y0 + h * (slope * t**2 + d0 * t * (1 - t)) / _below(t, slope, d0, d1)
    return y, _rational_log_slope(t, slope, d0, d1)


def _rational_inverse(table, y):
    (x0, y0), (w, h), (d0, d1) = _pick(table, 1, y)
    slope, rise = h / w, h * _within((y - y0) / h)
    curve = rise * (d0 + d1 - 2 * slope)
    a = h * (slope - d0) + curve
    b = h * d0 - curve
    c = -slope * rise
    # The root that stays accurate as a goes to 0, and is real but for rounding.
    t = _within(-2 * c / (b + jnp.sqrt(jnp.maximum(b**2 - 4 * a * c, jnp.finfo(b.dtype).tiny))))
    return x0 + t * w, -_rational_log_slope(t, slope, d0, d1)
