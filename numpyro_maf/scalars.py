# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

r"""Scalar maps: monotone functions of one variable whose parameters a network supplies.

Arrays in, arrays out. ``params`` leads with the parameter axis, ``(num_params, ...)``; the variable
and both results have the rest of that shape. Each map is a frozen dataclass without arrays, hence
hashable; zero parameters give the identity, so a flow with small weights starts near its base.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["Additive", "Affine", "RQSpline", "Scalar"]


@dataclass(frozen=True)
class Scalar:
    """A monotone scalar map (abstract)."""

    @property
    def num_params(self) -> int:
        """How many parameters the map takes per dimension."""
        raise NotImplementedError

    def forward(self, params, x):
        """``(P, ...), (...) -> (...), (...)``: the value and ``log dy/dx``."""
        raise NotImplementedError

    def inverse(self, params, y):
        """``(P, ...), (...) -> (...), (...)``: the preimage and ``log dx/dy``."""
        raise NotImplementedError

    @property
    def spec(self) -> dict[str, Any]:
        """The map as JSON-able values; :func:`scalar_from_spec` is the way back."""
        return {"scalar": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class Affine(Scalar):
    r"""``y = x exp(s) + t`` with ``s = bound tanh(a / bound)`` (MAF, Papamakarios et al. 2017, eq. 3).

    The log-scale is bounded smoothly: its gradient is the function's own everywhere, which HMC needs.

    :param bound: the largest ``|s|``.
    """

    bound: float = 5.0

    def __post_init__(self):
        if self.bound <= 0:
            raise ValueError(f"Affine needs bound > 0, got {self}")

    @property
    def num_params(self) -> int:
        return 2

    def _shift_and_log_scale(self, params):
        return params[0], self.bound * jnp.tanh(params[1] / self.bound)

    def forward(self, params, x):
        t, s = self._shift_and_log_scale(params)
        return x * jnp.exp(s) + t, s

    def inverse(self, params, y):
        t, s = self._shift_and_log_scale(params)
        return (y - t) * jnp.exp(-s), -s


@dataclass(frozen=True)
class Additive(Scalar):
    """``y = x + t``: volume preserving (NICE, Dinh et al. 2015, section 3)."""

    @property
    def num_params(self) -> int:
        return 1

    def forward(self, params, x):
        return x + params[0], jnp.zeros_like(x + params[0])

    def inverse(self, params, y):
        return y - params[0], jnp.zeros_like(y - params[0])


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
        if self.bins < 2 or self.bound <= 0 or not 0 <= self.bins * self.min_bin < 1:
            raise ValueError(f"RQSpline needs bins >= 2, bound > 0 and 0 <= bins * min_bin < 1, got {self}")
        if not 0 <= self.min_slope < 1:
            raise ValueError(f"RQSpline needs 0 <= min_slope < 1, got {self}")

    @property
    def num_params(self) -> int:
        return 3 * self.bins - 1

    def _knots(self, raw):
        """Left ends ``(K, ...)`` and widths ``(K, ...)`` of the bins from K unbounded numbers."""
        share = self.min_bin + (1 - self.bins * self.min_bin) * jax.nn.softmax(raw, axis=0)
        widths = 2 * self.bound * share
        return jnp.cumsum(widths, axis=0) - widths - self.bound, widths

    def _slopes(self, raw):
        """Derivatives ``(K+1, ...)`` at the knots: 1 at both ends, where the identity takes over."""
        offset = math.log(math.expm1(1 - self.min_slope))
        inner = self.min_slope + jax.nn.softplus(raw + offset)
        one = jnp.ones_like(inner[:1])
        return jnp.concatenate([one, inner, one])

    def _bin(self, params, value, by_height):
        """The numbers of the bin that holds ``value``: x0, width, y0, height, both slopes."""
        k = self.bins
        x0, widths = self._knots(params[:k])
        y0, heights = self._knots(params[k : 2 * k])
        slopes = self._slopes(params[2 * k :])
        left = y0 if by_height else x0
        # A mask and a sum are several times faster on a CPU than a gather along the bins.
        above = value >= left[1:]
        yes, no = jnp.ones_like(above[:1]), jnp.zeros_like(above[:1])
        here = jnp.concatenate([yes, above]) & ~jnp.concatenate([above, no])

        def pick(table):
            return jnp.sum(jnp.where(here, table, 0), axis=0)

        return *map(pick, (x0, widths, y0, heights)), pick(slopes[:-1]), pick(slopes[1:])

    def _log_slope(self, t, slope, d0, d1):
        """Log of eq. 5 at the relative position ``t``."""
        mixed = d1 * t**2 + 2 * slope * t * (1 - t) + d0 * (1 - t) ** 2
        below = slope + (d0 + d1 - 2 * slope) * t * (1 - t)
        return 2 * jnp.log(slope) + jnp.log(mixed) - 2 * jnp.log(below)

    def forward(self, params, x):
        inside = jnp.abs(x) < self.bound
        at = jnp.where(inside, x, 0.0)  # double where: no NaN gradient from the branch not taken
        x0, w, y0, h, d0, d1 = self._bin(params, at, by_height=False)
        slope, t = h / w, (at - x0) / w
        below = slope + (d0 + d1 - 2 * slope) * t * (1 - t)
        y = y0 + h * (slope * t**2 + d0 * t * (1 - t)) / below
        log_slope = self._log_slope(t, slope, d0, d1)
        return jnp.where(inside, y, x), jnp.where(inside, log_slope, 0.0)

    def inverse(self, params, y):
        inside = jnp.abs(y) < self.bound
        at = jnp.where(inside, y, 0.0)
        x0, w, y0, h, d0, d1 = self._bin(params, at, by_height=True)
        slope, rise = h / w, at - y0
        curve = rise * (d0 + d1 - 2 * slope)
        a = h * (slope - d0) + curve
        b = h * d0 - curve
        c = -slope * rise
        # The root that stays accurate as a goes to 0, and is real but for rounding.
        t = -2 * c / (b + jnp.sqrt(jnp.maximum(b**2 - 4 * a * c, jnp.finfo(b.dtype).tiny)))
        x = x0 + t * w
        log_slope = self._log_slope(t, slope, d0, d1)
        return jnp.where(inside, x, y), jnp.where(inside, -log_slope, 0.0)


SCALARS: dict[str, type[Scalar]] = {cls.__name__: cls for cls in (Affine, Additive, RQSpline)}


def scalar_from_spec(spec: dict[str, Any]) -> Scalar:
    """The scalar map that :attr:`Scalar.spec` describes.

    :raises ValueError: for a name that is none of this module's.
    """
    options = dict(spec)
    name = options.pop("scalar", None)
    if name not in SCALARS:
        raise ValueError(f"unknown scalar map {name!r}, expected one of {sorted(SCALARS)}")
    return SCALARS[name](**options)
