# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""A mixture of Gaussians as the base of a flow, for posteriors of several modes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.scipy.special import logsumexp
from jax.typing import ArrayLike
from numpyro.distributions import constraints
from numpyro.distributions.util import validate_sample

from numpyro_maf.inference.gaussian import normal_log_prob

__all__ = ["GaussianMixture", "standardized"]


class GaussianMixture(dist.Distribution):
    """A mixture of Gaussians that stays as it is: what is made of its draws may be differentiated.

    NumPyro's own mixtures count as not reparametrised, since their draws have no gradient with respect to
    their weights. Here nothing of the mixture is trained, so none is needed.

    :param log_weights: ``(K,)``, minus infinity for a component that is not there.
    :param loc: ``(K, D)``; ``scale``: ``(K, D, D)`` Cholesky factors or ``(K, D)`` standard deviations.
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    pytree_data_fields = ("log_weights", "loc", "scale")

    def __init__(self, log_weights: Array, loc: Array, scale: Array, *, validate_args: Any = None) -> None:
        self.log_weights, self.loc, self.scale = log_weights, loc, scale
        super().__init__((), (loc.shape[-1],), validate_args=validate_args)

    def sample(self, key: ArrayLike, sample_shape: tuple[int, ...] = ()) -> Array:
        """``sample_shape + (D,)`` draws."""
        which_key, eps_key = jax.random.split(key)
        which = jax.random.categorical(which_key, self.log_weights, shape=sample_shape)
        eps = jax.random.normal(eps_key, (*sample_shape, *self.event_shape), self.loc.dtype)
        scale = self.scale[which]
        full = self.scale.ndim == 3
        return self.loc[which] + (jnp.einsum("...ij,...j->...i", scale, eps) if full else scale * eps)

    @validate_sample
    def log_prob(self, value: Array) -> Array:
        """``(..., D) -> (...)``."""
        each = [normal_log_prob(loc, scale, value) for loc, scale in zip(self.loc, self.scale)]
        weights = self.log_weights.reshape(-1, *[1] * (value.ndim - 1))
        return logsumexp(weights + jnp.stack(each), 0)


def standardized(log_weights: Array, loc: Array, scale: Array) -> tuple[Any, tuple[Array, Array]]:
    """A mixture's parts in the coordinates in which its mean is 0 and its covariance 1; and mean and root."""
    weights = jnp.exp(log_weights)
    mean = weights @ loc
    if scale.ndim == 2:
        root = jnp.sqrt(weights @ (scale**2 + (loc - mean) ** 2))
        return (log_weights, (loc - mean) / root, scale / root), (mean, root)
    gap = loc - mean
    covariance = jnp.einsum("k,kij,klj->il", weights, scale, scale)
    root = jnp.linalg.cholesky(covariance + jnp.einsum("k,ki,kj->ij", weights, gap, gap))
    inverse = jax.scipy.linalg.solve_triangular(root, jnp.eye(len(mean), dtype=root.dtype), lower=True)
    return (log_weights, gap @ inverse.T, inverse @ scale), (mean, root)
