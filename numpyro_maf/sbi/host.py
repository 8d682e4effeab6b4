# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Simulators that JAX cannot trace, on the processes or threads of an executor."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from numpyro_maf.sbi.simulator import host_call, host_keys

__all__ = ["INTERRUPTED", "Host"]

INTERRUPTED = "interrupted"


class Host:
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
        errors = dict.fromkeys(range(count * each), INTERRUPTED)
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
