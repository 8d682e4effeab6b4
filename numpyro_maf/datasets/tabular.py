# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""The five tables on which density estimators are compared, split and scaled as everywhere else.

Papamakarios, Pavlakou & Murray, *Masked Autoregressive Flow for Density Estimation* (2017), section 4.2,
chose and cleaned them; their code (``gpapamak/maf``, folder ``datasets``) and files (Zenodo, record 1161203)
define them. Test log-likelihoods compare between papers only if splits and scales agree to the last row, so
all particulars of that code are kept, each with a note where it is done.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from numpyro_maf.datasets.frames import read_frame

__all__ = ["Splits", "load_tabular"]

Floats: TypeAlias = NDArray[np.float64]
Parts: TypeAlias = tuple[Floats, Floats, Floats]


@dataclass(frozen=True, eq=False)
class Splits:
    """Rows to train on, to choose by and to report: ``train``, ``validation``, ``test``, each ``(N, D)``."""

    train: NDArray[Any]
    validation: NDArray[Any]
    test: NDArray[Any]


FILES = {  # of each table, and what they hold
    "power": {"power/data.npy": "an array (2049280, 8)"},
    "gas": {"gas/ethylene_CO.pickle": "a pandas DataFrame of Time, Meth, Eth and 16 sensors"},
    "hepmass": {
        "hepmass/1000_train.csv": "a header, then rows of a label and 27 numbers",
        "hepmass/1000_test.csv": "a header, then rows of a label and 28 numbers",
    },
    "miniboone": {"miniboone/data.npy": "an array (36488, 43)"},
    "bsds300": {"BSDS300/BSDS300.hdf5": "arrays train, validation and test, each (N, 63)"},
}


def load_tabular(name: str, folder: str | Path) -> Splits:
    """Read one of the benchmark's tables from its published files.

    ============= === ======================== ===========================================================
    name            D train, validation, test  what it holds
    ============= === ======================== ===========================================================
    ``power``       6 1659917, 184435, 204928  electric power of a household, with noise of its resolution
    ``gas``         8 852174, 94685, 105206    gas sensors in mixtures of ethylene and CO
    ``hepmass``    21 315123, 35013, 174987    simulated collisions of particles, those with signal
    ``miniboone``  43 29556, 3284, 3648        neutrino events
    ``bsds300``    63 1000000, 50000, 250000   8x8 patches of natural images, less their mean and a pixel
    ============= === ======================== ===========================================================

    All but BSDS300 are standardised, so they have no units; log-likelihoods are in nats a row.

    :param name: one of those above.
    :param folder: holds ``power/data.npy``, ``gas/ethylene_CO.pickle``, ``hepmass/1000_train.csv`` and
        ``1000_test.csv``, ``miniboone/data.npy`` and ``BSDS300/BSDS300.hdf5``, or those of them asked for.
    :return: float32 arrays ``(N, D)``, computed in float64.
    :raises ValueError: for an unknown name, and for a file that does not hold what it should.
    :raises FileNotFoundError: for a missing file; the message says what it should hold.
    :raises ImportError: for BSDS300 without h5py.
    """
    if name not in FILES:
        raise ValueError(f"name must be one of {list(FILES)}, got {name!r}")
    paths = [Path(folder) / file for file in FILES[name]]
    for path, content in zip(paths, FILES[name].values(), strict=True):
        if not path.is_file():
            source = "https://zenodo.org/record/1161203"
            raise FileNotFoundError(f"{path} is missing: {content}; it can be had at {source}")
    try:
        parts = LOADERS[name](*paths)
    except (OSError, EOFError) as error:
        raise ValueError(f"{', '.join(map(str, paths))} cannot be read: {error}") from error
    return Splits(*(np.ascontiguousarray(part, np.float32) for part in parts))


def _power(path: Path) -> Parts:
    rng = np.random.RandomState(42)  # the original's generator, which draws in this order
    rows = _array(path)
    if rows.shape[1] != 8:
        raise ValueError(f"{path} must hold an array (N, 8), got {rows.shape}")
    rng.shuffle(rows)
    rows = np.delete(rows, [1, 3], axis=1)  # reactive power and current
    voltage, power, meters = (rng.rand(len(rows), n) for n in (1, 1, 3))
    rows[:, :5] += np.hstack([0.001 * power, 0.01 * voltage, meters])  # the time stays as it is
    return _standardised(rows)


def _gas(path: Path) -> Parts:
    names, rows = read_frame(path)
    if missing := {"Meth", "Eth", "Time"} - set(names):
        raise ValueError(f"{path} lacks the columns {sorted(missing)}, it has {names}")
    rows = rows[:, [name not in ("Meth", "Eth", "Time") for name in names]]
    # The first column that correlates with another goes, again and again: each one that a later one repeats.
    alike = np.corrcoef(rows, rowvar=False) > 0.98
    rows = rows[:, ~np.triu(alike, 1).any(axis=1)]
    rows = (rows - rows.mean(0)) / rows.std(0, ddof=1)  # by all rows, those of the test too
    return _split(rows)


def _hepmass(*paths: Path) -> Parts:
    train, test = (np.loadtxt(path, delimiter=",", skiprows=1, comments=None, ndmin=2) for path in paths)
    if test.shape[1] != train.shape[1] + 1:
        widths = test.shape[1], train.shape[1]
        raise ValueError(f"{paths[1]} must have one column more than {paths[0]}, they have {widths}")
    # Label 1 is signal; the last column of the test is in no description.
    train, test = train[train[:, 0] == 1, 1:], test[test[:, 0] == 1, 1:-1]
    mean, scale = train.mean(0), train.std(0, ddof=1)
    train, test = (train - mean) / scale, (test - mean) / scale
    # Columns with values that recur go, but only the least value is looked at.
    keep = (train == train.min(0)).sum(0) <= 5
    train, validation = _hold_out(train[:, keep])
    return train, validation, test[:, keep]


def _miniboone(path: Path) -> Parts:
    return _standardised(_array(path))


def _bsds300(path: Path) -> Parts:
    try:
        import h5py
    except ImportError as error:
        raise ImportError('BSDS300 needs h5py: pip install "numpyro_maf[examples]"') from error
    with h5py.File(path, "r") as file:
        if missing := {"train", "validation", "test"} - set(file):
            raise ValueError(f"{path} lacks the arrays {sorted(missing)}, it has {sorted(file)}")
        return file["train"][:], file["validation"][:], file["test"][:]


LOADERS: dict[str, Callable[..., Parts]] = {
    "power": _power, "gas": _gas, "hepmass": _hepmass, "miniboone": _miniboone, "bsds300": _bsds300,
}  # fmt: skip


def _array(path: Path) -> Floats:
    rows = np.load(path)  # which refuses objects, and so pickles
    if not isinstance(rows, np.ndarray) or rows.ndim != 2:
        raise ValueError(f"{path} must hold one array with two axes")
    return rows.astype(np.float64)


def _hold_out(rows: Floats) -> tuple[Floats, Floats]:
    """All rows but the last tenth, and these."""
    cut = len(rows) - len(rows) // 10
    return rows[:cut], rows[cut:]


def _split(rows: Floats) -> Parts:
    """The last tenth is the test, the last tenth of the rest validates."""
    rest, test = _hold_out(rows)
    train, validation = _hold_out(rest)
    return train, validation, test


def _standardised(rows: Floats) -> Parts:
    """Split, and scaled by all that is not the test."""
    rest, _ = _hold_out(rows)
    return _split((rows - rest.mean(0)) / rest.std(0))
