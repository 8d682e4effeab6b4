# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""What a folder of simulations says of itself: the call that made it, its sites and its format."""

from __future__ import annotations

import json
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["EarlierVersion", "compare", "earlier", "read", "write"]

FORMAT = 2


class EarlierVersion(ValueError):
    """A folder was written by an earlier version of this library."""


def write(folder: Path, about: dict[str, Any]) -> None:
    """Begin a folder."""
    about = {"format": FORMAT, **about}
    (folder / "about.part").write_text(json.dumps({**about, "crc": _crc(about)}))
    (folder / "about.part").replace(folder / "about.json")


def _crc(about) -> int:
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())


def read(folder: Path) -> dict[str, Any]:
    """What a folder says of itself.

    :raises ValueError: when it holds no simulations, or those of an earlier version.
    """
    path = folder / "about.json"
    if not path.is_file() or path.is_symlink():
        raise ValueError(f"{folder} holds no simulations")
    try:
        about = json.loads(path.read_bytes())
        if about.get("format") is None and isinstance(about["files"], dict):
            raise EarlierVersion(
                f"{folder} was written by an earlier version of numpyro_maf: Simulations.open reads it, and "
                "simulate needs another folder"
            )
        crc = about.pop("crc")
        shapes = [n for shape in about["sites"].values() for n in shape]
        numbers = [about["count"], about["block"], *shapes]
        fine = crc == _crc(about) and about["format"] == FORMAT and min(numbers[:2]) > 0
        if not fine or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("its checksum differs")
    except EarlierVersion:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}): give another folder"
        ) from error
    return about


def compare(folder: Path, known: dict[str, Any], about: dict[str, Any]) -> None:
    """Refuse results of another call, naming what differs."""
    if known["sites"] != {name: list(shape) for name, shape in about["sites"].items()}:
        raise ValueError(f"{folder} holds simulations of another model: its sites are {known['sites']}")
    differ = [name for name, part in about["called"].items() if known["called"].get(name) != part]
    if differ:
        raise ValueError(
            f"{folder} holds simulations of another call, with another {' and another '.join(differ)}: "
            "repeat that call, or give another folder"
        )
    names = sorted(set(known["globals"]) | set(about["globals"]))
    if changed := [name for name in names if known["globals"].get(name) != about["globals"].get(name)]:
        warnings.warn(
            f"{folder} was simulated while global variables that the model uses had other values: "
            f"{', '.join(changed[:5])}. Rows that are there are kept",
            stacklevel=4,
        )


def earlier(folder: Path) -> tuple[dict[str, np.ndarray], dict[int, str]]:
    """Values and errors of a folder of an earlier version: ``about.json`` names the file of each site."""
    about = json.loads((folder / "about.json").read_bytes())
    values = {}
    for name, file in about["files"].items():
        path = folder / str(file)
        if path.parent != folder or path.suffix != ".npy" or path.is_symlink():
            raise ValueError(f"{folder}/about.json names {file!r}, which is no file of this folder")
        values[name] = np.load(path, mmap_mode="r", allow_pickle=False)[: int(about["done"])]
    return values, {int(row): str(what) for row, what in about["errors"].items()}
