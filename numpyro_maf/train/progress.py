# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""What a training shows while it runs: a line that never promises an end, and records for ``logging``."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

from tqdm.auto import tqdm

from numpyro_maf.train.state import TrainState

__all__ = ["Progress"]

LOG = logging.getLogger("numpyro_maf.train")
LOG.addHandler(logging.NullHandler())
# How long training takes depends on when it stops improving, so there is no time that remains.
_LINE = "{desc} [{elapsed}]"
_EVERY = 10.0  # seconds between records of level INFO


class Progress:
    """A context that shows how a training goes, and at its end why it stopped (final).

    :param label: what is trained; ``max_epochs``, ``patience``: of the training.
    :param shown: whether to show the line. Records are made in any case: at level INFO the start, the end
        and one in ten seconds, at level DEBUG every epoch.
    """

    def __init__(self, label: str, max_epochs: int, patience: float, shown: bool):
        self.label, self.max_epochs, self.patience, self.shown = label, max_epochs, patience, shown
        self.state: TrainState | None = None
        self.why = ""

    def __enter__(self) -> Progress:
        self._began = self._logged = time.monotonic()
        self._bar = tqdm(bar_format=_LINE, desc=f"{self.label}: compiling", disable=not self.shown)
        self._bar.refresh()
        LOG.info("%s: compiling; at most %d epochs", self.label, self.max_epochs)
        return self

    def started(self, state: TrainState) -> None:
        """Note where training begins: after some epochs, if it resumes."""
        if state.epochs:
            self.state = state
            LOG.info("%s: resumes after epoch %d", self.label, state.epochs)

    def epoch(self, state: TrainState) -> None:
        """Show the state after an epoch."""
        self.state = state
        now = time.monotonic()
        due = now - self._logged > _EVERY
        if due or LOG.isEnabledFor(logging.DEBUG):
            LOG.log(logging.INFO if due else logging.DEBUG, "%s", self._line(state))
            self._logged = now if due else self._logged
        self._bar.set_description_str(self._line(state), refresh=False)
        self._bar.update()

    def _line(self, state: TrainState) -> str:
        loss = (state.validation_loss if len(state.validation_loss) else state.train_loss)[-1]
        waited = f", {state.idle} of {self.patience:g} without gain" if state.idle else ""
        return f"{self.label}: epoch {state.epochs}, loss {loss:.4f}, best {state.best_loss:.4f}{waited}"

    def reason(self, error: Any = None) -> str:
        """Why training ended, in words."""
        state = self.state
        if self.why or error is not None:
            return self.why or ("interrupted" if error is KeyboardInterrupt else f"ended by {error.__name__}")
        if state is None or state.idle >= self.patience:
            return f"no gain for {self.patience:g} epochs"
        improving = 4 * state.idle < state.epochs
        return f"reached max_epochs{' while still improving' if improving else ''}"

    def __exit__(self, kind, error, trace):
        state, reason = self.state, self.reason(kind)
        seconds = time.monotonic() - self._began
        told = f"{self.label}: {reason}"
        if state is not None and math.isfinite(state.best_loss):
            told += f"; best loss {state.best_loss:.4f} at epoch {state.best_epoch + 1} of {state.epochs}"
        LOG.info("%s; %.1f s", told, seconds)
        self._bar.set_description_str(told)
        self._bar.close()
