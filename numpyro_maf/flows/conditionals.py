# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Conditional distributions of one column, whose parameters a network supplies: what MADE is made of.

Arrays in, arrays out, as for scalar maps: ``params`` leads with the parameter axis, ``(P, ...)``. Each
is a frozen dataclass without arrays. Values are floats, also those of discrete columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from numpyro.distributions import constraints

from numpyro_maf.flows.formulas import bounded, normal_log_density
from numpyro_maf.flows.parametric import Parametric

__all__ = ["Bernoulli", "Categorical", "Conditional", "Mixture", "Normal"]


@dataclass(frozen=True)
class Conditional(Parametric):
    """A distribution of one number (abstract)."""

    is_discrete: ClassVar[bool] = False

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


@dataclass(frozen=True)
class Mixture(Conditional):
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

    @property
    def num_params(self) -> int:
        return 3 * self.components

    @property
    def initial(self) -> tuple[float, ...]:
        """Components spread evenly: equal ones would learn alike."""
        k = self.components
        means = [0.0] if k == 1 else [3 * i / (k - 1) - 1.5 for i in range(k)]
        return (*[0.0] * k, *means, *[0.0 if k == 1 else -0.5] * k)

    def log_prob(self, params, x):
        logits, means, raw = jnp.split(params, 3)
        log_scales = bounded(raw, self.bound)
        parts = normal_log_density((x - means) * jnp.exp(-log_scales)) - log_scales
        return logsumexp(jax.nn.log_softmax(logits, axis=0) + parts, axis=0)

    def sample(self, params, uniform, normal):
        logits, means, raw = jnp.split(params, 3)
        chosen = jax.nn.one_hot(_choice(logits, uniform), self.components, axis=0, dtype=means.dtype)
        return jnp.sum(chosen * (means + jnp.exp(bounded(raw, self.bound)) * normal), axis=0)


@dataclass(frozen=True)
class Bernoulli(Conditional):
    """0 or 1, with a logit."""

    is_discrete: ClassVar[bool] = True

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
    """One of ``0, …, categories - 1``, with logits; later columns see it as one-hot.

    :param categories: how many.
    """

    is_discrete: ClassVar[bool] = True

    categories: int = 2

    def __post_init__(self):
        if self.categories < 2:
            raise ValueError(f"Categorical needs two or more categories, got {self}")

    @property
    def inputs(self) -> int:  # type: ignore[override]
        return self.categories

    @property
    def support(self):
        return constraints.integer_interval(0, self.categories - 1)

    @property
    def num_params(self) -> int:
        return self.categories

    def log_prob(self, params, x):
        return jnp.sum(self.embed(x) * jax.nn.log_softmax(params, axis=0), axis=0)

    def sample(self, params, uniform, normal):
        return _choice(params, uniform).astype(params.dtype)

    def embed(self, x):
        categories = jnp.arange(self.categories, dtype=x.dtype).reshape(-1, *(1,) * x.ndim)
        return (x == categories).astype(x.dtype)


def _choice(logits, uniform):
    """``(K, ...), (...) -> (...)``: an index with these odds, by inversion."""
    below = jnp.cumsum(jax.nn.softmax(logits, axis=0), axis=0)
    return jnp.sum(uniform >= below[:-1], axis=0)
