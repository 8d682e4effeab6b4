# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Where the rows of simulations are kept while they come in: in memory, or in a folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import jax
import numpy as np

from numpyro_maf.sbi.simulator import host_keys

__all__ = ["Folder", "Memory", "digest"]


def digest(*parts) -> str:
    """A digest of the numbers and texts that a call is given."""
    leaves, structure = jax.tree.flatten(parts)
    found = hashlib.sha256(str(structure).encode())
    for leaf in leaves:
        known = isinstance(leaf, (int, float, complex, np.ndarray, np.generic, jax.Array))
        found.update(
            np.asarray(leaf).tobytes() if known else (leaf if isinstance(leaf, str) else "").encode()
        )
    return found.hexdigest()


class Memory:
    """Chunks in memory."""

    def __init__(self):
        self.done, self.chunks, self.errors = 0, [], {}

    def add(self, values, errors):
        self.chunks.append(values)
        self.errors.update(errors)
        self.done += len(next(iter(values.values())))

    def result(self):
        whole = {name: np.concatenate([chunk[name] for chunk in self.chunks]) for name in self.chunks[0]}
        return whole, self.errors


class Folder:
    """One ``.npy`` file for each site, and ``about.json``: nothing in it is ever executed."""

    def __init__(self, folder, about):
        self.folder, self.about = folder, about

    @classmethod
    def at(cls, store):
        folder = Path(store)
        if not (folder / "about.json").exists():
            raise ValueError(f"{folder} holds no simulations")
        return cls(folder, json.loads((folder / "about.json").read_text()))

    @classmethod
    def of(cls, store, key, count, called):
        folder = Path(store)
        about = {"key": host_keys(key).tolist(), "count": count, "called": called}
        if (folder / "about.json").exists():
            found = cls.at(store)
            if any(found.about[name] != value for name, value in about.items()):
                raise ValueError(f"{folder} holds simulations of another call")
            return found
        about |= {"done": 0, "files": {}, "errors": {}}
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder, about)

    @property
    def done(self):
        return self.about["done"]

    def check(self, shapes):
        """Refuse a model with other sites, by name with a row axis, than those that are here."""
        found = {name: value.shape[1:] for name, value in self.result()[0].items()}
        if self.done and found != {name: value.shape[1:] for name, value in shapes.items()}:
            raise ValueError(f"{self.folder} holds simulations of another model: its sites are {found}")

    def add(self, values, errors):
        for i, (name, value) in enumerate(values.items()):
            path = self.folder / self.about["files"].setdefault(name, f"{i}.npy")
            options = (
                {} if self.done else dict(dtype=value.dtype, shape=(self.about["count"], *value.shape[1:]))
            )
            file = np.lib.format.open_memmap(path, mode="r+" if self.done else "w+", **options)
            file[self.done : self.done + len(value)] = value
            file.flush()
        self.about["errors"] |= {str(row): what for row, what in errors.items()}
        self.about["done"] += len(value)
        part = self.folder / "about.part"
        part.write_text(json.dumps(self.about))
        part.replace(self.folder / "about.json")

    def result(self):
        files = {name: np.load(self.folder / f, mmap_mode="r") for name, f in self.about["files"].items()}
        errors = {int(row): what for row, what in self.about["errors"].items()}
        return {name: file[: self.done] for name, file in files.items()}, errors
