# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Where the results of simulations are kept while they come in: here in memory, in ``store`` in a folder.

A site's values are *units*: a row's or, of a simulator on the host in a plate, a call's. So each call is kept
when it is done.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["Memory"]


@dataclass
class _Site:
    """Values of one site: ``units`` for all rows, those that are there, and what went wrong by unit."""

    each: int
    values: Any
    done: np.ndarray
    errors: dict[int, str] = field(default_factory=dict)

    def rows(self) -> np.ndarray:
        """Which rows are complete."""
        return np.all(self.done.reshape(-1, self.each), axis=1)


class Memory:
    """Results in memory."""

    def __init__(self, count: int):
        self.count = count
        self.sites: dict[str, _Site] = {}
        self.names: tuple[str, ...] = ()

    def _site(self, name, each, like) -> _Site:
        if name not in self.sites:
            units = self.count * each
            self.sites[name] = _Site(each, self._array(name, each, like), np.zeros(units, bool))
        return self.sites[name]

    def _array(self, name, each, like):
        return np.full(
            (self.count * each, *like.shape[1:]), np.nan if like.dtype.kind == "f" else 0, like.dtype
        )

    def add(
        self, name: str, each: int, units: np.ndarray, values: np.ndarray, errors: dict[int, str]
    ) -> None:
        """Keep some units of a site.

        :param each: units of each row.
        :param units: their numbers, in rising order.
        :param values: ``(len(units), ...)``.
        :param errors: what went wrong, by unit.
        """
        site = self._site(name, each, values)
        self._write(name, site, units, values, errors)
        site.done[units] = True
        site.errors.update(errors)

    def _write(self, name, site, units, values, errors):
        site.values[units] = values

    def done(self, name: str, first: int, count: int) -> np.ndarray:
        """Which of ``count`` units from ``first`` on are there."""
        if name not in self.sites:
            return np.zeros(count, bool)
        return self.sites[name].done[first : first + count]

    def values(self, name: str, units: np.ndarray) -> np.ndarray:
        """The values of units that are there."""
        return self.sites[name].values[units]

    def errors(self, count: int) -> dict[int, str]:
        """What went wrong in the first rows, by row: the first thing that did."""
        found: dict[int, str] = {}
        for site in self.sites.values():  # in the order in which the model computes them
            for unit, what in sorted(site.errors.items()):
                if unit < count * site.each:
                    found.setdefault(unit // site.each, what)
        return dict(sorted(found.items()))

    def complete(self) -> int:
        """How many rows, from the first on, are complete."""
        if not self.names or set(self.names) - set(self.sites):
            return 0
        whole = np.all([site.rows() for site in self.sites.values()], axis=0)
        return self.count if whole.all() else int(np.argmin(whole))

    def result(self) -> tuple[dict[str, np.ndarray], dict[int, str]]:
        """The complete rows by site, and what went wrong by row."""
        count = self.complete()
        values = {name: self._whole(name, site)[:count] for name, site in self.sites.items()}
        empty = {name: np.zeros((0, *self.shapes[name])) for name in self.names}
        return empty | values, self.errors(count)

    def whole(self, first: int, count: int) -> bool:
        """Whether ``count`` rows from ``first`` on are complete."""
        if not self.names or set(self.names) - set(self.sites):
            return False
        return all(site.rows()[first : first + count].all() for site in self.sites.values())

    def shaped(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Say which sites there are to be, with the shape of one row of each."""
        self.names, self.shapes = tuple(shapes), dict(shapes)

    def _whole(self, name, site):
        return site.values.reshape(self.count, *self.shapes[name])

    def close(self) -> None:
        """Nothing more comes."""
