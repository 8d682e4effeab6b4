# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Completion: the unseen part of an event given the part that is seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.tree_util import register_dataclass
from jax.typing import ArrayLike
from numpyro.distributions import constraints
from numpyro.distributions.transforms import biject_to
from numpyro.infer import MCMC, NUTS, init_to_value

from numpyro_maf.flows.domains import of_one_number
from numpyro_maf.flows.flow import Flow
from numpyro_maf.flows.shapes import check_width
from numpyro_maf.inputs import as_labels, as_numbers, check_finite
from numpyro_maf.pytrees import Described
from numpyro_maf.rng import as_key, as_shape
from numpyro_maf.train.likelihood import FitResult, fit_loss
from numpyro_maf.train.options import FitOptions, check_options

__all__ = ["Completer", "complete", "fit_completer"]


def complete(
    key: ArrayLike,
    d: dist.Distribution,
    x: npt.ArrayLike,
    seen: npt.ArrayLike,
    num_samples: int = 1000,
    *,
    method: str = "auto",
    num_warmup: int = 500,
    num_chains: int = 4,
    progress: bool = True,
) -> Array:
    """Draws from the posterior of the unseen numbers of one event, given the seen ones.

    Where the seen numbers come first in the order of every layer, their places in the base are known and the
    rest is drawn anew: exact and independent draws (``"ancestral"``). Otherwise NUTS runs over the unseen
    numbers, from starts chosen among draws of the distribution by their density.

    :param key: a ``jax.random`` key, or an integer.
    :param d: what a trained flow gives when called, a guide's posterior, or any NumPyro distribution whose
        numbers are continuous.
    :param x: ``event_shape``; unseen numbers may be anything, NaN too.
    :param seen: booleans that broadcast to ``event_shape``.
    :param num_samples: how many draws; of NUTS in all chains together.
    :param method: ``"ancestral"``, ``"nuts"``, or ``"auto"`` for the first where it is possible.
    :param num_warmup: of NUTS, for each chain; ``num_chains`` run side by side.
    :return: ``(num_samples, *event_shape)``, the seen numbers as given.
    :raises ValueError: for shapes that do not fit, seen numbers that are not finite, ``"ancestral"`` where
        the order does not allow it, and ``"nuts"`` for discrete columns and for supports that couple numbers,
        such as a simplex.
    """
    key = as_key(key)
    if d.batch_shape:
        raise ValueError(f"complete takes one distribution, got one of batch shape {d.batch_shape}")
    x = jnp.asarray(as_numbers("x", x, missing=True))
    if x.shape != d.event_shape:
        raise ValueError(f"x must be one event of shape {d.event_shape}, got {x.shape}")
    seen = _mask(seen, d.event_shape)
    if seen.shape != d.event_shape:
        raise ValueError(f"seen must broadcast to {d.event_shape}, got {seen.shape}")
    if not isinstance(x, jax.core.Tracer):
        check_finite("the seen part of x", np.asarray(x)[seen])
    if method not in ("auto", "ancestral", "nuts"):
        raise ValueError(f"method must be 'auto', 'ancestral' or 'nuts', got {method!r}")
    allowed = hasattr(d, "is_ancestral") and d.is_ancestral(seen)
    if method == "ancestral" and not allowed:
        raise ValueError(
            "ancestral draws need the seen numbers first in the order of every layer; use method='nuts', or "
            "fit_completer"
        )
    if seen.all():
        return jnp.broadcast_to(x, (num_samples, *x.shape))
    if allowed and method != "nuts":
        return d.sample_given(key, x, seen, (num_samples,))
    if d.support.is_discrete:
        raise ValueError("NUTS cannot draw discrete columns; reorder them, see made(order=)")
    if of_one_number(d.support).event_dim:
        raise ValueError(f"NUTS needs numbers that are free of each other, got the support {d.support}")
    return _by_nuts(as_key(key), d, x, seen, num_samples, num_warmup, num_chains, progress)


def _by_nuts(
    key: Array,
    d: dist.Distribution,
    x: Array,
    seen: np.ndarray,
    num_samples: int,
    num_warmup: int,
    num_chains: int,
    progress: bool,
) -> Array:
    start_key, choice_key, run_key = jax.random.split(key, 3)
    free = np.flatnonzero(~seen)
    to_support = biject_to(d.support)
    # Numbers are mapped one by one, so that the seen ones stay where they are.
    starts = jax.jit(type(d).sample, static_argnums=2)(d, start_key, (200 * num_chains,))
    fixed = to_support.inv(jnp.where(seen, x, starts[0])).ravel()

    def place(numbers: Array) -> Array:
        rows = jnp.broadcast_to(fixed, (*numbers.shape[:-1], fixed.size)).at[..., free].set(numbers)
        return rows.reshape(*numbers.shape[:-1], *d.event_shape)

    def log_prob(numbers: Array) -> Array:
        at = place(numbers)
        y = to_support(at)
        log_det = to_support.log_abs_det_jacobian(at, y)
        return d.log_prob(y) + log_det.reshape(*numbers.shape[:-1], -1).sum(-1)

    def model() -> None:
        plane = dist.ImproperUniform(constraints.real_vector, (), (len(free),))
        numpyro.factor("density", log_prob(numpyro.sample("unseen", plane)))

    draws = to_support.inv(starts).reshape(len(starts), -1)[:, free]
    chosen = jax.random.categorical(choice_key, jax.jit(log_prob)(draws), shape=(num_chains,))
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
@dataclass(frozen=True, eq=False, repr=False)
class Completer(Described):
    """A flow trained to complete events under any mask: draws without MCMC. Made by :func:`fit_completer`."""

    flow: Flow

    def _describe(self) -> list[str]:
        first = f"Completer of events of {self.flow.features} numbers, given any of them"
        return [first, *(f"  {line}" for line in repr(self.flow).split("\n"))]

    def sample(
        self, key: ArrayLike, x: npt.ArrayLike, seen: npt.ArrayLike, sample_shape: int | Sequence[int] = ()
    ) -> Array:
        """Draws of the unseen numbers: ``sample_shape + (..., D)``, the seen ones as given.

        :param x: ``(..., D)``; ``seen``: booleans that broadcast with it.
        """
        x = jnp.asarray(as_numbers("x", x, missing=True))
        check_width(x, self.flow.features, "Completer")
        seen = as_numbers("seen", seen)
        if not any(isinstance(a, jax.core.Tracer) for a in (x, seen)):
            seen = _mask(seen, x.shape)
            check_finite("the seen part of x", np.broadcast_to(x, seen.shape)[seen])
        return _complete(self.flow, as_key(key), x, jnp.asarray(seen, bool), as_shape(sample_shape))


def _mask(seen: npt.ArrayLike, shape: tuple[int, ...]) -> np.ndarray:
    """Which numbers are seen, as booleans that broadcast with a shape."""
    mask = as_labels("seen", seen, 2).astype(bool)
    try:
        return np.broadcast_to(mask, np.broadcast_shapes(mask.shape, shape))
    except ValueError:
        raise ValueError(f"seen must broadcast with {shape}, got {mask.shape}") from None


@partial(jax.jit, static_argnames="sample_shape")
def _complete(flow: Flow, key: Array, x: Array, seen: Array, sample_shape: tuple[int, ...]) -> Array:
    return jnp.where(seen, x, flow(_context(flow, x, seen)).sample(key, sample_shape))


def fit_completer(
    key: ArrayLike,
    flow: Flow,
    x: ArrayLike,
    *,
    masks: Callable[[Array, tuple[int, ...]], Array] | None = None,
    **options: Unpack[FitOptions],
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
    :raises TypeError: for an option that does not exist.
    :raises ValueError: for a flow whose context does not fit.
    """
    check_options("fit_completer", options)
    if len(flow.event_shape) != 1 or flow.context != 2 * flow.features:
        raise ValueError(
            f"fit_completer needs a flow of vectors with context {2 * flow.features}, got {flow.context}"
        )
    result = fit_loss(key, flow, x, _Masked(masks or _random_masks), **options)
    return Completer(result.flow), result


@dataclass(frozen=True)
class _Masked:
    """The loss of a completer; equal ones share a compilation."""

    masks: Callable[[Array, tuple[int, ...]], Array]

    def __call__(self, weights: Any, flow: Flow, key: Array, x: Array) -> Array:
        mask_key, noise_key, flow_key = jax.random.split(key, 3)
        seen = self.masks(mask_key, x.shape)
        noise = jax.random.normal(noise_key, x.shape, x.dtype)
        noise = noise if flow.event_scale is None else flow.event_scale(noise)
        flow = flow.with_weights(weights).randomized(flow_key)
        return -flow(_context(flow, x, seen)).log_prob(jnp.where(seen, noise, x))


def _random_masks(key: Array, shape: tuple[int, ...]) -> Array:
    share_key, mask_key = jax.random.split(key)
    return jax.random.uniform(mask_key, shape) < jax.random.uniform(share_key, (shape[0], 1))


def _context(flow: Flow, x: ArrayLike, seen: ArrayLike) -> Array:
    x, seen = jnp.broadcast_arrays(jnp.asarray(x, float), jnp.asarray(seen))
    x = x if flow.event_scale is None else flow.event_scale._inverse(x)
    return jnp.concatenate([jnp.where(seen, x, 0), seen.astype(x.dtype)], -1)
