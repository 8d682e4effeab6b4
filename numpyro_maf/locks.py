# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""One writer at a time: a lock that the operating system lets go when its process ends, however it ends."""

from __future__ import annotations

import os
import socket
import threading
import warnings
from pathlib import Path

__all__ = ["Lock"]

_held: set[tuple[int, Path]] = set()  # by this process: the system's locks are the process's, not a thread's
_guard = threading.Lock()


class Lock:
    """The right to write to a folder, from construction to :meth:`release`.

    :param path: a file in the folder. It stays there and says who wrote last.
    :raises RuntimeError: when another process, or another thread of this one, holds it.
    """

    def __init__(self, path: Path):
        self.path, self.mine = path, (os.getpid(), path.resolve())
        with _guard:
            if self.mine in _held:
                raise RuntimeError(f"another call in this process is writing to {path.parent}")
            self.file = open(path, "a+")  # noqa: SIM115
            try:
                _lock(self.file)
            except BlockingIOError:
                self.file.seek(0)
                who = self.file.read(200).strip() or "another process"
                self.file.close()
                raise RuntimeError(
                    f"{path.parent} is being written to by {who}: give another folder"
                ) from None
            except OSError as error:
                warnings.warn(
                    f"the file system of {path.parent} knows no locks ({error}): make sure that one process "
                    "alone writes to it",
                    stacklevel=5,
                )
            self.file.truncate(0)
            self.file.write(f"process {os.getpid()} on {socket.gethostname()}")
            self.file.flush()
            _held.add(self.mine)

    def release(self) -> None:
        """Let another writer in."""
        with _guard:
            _held.discard(self.mine)
            self.file.close()


def _lock(file):
    """Lock a file, or raise ``BlockingIOError``. Children that are forked do not hold it."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            file.seek(1000)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except PermissionError as error:
            raise BlockingIOError(str(error)) from error
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except PermissionError as error:  # what some systems say of a lock that is held
        raise BlockingIOError(str(error)) from error
