# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Completion: the unseen part of an event given the part that is seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.tree_util import register_dataclass
from numpyro.distributions import constraints
from numpyro.distributions.transforms import biject_to
from numpyro.infer import MCMC, NUTS, init_to_value

from numpyro_maf.flows.bijectors import Bijector, Chain
from numpyro_maf.flows.distributions import FlowDistribution
from numpyro_maf.flows.flow import Flow
from numpyro_maf.flows.latent import decode, encode
from numpyro_maf.flows.mades import MADE
from numpyro_maf.train.likelihood import FitResult, fit_loss

__all__ = ["Completer", "complete", "fit_completer"]


def complete(
    key,
    d: FlowDistribution | MADE,
    x,
    seen,
    num_samples: int = 1000,
    *,
    method: str = "auto",
    num_warmup: int = 500,
    num_chains: int = 4,
    progress: bool = True,
):
    """Draws from the posterior of the unseen numbers of one event, given the seen ones.

    Where the seen numbers come first in the order of every layer, their places in the base are known and the
    rest is drawn anew: exact and independent draws (``"ancestral"``). Otherwise NUTS runs over the unseen
    numbers, from starts chosen among draws of the flow by their density.

    :param d: what a trained flow gives when called.
    :param x: ``event_shape``; unseen numbers may be anything, NaN too.
    :param seen: booleans that broadcast to ``event_shape``.
    :param num_samples: how many draws; of NUTS in all chains together.
    :param method: ``"ancestral"``, ``"nuts"``, or ``"auto"`` for the first where it is possible.
    :param num_warmup: of NUTS, for each chain; ``num_chains`` run side by side.
    :return: ``(num_samples, *event_shape)``, the seen numbers as given.
    :raises ValueError: for shapes that do not fit, ``"ancestral"`` where the order does not allow it,
        and ``"nuts"`` for discrete columns.
    """
    if d.batch_shape:
        raise ValueError(f"complete takes one distribution, got one of batch shape {d.batch_shape}")
    x, seen = jnp.asarray(x), np.broadcast_to(np.asarray(seen, bool), d.event_shape)
    if x.shape != d.event_shape:
        raise ValueError(f"x must be one event of shape {d.event_shape}, got {x.shape}")
    if method not in ("auto", "ancestral", "nuts"):
        raise ValueError(f"method must be 'auto', 'ancestral' or 'nuts', got {method!r}")
    allowed = _is_ancestral(d, seen)
    if method == "ancestral" and not allowed:
        raise ValueError(
            "ancestral draws need the seen numbers first in the order of every layer; use method='nuts', or "
            "fit_completer"
        )
    if allowed and method != "nuts":
        if isinstance(d, MADE):
            return jax.jit(type(d).sample_given, static_argnums=4)(d, key, x, seen, (num_samples,))
        return _ancestral(key, d, x, seen, num_samples)
    if isinstance(d, MADE) and d.is_discrete:
        raise ValueError("NUTS cannot draw discrete columns; reorder them, see made(order=)")
    return _by_nuts(key, d, x, seen, num_samples, num_warmup, num_chains, progress)


def _is_ancestral(d, seen) -> bool:
    known = frozenset(np.flatnonzero(seen).tolist())
    if isinstance(d, MADE):
        return all(known == set(order[: len(known)].tolist()) for order in d.made.orders)
    if not isinstance(d.base_dist, dist.Independent):
        return False
    if len(known) in (0, seen.size):
        return True
    layers = [t for t in d.transforms if isinstance(t, Bijector)]
    # What is no bijector here works on each number alone: from a bounded base, to images.
    return Chain(tuple(layers)).inputs_of(known) is not None


def _ancestral(key, d, x, seen, num_samples):
    known = frozenset(np.flatnonzero(seen).tolist())
    layers = tuple(t for t in d.transforms if isinstance(t, Bijector))
    inputs = known if len(known) in (0, seen.size) else Chain(layers).inputs_of(known)
    filled = jnp.where(seen, x, decode(d, d.base_dist.sample(key)))
    fixed = np.isin(np.arange(seen.size), list(inputs or ()))
    z = jnp.where(fixed, encode(d, filled), d.base_dist.sample(key, (num_samples,)))
    return jnp.where(seen, x, decode(d, z))


def _by_nuts(key, d, x, seen, num_samples, num_warmup, num_chains, progress):
    start_key, run_key = jax.random.split(key)
    free = np.flatnonzero(~seen)
    to_support = biject_to(d.support)
    # Numbers are mapped one by one, so that the seen ones stay where they are.
    starts = jax.jit(type(d).sample, static_argnums=2)(d, start_key, (200 * num_chains,))
    fixed = to_support.inv(jnp.where(seen, x, starts[0])).ravel()

    def place(numbers):
        rows = jnp.broadcast_to(fixed, (*numbers.shape[:-1], fixed.size)).at[..., free].set(numbers)
        return rows.reshape(*numbers.shape[:-1], *d.event_shape)

    def log_prob(numbers):
        at = place(numbers)
        y = to_support(at)
        log_det = to_support.log_abs_det_jacobian(at, y)
        return d.log_prob(y) + log_det.reshape(*numbers.shape[:-1], -1).sum(-1)

    def model():
        plane = dist.ImproperUniform(constraints.real_vector, (), (len(free),))
        numpyro.factor("density", log_prob(numpyro.sample("unseen", plane)))

    draws = to_support.inv(starts).reshape(len(starts), -1)[:, free]
    chosen = jax.random.categorical(run_key, jax.jit(log_prob)(draws), shape=(num_chains,))
    mcmc = MCMC(
        NUTS(model, init_strategy=init_to_value(values={"unseen": draws[chosen[0]]})),
        num_warmup=num_warmup,
        num_samples=-(-num_samples // num_chains),
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=progress,
    )
    init = draws[chosen] if num_chains > 1 else draws[chosen[0]]
    mcmc.run(run_key, init_params={"unseen": init})
    return jnp.where(seen, x, to_support(place(mcmc.get_samples()["unseen"]))[:num_samples])


@register_dataclass
@dataclass(frozen=True, eq=False)
class Completer:
    """A flow trained to complete events under any mask: draws without MCMC. Made by :func:`fit_completer`."""

    flow: Flow

    def sample(self, key, x, seen, sample_shape=()):
        """Draws of the unseen numbers: ``sample_shape + (..., D)``, the seen ones as given.

        :param x: ``(..., D)``; ``seen``: booleans that broadcast with it.
        """
        return _complete(self.flow, key, x, seen, tuple(sample_shape))


@partial(jax.jit, static_argnames="sample_shape")
def _complete(flow, key, x, seen, sample_shape):
    return jnp.where(seen, x, flow(_context(flow, x, seen)).sample(key, sample_shape))


def fit_completer(
    key, flow: Flow, x, *, masks: Callable | None = None, **options
) -> tuple[Completer, FitResult]:
    """Train a flow to complete events, over random masks.

    The flow's context is the seen numbers and the mask, 2 D wide. In the events it is trained on, the seen
    numbers are replaced by standardised noise, so that it learns the unseen ones alone and needs no other
    loss than the likelihood.

    :param flow: from any builder, with ``context = 2 * features``.
    :param x: ``(N, D)``.
    :param masks: ``(key, (n, D)) -> (n, D)`` booleans, True for seen; None for masks that show a share of the
        numbers that is itself uniform.
    :param options: of :func:`numpyro_maf.fit`, but ``context`` and ``dequantize``.
    :raises ValueError: for a flow whose context does not fit.
    """
    if len(flow.event_shape) != 1 or flow.context != 2 * flow.features:
        raise ValueError(
            f"fit_completer needs a flow of vectors with context {2 * flow.features}, got {flow.context}"
        )
    result = fit_loss(key, flow, x, _Masked(masks or _random_masks), **options)
    return Completer(result.flow), result


@dataclass(frozen=True)
class _Masked:
    """The loss of a completer; equal ones share a compilation."""

    masks: Callable

    def __call__(self, weights, flow, key, x):
        mask_key, noise_key, flow_key = jax.random.split(key, 3)
        seen = self.masks(mask_key, x.shape)
        noise = jax.random.normal(noise_key, x.shape, x.dtype)
        noise = noise if flow.event_scale is None else flow.event_scale(noise)
        flow = flow.with_weights(weights).randomized(flow_key)
        return -flow(_context(flow, x, seen)).log_prob(jnp.where(seen, noise, x))


def _random_masks(key, shape):
    share_key, mask_key = jax.random.split(key)
    return jax.random.uniform(mask_key, shape) < jax.random.uniform(share_key, (shape[0], 1))


def _context(flow, x, seen):
    x, seen = jnp.broadcast_arrays(jnp.asarray(x, float), jnp.asarray(seen))
    x = x if flow.event_scale is None else flow.event_scale._inverse(x)
    return jnp.concatenate([jnp.where(seen, x, 0), seen.astype(x.dtype)], -1)
