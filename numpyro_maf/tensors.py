# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Arrays by name in one safetensors file, with a header in JSON and a SHA-256 digest of both."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save as as_bytes

__all__ = ["opened", "read_tensors", "write_tensors"]

_HEADER, _DIGEST = "numpyro_maf", "sha256"


def write_tensors(path: str | os.PathLike[str], header: dict[str, Any], arrays: dict[str, Any]) -> None:
    """Write a file, which is replaced at once when it is complete.

    :param header: JSON-able; ``arrays``: by name.
    :raises OSError: when the file cannot be written; an older one stays as it was.
    """
    text = json.dumps(header, sort_keys=True)
    data = as_bytes(arrays, metadata={_HEADER: text, _DIGEST: _digest(text, arrays)})
    path = Path(path)
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[tuple[Any, str, str | None]]:
    """The open file, its header as text, and its digest or None.

    :raises ValueError: for a file that is damaged or of another kind.
    """
    try:
        file = safe_open(path, "numpy")
    except Exception as error:
        raise ValueError(f"is damaged or not a safetensors file: {error}") from error
    with file:
        metadata = file.metadata() or {}
        if _HEADER not in metadata:
            raise ValueError("was not written by numpyro_maf.save")
        yield file, metadata[_HEADER], metadata.get(_DIGEST)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, np.ndarray], bool]:
    """Header and arrays of a file, and whether it has a digest.

    :raises ValueError: for a file that is damaged or of another kind.
    """
    with opened(path) as (file, text, digest):
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if digest is not None and digest != _digest(text, arrays):
        raise ValueError("is damaged: its SHA-256 digest does not fit its contents")
    return json.loads(text), arrays, digest is not None


def _digest(header: str, arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 of the header and of all names, types, shapes and numbers."""
    found = hashlib.sha256(header.encode())
    for name, array in sorted(arrays.items()):
        found.update(f"{name} {array.dtype.str} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).data if array.size else b"")
    return found.hexdigest()
