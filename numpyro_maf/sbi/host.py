# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Simulators on the host: in this process while they are quick, else in processes or on an executor."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Generator
from concurrent.futures import BrokenExecutor, Executor
from functools import partial
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from numpyro_maf.fingerprints import Walk, first_argument_is_read, is_random
from numpyro_maf.sbi import executors
from numpyro_maf.sbi.purity import name_of
from numpyro_maf.sbi.simulator import host_keys
from numpyro_maf.sbi.worker import INTERRUPTED, attempt
from numpyro_maf.sbi.workers import CannotTravel, Workers, packed

__all__ = ["Host"]

QUICK = 1e-3  # seconds of a call for which another process does not pay
FLUSH = 0.4  # seconds after which finished calls are written
AGAIN = -1  # the number of the call that repeats the first

# What can end the process, or is compiled by others: a function that reaches it runs in a process of its own.
SAFE = {"builtins", "numpy", "scipy", "jax", "numpyro", "numpyro_maf", "pandas", "sklearn", "copyreg"}
UNSAFE = {"_exit", "abort", "kill", "killpg", "fork", "raise_signal", "ctypes", "CDLL", "signal", "_sigsegv"}


class Host:
    """Calls of simulators on an executor, or as it pays: in this process, or in processes of our own.

    :param executor: runs all calls; None to choose.
    :param timeout: seconds that one call may take.
    :param progress: show a progress bar.
    """

    def __init__(self, executor: Executor | None, timeout: float | None, progress: bool):
        self.executor, self.timeout, self.progress = executor, timeout, progress
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.workers = Workers(count, timeout)
        self.interrupted = False
        self.payloads: dict[int, Any] = {}
        self.repeated: set[str] = set()

    def close(self) -> None:
        """End the processes."""
        self.workers.close()

    def results(self, name: str, call: Any, parts: Any, start: int, missing: bool) -> np.ndarray:
        """All results of a site in a block of rows, ``(N, *batch, *event_shape)``; NaN where there is none.

        Each call goes to ``parts`` at most half a second after it is done; those that are there are not made.

        :param start: the block's first row.
        :param missing: whether NaN is no failure.
        """
        count, each = call.keys.shape
        keys, first = host_keys(call.keys.reshape(-1)), start * each
        columns = [np.asarray(p).reshape(count * each, *p.shape[2:]) for p in call.rows]
        row = lambda i: (keys[i], *(c[i] for c in columns))  # noqa: E731
        there = parts.done(name, first, count * each)
        left = [(i, row(i)) for i in np.flatnonzero(~there).tolist()]
        again = bool(left) and not start and not there.any() and name not in self.repeated
        if again:
            left.insert(1, (AGAIN, left[0][1]))
            self.repeated.add(name)
        compared: dict[int, Any] = {}
        fresh: dict[int, Any] = {}
        broken: list[int] = []
        last = time.monotonic()
        bar = tqdm(
            total=count * each, initial=int(there.sum()), disable=not self.progress, desc=f"simulate {name}"
        )
        keep = partial(self._keep, name, each, first, call.event_shape, missing, parts)
        stream = self._stream(call.fn, call.event_shape, left)
        try:
            for result in stream:
                if result is not None:
                    i, value, error = result
                    if again and i in (AGAIN, left[0][0]):
                        compared[i] = value
                        if len(compared) == 2:
                            self._compare(call, *compared.values())
                    if error == INTERRUPTED:
                        broken.append(i)
                    elif i != AGAIN:
                        fresh[i] = value, error
                        bar.update()
                if fresh and time.monotonic() - last > FLUSH:
                    fresh = keep(fresh)
                    last = time.monotonic()
            for i in broken:  # nobody interrupted but the simulator itself
                fresh[i] = None, "KeyboardInterrupt"
        except KeyboardInterrupt:
            self.interrupted = True
        finally:
            stream.close()
            bar.close()
        keep(fresh)
        results = np.full((count * each, *call.event_shape), np.nan)
        here = np.flatnonzero(parts.done(name, first, count * each))
        if len(here):
            results[here] = parts.values(name, first + here)
        return results.reshape(count, *call.batch, *call.event_shape)

    def _keep(self, name, each, first, shape, missing, parts, fresh):
        if fresh:
            units = np.array(sorted(fresh))
            values = np.full((len(units), *shape), np.nan)
            errors = {}
            for at, i in enumerate(units.tolist()):
                value, error = fresh[i]
                if error is None:
                    values[at] = value
                    fine = np.isfinite(value) | (np.isnan(value) & missing)
                    error = None if fine.all() else f"{name} is not finite"
                else:
                    error = f"{name}: {error}"
                if error is not None:
                    errors[first + i] = error
            parts.add(name, each, first + units, values, errors)
        return {}

    def _compare(self, call, once, twice):
        """Say what two calls with the same key and parameters tell."""
        if once is None or twice is None:
            return
        who = f"the simulator {name_of(call.fn)}"
        if not np.array_equal(once, twice, equal_nan=True):
            warnings.warn(
                f"{who} gives different results for the same key and parameters: its random numbers do not "
                "come from its key, so its simulations cannot be repeated, and a store cannot be resumed as "
                "if it had not been interrupted. Draw them from numpy.random.default_rng(key)",
                stacklevel=2,
            )
        elif call.host is None and not first_argument_is_read(call.fn):
            walk = Walk(strict=False)
            walk.digest(call.fn, name_of(call.fn))
            if draws := sorted(name for name, value in walk.reached.items() if is_random(name, value)):
                raise ValueError(
                    f"{who} does not use its key: its random numbers come from {draws[-1]}, and all rows "
                    "would have the same. Draw them from numpy.random.default_rng(key), or say "
                    "Simulator(..., host=True) if this is meant"
                )

    def _stream(self, fn, shape, calls) -> Generator[Any, None, None]:
        """``(index, value, error)`` of each call as it finishes; None now and then."""
        if self.executor is not None:
            left = dict(calls)
            try:
                for result in executors.stream(self.executor, fn, shape, self.timeout, calls):
                    if result is not None:
                        del left[result[0]]
                    yield result
            except BrokenExecutor as error:
                warnings.warn(
                    f"the executor is broken ({error or 'its process died'}): the calls that are left run in "
                    "processes of this library, where one that dies costs its call alone",
                    stacklevel=2,
                )
                yield from self._in_processes(fn, shape, deque(left.items()), here=False)
            return
        waiting = deque(calls)
        if self.timeout is None and _is_safe(fn):
            yield from self._here(fn, shape, waiting, quick=True)
        if waiting:
            yield from self._in_processes(fn, shape, waiting)

    def _here(self, fn, shape, waiting, quick):
        """In this process; while they are ``quick``, or all."""
        times: deque[float] = deque(maxlen=9)
        while waiting:
            usual = float(np.median(times)) if times else 0.0
            decided = len(times) >= 3 or usual > 100 * QUICK
            if quick and decided and usual > QUICK and usual * len(waiting) > 1:
                return
            i, row = waiting.popleft()
            value, error, seconds = attempt(fn, shape, self.timeout, row)
            if error == INTERRUPTED:
                raise KeyboardInterrupt
            times.append(seconds)
            yield i, value, error

    def _in_processes(self, fn, shape, waiting, here=True):
        left = dict(waiting)
        try:
            if not sys.executable:
                raise CannotTravel("this Python does not know its own program")
            for result in self.workers.stream(self._payload(fn), shape, list(waiting)):
                if result is not None:
                    del left[result[0]]
                yield result
        except CannotTravel as error:
            if not here:
                raise RuntimeError(
                    f"the executor broke, and the simulator {name_of(fn)} cannot be sent to other processes: "
                    f"{error}"
                ) from error
            warnings.warn(
                f"the simulator {name_of(fn)} cannot be sent to other processes ({error}): its calls run in "
                "this one, one after another",
                stacklevel=2,
            )
            yield from self._here(fn, shape, deque(left.items()), quick=False)

    def _payload(self, fn):
        if id(fn) not in self.payloads:
            self.payloads[id(fn)] = fn, packed(fn)  # the function stays alive, its id stays its own
        return self.payloads[id(fn)][1]


def _is_safe(fn) -> bool:
    """Whether nothing that a function's code reaches may end the process."""
    walk = Walk(strict=False)
    walk.digest(fn, name_of(fn))
    roots = {name.partition(".")[0] for name in walk.reached if not name.startswith("the ")}
    return not walk.names & UNSAFE and all(r in SAFE or r in sys.stdlib_module_names for r in roots)
