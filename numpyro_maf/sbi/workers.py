# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Processes that run simulators: one that dies or hangs costs its call alone and is replaced.

They are started by a command, neither forked nor through the user's script, so a script needs no
``if __name__ == "__main__":``. Results come back call by call: so it is known which call killed a process.
"""

from __future__ import annotations

import inspect
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

from numpyro_maf.sbi import worker

__all__ = ["CannotTravel", "Workers", "packed"]

GROUP_SECONDS = 0.05  # how long a worker goes on without asking for more
TICK = 0.1


class CannotTravel(Exception):
    """A function that another process cannot be given."""


def packed(fn: Any) -> bytes:
    """A function as bytes; those of scripts and notebooks, and closures, need cloudpickle.

    :raises CannotTravel: when it cannot be pickled.
    """
    try:
        if find_spec("cloudpickle"):
            import cloudpickle

            return cloudpickle.dumps(fn)
        if getattr(fn, "__module__", None) == "__main__":
            raise CannotTravel("functions of a script or a notebook need the package cloudpickle")
        return pickle.dumps(fn)
    except CannotTravel:
        raise
    except Exception as error:
        raise CannotTravel(f"{type(error).__name__}: {error}") from error


class Workers:
    """Processes for the calls of simulators, each started when it is first needed.

    :param count: how many.
    :param timeout: seconds that one call may take; None for any time.
    """

    def __init__(self, count: int, timeout: float | None = None):
        self.count, self.timeout = count, timeout
        self.idle: list[_Process] = []

    def stream(self, payload: bytes, shape: tuple[int, ...], calls: list[Any]) -> Iterator[Any]:
        """``(index, value, error)`` of each ``(index, row)``, as they finish; None now and then.

        :raises CannotTravel: when a worker cannot load the function.
        """
        waiting, found, busy = deque(calls), queue.SimpleQueue[Any](), list[_Process]()
        threads = [
            threading.Thread(target=self._serve, args=(payload, shape, waiting, found, busy), daemon=True)
            for _ in range(min(self.count, len(waiting)))
        ]
        left = len(waiting)
        for thread in threads:
            thread.start()
        try:
            while left:
                try:
                    result = found.get(timeout=TICK)
                except queue.Empty:
                    result = None
                for process in list(busy):
                    process.check(self.timeout)
                if isinstance(result, Exception):
                    raise result
                left -= result is not None
                yield result
        finally:
            waiting.clear()
            if left:
                for process in list(busy):
                    process.kill()
            for thread in threads:
                thread.join()

    def _serve(self, payload, shape, waiting, found, busy):
        """What one thread does: it feeds a process, and replaces it when it died."""
        process, mean = None, None
        while group := _take(waiting, 1 if mean is None else int(GROUP_SECONDS / max(mean, 1e-6))):
            done = 0
            try:
                if process is None:
                    process = self.idle.pop() if self.idle else _Process()
                    busy.append(process)
                process.load(payload)
                for value, error, seconds in process.calls(shape, [row for _, row in group]):
                    found.put((group[done][0], value, error))
                    mean = seconds if mean is None else 0.9 * mean + 0.1 * seconds
                    done += 1
            except (EOFError, OSError, pickle.UnpicklingError):
                why = process.end() if process is not None else "no process could be started"
                if process is None or process.payload is None:
                    found.put(CannotTravel(f"the process for it failed: {why}"))
                    break
                if process.late in (None, process.since):  # else it was killed for the call before this one
                    found.put((group[done][0], None, why))
                    done += 1
                waiting.extendleft(reversed(group[done:]))
                busy.remove(process)
                process = None
            except CannotTravel as error:
                found.put(error)
                break
        if process is not None:
            busy.remove(process)
            if process.alive:
                self.idle.append(process)

    def close(self) -> None:
        """End the processes."""
        while self.idle:
            self.idle.pop().end()


def _take(waiting, count):
    group: list[Any] = []
    while len(group) < min(max(count, 1), 64):
        try:
            group.append(waiting.popleft())
        except IndexError:
            break
    return group


class _Process:
    """One worker: calls go in, results come out."""

    def __init__(self):
        program = f"{inspect.getsource(worker)}\nserve()\n"
        environment = {"JAX_PLATFORMS": "cpu", **os.environ}  # a simulator that imports JAX takes no GPU
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # interrupts from the keyboard are for the parent
        )
        self.calls_in: Any = self.process.stdin
        self.results: Any = self.process.stdout
        self.payload, self.since, self.late = None, None, None
        self._send(list(sys.path))

    @property
    def alive(self):
        return self.process.poll() is None

    def _send(self, message):
        pickle.dump(message, self.calls_in, 5)
        self.calls_in.flush()

    def load(self, payload):
        if payload is self.payload:
            return
        self.payload = None
        self._send((None, payload))
        wrong = pickle.load(self.results)
        if wrong is not None:
            raise CannotTravel(wrong)
        self.payload = payload

    def calls(self, shape, rows):
        self._send((shape, pickle.dumps(rows, 5)))
        for _ in rows:
            self.since = time.monotonic()
            result = pickle.load(self.results)
            self.since = None
            yield result

    def check(self, timeout):
        """Kill a process whose call takes too long."""
        since = self.since
        if timeout is not None and since is not None and time.monotonic() - since > timeout:
            self.late = since
            self.kill()

    def kill(self):
        with suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)  # programs that the simulator started, too
            else:
                self.process.kill()

    def end(self) -> str:
        """End it, if it has not, and say how it ended."""
        for pipe in (self.calls_in, self.results):
            with suppress(OSError):
                pipe.close()
        try:
            status = self.process.wait(1)
        except subprocess.TimeoutExpired:
            self.kill()
            status = self.process.wait()
        if self.late is not None:
            return "timeout"
        if status >= 0:
            return f"the process that ran it ended with status {status}"
        return f"the process that ran it was killed by {signal.Signals(-status).name}"
