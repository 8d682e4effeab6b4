# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Simulators as NumPyro distributions: they can be drawn from, and have no density."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.typing import ArrayLike
from numpyro.distributions import constraints

from numpyro_maf.inputs import as_numbers
from numpyro_maf.rng import as_key, as_shape
from numpyro_maf.sbi.purity import fit_for_tracing, name_of
from numpyro_maf.sbi.worker import host_call

__all__ = ["Simulator", "parameters", "swap"]


class Simulator(dist.Distribution):
    """An implicit distribution: what a function makes of a key and parameters.

    Inside a model it is a site as any other: ``numpyro.sample("x", Simulator(fn, theta, event_shape=(2,)))``.
    A function of JAX runs under ``jit`` and ``vmap``. Any other Python, which NumPy, a compiled library or a
    subprocess may do the work of, gets its numbers as NumPy arrays, and the key as two integers fit for
    ``numpy.random.default_rng(key)``; such models are run by :func:`~numpyro_maf.simulate`.

    A function that JAX can trace may still not be one of JAX: it may draw from NumPy's generator, count its
    calls, or write a parameter into a command. That is found out, and it runs on the host with a warning. A
    function whose random numbers are the same whatever its key is, is refused. One that draws none is fine.

    :param fn: ``fn(key, *params)`` gives an array of shape ``event_shape``. All its randomness must come from
        the key.
    :param params: arrays; their leading ``batch_ndim`` axes are batch axes and broadcast.
    :param event_shape: of one result.
    :param support: a NumPyro constraint of the results' numbers, such as ``constraints.positive``.
    :param batch_ndim: how many leading axes of the parameters are batch axes, as those that local parameters
        have in a plate; None for the fewest with which a function of JAX gives ``event_shape``, and for other
        functions 0.
    :param host: True for a function that must never be traced; False for one that is always traced, whatever
        it does besides; None to find out.
    :raises ValueError: when a function of JAX gives something of another shape, or draws random numbers that
        do not come from its key.
    """

    arg_constraints: dict[str, Any] = {}
    pytree_data_fields = ("params",)
    pytree_aux_fields = ("fn", "each", "batch_ndim", "host")

    def __init__(
        self,
        fn: Callable,
        *params,
        event_shape=(),
        support=constraints.real,
        batch_ndim=None,
        host=None,
        validate_args=None,
    ):
        if not callable(fn):
            raise TypeError(f"a simulator is a function of a key and parameters, got {type(fn).__name__}")
        if host not in (None, True, False):
            raise ValueError(f"host must be True, False or None, got {host!r}")
        self.fn, self.each, self.host = fn, support, host
        self.params = tuple(jnp.asarray(as_numbers(f"params[{i}]", p)) for i, p in enumerate(params))
        if batch_ndim is None:
            batch_ndim = 0 if host else _batch_ndim(fn, self.params, tuple(event_shape))
        self.batch_ndim = batch_ndim
        batch_shape = jnp.broadcast_shapes(*(jnp.shape(p)[: self.batch_ndim] for p in self.params))
        super().__init__(batch_shape, tuple(event_shape), validate_args=validate_args)

    @property
    def support(self):
        return constraints.independent(self.each, self.event_dim)

    @property
    def theta(self) -> Any:
        """The parameters side by side, ``batch_shape + (P,)``."""
        rows = [p.reshape(*p.shape[: self.batch_ndim], -1) for p in self.params]
        batch = jnp.broadcast_shapes(*(r.shape[:-1] for r in rows))
        return jnp.concatenate([jnp.broadcast_to(r, (*batch, r.shape[-1])) for r in rows], -1)

    def rows(self, batch_shape) -> tuple[Any, ...]:
        """The parameters of each element of a batch, ``(B, ...)``."""
        count, own = math.prod(batch_shape), self.batch_ndim
        full = [(*batch_shape, *p.shape[own:]) for p in self.params]
        return tuple(
            jnp.broadcast_to(p, shape).reshape(count, *p.shape[own:]) for p, shape in zip(self.params, full)
        )

    def sample(self, key: ArrayLike, sample_shape: int | Sequence[int] = ()) -> Any:
        """``sample_shape + batch_shape + event_shape`` draws, each with a key of its own."""
        key, shape = as_key(key), as_shape(sample_shape) + self.batch_shape
        keys, rows = jax.random.split(key, max(math.prod(shape), 1)), self.rows(shape)
        if self.on_device(keys[0], [r[0] for r in rows]):
            values = jax.vmap(self.fn)(keys, *rows)
        elif any(isinstance(a, jax.core.Tracer) for a in (keys, *rows)):
            raise TypeError(
                f"the simulator {name_of(self.fn)} is no function of JAX, so it cannot be traced: draw from "
                "the model with numpyro_maf.simulate(key, model, num_simulations), which runs it on the host"
            )
        else:
            values = np.stack([host_call(self.fn, k, *row) for k, *row in zip(host_keys(keys), *rows)])
        values = jnp.asarray(values)
        if values.shape[1:] != self.event_shape:
            raise ValueError(
                f"the simulator {name_of(self.fn)} gave shape {values.shape[1:]}, its event_shape is "
                f"{self.event_shape}; are leading axes of its parameters batch axes? Then give batch_ndim"
            )
        return values.reshape(*shape, *self.event_shape)

    def on_device(self, key: ArrayLike, params: Any) -> bool:
        """Whether calls are traced and run on the device, given the parameters of one of them.

        :raises ValueError: when random numbers are the same whatever the key is.
        """
        return not self.host if self.host is not None else fit_for_tracing(self.fn, key, params)

    def log_prob(self, value: ArrayLike):
        raise NotImplementedError(
            f"the simulator {name_of(self.fn)} has no density. Learn a posterior with numpyro_maf.npe, or a "
            "likelihood with numpyro_maf.nle, with which numpyro_maf.learned(model, {site: likelihood}) runs "
            "under NUTS"
        )


def _batch_ndim(fn, params, event_shape) -> int:
    for count in range(max((p.ndim for p in params), default=0) + 1):
        mapped = fn
        for axis in range(count):
            inside = count - 1 - axis  # the innermost map peels the last batch axis
            mapped = jax.vmap(mapped, (None, *(0 if p.ndim > inside else None for p in params)))
        try:
            found = jax.eval_shape(mapped, jax.random.key(0), *params)
        except Exception:
            continue
        if found.shape[count:] == event_shape and len(found.shape) == count + len(event_shape):
            return count
    return 0


def host_keys(keys) -> np.ndarray:
    """Typed or raw keys as ``(..., 2)`` integers."""
    typed = jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(keys) if typed else keys)


def parameters(fn: dist.Distribution) -> Simulator | None:
    """The simulator within what plates and ``to_event`` made of it; None for other distributions."""
    while isinstance(fn, (dist.ExpandedDistribution, dist.Independent, dist.MaskedDistribution)):
        fn = fn.base_dist
    return fn if isinstance(fn, Simulator) else None


def swap(fn: dist.Distribution, make: Callable[[Simulator], dist.Distribution]) -> dist.Distribution:
    """The same expansions and event axes about another distribution in place of the simulator."""
    if isinstance(fn, dist.ExpandedDistribution):
        return swap(fn.base_dist, make).expand(fn.batch_shape)
    if isinstance(fn, dist.Independent):
        return swap(fn.base_dist, make).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.MaskedDistribution):
        raise ValueError("mask the learned model, not the one it was learned from: put `learned` inside mask")
    return make(fn)
