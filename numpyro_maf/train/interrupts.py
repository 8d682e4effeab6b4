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
from typing import Any

__all__ = ["Interrupted", "Interrupts"]


class Interrupted(KeyboardInterrupt):
    """Raised by :meth:`Interrupts.check` after an interrupt (final)."""


class Interrupts:
    """A context in which the first interrupt sets a flag and the second raises KeyboardInterrupt (final).

    Outside of the main thread, and where a program handles the signal itself, it changes nothing.

    :param terminate: whether SIGTERM sets the flag too. The process then ends when the context is left.
    """

    def __init__(self, terminate: bool = False):
        self.count, self.terminated = 0, False
        self._defaults: dict[int, Any] = {signal.SIGINT: signal.default_int_handler}
        if terminate:
            self._defaults[signal.SIGTERM] = signal.SIG_DFL

    def __enter__(self) -> Interrupts:
        main = threading.current_thread() is threading.main_thread()
        chosen = {n: h for n, h in self._defaults.items() if main and signal.getsignal(n) is h}
        self._defaults = chosen
        for number in chosen:
            signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        self.count += 1
        self.terminated |= number == signal.SIGTERM
        if self.count > 1:
            raise KeyboardInterrupt

    def __exit__(self, kind, error, trace):
        for number, handler in self._defaults.items():
            signal.signal(number, handler)
        if self.terminated:
            signal.raise_signal(signal.SIGTERM)
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
