# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Calls of a simulator on any executor of ``concurrent.futures``, Dask or MPI, whose workers may die.

Executors take tasks of several calls. The calls of a task that failed as a whole, as with its worker, are
tried again one at a time, so what killed the worker is found. A task of which nothing is heard for long is
asked for again, because clusters lose results with their workers; the first answer counts, and all are the
same. A cluster that still does not answer has lost its workers.
"""

from __future__ import annotations

import itertools
import queue
import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

from numpyro_maf.sbi.worker import attempts

__all__ = ["stream"]

WINDOW = 256  # tasks that an executor has at a time
TASK_SECONDS = 0.2
PATIENCE = 10  # seconds, and as many times the longest call


def stream(
    executor: Executor, fn: Any, shape: tuple[int, ...], timeout: float | None, calls: list[Any]
) -> Generator[Any, None, None]:
    """``(index, value, error)`` of each ``(index, row)``, as they finish; None now and then.

    :raises BrokenExecutor: when the executor broke.
    :raises RuntimeError: when it can run nothing.
    """
    left, waiting = dict(calls), deque(i for i, _ in calls)
    alone: deque[int] = deque()
    tried: set[int] = set()
    arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
    groups: dict[Any, list[int]] = {}
    flying: set[Any] = set()
    mean, longest, fine, failed = TASK_SECONDS, 0.0, False, 0
    loses = not isinstance(executor, (ThreadPoolExecutor, ProcessPoolExecutor))
    last, patience = time.monotonic(), PATIENCE

    number = itertools.count()  # Dask takes a task with the same arguments for the same task

    def submit(group):
        future = executor.submit(attempts, fn, shape, timeout, [left[i] for i in group], next(number))
        groups[future] = group
        flying.add(future)
        future.add_done_callback(arrived.put)

    try:
        while left:
            while waiting and len(flying) < WINDOW:
                count = min(max(int(TASK_SECONDS / max(mean, 1e-6)), 1), 64, len(waiting))
                submit([waiting.popleft() for _ in range(count)])
            if alone and not flying:
                submit([alone.popleft()])
            try:
                future = arrived.get(timeout=0.1)
            except queue.Empty:
                if loses and fine and time.monotonic() - last > patience * (1 + longest):
                    if patience > 2 * PATIENCE:
                        raise BrokenExecutor("it no longer answers") from None
                    lost = [[i for i in groups[future] if i in left] for future in flying]
                    flying.clear()
                    for group in filter(None, lost):
                        submit(group)
                    last, patience = time.monotonic(), 2 * patience
                yield None
                continue
            last, patience, asked = time.monotonic(), PATIENCE, groups.pop(future)
            group = [i for i in asked if i in left]
            flying.discard(future)
            try:
                results = future.result()
            except BrokenExecutor:
                raise
            except Exception as error:
                what, failed = f"{type(error).__name__}: {error}", failed + 1
                if failed > 3 and not fine:
                    raise RuntimeError(f"the executor cannot run the simulator: {what}") from error
                if len(group) == 1 and group[0] in tried:
                    del left[group[0]]
                    yield group[0], None, what
                else:
                    alone.extend(i for i in group if i not in alone)
                    tried.update(group)
                continue
            fine = True
            for i, (value, wrong, seconds) in zip(asked, results):
                mean, longest = 0.9 * mean + 0.1 * seconds, max(longest, seconds)
                if left.pop(i, None) is not None:
                    yield i, value, wrong
    finally:
        for future in groups:
            future.cancel()
