# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Flows as NumPyro's automatic guides, for SVI, NeuTra and ``AutoGuideList``.

A guide is a flow after a Gaussian. The Gaussian is fitted when the guide is set up, from a few thousand
gradients, and stays; the flow starts near the identity and learns what no Gaussian fits. A guide with latent
variables for each row of a subsampled plate is in :mod:`numpyro_maf.inference.amortized`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array, lax
from jax.typing import ArrayLike
from numpyro import handlers
from numpyro.distributions.transforms import LowerCholeskyAffine, biject_to
from numpyro.infer.autoguide import AutoContinuous
from numpyro.infer.initialization import init_to_median, init_to_sample

from numpyro_maf.flows.builders import iaf, maf, nsf
from numpyro_maf.flows.distributions import FlowDistribution
from numpyro_maf.flows.domains import is_real
from numpyro_maf.flows.flow import Flow
from numpyro_maf.flows.linear import Standardize
from numpyro_maf.flows.scalars import Affine, Compose
from numpyro_maf.flows.splines import RQSpline
from numpyro_maf.inference.gaussian import fit_gaussian, fit_modes, search
from numpyro_maf.inference.mixtures import GaussianMixture, standardized
from numpyro_maf.inference.modules import flat_flow_module
from numpyro_maf.inference.unconstrained import constrain, dependent_supports, run_from
from numpyro_maf.pytrees import Described, short
from numpyro_maf.rng import as_key, as_shape

__all__ = ["AutoFlow", "AutoIAF", "AutoMAF"]


# An affine map finds the place and width of a conditional, the spline its shape.
_SPLINES = partial(nsf, transforms=2, hidden=(32, 32), scalar=Compose((Affine(), RQSpline())))


class FlowGuide(Described, AutoContinuous):
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
    :param starts: from how many places the Gaussian is looked for: where ``init_loc_fn`` says, and draws of
        the prior, some with noise of 3, 10 and 30 added. None for 3, and for 12 for each of several modes.
    :param modes: at most so many modes of the posterior get a Gaussian of their own, weighed by importance
        weights; the flow's base is then their mixture, in place of the builder's.
    :param quantile_samples: draws for :meth:`median` and :meth:`quantiles`.
    :raises ValueError: for a builder whose flows have other than real events; and at set-up where no start
        leads to a finite density. It warns where the Gaussian has not arrived. Inside a compiled function
        neither is known.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        builder: Callable[..., Flow],
        *,
        prefix: str = "auto",
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
        warmup: int = 30,
        starts: int | None = None,
        modes: int = 1,
        quantile_samples: int = 10_000,
    ) -> None:
        if init_scale <= 0:
            raise ValueError(f"init_scale must be positive, got {init_scale}")
        if modes < 1 or (starts is not None and starts < modes):
            raise ValueError(f"modes must be 1 or more, starts at least as many, got {modes} and {starts}")
        if modes > 1 and not warmup:
            raise ValueError("modes are found in the warm-up, got warmup=0")
        self._builder = builder
        self._init_scale = init_scale
        self._warmup = warmup
        self._modes = modes
        self._starts = (3 if modes == 1 else 12 * modes) if starts is None else starts
        self._quantile_samples = quantile_samples
        super().__init__(model, prefix=prefix, init_loc_fn=init_loc_fn)

    def _describe(self) -> list[str]:
        return describe_guide(self, self._builder, getattr(self, "latent_dim", None))

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        support = self._flow(jax.random.key(0))().support
        if not is_real(support):
            raise ValueError(f"builder must make flows with real events, got {support}")
        self._arguments = args, kwargs
        params = {k: s["value"] for k, s in self.prototype_trace.items() if s["type"] == "param"}
        self._dependent = dependent_supports(self.model, args, kwargs, self._init_locs, params)

        with handlers.block():
            self._gaussian, self._mixture = self._start(args, kwargs)

    def _start(self, args: Any, kwargs: Any) -> tuple[tuple[Array, Array], Any]:
        """The Gaussian, and the mixture of several modes in its coordinates or None."""

        def log_density(z: Array) -> Array:
            return -self._potential_fn(self._unpack_latent(z))

        key, steps = jax.random.key(0), self._warmup
        if not steps:
            return fit_gaussian(key, log_density, self._init_latent, self._init_scale, steps=0), None
        starts = self._starting_points(key, args, kwargs)
        if self._modes == 1:
            found = search(key, log_density, starts, self._init_scale, steps=steps)
            self._say(found.elbo, found.gain)
            return (found.loc, found.scale), None
        log_weights, found = fit_modes(key, log_density, starts, self._init_scale, self._modes, steps=steps)
        self._say(found.elbo.max(), found.gain[0])
        mixture, gaussian = standardized(log_weights, found.loc, found.scale)
        return gaussian, mixture

    def _starting_points(self, key: Array, args: Any, kwargs: Any) -> Array:
        """``(N, D)``: where ``init_loc_fn`` starts; then draws of the prior, every other one with noise."""

        def draw(key: Array) -> Array:
            drawn = handlers.substitute(handlers.seed(self.model, key), substitute_fn=init_to_sample)
            trace = handlers.trace(drawn).get_trace(*args, **kwargs)
            sites = [trace[name] for name in self._init_locs]
            numbers = [biject_to(site["fn"].support).inv(site["value"]) for site in sites]
            return jnp.concatenate([number.ravel() for number in numbers])

        count = self._starts - 1
        if not count:
            return self._init_latent[None]
        radius = np.resize([0.0, 3.0, 0.0, 10.0, 0.0, 30.0], count)[:, None]

        @jax.jit
        def drawn(key: Array) -> Array:
            draw_key, noise_key = jax.random.split(key)
            draws = jax.vmap(draw)(jax.random.split(draw_key, count))
            draws = draws + radius * jax.random.normal(noise_key, draws.shape, draws.dtype)
            return jnp.where(jnp.isfinite(draws), draws, 0)

        return jnp.concatenate([self._init_latent[None], drawn(key)])

    def _say(self, elbo: Array, gain: Array) -> None:
        """Say where the Gaussian did not arrive, if that is known before the program runs."""
        if isinstance(elbo, jax.core.Tracer):
            return
        advice = "give init_loc_fn a place near the posterior, such as init_to_value, or more starts"
        if not np.isfinite(elbo):
            raise ValueError(f"the model's density is finite around none of {self._starts} starts: {advice}")
        if gain > 100:
            message = f"the guide's Gaussian was still improving, by {gain:.3g} nats: {advice}"
            warnings.warn(message, stacklevel=2)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Draw all sites of the model; with its arguments."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        posterior = self._get_posterior()
        latent = numpyro.sample(f"_{self.prefix}_latent", posterior, infer={"is_auxiliary": True})
        last = posterior.transforms[-1]
        scale = last.scale_tril if isinstance(last, LowerCholeskyAffine) else last.scale
        numbers = self._unpack_latent(tame(latent, scale))
        sites = self.prototype_trace
        if self._dependent:
            sites = run_from(self.model, args, kwargs, numbers)
        result = {}
        for name, number in numbers.items():
            fn = sites[name]["fn"]
            value, log_det = constrain(fn, number)
            delta = dist.Delta(value, log_density=-log_det, event_dim=fn.event_dim)
            result[name] = numpyro.sample(name, delta)
        return result

    def _get_posterior(self) -> FlowDistribution:
        name = self.prefix
        loc = lax.stop_gradient(numpyro.param(f"{name}_loc", lambda key: self._gaussian[0]))
        scale = lax.stop_gradient(numpyro.param(f"{name}_scale", lambda key: self._gaussian[1]))
        gaussian = LowerCholeskyAffine(loc, jnp.tril(scale)) if scale.ndim == 2 else Standardize(loc, scale)
        flow = flat_flow_module(name, self._flow)()
        base = flow.base_dist
        if self._modes > 1:
            starts = zip(("weights", "locs", "scales"), self._mixture)
            parts = [numpyro.param(f"{name}_mode_{what}", lambda key, v=v: v) for what, v in starts]
            base = GaussianMixture(*lax.stop_gradient(parts))
        return FlowDistribution(base, [*flow.transforms, gaussian])

    def _flow(self, key: ArrayLike) -> Flow:
        return self._builder(key, self.latent_dim)

    def get_base_dist(self) -> dist.Distribution:
        """The base distribution, with the weights it starts with if it has any."""
        if self._modes > 1:
            return GaussianMixture(*self._mixture)
        return self._flow(jax.random.key(0))().base_dist

    def get_posterior(self, params: dict[str, Any]) -> FlowDistribution:
        """The distribution of all latent variables in one vector, on the unconstrained scale."""
        return handlers.substitute(self._get_posterior, params)()

    def sample_posterior(
        self,
        rng_key: ArrayLike,
        params: dict[str, Any],
        *args: Any,
        sample_shape: int | Sequence[int] = (),
        **kwargs: Any,
    ) -> dict[str, Array]:
        """Draws by site, ``sample_shape + site.shape``, deterministic sites included.

        :param args: the model's arguments, with ``kwargs``; none for those the guide was set up with.
        """
        draws = self.get_posterior(params).sample(as_key(rng_key), as_shape(sample_shape))
        return self._unpack_and_constrain(draws, params, *args, **kwargs)

    def _unpack_and_constrain(
        self, latent_sample: Array, params: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Array]:
        """``(..., D)`` to values by site; by a run of the model where they depend on each other."""
        kinds = {k: s["type"] for k, s in self.prototype_trace.items()}
        if not (self._dependent or "deterministic" in kinds.values()):
            numbers = self._unpack_latent(latent_sample)
            sites = self.prototype_trace
            return {k: biject_to(sites[k]["fn"].support)(number) for k, number in numbers.items()}
        if not (args or kwargs):
            args, kwargs = self._arguments
        shape = jnp.shape(latent_sample)[:-1]

        def one(latent: Array) -> dict[str, Array]:
            numbers = self._unpack_latent(latent)
            known = {k: v for k, v in params.items() if kinds.get(k) == "param"}
            trace = run_from(self.model, args, kwargs, numbers, known)
            shown = [k for k, s in trace.items() if k in numbers or s["type"] == "deterministic"]
            return {k: trace[k]["value"] for k in shown}

        with handlers.block():
            rows = lax.map(one, latent_sample.reshape(-1, latent_sample.shape[-1]))
        return jax.tree.map(lambda a: a.reshape(*shape, *a.shape[1:]), rows)

    def median(self, params: dict[str, Any]) -> dict[str, Array]:
        """Posterior medians by site, from draws."""
        return self.quantiles(params, 0.5)

    def quantiles(self, params: dict[str, Any], quantiles: ArrayLike | Sequence[float]) -> dict[str, Array]:
        """Posterior quantiles by site, ``quantiles.shape + site.shape``, from draws.

        They are those of the numbers on the unconstrained scale, so each lies in the support. Where supports
        depend on other sites they are those of the values themselves, number by number.
        """
        draws = self.get_posterior(params).sample(jax.random.key(0), (self._quantile_samples,))
        levels = jnp.asarray(quantiles)
        if self._dependent:
            values = self._unpack_and_constrain(draws, params)
            return jax.tree.map(lambda value: jnp.quantile(value, levels, 0), values)
        return self._unpack_and_constrain(jnp.quantile(draws, levels, 0), params)


@jax.custom_vjp
def tame(z: Array, scale: Array) -> Array:
    """``z``, with its gradient dropped where it is not finite, and shortened where it is astronomical.

    One draw at which the model overflows would end a training otherwise: the gradient is a sum over draws.

    :param z: ``(..., D)``; ``scale``: ``(D, D)`` or ``(D,)``, the units in which gradients are measured.
    """
    return z


def _tamed(scale: Array, gradient: Array) -> tuple[Array, Array]:
    largest = jnp.abs(gradient @ scale if scale.ndim == 2 else gradient * scale).max(-1, keepdims=True)
    finite = jnp.isfinite(gradient).all(-1, keepdims=True) & jnp.isfinite(largest)
    factor = jnp.where(finite, jnp.minimum(1, 100 / jnp.maximum(largest, 1)), 0)
    return jnp.where(finite, gradient, 0) * factor, jnp.zeros_like(scale)


tame.defvjp(lambda z, scale: (z, scale), _tamed)


def describe_guide(guide: Any, builder: Callable[..., Flow], width: int | None) -> list[str]:
    """The lines in which a guide is shown: its model, its size once it is set up, its builder."""
    model = getattr(guide.model, "__name__", type(guide.model).__name__)
    size = "not set up yet" if width is None else f"{width} latent numbers"
    options = ", ".join(f"{k}={short(v)}" for k, v in getattr(builder, "keywords", {}).items())
    builder = getattr(builder, "func", builder)
    made_by = f"{getattr(builder, '__name__', type(builder).__name__)}({options})"
    return [f"{type(guide).__name__} of {model}: {size}", f"  builder {made_by}"]


class AutoFlow(FlowGuide):
    """:class:`FlowGuide` with any builder.

    :param builder: ``(key, features) -> Flow``, such as ``partial(maf, transforms=3)``; by default two
        autoregressive transforms of affine maps and splines.
    :param options: of :class:`FlowGuide`.
    """

    def __init__(
        self, model: Callable[..., Any], *, builder: Callable[..., Flow] = _SPLINES, **options: Any
    ) -> None:
        super().__init__(model, builder, **options)


class AutoMAF(FlowGuide):
    """:class:`FlowGuide` with :func:`~numpyro_maf.maf`, by default ``transforms=3, hidden=(32, 32)``.

    :param options: of :class:`FlowGuide`, and of the builder.
    """

    def __init__(self, model: Callable[..., Any], **options: Any) -> None:
        own, rest = _split_options(options)
        super().__init__(model, partial(maf, **rest), **own)


class AutoIAF(FlowGuide):
    """:class:`FlowGuide` with :func:`~numpyro_maf.iaf`: draws are one parallel pass, as NeuTra likes it.

    :param options: as for :class:`AutoMAF`.
    """

    def __init__(self, model: Callable[..., Any], **options: Any) -> None:
        own, rest = _split_options(options)
        super().__init__(model, partial(iaf, **rest), **own)


def _split_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The guide's options, and the builder's with the defaults of a guide."""
    names = set(inspect.signature(FlowGuide).parameters)
    own = {name: value for name, value in options.items() if name in names}
    rest = {name: value for name, value in options.items() if name not in names}
    return own, {"transforms": 3, "hidden": (32, 32)} | rest
