# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""A folder that keeps where a training stands, so that the same call resumes, whatever ended it."""

from __future__ import annotations

import hashlib
import os
import time
import types
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_maf.fingerprints import Walk
from numpyro_maf.locks import Lock
from numpyro_maf.tensors import read_tensors, write_tensors
from numpyro_maf.train.state import TrainState

__all__ = ["Checkpoint", "about", "fingerprint"]

_FILE, _KIND = "training.safetensors", "training"
_WHOLE = 2**28  # bytes: of larger arrays evenly spaced rows are read
_ROWS = 4096
_HISTORY = ("train_loss", "validation_loss")


class Checkpoint:
    """The state of a training on disk: a context, at whose end the last state is written (final).

    States are written at most once a second, and so seldom that it takes a twentieth of the time. The file is
    replaced at once, so that a killed process leaves the one before.

    :param folder: is made if it is not there. One process writes to it at a time.
    :param about: fingerprints by name of all that the training depends on.
    :raises RuntimeError: when another call is writing to the folder.
    """

    def __init__(self, folder: str | os.PathLike[str], about: dict[str, Any]):
        self.path, self.about = Path(folder) / _FILE, about
        self._latest: TrainState | None = None
        self._next = time.monotonic() + 1

    def __enter__(self) -> Checkpoint:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(self.path.parent / "lock")
        return self

    def __exit__(self, kind, error, trace):
        try:
            self._write()
        finally:
            self._lock.release()

    def resumed(self, start: TrainState) -> TrainState:
        """The state in the folder, or ``start`` where there is none.

        :raises ValueError: for a file that is damaged, or of another training, with what differs.
        """
        if not self.path.exists():
            return start
        try:
            header, arrays, sealed = read_tensors(self.path)
            known = header["about"] if header["kind"] == _KIND and sealed else None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path}: {error}; delete it to start anew") from error
        different = [name for name, value in self.about.items() if not known or known.get(name) != value]
        if not different and _kinds(arrays) != _kinds(_arrays(start)):
            different = ["network or optimizer"]
        if different:
            raise ValueError(
                f"{self.path.parent} holds a training with another {', '.join(different)}: give another "
                "folder, or delete this one"
            )
        leaves, structure = jax.tree_util.tree_flatten_with_path(start)
        kept: list[Any] = [arrays[_name(path)] for path, _ in leaves]
        kept = [jnp.asarray(a) if isinstance(leaf, jax.Array) else a for (_, leaf), a in zip(leaves, kept)]
        return jax.tree.unflatten(structure, kept).restored()

    def keep(self, state: TrainState) -> None:
        """Note a state, and write it if it is time."""
        self._latest = state
        if time.monotonic() > self._next:
            began = time.monotonic()
            self._write()
            now = time.monotonic()
            self._next = now + max(1, 20 * (now - began))

    def _write(self) -> None:
        if self._latest is not None:
            write_tensors(self.path, {"kind": _KIND, "about": self.about}, _arrays(self._latest))
            self._latest = None


def _name(path) -> str:
    return jax.tree_util.keystr(path).removeprefix(".")


def _arrays(state: TrainState) -> dict[str, np.ndarray]:
    """All numbers of a state by path, in the types in which files hold them."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {_name(path): np.array(leaf, order="C") for path, leaf in leaves}


def _kinds(arrays) -> dict[str, Any]:
    """Shapes and types by name. The histories may have any length."""
    return {name: (None if name in _HISTORY else a.shape, a.dtype) for name, a in arrays.items()}


def about(loss: Any, optimizer: Any, options: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    """Fingerprints by name of all that a training depends on.

    :param loss: a function, an object with a ``fingerprint``, or a dataclass, whose numbers and texts count.
    :param optimizer: the user's own, or None; ``options``: JSON-able; ``parts``: pytrees.
    """
    found = options | {name: fingerprint(part) for name, part in parts.items()}
    if optimizer is not None:
        found["optimizer"] = Walk(strict=False).digest([optimizer.init, optimizer.update], "optimizer")
    if isinstance(loss, types.FunctionType):
        return found | {"loss": Walk(strict=False).digest(loss, "the loss")}
    values = {f.name: getattr(loss, f.name) for f in fields(loss)} if is_dataclass(loss) else {}
    plain = {name: value for name, value in values.items() if isinstance(value, (bool, int, float, str))}
    return found | {"loss": getattr(loss, "fingerprint", f"{type(loss).__qualname__} {plain}")}


def fingerprint(tree: Any) -> str:
    """SHA-256 of a pytree's structure and arrays; of an array above 256 MB of 4096 of its rows."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    found = hashlib.sha256(str([jax.tree_util.keystr(path) for path, _ in leaves]).encode())
    for _, leaf in leaves:
        array = leaf if isinstance(leaf, np.ndarray) else np.asarray(leaf)
        found.update(f"{array.dtype.str} {array.shape}".encode())
        if array.nbytes > _WHOLE:
            array = array[np.linspace(0, len(array) - 1, _ROWS).astype(int)]
        found.update(np.ascontiguousarray(array).data if array.size else b"")
    return found.hexdigest()
