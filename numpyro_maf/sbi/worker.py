# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""One call of a simulator on the host, and the program of a process that does nothing else.

The text of this module is that program, so it imports nothing but Python's own modules and NumPy.
"""

from __future__ import annotations

import os
import pickle
import queue
import sys
import threading
import time
from typing import Any

__all__ = ["INTERRUPTED", "attempt", "attempts", "host_call", "serve"]

INTERRUPTED = "interrupted"


def host_call(fn: Any, key: Any, *params: Any) -> Any:
    """A simulator on the host: NumPy arrays in, an array of ``float64`` out.

    :raises TypeError: when the simulator gives anything but real numbers.
    """
    import numpy as np

    value = fn(np.asarray(key), *map(np.asarray, params))
    if isinstance(value, np.ma.MaskedArray):
        value = np.ma.filled(value.astype(float), np.nan)
    value = np.asarray(value)
    if value.dtype.kind not in "biuf" and not str(value.dtype).startswith(("bfloat", "float")):
        raise TypeError(f"the simulator must give real numbers, got {value.dtype}")
    return value.astype(float)


def attempt(
    fn: Any, shape: tuple[int, ...], timeout: float | None, row: Any
) -> tuple[Any, str | None, float]:
    """The result of one call or what went wrong, and its seconds.

    Whatever the simulator raises, ``SystemExit`` too, is what went wrong. After ``timeout`` seconds the call
    is left to itself.
    """
    found: list[tuple[Any, str | None]] = []
    start = time.perf_counter()

    def call():
        try:
            value = host_call(fn, *row)
            wrong = None if value.shape == shape else f"shape {value.shape}, not {shape}"
            found.append((None if wrong else value, wrong))
        except KeyboardInterrupt:
            found.append((None, INTERRUPTED))
        except BaseException as error:
            found.append((None, f"{type(error).__name__}: {error}"))

    if timeout is None:
        call()
    else:
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(timeout)
    return (*(found[0] if found else (None, "timeout")), time.perf_counter() - start)


def attempts(fn: Any, shape: tuple[int, ...], timeout: float | None, rows: Any, number: int = 0) -> list[Any]:
    """Several calls, one after another, as an executor runs them; ``number`` tells this task from others."""
    return [attempt(fn, shape, timeout, row) for row in rows]


def serve() -> None:
    """The program of a worker: functions and calls come in on a pipe, results go out on another.

    It ends when the pipe does, so it does not outlive the process that started it.
    """
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what a simulator prints must not get between the results
    try:  # where memory ends, a worker goes first
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        pass
    sys.path[:] = pickle.load(source)
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def receive():
        try:
            while True:
                messages.put(pickle.load(source))
        except BaseException:
            os._exit(0)

    def send(message):
        pickle.dump(message, sink, 5)
        sink.flush()

    threading.Thread(target=receive, daemon=True).start()
    fn = None
    while True:
        shape, content = messages.get()
        if shape is None:  # a function
            try:
                fn = pickle.loads(content)
                send(None)
            except BaseException as error:
                send(f"{type(error).__name__}: {error}")
        else:
            for row in pickle.loads(content):
                send(attempt(fn, shape, None, row))
