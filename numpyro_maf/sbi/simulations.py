# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Many runs of a model: on the device where JAX can trace it, else on the processes of an executor.

A run is traced once and mapped over keys. A simulator that JAX cannot trace interrupts it: its parameters
come out, an executor computes its results on the host, and the next pass, with the same keys, goes on from
there. So k simulators on the host take k + 1 passes, and only their functions travel to other processes.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from numpyro import handlers
from numpyro.primitives import Messenger
from tqdm.auto import tqdm

from numpyro_maf.pytrees import Described, static
from numpyro_maf.rng import as_key
from numpyro_maf.sbi.host import INTERRUPTED, Host
from numpyro_maf.sbi.simulator import is_traceable, parameters
from numpyro_maf.sbi.store import Folder, Memory, digest

__all__ = ["Simulations", "runs", "simulate", "traced", "with_shapes"]

CHUNK = 10_000


class Simulations(Described, dict):
    """The result of :func:`simulate`: values by site, ``(N, ...)``, and what went wrong by row.

    :param values: by site.
    :param errors: by row: what an exception said, ``timeout``, or which site is not finite. The values of
        a row that failed are NaN where they are missing.
    :param args: of the model, with ``kwargs``.
    :param stopped: whether an interrupt left some rows out.
    """

    def __init__(
        self, values, errors: dict[int, str] | None = None, args=(), kwargs=None, stopped: bool = False
    ):
        super().__init__(values)
        self.errors = dict(errors or {})
        self.args, self.kwargs, self.stopped = tuple(args), dict(kwargs or {}), stopped

    @property
    def failed(self) -> np.ndarray:
        """``(N,)`` booleans."""
        failed = np.zeros(len(next(iter(self.values()))), bool)
        failed[list(self.errors)] = True
        return failed

    def joined(self, other: Simulations) -> Simulations:
        """All rows of both, those of ``other`` last."""
        count = len(self.failed)
        values = {name: np.concatenate([self[name], other[name]]) for name in self}
        errors = self.errors | {count + row: what for row, what in other.errors.items()}
        return Simulations(values, errors, other.args, other.kwargs, other.stopped)

    def last(self, count: int) -> Simulations:
        """The last ``count`` rows."""
        first = len(self.failed) - count
        errors = {row - first: what for row, what in self.errors.items() if row >= first}
        values = {name: value[first:] for name, value in self.items()}
        return Simulations(values, errors, self.args, self.kwargs)

    def _describe(self):
        rows = len(self.failed)
        sites = with_shapes({name: np.shape(value)[1:] for name, value in self.items()})
        lines = [f"Simulations: {rows:,} rows of {sites}{', interrupted' if self.stopped else ''}"]
        if self.errors:
            first = min(self.errors)
            lines.append(f"{len(self.errors):,} failed, the first, row {first}, with: {self.errors[first]}")
        return lines

    @classmethod
    def open(cls, store) -> Simulations:
        """The simulations in a folder that :func:`simulate` filled, mapped from disk rather than read."""
        return cls(*Folder.at(store).result())


def with_shapes(shapes: dict[str, tuple[int, ...]]) -> str:
    """Names, each with its shape unless that is ``()``."""
    return ", ".join(f"{name} {shape}" if shape else name for name, shape in shapes.items())


def simulate(
    key: ArrayLike,
    model: Callable[..., Any],
    num_simulations: int,
    *args: Any,
    executor: Executor | None = None,
    store: str | os.PathLike[str] | None = None,
    timeout: float | None = None,
    given: dict[str, Any] | None = None,
    missing: tuple[str, ...] = (),
    progress: bool = True,
    **kwargs: Any,
) -> Simulations:
    """Run a model many times, each with a key of its own.

    Interrupting returns the rows that are complete, with a warning.

    :param key: a ``jax.random`` key, or an integer.
    :param model: its sample sites are drawn, unless ``obs`` of one is given.
    :param num_simulations: N.
    :param args: of the model, with all other ``kwargs``.
    :param executor: runs the simulators that JAX cannot trace; if given, all. Any of ``concurrent.futures``,
        ``dask.distributed.Client.get_executor()``, ``mpi4py.futures.MPIPoolExecutor``. None for a process
        pool with a worker for each core, where one is needed.
    :param store: a folder for the results, one ``.npy`` file for each site, from which they are then mapped;
        an interrupted call resumes if repeated. None for memory.
    :param timeout: seconds that one call of a simulator on the host may take.
    :param given: values by site, ``(N, ...)``, for sites that are not to be drawn.
    :param missing: names of sites at which NaN stands for numbers that are not there, padding, say, and is no
        failure.
    :param progress: show a progress bar.
    :return: values by site, deterministic ones included, with the rows that failed.
    :raises ValueError: when all rows fail, with the first reason; for a store of another call.
    """
    if int(num_simulations) != num_simulations or num_simulations < 1:
        raise ValueError(f"num_simulations must be a positive integer, got {num_simulations!r}")
    key = as_key(key)
    given = {name: np.asarray(value) for name, value in (given or {}).items()}
    for name, value in given.items():
        if value.shape[:1] != (num_simulations,):
            raise ValueError(
                f"given[{name!r}] must lead with {num_simulations} rows, got shape {value.shape}"
            )
    run = runs(model, args, kwargs)
    keys = jax.random.split(key, num_simulations)
    host = Host(executor, timeout, progress)
    parts: Any = Memory()
    if store is not None:
        parts = Folder.of(store, key, num_simulations, digest(args, kwargs, given, missing))
        first = {name: value[:1] for name, value in given.items()}
        parts.check(jax.eval_shape(partial(run, executor is not None), keys[:1], first)[0])
    starts = range(parts.done, num_simulations, CHUNK)
    try:
        for start in tqdm(starts, disable=not progress or len(starts) < 2, desc="simulate", unit="chunk"):
            rows = slice(start, min(start + CHUNK, num_simulations))
            part = {k: v[rows] for k, v in given.items()}
            values, errors = _chunk(run, keys[rows], part, host, missing)
            # Of an interrupted chunk the rows before the first call that is not done are kept.
            whole = min((row for row, what in errors.items() if what is INTERRUPTED), default=len(keys[rows]))
            if whole:
                values = {name: value[:whole] for name, value in values.items()}
                parts.add(values, {start + row: what for row, what in errors.items() if row < whole})
            if host.interrupted:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        if not parts.done:
            raise
    finally:
        host.close()
    values, errors = parts.result()
    done = len(next(iter(values.values())))
    if done < num_simulations:
        warnings.warn(f"interrupted after {done} of {num_simulations} simulations", stacklevel=2)
    if len(errors) == done:
        raise ValueError(f"all {done} simulations failed, the first with: {errors[min(errors)]}")
    return Simulations(values, errors, args, kwargs, done < num_simulations)


def runs(model: Callable[..., Any], args=(), kwargs=None):
    """A compiled function of keys ``(N,)`` and values by site: sites ``(N, ...)``, and where it stopped.

    It stops at the first simulator that cannot be traced, or at the first of all if ``every``, unless its
    values are given; then it also returns that simulator's parameters by row.
    """

    def row(every, key, given):
        trace, calls = traced(model, args, kwargs or {}, key, every, data=given)
        kinds = ("sample", "deterministic")
        return {name: site["value"] for name, site in trace.items() if site["type"] in kinds}, calls

    @partial(jax.jit, static_argnums=0)
    def several(every, keys, given):
        return jax.vmap(partial(row, every))(keys, given)

    return several


def traced(model: Callable[..., Any], args, kwargs, key: ArrayLike, every: bool = False, **given: Any):
    """The trace of one run, and the call of the simulator at which it stopped, by name.

    :param every: whether to stop at the first simulator, or the first that JAX cannot trace.
    :param given: options of NumPyro's ``substitute``.
    """
    stop = _Stop(every)
    seeded = handlers.substitute(handlers.seed(model, key), **given)
    with handlers.block(), stop:
        return dict(handlers.trace(seeded).get_trace(*args, **kwargs)), stop.calls


class _Stop(Messenger):
    """Notes the first simulator that cannot be traced, and gives NaN for it and what comes after."""

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
        if self.calls or self.every or not is_traceable(simulator.fn, keys[0], [r[0] for r in rows]):
            msg["value"] = jnp.full(msg["fn"].shape(), jnp.nan)
            if not self.calls:
                self.calls[msg["name"]] = _Call(keys, rows, simulator.fn, batch, simulator.event_shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Call:
    """What one site asks of a simulator: keys and parameters of the elements of its batch."""

    keys: Any
    rows: tuple[Any, ...]
    fn: Callable = static()
    batch: tuple[int, ...] = static()
    event_shape: tuple[int, ...] = static()


def _chunk(run, keys, given, host, missing):
    """Some rows, on the device and, where simulators ask for it, on the host."""
    errors: dict[int, str] = {}
    while True:
        values, calls = run(host.executor is not None, keys, given)
        if not calls:
            break
        if host.interrupted:  # no row has all its simulators' results
            raise KeyboardInterrupt
        ((name, call),) = calls.items()
        given[name], failures = host.results(name, call)
        for row, what in failures.items():
            errors.setdefault(row, what if what is INTERRUPTED else f"{name}: {what}")
    values = {name: np.asarray(value) for name, value in values.items()}
    for name, value in values.items():
        if np.issubdtype(value.dtype, np.floating):
            fine = np.isfinite(value) | (np.isnan(value) & (name in missing))
            for row in np.flatnonzero(~fine.reshape(len(value), -1).all(1)):
                errors.setdefault(int(row), f"{name} is not finite")
    return values, errors
