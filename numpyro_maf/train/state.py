# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Where training stands, and what it gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from jax.tree_util import register_dataclass

from numpyro_maf.pytrees import Described

__all__ = ["NotFiniteError", "TrainState", "Trained", "carrying"]


def _none() -> np.ndarray:
    return np.zeros(0)


@register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class TrainState(Described):
    """Where training stands after an epoch: all that :func:`train` needs to go on as if it had never stopped.

    Every field is an array, a number or a pytree of arrays, so that the state can be saved by any means that
    keep the numbers as they are.

    :param params: the parameters after the last step; ``mean``: their average over steps; ``best``: the
        average that validated best.
    :param optimizer: the state of the optimiser.
    :param key: ``uint32`` data of the key from which all orders and all random numbers are derived.
    :param rate: the present learning rate, which annealing lowers.
    :param steps: how many steps were taken.
    :param train_loss: by epoch, with ``validation_loss``, which is empty without validation rows.
    :param best_epoch: the epoch of ``best``, from 0, or -1; ``best_loss``: its loss.
    :param mark: the last loss that was an improvement by more than the tolerance; ``marked``: its epoch.
    :param turned: the last epoch at which the learning rate was lowered.
    :param start: the number of the start that it came from, where several were tried.
    """

    params: Any
    mean: Any
    best: Any
    optimizer: Any
    key: np.ndarray
    rate: float = 1.0
    steps: int = 0
    train_loss: np.ndarray = field(default_factory=_none)
    validation_loss: np.ndarray = field(default_factory=_none)
    best_epoch: int = -1
    best_loss: float = math.inf
    mark: float = math.inf
    marked: int = -1
    turned: int = -1
    start: int = 0

    @property
    def epochs(self) -> int:
        """How many epochs are finished."""
        return len(self.train_loss)

    @property
    def idle(self) -> int:
        """How many epochs have passed since the last improvement."""
        return self.epochs - 1 - self.marked

    def restored(self) -> TrainState:
        """With numbers of Python, whatever a file made of them."""
        kinds: dict[str, Any] = {f.name: type(f.default) for f in fields(self)}
        numbers = {n: kind(getattr(self, n)) for n, kind in kinds.items() if kind in (int, float)}
        return replace(self, **numbers)

    def _describe(self):
        return [
            f"TrainState after {self.epochs} epochs, {self.steps} steps",
            f"  best loss {self.best_loss:.4g} at epoch {self.best_epoch}, {self.idle} epochs without gain",
        ]


class NotFiniteError(FloatingPointError):
    """A loss that is not finite (final).

    :ivar result: what the call would have returned with the best of the epochs before; None without any.
    """

    result: Any = None


@contextmanager
def carrying(made_of: Callable[[Any], Any]) -> Iterator[None]:
    """Within, a :class:`NotFiniteError` gets the result that is made of the one it carries."""
    try:
        yield
    except NotFiniteError as error:
        error.result = None if error.result is None else made_of(error.result)
        raise


@dataclass(frozen=True, eq=False, repr=False)
class Trained(Described):
    """What :func:`train` returns.

    :param state: the state after the last finished epoch.
    :param stopped: ``"interrupted"``, ``"callback"``, ``"not finite"``, or empty where training ended by
        itself.
    :param improving: whether the limit of epochs ended it, and its last quarter brought an improvement.
    :param error: of a loss that was not finite; else None.
    """

    state: TrainState
    stopped: str = ""
    improving: bool = False
    error: NotFiniteError | None = None

    def carried(self, result: Any) -> Any:
        """The result that was made of this, given back, or raised by the training's error."""
        if self.error is None:
            return result
        self.error.result = result
        raise self.error

    @property
    def params(self) -> Any:
        """The parameters that validated best."""
        return self.state.best

    @property
    def train_loss(self) -> np.ndarray:
        """Weighted mean of the loss over the training rows, by epoch."""
        return self.state.train_loss

    @property
    def validation_loss(self) -> np.ndarray:
        """The same of the validation rows; empty without any."""
        return self.state.validation_loss

    @property
    def best_epoch(self) -> int:
        """The epoch, from 0, whose parameters were kept."""
        return self.state.best_epoch

    def _describe(self):
        return ["Trained", *summary(self)]


def summary(result) -> list[str]:
    """Lines about losses, best epoch and ending of anything that has these."""
    losses = result.validation_loss if len(result.validation_loss) else result.train_loss
    kind = "validation" if len(result.validation_loss) else "training"
    epochs, best = len(result.train_loss), result.best_epoch
    lines = [f"  {epochs} epochs; best epoch {best} with {kind} loss {losses[best]:.4g}"]
    if kind == "validation":
        lines.append(f"  training loss there {result.train_loss[best]:.4g}")
    if result.stopped:
        lines.append(f"  stopped early: {result.stopped}")
    elif result.improving:
        lines.append("  reached max_epochs while still improving: more epochs may help")
    return lines
