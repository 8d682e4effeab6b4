# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Interrupts of a long computation: Ctrl-C is noted at once and obeyed between two parts of the work.

An exception raised inside JAX or NumPy may come out as another one, or leave work half done. So the signal
only sets a flag while the computation runs.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

__all__ = ["Interrupted", "Interrupts"]


class Interrupted(KeyboardInterrupt):
    """Raised by :meth:`Interrupts.check` after an interrupt (final)."""


class Interrupts:
    """A context in which the first interrupt sets a flag and the second raises KeyboardInterrupt (final).

    Outside of the main thread, and where a program handles the signal itself, it changes nothing.
    """

    def __init__(self):
        self.count, self._installed = 0, False

    def __enter__(self) -> Interrupts:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)
            self._installed = True
        return self

    def _note(self, number, frame):
        self.count += 1
        if self.count > 1:
            raise KeyboardInterrupt

    def __exit__(self, kind, error, trace):
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.count > 1 and not isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt from error

    def check(self) -> None:
        """Raise :class:`Interrupted` if there was an interrupt."""
        if self.count:
            raise Interrupted

    def parts(self, steps: int, pace: Pace) -> Iterator[tuple[int, int]]:
        """Cut the numbers of steps into parts ``(start, stop)`` of about half a second; check before each."""
        start = 0
        while start < steps:
            self.check()
            stop, began = min(start + pace.steps, steps), time.perf_counter()
            yield start, stop
            pace.measured(stop - start, time.perf_counter() - began)
            start = stop


class Pace:
    """How many steps a part of the work has: learned from how long the parts took (final)."""

    def __init__(self, steps: int = 16):
        self.steps = steps

    def measured(self, steps: int, seconds: float) -> None:
        """Adapt to the time that a part took."""
        if seconds > 1:
            self.steps = max(steps // 2, 1)
        elif seconds < 0.25 and steps == self.steps:
            self.steps *= 2
