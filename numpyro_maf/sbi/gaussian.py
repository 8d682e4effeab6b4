# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

r"""Mixtures of Gaussians of unconstrained vectors, which can be divided by the Gaussian they were drawn from.

Papamakarios & Murray (2016), section 2.4 and appendix C: what is learned from a proposal
:math:`\tilde p(\theta)` in place of the prior is :math:`\tilde p(\theta) p(x \mid \theta)`, so the posterior
is it times :math:`p(\theta) / \tilde p(\theta)`. Uniform, normal and log-normal priors are Gaussian as
vectors; of others their first two moments count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import logsumexp

from numpyro_maf.inference.sites import Sites
from numpyro_maf.nn.mlp import MLP
from numpyro_maf.rng import split
from numpyro_maf.sbi.densities import prior_draws
from numpyro_maf.sbi.neural import Task
from numpyro_maf.sbi.posterior import Posterior, Setting
from numpyro_maf.sbi.simulations import Simulations

__all__ = ["GaussianEstimator", "GaussianPosterior", "fit_gaussians"]


@dataclass(frozen=True, eq=False)
class GaussianPosterior(Posterior):
    """A mixture of Gaussians of unconstrained vectors.

    :param log_shares: ``(K,)``; ``means``: ``(K, D)``; ``factors``: ``(K, D, D)``, lower, of the precisions.
    """

    sites: Sites
    setting: Setting
    observation: dict[str, Any]
    log_shares: Any
    means: Any
    factors: Any

    def sample(self, key, sample_shape=()):
        share_key, normal_key = jax.random.split(key)
        chosen = jax.random.categorical(share_key, self.log_shares, shape=sample_shape)
        z = jax.random.normal(normal_key, (*sample_shape, self.means.shape[-1]))
        rest = jnp.linalg.solve(jnp.swapaxes(self.factors[chosen], -1, -2), z[..., None])[..., 0]
        return self.sites.constrain(self.means[chosen] + rest)

    def log_prob(self, values):
        vector = self.sites.unconstrain(values)
        parts = self.log_shares, self.means, self.factors
        log_prob = _mixture(*parts, vector) - self.sites.log_det(vector)
        return jnp.where(self.sites.contains(values), log_prob, -jnp.inf)

    @property
    def moments(self):
        """Mean and covariance of the vector."""
        shares = jnp.exp(self.log_shares - logsumexp(self.log_shares))
        mean = shares @ self.means
        inner = jnp.linalg.inv(self.factors @ jnp.swapaxes(self.factors, -1, -2))
        apart = self.means - mean
        return mean, jnp.einsum("k,kij->ij", shares, inner + apart[:, :, None] * apart[:, None])

    @property
    def merged(self) -> GaussianPosterior:
        """The one Gaussian with its moments, from which the next round may be drawn."""
        mean, spread = self.moments
        factor = jnp.linalg.cholesky(jnp.linalg.inv(spread))
        parts = jnp.zeros(1), mean[None], factor[None]
        return GaussianPosterior(self.sites, self.setting, self.observation, *parts)


@dataclass(frozen=True, eq=False)
class GaussianEstimator:
    """Mixtures of Gaussians for any observation, before they are divided by ``proposal``."""

    task: Task
    net: MLP
    networks: Any
    scale: tuple[Any, Any]
    prior: tuple[Any, Any]
    proposal: GaussianPosterior | None

    def __call__(self, observation) -> GaussianPosterior:
        task = self.task
        arrays, batch = task.view.arrays(observation)
        if batch:
            raise ValueError(f"SNPE-A takes one observation, got a batch of shape {batch}")
        context = task.summary(self.networks, task.view(arrays))
        log_shares, means, factors = (a[0] for a in _parts(self.net, context, task.sites.width))
        loc, scale = self.scale
        means, factors = means * scale + loc, factors / scale[:, None]
        if self.proposal is not None:
            log_shares, means, factors = _divided(
                log_shares, means, factors, self.prior, self.proposal.moments
            )
        observation = {name: jnp.asarray(observation[name]) for name in task.view.names}
        return GaussianPosterior(task.sites, task.setting, observation, log_shares, means, factors)


def fit_gaussians(
    key, model, sims, observed, *, proposal=None, fresh=None, components: int = 4, hidden=(64, 64),
    embedding=None, missing=False, latent=None, model_args=(), model_kwargs=None, validation: Any = 0.1,
    **options,
) -> GaussianEstimator:  # fmt: skip
    """Learn mixtures of Gaussians from the last ``fresh`` simulations, drawn from ``proposal`` or the prior.

    :param components: K.
    """
    last = {name: np.asarray(value)[-(fresh or len(value)) :] for name, value in sims.items()}
    last = Simulations(last, None, getattr(sims, "args", ()), getattr(sims, "kwargs", {}))
    task_key, net_key, prior_key, fit_key = split(key, 4)
    task = Task.of(
        task_key, model, last, observed, embedding=embedding, missing=missing, latent=latent,
        model_args=model_args, model_kwargs=model_kwargs, validation=validation,
    )  # fmt: skip
    if any(task.sites.columns):
        raise ValueError("mixtures of Gaussians take no discrete sites")
    width = task.sites.width
    outputs = components * (1 + width + width * (width + 1) // 2)
    net = MLP.init(net_key, task.width, (1, outputs), hidden=hidden)
    start = np.zeros((components, outputs // components))
    start[:, 1 : 1 + width] = 0.5 * np.random.default_rng(0).normal(size=(components, width))
    net = MLP(net.weights, (*net.biases[:-1], jnp.asarray(start.ravel(), float)), net.outputs, net.activation)
    rows = task.vector[~task.held_out]
    loc, scale = jnp.asarray(rows.mean(0)), jnp.asarray(rows.std(0) + 1e-9)
    data = [(task.vector - np.asarray(loc)) / np.asarray(scale), *task.arrays]
    networks = jax.tree.map(lambda a: a[0], task.networks)
    task = Task(**{**vars(task), "networks": networks})
    loss = _GaussianLoss(task.summary, width)
    net, networks, *_ = task.train(fit_key, loss, [(net, None)], data, **options)
    drawn = prior_draws(
        task.setting, {n: jnp.asarray(last[n][0]) for n in task.view.names}, prior_key, 20_000
    )
    vectors = task.sites.unconstrain({name: drawn[name] for name in task.sites.names})
    prior = vectors.mean(0), jnp.cov(vectors.T).reshape(width, width)
    return GaussianEstimator(task, net, networks, (loc, scale), prior, proposal)


@dataclass(frozen=True)
class _GaussianLoss:
    summary: Any
    width: int

    def __call__(self, params, fixed, key, vector, *arrays):
        net, networks = params
        context = self.summary(networks, fixed[1](arrays))
        log_shares, means, factors = _parts(net, context, self.width)
        return -jax.vmap(_mixture)(log_shares, means, factors, vector)


def _parts(net, context, width):
    """Log shares ``(B, K)``, means ``(B, K, D)`` and factors of precisions ``(B, K, D, D)``."""
    raw = net(None, context)[..., 0, :]
    raw = raw.reshape(*raw.shape[:-1], -1, 1 + width + width * (width + 1) // 2)
    rows, columns = np.tril_indices(width)
    factors = jnp.zeros((*raw.shape[:-1], width, width)).at[..., rows, columns].set(raw[..., 1 + width :])
    diagonal = jnp.diagonal(factors, axis1=-2, axis2=-1)
    bounded = jnp.exp(7 * jnp.tanh(diagonal / 7))
    factors = factors + (bounded - diagonal)[..., None] * jnp.eye(width)
    return jax.nn.log_softmax(raw[..., 0]), raw[..., 1 : 1 + width], factors


def _mixture(log_shares, means, factors, vector):
    """Log-density of vectors ``(..., D)``."""
    rest = vector[..., None, :] - means
    z = jnp.einsum("...kj,kji->...ki", rest, factors)
    log_det = jnp.log(jnp.diagonal(factors, axis1=-2, axis2=-1)).sum(-1)
    each = log_det - 0.5 * (z**2).sum(-1) - 0.5 * vector.shape[-1] * jnp.log(2 * jnp.pi)
    return logsumexp(log_shares - logsumexp(log_shares) + each, -1)


def _divided(log_shares, means, factors, prior, proposal):
    """Times the prior and divided by the proposal, both Gaussian.

    A component wider than the proposal has no such quotient; then as much is taken off as leaves a tenth of
    its precision.
    """
    (m0, s0), (m1, s1) = prior, proposal
    p0, p1 = jnp.linalg.inv(s0), jnp.linalg.inv(s1)

    def one(log_share, mean, factor):
        change = p0 - p1
        inner = solve_triangular(factor, solve_triangular(factor, change, lower=True).T, lower=True)
        values, vectors = jnp.linalg.eigh((inner + inner.T) / 2)
        kept = (vectors * jnp.maximum(values, -0.9)) @ vectors.T
        change = factor @ kept @ factor.T
        precision = factor @ factor.T + change
        shift = factor @ (factor.T @ mean) + p0 @ m0 - p1 @ m1
        new = jnp.linalg.solve(precision, shift)
        lower = jnp.linalg.cholesky((precision + precision.T) / 2)
        log_det = lambda a: jnp.log(jnp.diagonal(a)).sum()  # noqa: E731
        gain = log_det(factor) - log_det(lower) - 0.5 * ((factor.T @ mean) ** 2).sum() + 0.5 * new @ shift
        return log_share + gain, new, lower

    return jax.vmap(one)(log_shares, means, factors)
