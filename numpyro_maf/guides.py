# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Flows as NumPyro's automatic guides, for SVI, NeuTra and ``AutoGuideList``.

A guide is a flow after a Gaussian. The Gaussian is fitted when the guide is set up, from a few thousand
gradients, and stays; the flow starts near the identity and learns what no Gaussian fits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from jax import lax
from numpyro import handlers
from numpyro.distributions.transforms import LowerCholeskyAffine
from numpyro.infer.autoguide import AutoContinuous
from numpyro.infer.initialization import init_to_median

from numpyro_maf.bijectors import Standardize
from numpyro_maf.builders import iaf, maf, nsf
from numpyro_maf.distributions import FlowDistribution, is_real
from numpyro_maf.flow import Flow
from numpyro_maf.module import flow_module
from numpyro_maf.scalars import Affine, Compose
from numpyro_maf.splines import RQSpline

__all__ = ["AutoFlow", "AutoIAF", "AutoMAF", "fit_gaussian"]


# An affine map finds the place and width of a conditional, the spline its shape.
_SPLINES = partial(nsf, transforms=2, hidden=(32, 32), scalar=Compose((Affine(), RQSpline())))


class AutoFlow(AutoContinuous):
    """A guide over all latent variables of a model: any flow on the reals, after a Gaussian.

    It works as NumPyro's own guides do: with ``SVI``, ``NeuTraReparam``, ``AutoGuideList`` and
    ``Predictive``. Its param sites are ``{prefix}$params``, the flow's weights, and ``{prefix}_loc`` and
    ``{prefix}_scale``, the Gaussian, which SVI leaves as it is. :class:`PathELBO` trains it best.

    :param model: a NumPyro model whose latent variables are continuous.
    :param builder: ``(key, features) -> Flow``, such as ``partial(maf, transforms=3)``.
    :param prefix: of the names of its sites.
    :param init_loc_fn: where to start, one of NumPyro's strategies.
    :param init_scale: standard deviation at the start, on the unconstrained scale.
    :param warmup: steps of :func:`fit_gaussian`, which takes the start to the posterior; 0 to stay at the
        start.
    :param quantile_samples: draws for :meth:`median` and :meth:`quantiles`.
    :raises ValueError: for a builder whose flows have other than real events.
    """

    def __init__(
        self,
        model,
        *,
        builder: Callable[..., Flow] = _SPLINES,
        prefix="auto",
        init_loc_fn=init_to_median,
        init_scale: float = 0.1,
        warmup: int = 50,
        quantile_samples: int = 10_000,
    ):
        if init_scale <= 0:
            raise ValueError(f"init_scale must be positive, got {init_scale}")
        self._builder = builder
        self._init_scale = init_scale
        self._warmup = warmup
        self._quantile_samples = quantile_samples
        super().__init__(model, prefix=prefix, init_loc_fn=init_loc_fn)

    def _setup_prototype(self, *args, **kwargs):
        super()._setup_prototype(*args, **kwargs)
        if not is_real(self._flow(jax.random.key(0))().support):
            raise ValueError("builder must make flows with real events")

        def log_density(z):
            return -self._potential_fn(self._unpack_latent(z))

        start = self._init_latent, self._init_scale
        with handlers.block():
            self._gaussian = fit_gaussian(jax.random.key(0), log_density, *start, steps=self._warmup)

    def _flow(self, key) -> Flow:
        return self._builder(key, self.latent_dim)

    def _get_posterior(self):
        name = self.prefix
        # Functions, lest `get_transform` after pickling ask for values that only a set-up guide has.
        loc = lax.stop_gradient(numpyro.param(f"{name}_loc", lambda key: self._gaussian[0]))
        scale = lax.stop_gradient(numpyro.param(f"{name}_scale", lambda key: self._gaussian[1]))
        gaussian = LowerCholeskyAffine(loc, scale) if scale.ndim == 2 else Standardize(loc, scale)
        flow = flow_module(name, self._flow)()
        return FlowDistribution(flow.base_dist, [*flow.transforms, gaussian])

    def get_base_dist(self):
        return self._flow(jax.random.key(0))().base_dist

    def get_posterior(self, params):
        """The distribution of all latent variables in one vector, on the unconstrained scale."""
        return FlowDistribution(self.get_base_dist(), self.get_transform(params).parts)

    def median(self, params):
        """Posterior medians by site, from draws."""
        return self.quantiles(params, 0.5)

    def quantiles(self, params, quantiles):
        """Posterior quantiles by site, ``quantiles.shape + site.shape``, from draws.

        They are those of the numbers on the unconstrained scale, so each lies in the support.
        """
        draws = self.get_posterior(params).sample(jax.random.key(0), (self._quantile_samples,))
        return self._unpack_and_constrain(jnp.quantile(draws, jnp.asarray(quantiles), 0), params)


class AutoMAF(AutoFlow):
    """:class:`AutoFlow` with :func:`~numpyro_maf.maf`.

    :param options: of :class:`AutoFlow`, and of the builder.
    """

    _family = staticmethod(maf)
    _defaults: dict[str, Any] = {"transforms": 3, "hidden": (32, 32)}

    def __init__(self, model, **options):
        names = inspect.signature(AutoFlow).parameters
        own = {name: options.pop(name) for name in list(options) if name in names}
        super().__init__(model, builder=partial(self._family, **(self._defaults | options)), **own)


class AutoIAF(AutoMAF):
    """:class:`AutoFlow` with :func:`~numpyro_maf.iaf`: draws are one parallel pass. For NeuTra."""

    _family = staticmethod(iaf)


def fit_gaussian(key, log_density, loc, scale, *, steps: int = 50, draws: int = 64, dense: int = 100):
    """A Gaussian near a density, from its gradients: batch and match, with a trust region.

    Cai et al., *Batch and match: black-box variational inference with a score-based divergence* (2024),
    algorithm 1, in the coordinates in which the present Gaussian is standard. The learning rate grows after
    steps that raise the ELBO of the draws and shrinks after those, not taken, that lower it.

    :param log_density: ``(D,) -> ()``, not necessarily normalised.
    :param loc: ``(D,)``, where to start; ``scale``: standard deviation there.
    :param draws: gradients for each step.
    :param dense: largest D for full covariance; above it is diagonal.
    :return: mean ``(D,)`` and the Cholesky factor ``(D, D)`` of the covariance, or standard deviations
        ``(D,)``, of the step with the greatest ELBO.
    """
    width = len(loc)
    full = width <= dense
    value_and_grad = jax.vmap(jax.value_and_grad(log_density))

    def evaluate(step, mean, root):
        eps = jax.random.normal(jax.random.fold_in(key, step), (draws, width), mean.dtype)
        value, score = value_and_grad(mean + (eps @ root.T if full else eps * root))
        score = score @ root if full else score * root
        log_det = jnp.log(jnp.diagonal(root) if full else root).sum()
        value = value + 0.5 * (eps**2).sum(-1) + log_det
        finite = jnp.isfinite(value).all() & jnp.isfinite(score).all()
        return jnp.where(finite, value.mean(), -jnp.inf), value.std() / draws**0.5, eps, score

    def propose(mean, root, rate, eps, score):
        """One step of batch and match from the standard normal, put back into place."""
        second = partial(jnp.einsum, "ni,nj->ij" if full else "ni,ni->i")
        part = rate / (1 + rate)
        e, s = eps.mean(0), score.mean(0)

        def moment(x, centre):
            centred = x - centre
            return rate * second(centred, centred) / draws + part * second(centre[None], centre[None])

        u, v = moment(score, s), moment(eps, e)
        if not full:
            v = 1 + v
            variance = 2 * v / (1 + jnp.sqrt(1 + 4 * u * v))
            return mean + root * part * (variance * s + e), root * jnp.sqrt(variance)
        factor = jnp.linalg.cholesky(jnp.eye(width, dtype=v.dtype) + v)
        values, vectors = jnp.linalg.eigh(factor.T @ u @ factor)
        vectors = factor @ vectors
        covariance = (vectors * (2 / (1 + jnp.sqrt(1 + 4 * jnp.maximum(values, 0))))) @ vectors.T
        return mean + root @ (part * (covariance @ s + e)), root @ jnp.linalg.cholesky(covariance)

    def step(carry, i):
        place, rate, found, best = carry
        # The second half averages more and more, which counts where no Gaussian fits exactly.
        cap = jnp.where(i < steps // 2, 1e6, draws * width / (1 + i - steps // 2))
        new = propose(*place, jnp.minimum(rate, cap), *found[2:])
        there = evaluate(i, *new)
        better = there[0] > found[0] - 2 * jnp.hypot(found[1], there[1])
        better &= jnp.isfinite(new[0]).all() & jnp.isfinite(new[1]).all()
        choose = partial(jax.tree.map, partial(jnp.where, better))
        rate = jnp.clip(jnp.where(better, 4 * rate, rate / 16), 1e-3, 1e6)
        best = jax.tree.map(
            partial(jnp.where, better & (there[0] > best[0])), (there[0], *new), best
        )
        return (choose(new, place), rate, choose(there, found), best), None

    place = loc, jnp.diag(jnp.full(width, scale)) if full else jnp.full(width, scale)
    found = evaluate(0, *place)
    carry = place, jnp.array(float(draws * width)), found, (found[0], *place)
    best = lax.scan(step, carry, jnp.arange(1, steps + 1))[0][-1]
    return best[1], best[2]
