# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Numbers out of a pickled pandas DataFrame, without pandas and without running the file.

A pickle is a program that names functions to call. Here every name on a short list becomes an inert
:class:`_Node`, which only keeps what it was called with, and any other name ends the reading. What the
nodes mean is read off afterwards.

A frame holds its numbers in blocks, columns of one type. Up to pandas 1.2 the blocks are in the state of its
block manager, under the key ``"0.14.1"``, the version that began so; later they are arguments of the manager.
"""

import pickle
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

__all__ = ["read_frame"]

KNOWN = {  # names by package; modules within a package moved from version to version
    "pandas": {
        "DataFrame", "BlockManager", "_unpickle_block", "_new_Index", "Index", "RangeIndex", "Int64Index",
        "__pyx_unpickle_NDArrayBacked", "StringArray", "StringDtype",
    },
    "numpy": {"_reconstruct", "_frombuffer", "ndarray", "dtype"},
    "builtins": {"slice"},
    "__builtin__": {"slice"},  # as Python 2 calls it
    "_codecs": {"encode"},  # how old protocols write bytes
}  # fmt: skip


class _Node:
    """Any object of a pickle: what it was to be made of, and its state."""

    args: tuple[Any, ...]
    state: Any = None

    def __new__(cls, *args):
        node = super().__new__(cls)
        node.args = args
        return node

    def __setstate__(self, state):
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Unpickles into nodes."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in KNOWN.get(module.partition(".")[0], ()):
            raise ValueError(f"it asks for {module}.{name}, which is no part of a table of numbers")
        return type(name, (_Node,), {})


def read_frame(path: str | Path) -> tuple[list[str], NDArray[np.float64]]:
    """Column names and values ``(rows, columns)`` of a pickled pandas DataFrame of numbers.

    Reads what ``DataFrame.to_pickle`` writes uncompressed, from pandas 0.15 on Python 2 to pandas 3. Nothing
    that the file names is run or imported. Raises ValueError where it names anything else than such
    a table does, and where it is none.
    """
    with open(path, "rb") as file:
        try:
            return _table(_load(file))
        except Exception as error:  # a malformed pickle fails in any way
            raise ValueError(f"{path} is not a pickled DataFrame of numbers: {error}") from error


def _load(file: BinaryIO) -> Any:
    # Python 2 wrote bytes and text alike; latin1 keeps every byte.
    return _Unpickler(file, encoding="latin1").load()


def _table(frame: _Node) -> tuple[list[str], NDArray[np.float64]]:
    manager = frame.state["_mgr" if "_mgr" in frame.state else "_data"]
    if manager.state is None:
        parts, axes = manager.args
        blocks = [part.args[:2] for part in parts]
    else:
        state = manager.state[3]["0.14.1"]
        axes, blocks = state["axes"], [(part["values"], part["mgr_locs"]) for part in state["blocks"]]
    names = _labels(axes[0])
    arrays = [(_array(values), _places(places)) for values, places in blocks]
    table = np.empty((arrays[0][0].shape[1], len(names)))
    filled = np.zeros(len(names), int)
    for values, places in arrays:
        table[:, places] = values.T
        filled[places] += 1
    if (filled != 1).any():
        raise ValueError(f"its blocks fill columns {filled} times")
    return names, table


def _labels(index: _Node) -> list[str]:
    data = index.args[1]["data"]
    if data.args and getattr(data.args[0], "__name__", "") == "StringArray":
        data = data.state[1]  # after its type
    return [str(label) for label in _array(data)]


def _places(node: _Node) -> Any:
    return slice(*node.args) if type(node).__name__ == "slice" else _array(node)


def _array(node: _Node) -> Any:
    """The array of a node, or the list of its objects."""
    if type(node).__name__ == "_frombuffer":
        buffer, dtype, shape, order = node.args
    else:
        _, shape, dtype, fortran, buffer = node.state
        order = "F" if fortran else "C"
    kind, byte_order = dtype.args[0], dtype.state[1]
    if kind[0] == "O":
        return buffer
    if kind[0] not in "fiub":
        raise ValueError(f"it holds values of type {kind}")
    if isinstance(buffer, _Node):
        buffer = buffer.args[0]
    if isinstance(buffer, str):
        buffer = buffer.encode("latin1")
    return np.frombuffer(buffer, byte_order + kind).reshape(shape, order=order)
