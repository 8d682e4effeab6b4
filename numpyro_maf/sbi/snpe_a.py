# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

r"""SNPE-A: mixtures of Gaussians of unconstrained vectors, divided by the Gaussian they were drawn from.

Papamakarios & Murray (2016), section 2.4 and appendix C: simulations of a proposal
:math:`\tilde p(\theta)` in place of the prior give :math:`\tilde p(\theta) p(x \mid \theta)`, so the
posterior is that times :math:`p(\theta) / \tilde p(\theta)`. Uniform, normal and log-normal priors are
Gaussian as vectors; of others their first two moments count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import logsumexp
from jax.typing import ArrayLike

from numpyro_maf.codec import storable
from numpyro_maf.inference.sites import Sites
from numpyro_maf.nn.mlp import MLP
from numpyro_maf.rng import as_key, as_shape, normal, split
from numpyro_maf.sbi.densities import prior_draws
from numpyro_maf.sbi.methods import Method, Proposal
from numpyro_maf.sbi.options import GaussianOptions
from numpyro_maf.sbi.posterior import Posterior, Setting, not_stored, to_vectors
from numpyro_maf.sbi.preprocessing import Losses, Prepared
from numpyro_maf.sbi.views import Summary, View

__all__ = ["GaussianDivision", "GaussianEstimator", "GaussianPosterior", "fit_gaussians"]


@dataclass(frozen=True)
class GaussianDivision(Method):
    """One Gaussian with the moments of the posterior, by which what is learned is divided (SNPE-A)."""

    who: ClassVar[str] = "snpe"
    options: ClassVar[type] = GaussianOptions

    def propose(self, key: ArrayLike, last, setting, count):
        source = last.posterior.merged
        return Proposal(source.sample(key, (count,)), source)

    def chosen(self, sims: Any, fresh):
        return sims.last(fresh)

    def learn(self, key: ArrayLike, prepared, observation: Any, proposal, **options: Any):
        found = fit_gaussians(key, prepared, proposal=proposal.source, **options)
        return found(observation), found, bool(found.losses.stopped)


@storable
@dataclass(frozen=True, eq=False, repr=False)
class GaussianPosterior(Posterior):
    """A mixture of Gaussians of unconstrained vectors.

    :param log_shares: ``(K,)``; ``means``: ``(K, D)``; ``factors``: ``(K, D, D)``, lower triangular factors
        of the precisions.
    """

    sites: Sites
    observation: dict[str, Any]
    log_shares: Any
    means: Any
    factors: Any
    setting: Setting = not_stored()

    def sample(self, key: ArrayLike, sample_shape: int | Sequence[int] = ()) -> dict[str, Any]:
        parts = self.log_shares, self.means, self.factors
        return _draw(self.sites, parts, as_key(key), as_shape(sample_shape))

    def of_vectors(self, vector):
        return _mixture(self.log_shares, self.means, self.factors, vector)

    @property
    def moments(self):
        """Mean and covariance of the vector."""
        shares = np.exp(self.log_shares - np.logaddexp.reduce(self.log_shares))
        means, factors = np.asarray(self.means), np.asarray(self.factors)
        mean = shares @ means
        inner = np.linalg.inv(factors @ np.swapaxes(factors, -1, -2))
        apart = means - mean
        return mean, np.einsum("k,kij->ij", shares, inner + apart[:, :, None] * apart[:, None])

    @property
    def merged(self) -> GaussianPosterior:
        """The one Gaussian with its moments, from which the next round may be drawn."""
        mean, spread = self.moments
        parts = np.zeros(1), mean[None], np.linalg.cholesky(np.linalg.inv(spread))[None]
        return GaussianPosterior(self.sites, self.observation, *parts, self.setting)

    def _describe(self):
        return [f"GaussianPosterior {self._about()}", f"a mixture of {len(self.log_shares)} Gaussians"]


@storable
@dataclass(frozen=True, eq=False)
class GaussianEstimator:
    """Mixtures of Gaussians for any observation, before they are divided by ``proposal``."""

    sites: Sites
    view: View
    summary: Summary
    net: MLP
    networks: Any
    scale: tuple[Any, Any]
    prior: tuple[Any, Any]
    proposal: GaussianPosterior | None
    losses: Losses
    setting: Setting = not_stored()

    def __call__(self, observation: Any) -> GaussianPosterior:
        observation = self.view.by_name(observation)
        arrays, batch = self.view.arrays(observation)
        if batch:
            raise ValueError(f"SNPE-A takes one observation, got a batch of shape {batch}")
        moments = None if self.proposal is None else (self.prior, self.proposal.moments)
        given = self.net, self.networks, self.view, self.scale, moments
        log_shares, means, factors = _posterior(self.summary, self.sites.width, given, arrays)
        seen = {name: jnp.asarray(observation[name]) for name in self.view.names}
        return GaussianPosterior(self.sites, seen, log_shares, means, factors, self.setting)


def fit_gaussians(
    key: ArrayLike,
    prepared: Prepared,
    *,
    proposal=None,
    components: int = 4,
    hidden=(64, 64),
    embedding: Any = None,
    **options: Any,
) -> GaussianEstimator:
    """Learn mixtures of Gaussians from simulations of ``proposal``, or of the prior.

    :param components: number of components of the mixture, K.
    """
    net_key, start_key, network_key, prior_key, fit_key = split(key, 5)
    sites: Any = prepared.sites
    if any(sites.columns):
        raise ValueError("mixtures of Gaussians take no discrete sites")
    width, vectors = sites.width, prepared.theta
    view, summary, weights_of, context = prepared.summary(embedding)
    outputs = 1 + width + width * (width + 1) // 2
    net = MLP.init(net_key, context, (1, components * outputs), hidden=hidden)
    start = np.zeros((components, outputs))
    start[:, 1 : 1 + width] = 0.5 * normal(start_key, (components, width))
    net = MLP(net.weights, (*net.biases[:-1], jnp.asarray(start.ravel(), float)), net.outputs, net.activation)
    rows = vectors[~prepared.held_out]
    loc, scale = rows.mean(0), rows.std(0) + 1e-9
    data = [(vectors - loc) / scale, *prepared.arrays]
    pair = (net, weights_of(network_key)), (None, view)
    trained, _ = prepared.train(fit_key, _GaussianLoss(summary, width), [pair], data, **options)
    net, networks = trained.params
    seen = {name: jnp.asarray(a[0]) for name, a in zip(prepared.supports, prepared.arrays)}
    drawn = np.asarray(to_vectors(sites, prior_draws(prepared.setting, seen, prior_key, 20_000))[0])
    prior = drawn.mean(0), np.cov(drawn.T).reshape(width, width)
    found = GaussianEstimator(
        sites, view, summary, net, networks, (loc, scale), prior, proposal, Losses.of(trained),
        prepared.setting,
    )  # fmt: skip
    return trained.carried(found)


@partial(jax.jit, static_argnames="sample_shape")
def _draw(sites, parts, key, sample_shape):
    log_shares, means, factors = parts
    share_key, normal_key = jax.random.split(key)
    chosen = jax.random.categorical(share_key, log_shares, shape=sample_shape)
    z = jax.random.normal(normal_key, (*sample_shape, means.shape[-1]))
    rest = jnp.linalg.solve(jnp.swapaxes(factors[chosen], -1, -2), z[..., None])[..., 0]
    return sites.constrain(means[chosen] + rest)


@partial(jax.jit, static_argnums=(0, 1))
def _posterior(summary, width, given, arrays):
    """The mixture for one observation, divided where ``moments`` of prior and proposal are given."""
    net, networks, view, (loc, scale), moments = given
    parts = _parts(net, summary(networks, view(arrays)), width)
    log_shares, means, factors = (a[0] for a in parts)
    means, factors = means * scale + loc, factors / scale[:, None]
    return (log_shares, means, factors) if moments is None else _divided(log_shares, means, factors, *moments)


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


@jax.jit
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
