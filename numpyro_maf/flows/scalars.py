# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

r"""Scalar maps: monotone functions of one variable whose parameters a network supplies.

Arrays in, arrays out. ``params`` leads with the parameter axis, ``(num_params, ...)``; the variable
and both results have the rest of that shape. Each map is a frozen dataclass without arrays, hence
hashable; zero parameters give the identity, so a flow with small weights starts near its base.

Flows apply ``forward`` from data to base, an IAF from base to data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import log_ndtr, logsumexp, ndtri

from numpyro_maf.flows.formulas import bounded, normal_log_density
from numpyro_maf.flows.parametric import Parametric

__all__ = ["Additive", "Affine", "Compose", "MixtureCDF", "Scalar"]


@dataclass(frozen=True)
class Scalar(Parametric):
    """A monotone scalar map (abstract)."""

    # Of values and results alike: "real", "unit" for [0, 1] or "circle" for [-pi, pi).
    support: ClassVar[str] = "real"
    # What takes a bounded base to the reals: "logit", or "probit" where the map ends in a normal quantile.
    link: ClassVar[str] = "logit"

    def forward(self, params, x):
        """``(P, ...), (...) -> (...), (...)``: the value and ``log dy/dx``."""
        raise NotImplementedError

    def inverse(self, params, y):
        """``(P, ...), (...) -> (...), (...)``: the preimage and ``log dx/dy``."""
        raise NotImplementedError


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
        return params[0], bounded(params[1], self.bound)

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
class MixtureCDF(Scalar):
    r"""A mixture's distribution function ``F``, taken to the reals by the kernel's own quantile function.

    ``y = logit F(x)`` with logistic kernels, as in Flow++ (Ho et al. 2019, eq. 5 without the affine part),
    and ``y = probit F(x)`` with Gaussian ones; one component is an affine map. Onto a base with support
    (0, 1), such as Uniform or Beta, flows drop the quantile function: then ``y = F(x)``.

    Computed from ``log F`` and ``log (1 - F)``, so the tails stay exact. The inverse is Newton's, kept inside
    the least and greatest quantile of the components, between which that of the mixture lies; its
    derivatives are those of the inverse function.

    :param components: how many.
    :param kernel: ``"logistic"`` or ``"gaussian"``.
    :param bound: the largest absolute log-scale of a component.
    """

    components: int = 8
    kernel: str = "logistic"
    bound: float = 5.0

    def __post_init__(self):
        if self.components < 1 or self.bound <= 0:
            raise ValueError(f"MixtureCDF needs components >= 1 and bound > 0, got {self}")
        if self.kernel not in ("logistic", "gaussian"):
            raise ValueError(f"kernel must be 'logistic' or 'gaussian', got {self.kernel!r}")

    @property
    def link(self) -> str:  # type: ignore[override]
        return "probit" if self.kernel == "gaussian" else "logit"

    @property
    def num_params(self) -> int:
        return 3 * self.components

    @property
    def initial(self) -> tuple[float, ...]:
        """Equal components spread so that the mixture has a kernel's mean and variance."""
        k = self.components
        spread = np.linspace(-1, 1, k) if k > 1 else np.zeros(1)
        variance = math.pi**2 / 3 if self.kernel == "logistic" else 1.0
        share = 0.6 if k > 1 else 0.0
        means = spread * math.sqrt(share * variance / max(spread.var(), 1e-30))
        return (*[0.0] * k, *means.tolist(), *[math.log(1 - share) / 2] * k)

    def _components(self, params):
        """Log-weights, means and log-scales, ``(K, ...)`` each."""
        logits, means, raw = jnp.split(params, 3)
        return jax.nn.log_softmax(logits, axis=0), means, bounded(raw, self.bound)

    def forward(self, params, x):
        log_weights, means, log_scales = self._components(params)
        z = (x - means) * jnp.exp(-log_scales)
        log_cdf = jax.nn.log_sigmoid if self.kernel == "logistic" else _log_ndtr
        low, high = log_weights + log_cdf(jnp.stack([z, -z]))  # once, for it is much to compile
        below, above = logsumexp(low, axis=0), logsumexp(high, axis=0)
        # Everything about the nearer tail, whose logarithms may be huge: of these only differences are taken.
        # Not by jnp.minimum, whose derivative where both are equal is that of neither.
        lower = below < above
        shares = jax.nn.log_softmax(jnp.where(lower, low, high), axis=0) - log_scales
        if self.kernel == "logistic":  # a density over its tail is the other tail
            other = logsumexp(shares + log_cdf(jnp.where(lower, -z, z)), axis=0)
            return below - above, other - jnp.where(lower, above, below)
        tail = _log_ndtri(jnp.where(lower, below, above))
        log_slope = logsumexp(shares + _log_hazard(jnp.where(lower, z, -z)), axis=0) - _log_hazard(tail)
        return jnp.where(lower, tail, -tail), log_slope

    def inverse(self, params, y):
        params = jnp.broadcast_to(params, (params.shape[0], *jnp.shape(y)))
        x = _mixture_inverse(self, params, y)
        return x, -self.forward(params, x)[1]


@dataclass(frozen=True)
class Compose(Scalar):
    """Scalar maps one after the other: ``forward`` goes through them in order.

    Flow++'s map is ``Compose((MixtureCDF(), Affine()))``.

    :param maps: two or more scalar maps with the same support.
    """

    maps: tuple[Scalar, ...] = (MixtureCDF(), Affine())

    def __post_init__(self):
        object.__setattr__(self, "maps", tuple(self.maps))
        if len(self.maps) < 2 or len({m.support for m in self.maps}) != 1:
            raise ValueError(f"Compose needs two or more maps with the same support, got {self.maps}")

    @property
    def support(self):  # type: ignore[override]
        return self.maps[0].support

    @property
    def inputs(self):  # type: ignore[override]
        return self.maps[0].inputs

    @property
    def num_params(self) -> int:
        return sum(m.num_params for m in self.maps)

    @property
    def initial(self) -> tuple[float, ...]:
        return tuple(value for m in self.maps for value in m.initial)

    def _parts(self, params):
        ends = np.cumsum([m.num_params for m in self.maps])[:-1]
        return list(zip(self.maps, jnp.split(params, ends)))

    def forward(self, params, x):
        total = 0.0
        for scalar, part in self._parts(params):
            x, log_slope = scalar.forward(part, x)
            total = total + log_slope
        return x, total

    def inverse(self, params, y):
        total = 0.0
        for scalar, part in self._parts(params)[::-1]:
            y, log_slope = scalar.inverse(part, y)
            total = total + log_slope
        return y, total

    def embed(self, x):
        return self.maps[0].embed(x)


# Distribution functions and their inverses --------------------------------------------------------


_FAR = -10.0  # from here on a tail of the normal is summed as a series, right to 1e-11


def _log_mills(z):
    """Log of the lower tail's probability over its density, for ``z <= -10``, by its asymptotic series."""
    series, inverse = jnp.ones_like(z), 1 / z**2
    for n in range(10, 0, -1):
        series = 1 - (2 * n - 1) * inverse * series
    return jnp.log(series) - jnp.log(-z)


def _log_tail(z):
    """Logs of the standard normal's distribution function, and of its density over that, however far out."""
    near, far = jnp.maximum(z, _FAR), jnp.minimum(z, _FAR)
    within, mills = log_ndtr(near), _log_mills(far)
    below = jnp.where(z > _FAR, within, normal_log_density(far) + mills)
    return below, jnp.where(z > _FAR, normal_log_density(near) - within, -mills)


def _log_hazard(z):
    return _log_tail(z)[1]


@jax.custom_jvp
def _log_ndtr(z):
    """Log of the standard normal's distribution function, with a derivative that is right far out."""
    return _log_tail(z)[0]


@_log_ndtr.defjvp
def _log_ndtr_jvp(primals, tangents):
    (z,), (dz,) = primals, tangents
    return _log_ndtr(z), dz * jnp.exp(_log_hazard(z))


@jax.custom_jvp
def _log_ndtri(p):
    """The standard normal's quantile of ``exp(p)``, for ``p <= log 1/2`` however small."""
    far = jnp.minimum(p, -10.0)
    z = -jnp.sqrt(-2 * far - math.log(2 * math.pi) - jnp.log(-2 * far))
    z = jnp.where(p > -10, ndtri(jnp.exp(p)), z)

    def newton(_, z):
        below, hazard = _log_tail(z)
        return z - (below - p) * jnp.exp(-hazard)

    return jax.lax.fori_loop(0, 3, newton, z)  # a loop, for one step is much to compile


@_log_ndtri.defjvp
def _log_ndtri_jvp(primals, tangents):
    (p,), (dp,) = primals, tangents
    z = _log_ndtri(p)
    return z, dp * jnp.exp(-_log_hazard(z))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _mixture_inverse(scalar, params, y):
    """``x`` with ``scalar.forward(params, x) = y``, by Newton's method inside a bracket."""
    _, means, log_scales = scalar._components(params)
    quantiles = means + y * jnp.exp(log_scales)
    low, high = quantiles.min(0), quantiles.max(0)
    # Newton's steps end at rounding; what they cannot do, halving the bracket does.
    least = 4 * jnp.finfo(quantiles.dtype).eps

    def step(state):
        low, high, x, _, count = state
        value, log_slope = scalar.forward(params, x)
        low, high = jnp.where(value < y, x, low), jnp.where(value < y, high, x)
        new = x - (value - y) * jnp.exp(-log_slope)
        new = jnp.where((low < new) & (new < high), new, (low + high) / 2)
        moved = jnp.abs(new - x) > least * (1 + jnp.abs(x))
        return low, high, new, moved.any(), count + 1

    def going(state):
        return state[3] & (state[4] < 100)

    return lax.while_loop(going, step, (low, high, (low + high) / 2, True, 0))[2]


@_mixture_inverse.defjvp
def _mixture_inverse_jvp(scalar, primals, tangents):
    (params, y), (dparams, dy) = primals, tangents
    x = _mixture_inverse(scalar, params, y)
    (_, log_slope), (moved, _) = jax.jvp(lambda p: scalar.forward(p, x), (params,), (dparams,))
    return x, (dy - moved) * jnp.exp(-log_slope)
