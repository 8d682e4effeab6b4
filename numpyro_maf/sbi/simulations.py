# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Many runs of a model: on the device where JAX can trace it, else on the host.

A run is traced once and mapped over keys. A simulator that runs on the host interrupts it: its parameters
come out, its results are computed there, and the next pass, with the same keys, goes on from them. So k
simulators on the host take k + 1 passes, and only their functions travel to other processes.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from tqdm.auto import tqdm

from numpyro_maf.codec import storable
from numpyro_maf.fingerprints import Walk
from numpyro_maf.inputs import by_site
from numpyro_maf.pytrees import Described
from numpyro_maf.rng import as_key
from numpyro_maf.sbi.host import Host
from numpyro_maf.sbi.memory import Memory
from numpyro_maf.sbi.passes import runs
from numpyro_maf.sbi.simulator import host_keys
from numpyro_maf.sbi.store import Folder, saved

__all__ = ["Simulations", "simulate", "with_shapes"]

BLOCKS = (10_000, 1_000, 100, 10)  # how many rows may be simulated at once


@storable
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
        self.errors = {int(row): what for row, what in (errors or {}).items()}
        self.args, self.kwargs, self.stopped = tuple(args), dict(kwargs or {}), stopped

    def stored(self) -> dict[str, Any]:
        """What files hold: all but the model's arguments."""
        errors = {str(row): what for row, what in self.errors.items()}
        return {
            "values": {k: np.asarray(v) for k, v in self.items()},
            "errors": errors,
            "stopped": self.stopped,
        }

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
        """The simulations in a folder that :func:`simulate` filled, mapped from disk rather than read.

        Of a campaign that is not finished, the rows before the first that is missing.

        :raises ValueError: when the folder holds none, or when some are damaged, with their rows.
        """
        return cls(*saved(store))


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

    Interrupting returns the rows that are complete, with a warning. The same key gives the same rows,
    whatever runs them, however many workers there are, interrupted or not. Several threads may call this at
    once; their models then run one at a time, because NumPyro keeps one stack of handlers for all threads.

    Simulators on the host run in this process while a call takes less than about a millisecond and its code
    reaches nothing that may end the process; else in processes of this library's own, one for each core.
    There a call that raises, exits, crashes, hangs or takes all memory is one row in ``errors``. On the
    threads of an executor a call can raise, ``SystemExit`` too, or time out; one that crashes ends the
    program.

    :param key: a ``jax.random`` key, or an integer.
    :param model: its sample sites are drawn, unless ``obs`` of one is given.
    :param num_simulations: number of simulations, N.
    :param args: of the model, with all other ``kwargs``.
    :param executor: runs all simulators but those with ``host=False``. Any of ``concurrent.futures``,
        ``dask.distributed.Client.get_executor()``, ``mpi4py.futures.MPIPoolExecutor``. None to run those that
        need the host as said above.
    :param store: a folder for the results, one ``.npy`` file for each site, from which they are then mapped.
        Finished calls are there within a second, and the same call resumes. One process writes to it at a
        time. None for memory.
    :param timeout: seconds that one call of a simulator on the host may take. Without an executor the process
        that runs it is killed; a thread of an executor cannot be, and goes on unheeded.
    :param given: values by site, ``(N, ...)``, for sites that are not to be drawn.
    :param missing: names of sites at which NaN stands for numbers that are not there, padding, say, and is no
        failure.
    :param progress: show a progress bar.
    :return: values by site, deterministic ones included, with the rows that failed. Results of simulators on
        the host are ``float64``.
    :raises ValueError: when all rows fail, with the first reason; for a store of another call; for a
        simulator whose random numbers are the same whatever its key is.
    :raises TypeError: for a store, when an argument has no fingerprint, as an open file has none.
    :raises RuntimeError: when another call is writing to the store.
    :raises OSError: when the disk of the store is full.
    """
    if int(num_simulations) != num_simulations or num_simulations < 1:
        raise ValueError(f"num_simulations must be a positive integer, got {num_simulations!r}")
    key = as_key(key)
    given = {name: np.asarray(value) for name, value in by_site("given", given or {}).items()}
    for name, value in given.items():
        if value.shape[:1] != (num_simulations,):
            raise ValueError(
                f"given[{name!r}] must lead with {num_simulations} rows, got shape {value.shape}"
            )
    run = partial(runs(model, args, kwargs), executor is not None)
    keys = jax.random.split(key, num_simulations)
    parts: Any = Memory(num_simulations)
    block = BLOCKS[0]
    few = slice(0, min(num_simulations, BLOCKS[-1]))
    some = {name: value[few] for name, value in given.items()}
    if store is not None:
        about = _about(key, num_simulations, model, args, kwargs, given, missing)
        sites = jax.eval_shape(run, keys[few], some)[0]
        about["sites"] = {name: list(value.shape[1:]) for name, value in sites.items()}
        parts = Folder.of(store, about, lambda: _block(run, keys[few], some, num_simulations))
        block = parts.block
    host = Host(executor, timeout, progress)
    starts = range(0, num_simulations, block)
    try:
        for start in tqdm(starts, disable=not progress or len(starts) < 2, desc="simulate", unit="block"):
            rows = slice(start, min(start + block, num_simulations))
            if parts.whole(start, block):
                continue
            _simulate(run, keys[rows], {k: v[rows] for k, v in given.items()}, host, missing, parts, start)
    except KeyboardInterrupt:
        if not parts.complete():
            raise
    finally:
        host.close()
        parts.close()
    values, errors = parts.result()
    done = parts.complete()
    if done < num_simulations:
        warnings.warn(f"interrupted after {done} of {num_simulations} simulations", stacklevel=2)
    if len(errors) == done:
        raise ValueError(f"all {done} simulations failed, the first with: {errors[min(errors)]}")
    return Simulations(values, errors, args, kwargs, done < num_simulations)


def _about(key, count, model, args, kwargs, given, missing) -> dict[str, Any]:
    """What tells one call from another."""
    walk = Walk()
    called = {
        "key": host_keys(key).tolist(),
        "number of simulations": count,
        "model or simulator": walk.digest(model, "the model"),
        "argument": walk.digest([list(args), kwargs], "the arguments"),
        "given": walk.digest(given, "given"),
        "missing": sorted(missing),
        "precision": str(jnp.result_type(float)),
    }
    return {"count": count, "called": called, "globals": dict(sorted(walk.globals.items()))}


def _block(run, keys, given, count) -> int:
    """As many rows as one pass of the device simulates in about a second."""
    if count <= BLOCKS[-1]:
        return BLOCKS[-1]
    jax.block_until_ready(run(keys, given))  # compiles
    start = time.perf_counter()
    jax.block_until_ready(run(keys, given))
    seconds = (time.perf_counter() - start) / len(keys)
    return next((size for size in BLOCKS if seconds * size < 1), BLOCKS[-1])


def _simulate(run, keys, given, host, missing, parts, start):
    """A block of rows, on the device and, where simulators ask for it, on the host."""

    finished = np.ones(len(keys), bool)
    called = set()

    def keep(name, value):
        left = np.flatnonzero(finished & ~parts.done(name, start, len(keys)))
        if len(left):
            units, value = start + left, np.asarray(value)[left]
            parts.add(name, 1, units, value, _not_finite(name, units, value, missing))

    while True:
        values, calls = run(keys, given)
        if not parts.names:
            parts.shaped({name: value.shape[1:] for name, value in values.items()})
        if not calls:
            break
        if host.interrupted:  # no row has all its simulators' results
            raise KeyboardInterrupt
        ((name, call),) = calls.items()
        for before in call.before:
            if before not in called:
                keep(before, values[before])
        called.add(name)
        given[name] = host.results(name, call, parts, start, name in missing)
        each = call.keys.shape[1]
        done = parts.done(name, start * each, len(keys) * each)
        finished &= done.reshape(len(keys), each).all(1)  # not all if interrupted
    for name, value in values.items():
        if name not in called:
            keep(name, value)
    if host.interrupted:
        raise KeyboardInterrupt


def _not_finite(name, units, values, missing) -> dict[int, str]:
    if not np.issubdtype(values.dtype, np.floating):
        return {}
    fine = np.isfinite(values) | (np.isnan(values) & (name in missing))
    bad = units[~fine.reshape(len(units), -1).all(1)]
    return {int(unit): f"{name} is not finite" for unit in bad}
