# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Many runs of a model: on the device where JAX can trace it, else on the processes of an executor.

A run is traced once and mapped over keys. A simulator that JAX cannot trace interrupts it: its parameters
come out, an executor computes its results on the host, and the next pass, with the same keys, goes on from
there. So k simulators on the host take k + 1 passes, and only their functions travel to other processes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.primitives import Messenger
from tqdm.auto import tqdm

from numpyro_maf.pytrees import static
from numpyro_maf.rng import as_key
from numpyro_maf.sbi.simulator import host_call, host_keys, is_traceable, parameters

__all__ = ["Simulations", "runs", "simulate"]

CHUNK = 10_000
_INTERRUPTED = "interrupted"


class Simulations(dict):
    """What :func:`simulate` returns: values by site, ``(N, ...)``, and what went wrong by row.

    :param values: by site.
    :param errors: by row: what an exception said, ``timeout``, or which site is not finite. The values of
        a row that failed are NaN where they are missing.
    :param args: of the model, with ``kwargs``.
    """

    def __init__(self, values, errors: dict[int, str] | None = None, args=(), kwargs=None):
        super().__init__(values)
        self.errors = dict(errors or {})
        self.args, self.kwargs = tuple(args), dict(kwargs or {})

    @property
    def failed(self) -> np.ndarray:
        """``(N,)`` booleans."""
        failed = np.zeros(len(next(iter(self.values()))), bool)
        failed[list(self.errors)] = True
        return failed

    def __repr__(self):
        shapes = ", ".join(f"{name}: {np.shape(value)}" for name, value in self.items())
        return f"Simulations({shapes}; {len(self.errors)} failed)"

    @classmethod
    def open(cls, store) -> Simulations:
        """The simulations in a folder that :func:`simulate` filled, mapped from disk rather than read."""
        return cls(*_Folder.at(store).result())


def simulate(
    key,
    model,
    num_simulations: int,
    *args,
    executor: Executor | None = None,
    store: str | os.PathLike | None = None,
    timeout: float | None = None,
    given: dict[str, Any] | None = None,
    missing: tuple[str, ...] = (),
    progress: bool = True,
    **kwargs,
) -> Simulations:
    """Run a model many times, each with a key of its own.

    Interrupting returns the rows that are complete, with a warning.

    :param key: a ``jax.random`` key.
    :param model: its sample sites are drawn, unless ``obs`` of one is given.
    :param num_simulations: N.
    :param args: of the model, with all other ``kwargs``.
    :param executor: runs the simulators that JAX cannot trace; if given, all. Any of ``concurrent.futures``,
        ``dask.distributed.Client.get_executor()``, ``mpi4py.futures.MPIPoolExecutor``. None for a process
        pool with a worker for each core, where one is needed.
    :param store: a folder for the results, one ``.npy`` file for each site, from which they are then mapped;
        an interrupted call goes on where it was if repeated. None for memory.
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
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    given = {name: np.asarray(value) for name, value in (given or {}).items()}
    for name, value in given.items():
        if value.shape[:1] != (num_simulations,):
            raise ValueError(
                f"given[{name!r}] must lead with {num_simulations} rows, got shape {value.shape}"
            )
    run = runs(model, args, kwargs)
    keys = jax.random.split(key, num_simulations)
    host = _Host(executor, timeout, progress)
    parts: Any = _Memory()
    if store is not None:
        parts = _Folder.of(store, key, num_simulations, _digest(args, kwargs, given, missing))
        first = {name: value[:1] for name, value in given.items()}
        parts.check(jax.eval_shape(partial(run, executor is not None), keys[:1], first)[0])
    starts = range(parts.done, num_simulations, CHUNK)
    try:
        for start in tqdm(starts, disable=not progress or len(starts) < 2, desc="simulate", unit="chunk"):
            rows = slice(start, min(start + CHUNK, num_simulations))
            part = {k: v[rows] for k, v in given.items()}
            values, errors = _chunk(run, keys[rows], part, host, missing)
            # Of a chunk that was interrupted what comes before the first call that is not done is kept.
            whole = min(
                (row for row, what in errors.items() if what is _INTERRUPTED), default=len(keys[rows])
            )
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
    return Simulations(values, errors, args, kwargs)


def runs(model, args=(), kwargs=None):
    """A compiled function of keys ``(N,)`` and values by site: sites ``(N, ...)``, and where it stopped.

    It stops at the first simulator that cannot be traced, or at the first of all if ``every``, unless its
    values are given; then it also returns that simulator's parameters by row.
    """

    def row(every, key, given):
        stop = _Stop(every)
        seeded = handlers.substitute(handlers.seed(model, key), data=given)
        with handlers.block(), stop:
            trace = handlers.trace(seeded).get_trace(*args, **(kwargs or {}))
        kinds = ("sample", "deterministic")
        values = {name: site["value"] for name, site in trace.items() if site["type"] in kinds}
        return values, stop.calls

    @partial(jax.jit, static_argnums=0)
    def several(every, keys, given):
        return jax.vmap(partial(row, every))(keys, given)

    return several


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
            errors.setdefault(row, what if what is _INTERRUPTED else f"{name}: {what}")
    values = {name: np.asarray(value) for name, value in values.items()}
    for name, value in values.items():
        if np.issubdtype(value.dtype, np.floating):
            fine = np.isfinite(value) | (np.isnan(value) & (name in missing))
            for row in np.flatnonzero(~fine.reshape(len(value), -1).all(1)):
                errors.setdefault(int(row), f"{name} is not finite")
    return values, errors


# The host -----------------------------------------------------------------------------------------


class _Host:
    """Calls of simulators on an executor; its own process pool starts when the first call comes."""

    def __init__(self, executor, timeout, progress):
        self.executor, self.timeout, self.progress = executor, timeout, progress
        self.own, self.interrupted = None, False

    def close(self):
        if self.own is not None:
            self.own.shutdown(wait=not self.interrupted, cancel_futures=True)

    def results(self, name, call):
        """All of a site's results, ``(N, *batch, *event_shape)``, and what went wrong by row."""
        count, each = call.keys.shape
        keys = host_keys(call.keys.reshape(-1))
        columns = [np.asarray(p).reshape(count * each, *p.shape[2:]) for p in call.rows]
        results = np.full((count * each, *call.event_shape), np.nan, jnp.result_type(float))
        errors = dict.fromkeys(range(count * each), _INTERRUPTED)
        size = min(max(count * each // 64, 1), 64)
        tasks = [slice(i, min(i + size, len(keys))) for i in range(0, len(keys), size)]
        work = partial(_work, self._sent(call.fn), call.event_shape, self.timeout)
        bar = tqdm(total=len(keys), disable=not self.progress, desc=f"simulate {name}", unit="call")
        futures = {}
        try:
            for rows in tasks:
                futures[self._pool().submit(work, keys[rows], [c[rows] for c in columns])] = rows
            for future in as_completed(futures):
                rows = futures[future]
                for call_, (value, error) in zip(range(rows.start, rows.stop), _result(future)):
                    if error is None:
                        results[call_] = value
                        del errors[call_]
                    else:
                        errors[call_] = error
                bar.update(rows.stop - rows.start)
        except KeyboardInterrupt:
            self.interrupted = True
            for future in futures:
                future.cancel()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "the processes that run the simulator died. A script that starts processes must keep its own "
                "work under `if __name__ == '__main__':`; or pass executor=ThreadPoolExecutor()"
            ) from error
        finally:
            bar.close()
        by_row = {call_ // max(each, 1): what for call_, what in sorted(errors.items(), reverse=True)}
        return results.reshape(count, *call.batch, *call.event_shape), by_row

    def _pool(self) -> Executor:
        if self.executor is not None:
            return self.executor
        if self.own is None:  # started anew: a fork of a process that runs JAX may hang
            self.own = ProcessPoolExecutor(mp_context=get_context("spawn"))
        return self.own

    def _sent(self, fn):
        """Functions of a notebook or a script, and closures, travel where cloudpickle is installed."""
        if self.executor is None and find_spec("cloudpickle"):
            import cloudpickle

            return cloudpickle.dumps(fn)
        return fn


def _result(future):
    try:
        return future.result()
    except CancelledError:
        return []


def _work(fn, event_shape, timeout, keys, columns):
    """Some calls of a simulator, in another process or thread: results and errors."""
    if isinstance(fn, bytes):
        import cloudpickle

        fn = cloudpickle.loads(fn)
    return [_attempt(fn, event_shape, timeout, row) for row in zip(keys, *columns)]


def _attempt(fn, event_shape, timeout, row):
    found: list[tuple[Any, str | None]] = []

    def call():
        try:
            value = host_call(fn, *row)
            wrong = None if value.shape == event_shape else f"shape {value.shape}, not {event_shape}"
            found.append((None if wrong else value, wrong))
        except Exception as error:
            found.append((None, f"{type(error).__name__}: {error}"))

    if timeout is None:
        call()
    else:
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(timeout)
    return found[0] if found else (None, "timeout")


def _digest(*parts) -> str:
    """Of the numbers and texts that a call is given."""
    leaves, structure = jax.tree.flatten(parts)
    digest = hashlib.sha256(str(structure).encode())
    for leaf in leaves:
        known = isinstance(leaf, (int, float, complex, np.ndarray, np.generic, jax.Array))
        digest.update(
            np.asarray(leaf).tobytes() if known else (leaf if isinstance(leaf, str) else "").encode()
        )
    return digest.hexdigest()


# Where rows are kept ------------------------------------------------------------------------------


class _Memory:
    """Chunks in memory."""

    def __init__(self):
        self.done, self.chunks, self.errors = 0, [], {}

    def add(self, values, errors):
        self.chunks.append(values)
        self.errors.update(errors)
        self.done += len(next(iter(values.values())))

    def result(self):
        whole = {name: np.concatenate([chunk[name] for chunk in self.chunks]) for name in self.chunks[0]}
        return whole, self.errors


class _Folder:
    """One ``.npy`` file for each site, and ``about.json``: nothing in it is ever executed."""

    def __init__(self, folder, about):
        self.folder, self.about = folder, about

    @classmethod
    def at(cls, store):
        folder = Path(store)
        if not (folder / "about.json").exists():
            raise ValueError(f"{folder} holds no simulations")
        return cls(folder, json.loads((folder / "about.json").read_text()))

    @classmethod
    def of(cls, store, key, count, called):
        folder = Path(store)
        about = {"key": host_keys(key).tolist(), "count": count, "called": called}
        if (folder / "about.json").exists():
            found = cls.at(store)
            if any(found.about[name] != value for name, value in about.items()):
                raise ValueError(f"{folder} holds simulations of another call")
            return found
        about |= {"done": 0, "files": {}, "errors": {}}
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder, about)

    @property
    def done(self):
        return self.about["done"]

    def check(self, shapes):
        """Refuse a model with other sites, by name with a row axis, than those that are here."""
        found = {name: value.shape[1:] for name, value in self.result()[0].items()}
        if self.done and found != {name: value.shape[1:] for name, value in shapes.items()}:
            raise ValueError(f"{self.folder} holds simulations of another model: its sites are {found}")

    def add(self, values, errors):
        for i, (name, value) in enumerate(values.items()):
            path = self.folder / self.about["files"].setdefault(name, f"{i}.npy")
            options = (
                {} if self.done else dict(dtype=value.dtype, shape=(self.about["count"], *value.shape[1:]))
            )
            file = np.lib.format.open_memmap(path, mode="r+" if self.done else "w+", **options)
            file[self.done : self.done + len(value)] = value
            file.flush()
        self.about["errors"] |= {str(row): what for row, what in errors.items()}
        self.about["done"] += len(value)
        part = self.folder / "about.part"
        part.write_text(json.dumps(self.about))
        part.replace(self.folder / "about.json")

    def result(self):
        files = {name: np.load(self.folder / f, mmap_mode="r") for name, f in self.about["files"].items()}
        errors = {int(row): what for row, what in self.about["errors"].items()}
        return {name: file[: self.done] for name, file in files.items()}, errors
