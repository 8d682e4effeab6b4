# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Conditional distributions of one column, whose parameters a network supplies: what MADE is made of.

Arrays in, arrays out, as for scalar maps: ``params`` leads with the parameter axis, ``(P, ...)``. Each
is a frozen dataclass without arrays. Values are floats, also those of discrete columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr, logsumexp
from numpyro.distributions import constraints

from numpyro_maf.flows.formulas import bounded, normal_log_density
from numpyro_maf.flows.parametric import Parametric

__all__ = ["Bernoulli", "Categorical", "Conditional", "Count", "LogMixture", "Mixture", "Normal"]

_LARGEST = 2.0**30  # of counts that are drawn: float32 and int32 hold it


@dataclass(frozen=True)
class Conditional(Parametric):
    """A distribution of one number (abstract).

    ``keeps_units`` says that values come in their own units, not standardised: those of discrete columns, and
    of columns with a scale of their own.
    """

    is_discrete: ClassVar[bool] = False
    keeps_units: ClassVar[bool] = False

    @property
    def support(self) -> constraints.Constraint:
        """Of one number."""
        raise NotImplementedError

    def log_prob(self, params, x):
        """``(P, ...), (...) -> (...)``."""
        raise NotImplementedError

    def sample(self, params, uniform, normal):
        """A draw made of one uniform and one standard normal number: ``(P, ...), (...), (...) -> (...)``."""
        raise NotImplementedError


@dataclass(frozen=True)
class Normal(Conditional):
    """``Normal(m, exp(s))``, ``s = bound tanh(a / bound)``.

    :param bound: the largest ``|s|``.
    """

    bound: float = 7.0

    @property
    def support(self):
        return constraints.real

    @property
    def num_params(self) -> int:
        return 2

    def log_prob(self, params, x):
        mean, log_scale = params[0], bounded(params[1], self.bound)
        return normal_log_density((x - mean) * jnp.exp(-log_scale)) - log_scale

    def sample(self, params, uniform, normal):
        return params[0] + jnp.exp(bounded(params[1], self.bound)) * normal


class _OfComponents(Conditional):
    """A mixture: ``(3 K, ...)`` logits, means and log-scales (abstract)."""

    components: int

    @property
    def num_params(self) -> int:
        return 3 * self.components

    @property
    def initial(self) -> tuple[float, ...]:
        """Components spread evenly: equal ones would learn alike."""
        k = self.components
        means = [0.0] if k == 1 else [3 * i / (k - 1) - 1.5 for i in range(k)]
        return (*[0.0] * k, *means, *[0.0 if k == 1 else -0.5] * k)


@dataclass(frozen=True)
class Mixture(_OfComponents):
    """A mixture of normals, the MoG of Papamakarios et al. (2017).

    :param components: how many.
    :param bound: the largest absolute log-scale.
    """

    components: int = 10
    bound: float = 7.0

    def __post_init__(self):
        if self.components < 1 or self.bound <= 0:
            raise ValueError(f"Mixture needs components >= 1 and bound > 0, got {self}")

    @property
    def support(self):
        return constraints.real

    def log_prob(self, params, x):
        logits, means, raw = jnp.split(params, 3)
        log_scales = bounded(raw, self.bound)
        parts = normal_log_density((x - means) * jnp.exp(-log_scales)) - log_scales
        return logsumexp(jax.nn.log_softmax(logits, axis=0) + parts, axis=0)

    def sample(self, params, uniform, normal):
        return _drawn(params, uniform, normal, self.bound)


@dataclass(frozen=True)
class LogMixture(_OfComponents):
    """A positive number, whose logarithm has a mixture of normals as its distribution.

    :param components: how many.
    :param loc: mean of the logarithm, about, with its standard deviation ``scale``: components start there.
    :param bound: the largest absolute log-scale, in units of ``scale``.
    """

    components: int = 5
    loc: float = 0.0
    scale: float = 1.0
    bound: float = 7.0
    keeps_units: ClassVar[bool] = True

    def __post_init__(self):
        if self.components < 1 or self.scale <= 0 or self.bound <= 0:
            raise ValueError(f"LogMixture needs components >= 1, scale > 0 and bound > 0, got {self}")

    @property
    def support(self):
        return constraints.positive

    def log_prob(self, params, x):
        log = jnp.log(jnp.where(x > 0, x, 1.0))
        inner = Mixture(self.components, self.bound).log_prob(params, (log - self.loc) / self.scale)
        return jnp.where(x > 0, inner - log - math.log(self.scale), -jnp.inf)

    def sample(self, params, uniform, normal):
        tiny, huge = jnp.finfo(params.dtype).tiny, jnp.finfo(params.dtype).max
        drawn = self.loc + self.scale * _drawn(params, uniform, normal, self.bound)
        return jnp.clip(jnp.exp(drawn), tiny, huge)

    def embed(self, x):
        return ((jnp.log(jnp.where(x > 0, x, 1.0)) - self.loc) / self.scale)[None]


@dataclass(frozen=True)
class Count(_OfComponents):
    r"""0, 1, 2, …: a mixture of logistic distributions on the scale of ``log(1 + n)``, cut into cells.

    With F the distribution function of the mixture, and :math:`u(t) = (\log(1 + t) - loc) / scale`,

    .. math:: P(n) = F(u(n + 1/2)) - F(u(n - 1/2)),

    where all mass below belongs to 0, and all mass above to ``most`` (Salimans et al. 2017, *PixelCNN++*,
    section 2.1). Differences are taken as
    :math:`\log(\sigma(b) - \sigma(a)) = \log\sigma(b) + \log\sigma(-a) + \log(1 - e^{a - b})`, which holds in
    the tails and for large n, where both ends of a cell round to the same number.

    :param components: how many.
    :param most: the largest count; None for none.
    :param loc: mean of ``log(1 + n)``, about, with its standard deviation ``scale``: components start there.
    :param bound: the largest absolute log-scale, in units of ``scale``.
    """

    components: int = 5
    most: int | None = None
    loc: float = 2.0
    scale: float = 2.0
    bound: float = 7.0
    is_discrete: ClassVar[bool] = True
    keeps_units: ClassVar[bool] = True

    def __post_init__(self):
        fine = self.components >= 1 and self.scale > 0 and self.bound > 0
        if not fine or (self.most is not None and self.most < 1):
            raise ValueError(f"Count needs components, most >= 1, scale > 0 and bound > 0, got {self}")

    @property
    def support(self):
        if self.most is None:
            return constraints.nonnegative_integer
        return constraints.integer_interval(0, self.most)

    def _inside(self, x):
        inside = (x >= 0) & (x == jnp.round(x))
        return inside if self.most is None else inside & (x <= self.most)

    def log_prob(self, params, x):
        logits, means, raw = jnp.split(params, 3)
        log_scales, inside = bounded(raw, self.bound), self._inside(x)
        n = jnp.where(inside, x, 0.0)
        rate = jnp.exp(-log_scales)
        below, above = (((jnp.log(n + shift) - self.loc) / self.scale - means) * rate for shift in (0.5, 1.5))
        width = jnp.log1p(1 / (n + 0.5)) / self.scale * rate  # above - below, without rounding
        low = jax.nn.log_sigmoid(-below) + jnp.log(-jnp.expm1(-width))
        parts = jax.nn.log_sigmoid(above) + jnp.where(n > 0, low, 0.0)
        if self.most is not None:
            parts = jnp.where(n == self.most, jax.nn.log_sigmoid(-below), parts)
        mixed = logsumexp(jax.nn.log_softmax(logits, axis=0) + parts, axis=0)
        return jnp.where(inside, mixed, -jnp.inf)

    def sample(self, params, uniform, normal):
        logistic = log_ndtr(normal) - log_ndtr(-normal)  # of the same rank as the normal number
        at = self.loc + self.scale * _drawn(params, uniform, logistic, self.bound)
        most = _LARGEST if self.most is None else float(self.most)
        return jnp.clip(jnp.floor(jnp.exp(jnp.minimum(at, math.log(_LARGEST))) - 0.5), 0.0, most)

    def embed(self, x):
        return ((jnp.log1p(jnp.maximum(x, 0.0)) - self.loc) / self.scale)[None]


@dataclass(frozen=True)
class Bernoulli(Conditional):
    """0 or 1, with a logit."""

    is_discrete: ClassVar[bool] = True
    keeps_units: ClassVar[bool] = True

    @property
    def support(self):
        return constraints.boolean

    @property
    def num_params(self) -> int:
        return 1

    def log_prob(self, params, x):
        # log sigmoid of plus or minus the logit, exactly 0 only where it rounds to it
        return -jax.nn.softplus(jnp.where(x > 0.5, -params[0], params[0]))

    def sample(self, params, uniform, normal):
        return (uniform < jax.nn.sigmoid(params[0])).astype(params.dtype)


@dataclass(frozen=True)
class Categorical(Conditional):
    """One of ``low, …, low + categories - 1``, with logits; later columns see it as one-hot.

    :param categories: how many.
    :param low: the first of them.
    """

    is_discrete: ClassVar[bool] = True
    keeps_units: ClassVar[bool] = True

    categories: int = 2
    low: int = field(default=0, metadata={"added": True})

    def __post_init__(self):
        if self.categories < 1:
            raise ValueError(f"Categorical needs one category or more, got {self}")

    @property
    def inputs(self) -> int:  # type: ignore[override]
        return self.categories

    @property
    def support(self):
        return constraints.integer_interval(self.low, self.low + self.categories - 1)

    @property
    def num_params(self) -> int:
        return self.categories

    def log_prob(self, params, x):
        return jnp.sum(self.embed(x) * jax.nn.log_softmax(params, axis=0), axis=0)

    def sample(self, params, uniform, normal):
        return _choice(params, uniform).astype(params.dtype) + self.low

    def embed(self, x):
        categories = self.low + jnp.arange(self.categories, dtype=x.dtype).reshape(-1, *(1,) * x.ndim)
        return (x == categories).astype(x.dtype)


def _drawn(params, uniform, standard, bound):
    """A draw of a mixture, ``(3 K, ...), (...), (...) -> (...)``, from one of its standard distribution."""
    logits, means, raw = jnp.split(params, 3)
    chosen = jax.nn.one_hot(_choice(logits, uniform), len(means), axis=0, dtype=means.dtype)
    return jnp.sum(chosen * (means + jnp.exp(bounded(raw, bound)) * standard), axis=0)


def _choice(logits, uniform):
    """``(K, ...), (...) -> (...)``: an index with these odds, by inversion."""
    below = jnp.cumsum(jax.nn.softmax(logits, axis=0), axis=0)
    return jnp.sum(uniform >= below[:-1], axis=0)
