# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Results of simulations in a folder, from which a campaign resumes.

``0.npy``, ``1.npy``, ... are the sites' arrays, in the order of ``about.json``. Units are written in place,
and then a line of ``journal`` says which and gives their checksum. What no line vouches for is not there: a
file cut short, a flipped bit or a process killed while writing cost those units and nothing else. Nothing of
a folder is executed, and its text names no files.
"""

from __future__ import annotations

import io
import json
import math
import os
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from numpyro_maf.locks import Lock
from numpyro_maf.sbi import about
from numpyro_maf.sbi.memory import Memory

__all__ = ["Folder", "saved"]

LINE_BYTES = 2**18  # of values that one checksum covers


class Folder(Memory):
    """Results in a folder."""

    def __init__(self, folder: Path, known: dict[str, Any], lock: Lock | None = None):
        super().__init__(known["count"])
        self.folder, self.block, self.lock = folder, known["block"], lock
        self.shaped({name: tuple(shape) for name, shape in known["sites"].items()})
        self.files: dict[str, Any] = {}
        self.journal: Any = None
        self.damaged: list[str] = []

    @classmethod
    def at(cls, store: str | os.PathLike[str]) -> Folder:
        """A folder's results, to be read.

        :raises ValueError: when there are none, or when some are damaged, with their rows.
        """
        found = cls(Path(store), about.read(Path(store)))
        found._read()
        if found.damaged:
            raise ValueError(
                f"{store} is damaged: {'; '.join(found.damaged[:5])}. Repeat the call of simulate that made "
                "it: it simulates those rows again"
            )
        return found

    @classmethod
    def of(cls, store, call: dict[str, Any], block: Callable[[], int]) -> Folder:
        """A folder to be written by this process alone, with the results of the same call, if any.

        :param call: what tells it from others, as JSON; its ``globals`` may change, with a warning.
        :param block: how many rows are simulated at once; asked for once in the life of a folder.
        :raises ValueError: for a folder of another call, or of something else.
        :raises RuntimeError: when another call is writing to it.
        """
        folder = Path(store)
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder / "lock")
        try:
            if not (folder / "about.json").exists():
                if others := sorted(
                    p.name for p in folder.iterdir() if p.name not in ("lock", "about.part", "journal.part")
                ):
                    raise ValueError(
                        f"{folder} holds no simulations but {', '.join(others[:3])}: give another folder"
                    )
                about.write(folder, {**call, "block": block()})
            known = about.read(folder)
            about.compare(folder, known, call)
            found = cls(folder, known, lock)
            found._open(found._read())
        except BaseException:
            lock.release()
            raise
        if found.damaged:
            warnings.warn(
                f"{folder} is damaged and simulated again in part: {'; '.join(found.damaged[:5])}",
                stacklevel=3,
            )
        return found

    def _open(self, lines):
        """Go on with a journal of the lines that hold."""
        path = self.folder / "journal"
        text = b"".join(line + b"\n" for line in lines)
        if not path.exists() or path.read_bytes() != text:
            part = self.folder / "journal.part"
            part.write_bytes(text)
            part.replace(path)
        self.journal = open(path, "r+b", buffering=0)  # noqa: SIM115
        self.journal.seek(0, os.SEEK_END)

    def _path(self, name) -> Path:
        path = self.folder / f"{self.names.index(name)}.npy"
        if path.is_symlink():
            raise ValueError(f"{path} is a link: a folder of simulations holds its files itself")
        return path

    def _header(self, name, dtype) -> bytes:
        """The first bytes of a site's file, as ``numpy.save`` writes them."""
        head = io.BytesIO()
        shape = (self.count, *self.shapes[name])
        np.lib.format.write_array_header_1_0(
            head, {"descr": dtype.str, "fortran_order": False, "shape": shape}
        )
        return head.getvalue()

    def _array(self, name, each, like):
        """A site's file mapped to be read; written, where this process may, to its full length."""
        path, head = self._path(name), self._header(name, like.dtype)
        units = (self.count * each, *like.shape[1:])
        size = len(head) + math.prod(units) * like.dtype.itemsize
        if self.lock is not None and name not in self.files:
            file = self.files[name] = open(path, "r+b" if path.exists() else "w+b", buffering=0)  # noqa: SIM115
            if file.read(len(head)) != head:
                file.seek(0)
                _write(file, head)
            if os.fstat(file.fileno()).st_size != size:
                file.truncate(size)
        if not path.exists() or path.stat().st_size != size:
            raise ValueError(
                f"{path.name} has {path.stat().st_size if path.exists() else 0} bytes, not {size}"
            )
        with open(path, "rb") as there:
            if there.read(len(head)) != head:
                raise ValueError(f"{path.name} has another header than about.json says")
        if not math.prod(units):
            return np.zeros(units, like.dtype)
        return np.memmap(path, like.dtype, "r", len(head), units)

    def _write(self, name, site, units, values, errors):
        file, values = self.files[name], np.ascontiguousarray(values)
        start = len(self._header(name, values.dtype))
        width = values.nbytes // max(len(values), 1)
        step = max(LINE_BYTES // max(width, 1), 1)
        for i in range(0, len(units), step):
            some, part = units[i : i + step], values[i : i + step]
            at = 0
            for a, b in _ranges(some):
                file.seek(start + a * width)
                _write(file, part[at : at + b - a].tobytes())
                at += b - a
            line = {
                "site": name,
                "dtype": values.dtype.str,
                "each": site.each,
                "units": _ranges(some),
                "crc": zlib.crc32(part.tobytes()),
                "errors": {str(u): errors[u] for u in some.tolist() if u in errors},
            }
            text = json.dumps(line, separators=(",", ":")).encode()
            end = self.journal.tell()
            try:
                _write(self.journal, b"%08x %s\n" % (zlib.crc32(text), text))
            except OSError:  # half a line would spoil the next
                self.journal.truncate(end)
                self.journal.seek(end)
                raise

    def _read(self):
        """Believe what the journal vouches for and the files still hold; the lines of which that is so."""
        lines = []
        path = self.folder / "journal"
        text = path.read_bytes() if path.exists() and not path.is_symlink() else b""
        for number, line in enumerate(text.split(b"\n")[:-1], 1):
            try:
                if int(line[:8], 16) != zlib.crc32(line[9:]):
                    raise ValueError("checksum")
                entry = json.loads(line[9:])
                name, each, units = entry["site"], int(entry["each"]), _expanded(entry["units"])
                dtype, errors = np.dtype(entry["dtype"]), {int(u): str(w) for u, w in entry["errors"].items()}
                rows = math.prod(self.shapes[name]) // each, self.count * each
                if dtype.kind not in "biufc" or not len(units) or units[0] < 0 or units[-1] >= rows[1]:
                    raise ValueError("units")
            except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
                self.damaged.append(f"line {number} of journal")
                continue
            where = f"rows {units[0] // each} to {units[-1] // each} of site {name!r}"
            try:
                site = self._site(name, each, _Like(dtype, (0, *self._unit_shape(name, each))))
                if zlib.crc32(np.ascontiguousarray(site.values[units]).tobytes()) != entry["crc"]:
                    raise ValueError("their checksum differs")
            except (ValueError, OSError, OverflowError) as error:
                self.damaged.append(f"{where} ({error})")
                continue
            site.done[units] = True
            site.errors.update(errors)
            lines.append(line)
        return lines

    def _unit_shape(self, name, each):
        """The shape of a unit: of a row's shape, the axes after those that number its units."""
        shape = self.shapes[name]
        for axes in range(len(shape) + 1):
            if math.prod(shape[:axes]) == each:
                return shape[axes:]
        raise ValueError(f"{each} units do not make a row of shape {shape}")

    def close(self) -> None:
        for file in (*self.files.values(), self.journal):
            try:
                os.fsync(file.fileno())
            finally:
                file.close()
        if self.lock is not None:
            self.lock.release()


@dataclass(frozen=True)
class _Like:
    dtype: np.dtype
    shape: tuple[int, ...]


def _write(file, data: bytes) -> None:
    """All of the bytes; a full disk is an ``OSError``."""
    left = memoryview(data)
    while len(left):
        left = left[file.write(left) :]


def _ranges(units: np.ndarray) -> list[list[int]]:
    """Rising numbers as ``[first, last + 1]``."""
    units = np.asarray(units)
    cuts = np.flatnonzero(np.diff(units) != 1) + 1
    return [[int(part[0]), int(part[-1]) + 1] for part in np.split(units, cuts) if len(part)]


def _expanded(ranges) -> np.ndarray:
    if sum(b - a for a, b in ranges) > LINE_BYTES:
        raise ValueError("a line covers too many units")
    return np.concatenate([np.arange(a, b) for a, b in ranges])


def saved(store: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[int, str]]:
    """The complete rows of a folder by site, mapped, and what went wrong by row."""
    try:
        return Folder.at(store).result()
    except about.EarlierVersion:
        return about.earlier(Path(store))
