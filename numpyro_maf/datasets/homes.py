# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Two real homes with binary sensors, from files that the user has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["load_ordonez"]


def load_ordonez(directory: str | Path, home: str = "A") -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read a home of the *Activities of Daily Living recognition using binary sensors* data.

    Source: UCI Machine Learning Repository 271; F. J. Ordonez, P. de Toledo and A. Sanchis, Sensors 13 (2013)
    5460-5477. Its README allows no commercial use. ``activities.from_events(*load_ordonez(folder))`` makes a
    frame of it.

    :param directory: folder with ``OrdonezA_Sensors.txt``, ``OrdonezA_ADLs.txt`` and those of B.
    :param home: ``"A"`` (14 days) or ``"B"`` (21 days).
    :return: events with columns ``start``, ``end`` and ``sensor``, and labels with ``start``, ``end`` and
        ``activity``.
    :raises FileNotFoundError: for a missing file.
    :raises ValueError: for another home, and for a line that cannot be read, with its number.
    """
    import pandas as pd

    if home not in ("A", "B"):
        raise ValueError(f"home must be 'A' or 'B', got {home!r}")
    tables = []
    for part, name, columns in (("Sensors", "sensor", 5), ("ADLs", "activity", 3)):
        path = Path(directory) / f"Ordonez{home}_{part}.txt"
        rows = []
        # Columns are separated by runs of tabs or spaces; times hold a single space.
        for number, line in enumerate(path.read_text(encoding="latin-1").splitlines()[2:], start=3):
            cells = [c.strip() for c in re.split(r"\t+|\s{2,}", line.strip()) if c.strip()]
            if not cells:
                continue
            try:
                if len(cells) != columns:
                    raise ValueError(f"expected {columns} columns, found {len(cells)}")
                rows.append((pd.Timestamp(cells[0]), pd.Timestamp(cells[1]), " ".join(cells[2:])))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
        tables.append(pd.DataFrame(rows, columns=["start", "end", name]))
    return tables[0], tables[1]
