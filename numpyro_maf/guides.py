# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Flows as NumPyro's automatic guides, for SVI, NeuTra and ``AutoGuideList``.

A guide is a flow after a Gaussian. The Gaussian is fitted when the guide is set up, from a few thousand
gradients, and stays; the flow starts near the identity and learns what no Gaussian fits.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import lax
from numpyro import handlers
from numpyro.distributions.transforms import LowerCholeskyAffine, biject_to
from numpyro.distributions.util import sum_rightmost
from numpyro.infer.autoguide import AutoContinuous, AutoGuide
from numpyro.infer.initialization import init_to_median

from numpyro_maf.bijectors import Standardize
from numpyro_maf.builders import iaf, maf, nsf
from numpyro_maf.distributions import FlowDistribution, is_real
from numpyro_maf.encoders import as_network
from numpyro_maf.flow import Flow
from numpyro_maf.module import flow_module
from numpyro_maf.scalars import Affine, Compose
from numpyro_maf.splines import RQSpline

__all__ = ["AutoAmortized", "AutoFlow", "AutoIAF", "AutoMAF", "fit_gaussian"]


# An affine map finds the place and width of a conditional, the spline its shape.
_SPLINES = partial(nsf, transforms=2, hidden=(32, 32), scalar=Compose((Affine(), RQSpline())))


class FlowGuide(AutoContinuous):
    """A guide over all latent variables of a model: a flow on the reals, after a Gaussian (abstract).

    It works as NumPyro's own guides do: with ``SVI``, ``NeuTraReparam``, ``AutoGuideList`` and
    ``Predictive``. Its param sites are ``{prefix}$params``, the flow's weights, and ``{prefix}_loc`` and
    ``{prefix}_scale``, the Gaussian, which SVI leaves as it is. :class:`PathELBO` trains it best.

    :param model: a NumPyro model whose latent variables are continuous.
    :param builder: ``(key, features) -> Flow``.
    :param prefix: of the names of its sites.
    :param init_loc_fn: where to start, one of NumPyro's strategies.
    :param init_scale: standard deviation at the start, on the unconstrained scale.
    :param warmup: steps of each round of :func:`fit_gaussian`, which takes the start to the posterior; 0 to
        stay at the start.
    :param quantile_samples: draws for :meth:`median` and :meth:`quantiles`.
    :raises ValueError: for a builder whose flows have other than real events.
    """

    def __init__(
        self,
        model,
        builder: Callable[..., Flow],
        *,
        prefix="auto",
        init_loc_fn=init_to_median,
        init_scale: float = 0.1,
        warmup: int = 30,
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
        support = self._flow(jax.random.key(0))().support
        if not is_real(support):
            raise ValueError(f"builder must make flows with real events, got {support}")

        def log_density(z):
            return -self._potential_fn(self._unpack_latent(z))

        start = self._init_latent, self._init_scale
        with handlers.block():
            self._gaussian = fit_gaussian(jax.random.key(0), log_density, *start, steps=self._warmup)

    def _get_posterior(self):
        name = self.prefix
        loc = lax.stop_gradient(numpyro.param(f"{name}_loc", lambda key: self._gaussian[0]))
        scale = lax.stop_gradient(numpyro.param(f"{name}_scale", lambda key: self._gaussian[1]))
        gaussian = LowerCholeskyAffine(loc, scale) if scale.ndim == 2 else Standardize(loc, scale)
        flow = flow_module(name, self._flow)()
        return FlowDistribution(flow.base_dist, [*flow.transforms, gaussian])

    def _flow(self, key) -> Flow:
        return self._builder(key, self.latent_dim)

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


class AutoFlow(FlowGuide):
    """:class:`FlowGuide` with any builder.

    :param builder: ``(key, features) -> Flow``, such as ``partial(maf, transforms=3)``; by default two
        autoregressive transforms of affine maps and splines.
    :param options: of :class:`FlowGuide`.
    """

    def __init__(self, model, *, builder: Callable[..., Flow] = _SPLINES, **options):
        super().__init__(model, builder, **options)


class AutoMAF(FlowGuide):
    """:class:`FlowGuide` with :func:`~numpyro_maf.maf`, by default ``transforms=3, hidden=(32, 32)``.

    :param options: of :class:`FlowGuide`, and of the builder.
    """

    def __init__(self, model, **options):
        own, rest = _split_options(options)
        super().__init__(model, partial(maf, **rest), **own)


class AutoIAF(FlowGuide):
    """:class:`FlowGuide` with :func:`~numpyro_maf.iaf`: draws are one parallel pass, as NeuTra likes it.

    :param options: as for :class:`AutoMAF`.
    """

    def __init__(self, model, **options):
        own, rest = _split_options(options)
        super().__init__(model, partial(iaf, **rest), **own)


def _split_options(options) -> tuple[dict[str, Any], dict[str, Any]]:
    """The guide's options, and the builder's with the defaults of a guide."""
    names = set(inspect.signature(FlowGuide).parameters)
    own = {name: value for name, value in options.items() if name in names}
    rest = {name: value for name, value in options.items() if name not in names}
    return own, {"transforms": 3, "hidden": (32, 32)} | rest


class AutoAmortized(AutoGuide):
    """A guide over the local latent variables of a plate: a flow given an encoding of each row's data.

    The rows of a subsampled plate share one encoder and one flow, so memory does not grow with them, and new
    data need no new training. Its param sites are ``{prefix}$params``, the flow's weights, and
    ``{prefix}_encoder``. For global variables beside it use NumPyro's ``AutoGuideList``.

    :param model: a model, or ``handlers.block(model, hide=[…])`` of one with global variables.
    :param plate: name of the plate in which all its latent variables are.
    :param inputs: ``(*args, **kwargs) -> (N, ...)``, the encoder's data of all rows, from the model's
        arguments; None for the first argument. A pytree of arrays for an encoder that takes one.
    :param encoder: see :func:`~numpyro_maf.encoders.as_network`; its results are the flow's context.
    :param builder: ``(key, features, *, context) -> Flow``.
    :param prefix: of the names of its sites; ``create_plates``: as for NumPyro's guides.
    :param init_loc_fn: where the latent variables start, one of NumPyro's strategies.
    :param quantile_samples: draws for :meth:`median` and :meth:`quantiles`.
    :raises ValueError: for latent variables outside the plate.
    """

    def __init__(
        self,
        model,
        plate: str,
        *,
        inputs: Callable[..., Any] | None = None,
        encoder: Any = (64, 32),
        builder: Callable[..., Flow] = partial(iaf, transforms=2, hidden=(32, 32)),
        prefix="auto",
        init_loc_fn=init_to_median,
        create_plates=None,
        quantile_samples: int = 1000,
    ):
        self.plate = plate
        self._inputs = inputs or (lambda *args, **kwargs: args[0])
        self._encoder = encoder
        self._builder = builder
        self._quantile_samples = quantile_samples
        super().__init__(model, prefix=prefix, init_loc_fn=init_loc_fn, create_plates=create_plates)

    def _setup_prototype(self, *args, **kwargs):
        super()._setup_prototype(*args, **kwargs)
        self._layout, locs = {}, []
        for name, site in self.prototype_trace.items():
            if site["type"] != "sample" or site["is_observed"]:
                continue
            frames = {frame.name: frame for frame in site["cond_indep_stack"]}
            if self.plate not in frames:
                raise ValueError(
                    f"site {name!r} is not in plate {self.plate!r}: block it, and give it a guide of its own "
                    "in an AutoGuideList"
                )
            transform = biject_to(site["fn"].support)
            frame = frames[self.plate]
            shape = jnp.shape(self._init_locs[name])
            axis = len(site["fn"].batch_shape) + frame.dim
            self._layout[name] = transform, len(shape) - axis, shape[:axis] + shape[axis + 1 :]
            locs.append(jnp.moveaxis(self._init_locs[name], axis, 0).reshape(frame.size, -1))
        self._frame = frame
        rows = jax.tree.map(lambda a: jnp.asarray(a)[:1], self._inputs(*args, **kwargs))
        self._init_loc = jnp.concatenate(locs, -1).mean(0)
        weights, self._apply = as_network(self._encoder, jax.random.key(0), rows)
        context = jax.eval_shape(self._apply, weights, rows).shape[-1]
        self._flow = partial(self._builder, features=len(self._init_loc), context=context)
        self._init_encoder = lambda key: as_network(self._encoder, key, rows)[0]

    def _posterior(self, rows) -> FlowDistribution:
        """The flow given each row, on the unconstrained scale: ``(B,)`` distributions of D numbers."""
        name = self.prefix
        context = self._apply(numpyro.param(f"{name}_encoder", self._init_encoder), rows)
        loc = lax.stop_gradient(numpyro.param(f"{name}_loc", lambda key: self._init_loc))
        flow = flow_module(name, self._flow)(context.reshape(len(context), *self._inner, -1))
        return FlowDistribution(flow.base_dist, [*flow.transforms, Standardize(loc, jnp.ones_like(loc))])

    @property
    def _inner(self) -> tuple[int, ...]:
        """Axes of length 1 between the plate's and the event's."""
        return (1,) * (-1 - self._frame.dim)

    def _unpack(self, latent):
        """``(..., B, D)`` to name, transform and unconstrained values with the plate's axis in place."""
        start, lead = 0, latent.ndim - 2
        for name, (transform, from_right, shape) in self._layout.items():
            size = math.prod(shape)
            part = latent[..., start : start + size].reshape(*latent.shape[:-1], *shape)
            yield name, transform, jnp.moveaxis(part, lead, part.ndim - from_right)
            start += size

    def _plates(self, data, *args, **kwargs):
        """The plates, that of the rows as long as the data."""
        plates = self._create_plates(*args, **kwargs)
        if self.create_plates is None:
            full, frame = len(jax.tree.leaves(data)[0]), self._frame
            subsampled = frame.size != self._prototype_frame_full_sizes[self.plate]
            size = min(frame.size, full) if subsampled else None
            plates[self.plate] = numpyro.plate(self.plate, full, subsample_size=size, dim=frame.dim)
        return plates

    def __call__(self, *args, **kwargs):
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        data = self._inputs(*args, **kwargs)
        plates = self._plates(data, *args, **kwargs)
        with plates[self.plate] as index:
            posterior = self._posterior(jax.tree.map(lambda a: jnp.asarray(a)[index], data))
            auxiliary = {"is_auxiliary": True}
            latent = numpyro.sample(f"_{self.prefix}_latent", posterior, infer=auxiliary)
        result = {}
        for name, transform, unconstrained in self._unpack(latent.reshape(len(latent), -1)):
            fn, value = self.prototype_trace[name]["fn"], transform(unconstrained)
            log_det = transform.log_abs_det_jacobian(unconstrained, value)
            log_det = sum_rightmost(log_det, jnp.ndim(log_det) - jnp.ndim(value) + fn.event_dim)
            with ExitStack() as stack:
                for frame in self.prototype_trace[name]["cond_indep_stack"]:
                    stack.enter_context(plates[frame.name])
                delta = dist.Delta(value, log_density=-log_det, event_dim=fn.event_dim)
                result[name] = numpyro.sample(name, delta)
        return result

    def sample_posterior(self, rng_key, params, *args, sample_shape=(), **kwargs):
        """Draws for all rows of the data in the arguments, new ones included, by site."""
        posterior = handlers.substitute(self._posterior, params)(self._inputs(*args, **kwargs))
        latent = posterior.sample(rng_key, sample_shape)
        latent = latent.reshape(*sample_shape, posterior.batch_shape[0], -1)
        return {name: transform(value) for name, transform, value in self._unpack(latent)}

    def median(self, params, *args, **kwargs):
        """Posterior medians by site, from draws, for the rows of the data in the arguments."""
        return self.quantiles(params, 0.5, *args, **kwargs)

    def quantiles(self, params, quantiles, *args, **kwargs):
        """Posterior quantiles by site, ``quantiles.shape + site.shape``, from draws."""
        posterior = handlers.substitute(self._posterior, params)(self._inputs(*args, **kwargs))
        draws = posterior.sample(jax.random.key(0), (self._quantile_samples,))
        latent = jnp.quantile(draws, jnp.asarray(quantiles), 0)
        latent = latent.reshape(*jnp.shape(quantiles), posterior.batch_shape[0], -1)
        return {name: transform(value) for name, transform, value in self._unpack(latent)}


def fit_gaussian(
    key, log_density, loc, scale, *, steps: int = 30, rounds: int = 10, draws: int = 64, dense: int = 100
):  # fmt: skip
    """A Gaussian near a density, from its gradients: batch and match, with a trust region.

    Cai et al., *Batch and match: black-box variational inference with a score-based divergence* (2024),
    algorithm 1, in the coordinates in which the present Gaussian is standard. The learning rate grows after
    steps that raise the ELBO of the draws and shrinks after those, not taken, that lower it.

    :param log_density: ``(D,) -> ()``, not necessarily normalised.
    :param loc: ``(D,)``, where to start; ``scale``: standard deviation there.
    :param steps: of each round. A round starts at the best mean so far, with ``scale`` again, since from far
        away the covariance may collapse before the mean has arrived.
    :param rounds: at most; from the second on as long as they gain half a nat.
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
        (mean, root), rate, found, best = carry
        # The second half averages more and more, which counts where no Gaussian fits exactly.
        cap = jnp.where(i < steps // 2, 1e6, draws * width / (1 + i - steps // 2))
        new = propose(mean, root, jnp.minimum(rate, cap), found[2], found[3])
        there = evaluate(i, *new)
        better = there[0] > found[0] - 2 * jnp.hypot(found[1], there[1])
        better &= jnp.isfinite(new[0]).all() & jnp.isfinite(new[1]).all()
        choose = partial(jax.tree.map, partial(jnp.where, better))
        rate = jnp.clip(jnp.where(better, 4 * rate, rate / 16), 1e-3, 1e6)
        best = jax.tree.map(partial(jnp.where, better & (there[0] > best[0])), (there[0], *new), best)
        return (choose(new, (mean, root)), rate, choose(there, found), best), None

    @jax.jit
    def run():
        start = jnp.diag(jnp.full(width, scale)) if full else jnp.full(width, scale)
        # From no draws and no scores the first step goes nowhere, and looks there.
        nothing = jnp.zeros((draws, width), loc.dtype)
        worst = jnp.array(-jnp.inf, loc.dtype)
        unknown = worst, jnp.zeros_like(worst), nothing, nothing

        def again(state):
            number, old, _ = state
            carry = (old[1], start), jnp.array(float(draws * width)), unknown, old
            best = lax.scan(step, carry, jnp.arange(steps))[0][-1]
            return number + 1, best, best[0] - old[0]

        def going(state):
            number, _, gain = state
            return (number < rounds) & ((number < 2) | (gain > 0.5))

        _, best, _ = lax.while_loop(going, again, (0, (worst, loc, start), worst))
        return best[1], best[2]

    return run()
