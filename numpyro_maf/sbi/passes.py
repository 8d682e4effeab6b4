# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Runs of a model on the device, each up to the first simulator that must run on the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from numpyro import handlers
from numpyro.primitives import Messenger

from numpyro_maf.inputs import nearest
from numpyro_maf.pytrees import static
from numpyro_maf.sbi.simulator import parameters
from numpyro_maf.traces import ONE_AT_A_TIME

__all__ = ["runs", "traced"]


def runs(model: Callable[..., Any], args=(), kwargs=None):
    """A compiled function of keys ``(N,)`` and values by site: sites ``(N, ...)``, and where it stopped.

    It stops at the first simulator that runs on the host, or at the first of all if ``every``, unless its
    values are given; then it also returns that simulator's parameters by row.
    """

    def row(every, key, given):
        trace, calls = traced(model, args, kwargs or {}, key, every, data=given)
        for name, value in given.items():
            if name not in trace:
                raise ValueError(f"given: the model has no site {name!r}{nearest(name, trace)}")
            site = trace[name]
            if site["type"] == "sample" and jnp.shape(value) != site["fn"].shape():
                shapes = f"rows of shape {jnp.shape(value)}, the model's site {site['fn'].shape()}"
                raise ValueError(f"given[{name!r}] has {shapes}")
        kinds = ("sample", "deterministic")
        values = {name: site["value"] for name, site in trace.items() if site["type"] in kinds}
        names = tuple(values)
        return values, {
            name: replace(call, before=names[: names.index(name)]) for name, call in calls.items()
        }

    @partial(jax.jit, static_argnums=0)
    def several(every, keys, given):
        return jax.vmap(partial(row, every))(keys, given)

    return several


def traced(model: Callable[..., Any], args, kwargs, key: ArrayLike, every: bool = False, **given: Any):
    """The trace of one run, and the call of the simulator at which it stopped, by name.

    :param every: whether to stop at the first simulator, or the first that runs on the host.
    :param given: options of NumPyro's ``substitute``.
    """
    stop = _Stop(every)
    seeded = handlers.substitute(handlers.seed(model, key), **given)
    with ONE_AT_A_TIME, handlers.block(), stop:
        return dict(handlers.trace(seeded).get_trace(*args, **kwargs)), stop.calls


class _Stop(Messenger):
    """Notes the first simulator that runs on the host, and gives NaN for it and what comes after."""

    def __init__(self, every: bool):
        super().__init__()
        self.every = every
        self.calls: dict[str, _Call] = {}

    def process_message(self, msg):
        if msg["type"] != "sample" or msg["value"] is not None:
            return
        simulator = parameters(msg["fn"])
        if simulator is None:
            return
        batch = msg["fn"].shape()[: len(msg["fn"].shape()) - len(simulator.event_shape)]
        keys, rows = jax.random.split(msg["kwargs"]["rng_key"], math.prod(batch)), simulator.rows(batch)
        every = self.every and simulator.host is not False
        if self.calls or every or not simulator.on_device(keys[0], [r[0] for r in rows]):
            msg["value"] = jnp.full(msg["fn"].shape(), jnp.nan)
            if not self.calls:
                self.calls[msg["name"]] = _Call(
                    keys, rows, simulator.fn, batch, simulator.event_shape, simulator.host
                )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Call:
    """What one site asks of a simulator: keys and parameters of the elements of its batch."""

    keys: Any
    rows: tuple[Any, ...]
    fn: Callable = static()
    batch: tuple[int, ...] = static()
    event_shape: tuple[int, ...] = static()
    host: bool | None = static(default=None)
    before: tuple[str, ...] = static(default=())  # the sites whose values do not depend on its results
