# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""A flow as the guide of a plate's local variables, given an encoding of each row's data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
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
from numpyro.distributions.transforms import biject_to
from numpyro.distributions.util import sum_rightmost
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.initialization import init_to_median

from numpyro_maf.flows.builders import iaf
from numpyro_maf.flows.distributions import FlowDistribution
from numpyro_maf.flows.flow import Flow
from numpyro_maf.flows.linear import Standardize
from numpyro_maf.inference.guides import describe_guide
from numpyro_maf.inference.modules import flat_flow_module, flat_param
from numpyro_maf.inference.unconstrained import dependent_supports
from numpyro_maf.nn.adapters import as_network
from numpyro_maf.pytrees import Described
from numpyro_maf.rng import as_key, as_shape
from numpyro_maf.traces import run_once

__all__ = ["AutoAmortized"]


class AutoAmortized(Described, AutoGuide):
    """A guide over the local latent variables of a plate: a flow given an encoding of each row's data.

    The rows of a subsampled plate share one encoder and one flow, so memory does not grow with them, and new
    data need no new training. Its param sites are ``{prefix}$params``, the flow's weights, and
    ``{prefix}_encoder``. For global variables beside it use NumPyro's ``AutoGuideList``.

    :param model: a model, or ``handlers.block(model, hide=[…])`` of one with global variables.
    :param plate: name of the plate in which all its latent variables are.
    :param inputs: ``(*args, **kwargs) -> (N, ...)``, the encoder's data of all rows, from the model's
        arguments; None for the first argument. A pytree of arrays for an encoder that takes one. Where the
        model takes a minibatch as its argument, and its plate says how many rows there are in all, they are
        the minibatch's rows.
    :param encoder: see :func:`~numpyro_maf.encoders.as_network`; its results are the flow's context.
    :param builder: ``(key, features, *, context) -> Flow``.
    :param prefix: of the names of its sites; ``create_plates``: as for NumPyro's guides.
    :param init_loc_fn: where the latent variables start, one of NumPyro's strategies.
    :param quantile_samples: draws for :meth:`median` and :meth:`quantiles`.
    :raises ValueError: for latent variables outside the plate, supports that depend on other sites, and
        inputs that have neither as many rows as the plate nor as many as it draws.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        plate: str,
        *,
        inputs: Callable[..., Any] | None = None,
        encoder: Any = (64, 32),
        builder: Callable[..., Flow] = partial(iaf, transforms=2, hidden=(32, 32)),
        prefix: str = "auto",
        init_loc_fn: Callable[..., Any] = init_to_median,
        create_plates: Callable[..., Any] | None = None,
        quantile_samples: int = 1000,
    ) -> None:
        self.plate = plate
        self._inputs = inputs or (lambda *args, **kwargs: args[0])
        self._encoder = encoder
        self._builder = builder
        self._quantile_samples = quantile_samples
        super().__init__(model, prefix=prefix, init_loc_fn=init_loc_fn, create_plates=create_plates)

    def _describe(self) -> list[str]:
        width = len(self._init_loc) if hasattr(self, "_init_loc") else None
        first, *rest = describe_guide(self, self._builder, width)
        return [f"{first} for each row of plate {self.plate!r}", *rest]

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        params = {k: s["value"] for k, s in self.prototype_trace.items() if s["type"] == "param"}
        dependent = dependent_supports(self.model, args, kwargs, self._init_locs, params)
        if dependent:
            raise ValueError(
                f"the support of site {dependent[0]!r} depends on other sites or params, which AutoAmortized "
                "does not follow: sample a site of constant support and compute this one from it"
            )
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
        self._encoder_structure = jax.tree.structure(weights)
        self._init_encoder = lambda key: as_network(self._encoder, key, rows)[0]

    def _posterior(self, rows: Any) -> FlowDistribution:
        """The flow given each row, on the unconstrained scale: ``(B,)`` distributions of D numbers."""
        name = self.prefix
        encoder = flat_param(f"{name}_encoder", self._encoder_structure, self._init_encoder)
        context = self._apply(encoder, rows)
        loc = lax.stop_gradient(numpyro.param(f"{name}_loc", lambda key: self._init_loc))
        flow = flat_flow_module(name, self._flow)(context.reshape(len(context), *self._inner, -1))
        return FlowDistribution(flow.base_dist, [*flow.transforms, Standardize(loc, jnp.ones_like(loc))])

    @property
    def _inner(self) -> tuple[int, ...]:
        """Axes of length 1 between the plate's and the event's."""
        return (1,) * (-1 - self._frame.dim)

    def _unpack(self, latent: Array) -> Iterator[tuple[str, Any, Array]]:
        """``(..., B, D)`` to name, transform and unconstrained values with the plate's axis in place."""
        start, lead = 0, latent.ndim - 2
        for name, (transform, from_right, shape) in self._layout.items():
            size = math.prod(shape)
            part = latent[..., start : start + size].reshape(*latent.shape[:-1], *shape)
            yield name, transform, jnp.moveaxis(part, lead, part.ndim - from_right)
            start += size

    def _plates(self, rows: int, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], bool]:
        """The plates, that of the rows as the model has it; and whether its rows are all in the arguments."""
        plates = self._create_plates(*args, **kwargs)
        if self.create_plates is not None:
            return plates, True
        full, size = self._sizes(*args, **kwargs)
        if rows not in (full, size):
            raise ValueError(
                f"inputs must give the {full} rows of plate {self.plate!r}, or the {size} that it draws, "
                f"got {rows}"
            )
        plates[self.plate] = numpyro.plate(self.plate, full, subsample_size=size, dim=self._frame.dim)
        return plates, rows == full

    def _sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """How many rows the model's plate has with these arguments, and how many of them it draws."""
        found = []

        def look() -> None:
            plate = run_once(self.model, args, kwargs)[self.plate]
            found.append((plate["args"][0], len(plate["value"])))

        jax.eval_shape(look)  # nothing is computed
        return found[0]

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Array]:
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        data = jax.tree.map(jnp.asarray, self._inputs(*args, **kwargs))
        plates, whole = self._plates(len(jax.tree.leaves(data)[0]), *args, **kwargs)
        with plates[self.plate] as index:
            posterior = self._posterior(jax.tree.map(lambda a: a[index], data) if whole else data)
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

    def sample_posterior(
        self,
        rng_key: ArrayLike,
        params: dict[str, Any],
        *args: Any,
        sample_shape: int | Sequence[int] = (),
        **kwargs: Any,
    ) -> dict[str, Array]:
        """Draws for all rows of the data in the arguments, new ones included, by site."""
        posterior = handlers.substitute(self._posterior, params)(self._inputs(*args, **kwargs))
        shape = as_shape(sample_shape)
        latent = posterior.sample(as_key(rng_key), shape)
        latent = latent.reshape(*shape, posterior.batch_shape[0], -1)
        return {name: transform(value) for name, transform, value in self._unpack(latent)}

    def median(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Posterior medians by site, from draws, for the rows of the data in the arguments."""
        return self.quantiles(params, 0.5, *args, **kwargs)

    def quantiles(
        self,
        params: dict[str, Any],
        quantiles: ArrayLike | Sequence[float],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Array]:
        """Posterior quantiles by site, ``quantiles.shape + site.shape``, from draws."""
        posterior = handlers.substitute(self._posterior, params)(self._inputs(*args, **kwargs))
        draws = posterior.sample(jax.random.key(0), (self._quantile_samples,))
        latent = jnp.quantile(draws, jnp.asarray(quantiles), 0)
        latent = latent.reshape(*np.shape(quantiles), posterior.batch_shape[0], -1)
        return {name: transform(value) for name, transform, value in self._unpack(latent)}
