# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Linear bijectors: permutations, scalings, normalisations, linear maps and regressions."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

from numpyro_maf.flows.bijectors import Bijector
from numpyro_maf.flows.formulas import bounded
from numpyro_maf.flows.shapes import check_order, check_width, zeros_of
from numpyro_maf.pytrees import static
from numpyro_maf.rng import normal, split

__all__ = ["ActNorm", "HeavyTails", "LULinear", "Permute", "Regression", "Standardize"]


@dataclass(frozen=True, eq=False)
class Permute(Bijector):
    """``y[..., i] = x[..., order[i]]``.

    :param order: a tuple that holds each of ``0, …, D-1`` once.
    :raises ValueError: when ``order`` is no permutation, or is of another width than the event.
    """

    order: tuple[int, ...] = static()

    def __post_init__(self):
        object.__setattr__(self, "order", check_order(self.order, len(self.order)))

    def inputs_of(self, known):
        return frozenset(self.order[i] for i in known)

    def outputs_of(self, known):
        return frozenset(self.order.index(i) for i in known)

    def forward_and_log_det(self, x):
        check_width(x, len(self.order), "Permute")
        return x[..., np.array(self.order)], zeros_of(x)

    def inverse_and_log_det(self, y):
        check_width(y, len(self.order), "Permute")
        return y[..., np.argsort(self.order)], zeros_of(y)


@dataclass(frozen=True, eq=False)
class Standardize(Bijector):
    """``y = loc + scale * x``: from standardised to original units.

    :param loc: ``(D,)``, or with leading batch axes.
    :param scale: like ``loc``, positive.
    :raises ValueError: when the event is of another width.
    """

    loc: Any
    scale: Any

    @classmethod
    def identity(cls, features: int) -> Standardize:
        """The one that changes nothing."""
        return cls(*jax.device_put((np.zeros(features), np.ones(features))))

    @property
    def batch_shape(self):
        return jnp.broadcast_shapes(jnp.shape(self.loc), jnp.shape(self.scale))[:-1]

    def inputs_of(self, known):
        return known

    def forward_and_log_det(self, x):
        check_width(x, jnp.shape(self.loc)[-1], "Standardize")
        y = self.loc + self.scale * x
        return y, jnp.broadcast_to(jnp.log(self.scale).sum(-1), y.shape[:-1])

    def inverse_and_log_det(self, y):
        check_width(y, jnp.shape(self.loc)[-1], "Standardize")
        x = self._standardized(y)
        return x, jnp.broadcast_to(-jnp.log(self.scale).sum(-1), x.shape[:-1])

    def _standardized(self, y):
        if all(isinstance(a, np.ndarray) for a in (y, self.loc, self.scale)):
            # On the host, in double precision: JAX's single precision holds no seconds since 1970.
            return jnp.asarray((y - self.loc) / self.scale, jnp.result_type(float))
        return (y - self.loc) / self.scale


@dataclass(frozen=True, eq=False)
class HeavyTails(Standardize):
    """``y = loc + scale * sinh(heavy * x)`` in some columns, ``loc + scale * x`` in the others.

    Going from data to base, power-law tails become exponential ones, which flows can learn. Beyond
    ``|heavy * x| = 30`` the map goes on as a straight line, so that no number overflows.

    :param heavy: ``(D,)``, positive for the columns with heavy tails, 0 for others.
    :raises ValueError: when the event is of another width.
    """

    heavy: Any = 0.0

    def forward_and_log_det(self, x):
        check_width(x, jnp.shape(self.loc)[-1], "HeavyTails")
        u = self._width * x
        near = jnp.clip(u, -_LINE, _LINE)
        bent = jnp.sinh(near) + math.cosh(_LINE) * (u - near)
        y, log_det = super().forward_and_log_det(jnp.where(self.heavy > 0, bent, x))
        return y, log_det + self._log_slope(near)

    def inverse_and_log_det(self, y):
        bent, log_det = super().inverse_and_log_det(y)
        near = jnp.clip(bent, -math.sinh(_LINE), math.sinh(_LINE))
        u = jnp.arcsinh(near) + (bent - near) / math.cosh(_LINE)
        x = jnp.where(self.heavy > 0, u / self._width, bent)
        return x, log_det - self._log_slope(jnp.arcsinh(near))

    @property
    def _width(self):
        return jnp.where(self.heavy > 0, self.heavy, 1.0)

    def _log_slope(self, near):
        """Log of the derivative of ``sinh(heavy * x)``, at ``near = heavy * x``, sum over columns."""
        slope = jnp.log(self._width) + jnp.log(jnp.cosh(near))
        return jnp.where(self.heavy > 0, slope, 0.0).sum(-1)


_LINE = 30.0


@dataclass(frozen=True, eq=False)
class ActNorm(Bijector):
    """``y = exp(s) x + t`` for each channel; Glow's normalisation (Kingma & Dhariwal 2018, section 3.1).

    :meth:`initialized` sets it so that given outputs come from inputs with mean 0 and variance 1.

    :param loc: ``(C,)``. Events are ``n * C`` wide, the channel being the fastest index.
    :param raw_scale: ``(C,)``; ``s = bound tanh(raw_scale / bound)``.
    :param bound: the largest ``|s|``.
    """

    loc: Any
    raw_scale: Any
    bound: float = static(default=10.0)

    @classmethod
    def init(cls, channels: int) -> ActNorm:
        """The identity on events of ``channels`` features, or a multiple."""
        return cls(jnp.zeros(channels), jnp.zeros(channels))

    def initialized(self, y, context=None):
        rows = y.reshape(-1, self.loc.shape[-1])
        log_scale = jnp.log(jnp.maximum(rows.std(0), 1e-6))
        return ActNorm(rows.mean(0), self.bound * jnp.arctanh(log_scale / self.bound), self.bound)

    def inputs_of(self, known):
        return known

    @property
    def _log_scale(self):
        return bounded(self.raw_scale, self.bound)

    def forward_and_log_det(self, x):
        rows, count = _channels(x, self.loc.shape[-1], "ActNorm")
        y = rows * jnp.exp(self._log_scale) + self.loc
        return y.reshape(jnp.shape(x)), zeros_of(x) + count * self._log_scale.sum()

    def inverse_and_log_det(self, y):
        rows, count = _channels(y, self.loc.shape[-1], "ActNorm")
        x = (rows - self.loc) * jnp.exp(-self._log_scale)
        return x.reshape(jnp.shape(y)), zeros_of(y) - count * self._log_scale.sum()


@dataclass(frozen=True, eq=False)
class LULinear(Bijector):
    """``L U y = x``: an invertible linear map of the channels, Glow's 1x1 convolution in the vector case.

    Kingma & Dhariwal (2018), eq. 10, without the permutation, which is :class:`Permute`'s. Data to base is a
    product, base to data two triangular solves.

    :param lower: ``(C, C)``, of which the part below the diagonal counts; the diagonal is 1.
    :param upper: ``(C, C)``, of which the part above the diagonal counts. Its diagonal ``a`` stands for
        ``exp(bound tanh(a / bound))``.
    :param bound: the largest log of a diagonal element.
    """

    lower: Any
    upper: Any
    bound: float = static(default=5.0)
    parallel = "inverse"

    @classmethod
    def init(cls, key, channels: int) -> LULinear:
        """Near the identity, on events of ``channels`` features, or a multiple."""
        scale = 0.1 / channels**0.5
        return cls(*(jnp.asarray(scale * normal(k, (channels, channels))) for k in split(key)))

    def _factors(self):
        log_diagonal = bounded(jnp.diagonal(self.upper), self.bound)
        lower = jnp.tril(self.lower, -1) + jnp.eye(len(self.lower), dtype=self.lower.dtype)
        return lower, jnp.triu(self.upper, 1) + jnp.diag(jnp.exp(log_diagonal)), log_diagonal.sum()

    def forward_and_log_det(self, x):
        rows, count = _channels(x, self.lower.shape[-1], "LULinear")
        lower, upper, log_det = self._factors()
        columns = rows.reshape(-1, rows.shape[-1]).T.astype(jnp.result_type(x, lower))
        columns = solve_triangular(lower, columns, lower=True, unit_diagonal=True)
        y = solve_triangular(upper, columns).T
        return y.reshape(jnp.shape(x)), zeros_of(x) - count * log_det

    def inverse_and_log_det(self, y):
        rows, count = _channels(y, self.lower.shape[-1], "LULinear")
        lower, upper, log_det = self._factors()
        return (rows @ (lower @ upper).T).reshape(jnp.shape(y)), zeros_of(y) + count * log_det


@dataclass(frozen=True, eq=False)
class Regression(Bijector):
    """``y = L x + A c + b``: a Gaussian linear model of events given the context, where a flow may start.

    :meth:`initialized` sets it by ridge regression of outputs on contexts.

    :param slope: A, ``(D, C)``; ``loc``: b, ``(D,)``.
    :param factor: ``(D, D)``, of which the part below the diagonal counts; its diagonal is the log of L's.
    :param context: ``(..., C)``, when bound.
    """

    slope: Any
    loc: Any
    factor: Any
    context: Any = None

    @classmethod
    def init(cls, features: int, context: int) -> Regression:
        """The identity."""
        shapes = (features, context), (features,), (features, features)
        return cls(*jax.device_put(tuple(map(np.zeros, shapes))))

    def bind(self, context):
        return dataclasses.replace(self, context=context)

    @property
    def batch_shape(self):
        return jnp.shape(self.context)[:-1]

    def initialized(self, y, context=None):
        y, c = (np.asarray(a, np.float64) for a in (y, context))
        slope, freedom = _ridge(c - c.mean(0), y - y.mean(0))
        loc = y.mean(0) - c.mean(0) @ slope
        # Residuals as large as those of rows left out would be, about.
        rest = (y - c @ slope - loc) / (1 - freedom / len(y))
        spread = rest.T @ rest / len(y)
        factor = np.linalg.cholesky(spread + 1e-9 * (1 + np.trace(spread)) * np.eye(len(spread)))
        factor = np.tril(factor, -1) + np.diag(np.log(np.diag(factor)))
        return Regression(*jax.device_put(tuple(a.astype(self.loc.dtype) for a in (slope.T, loc, factor))))

    def _parts(self, x):
        check_width(x, self.loc.shape[-1], "Regression")
        width = self.slope.shape[-1]
        if self.context is None or jnp.shape(self.context)[-1:] != (width,):
            given = "none" if self.context is None else f"one of shape {jnp.shape(self.context)}"
            raise ValueError(f"Regression expects a context of width {width}, got {given}")
        log_diagonal = jnp.diagonal(self.factor)
        lower = jnp.tril(self.factor, -1) + jnp.diag(jnp.exp(log_diagonal))
        return lower, self.context @ self.slope.T + self.loc, log_diagonal.sum()

    def forward_and_log_det(self, x):
        lower, shift, log_det = self._parts(x)
        y = x @ lower.T + shift
        return y, jnp.broadcast_to(log_det, y.shape[:-1])

    def inverse_and_log_det(self, y):
        lower, shift, log_det = self._parts(y)
        rest = y - shift
        columns = rest.reshape(-1, rest.shape[-1]).T.astype(jnp.result_type(rest, lower))
        x = solve_triangular(lower, columns, lower=True).T.reshape(rest.shape)
        return x, jnp.broadcast_to(-log_det, x.shape[:-1])


def _ridge(c, y) -> tuple[np.ndarray, np.ndarray]:
    """Slopes ``(C, D)`` of centred columns, each with the penalty of least generalised cross-validation.

    Golub, Heath & Wahba (1979), from one singular value decomposition; and the degrees of freedom of each, at
    most half the number of rows.
    """
    u, s, vt = np.linalg.svd(c, full_matrices=False)
    projected, n = u.T @ y, len(y)
    rest = (y**2).sum(0) - (projected**2).sum(0)
    shrink = s**2 / (s**2 + n * np.logspace(-7, 3, 41)[:, None] + 1e-300)  # (penalties, rank)
    errors = rest + ((1 - shrink) ** 2) @ projected**2
    freedom = shrink.sum(1)
    score = errors / (1 - freedom[:, None] / n).clip(0.5) ** 2
    best = np.argmin(np.where(freedom[:, None] <= n / 2, score, np.inf), 0)
    coefficients = shrink[best].T * projected / np.where(s > 0, s, 1)[:, None]
    return vt.T @ coefficients, freedom[best]


def _channels(x, channels: int, name: str):
    """Events ``(..., n * C)`` as ``(..., n, C)``, and n."""
    shape = jnp.shape(x)
    if not shape or shape[-1] % channels or not shape[-1]:
        raise ValueError(f"{name} expects events with last axis a multiple of {channels}, got {shape}")
    count = shape[-1] // channels
    return jnp.reshape(x, (*shape[:-1], count, channels)), count
