# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Online: readings go in as they come, probabilities come out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from numpyro_maf.activities.experts import tables_of
from numpyro_maf.activities.features import HORIZON, features_of
from numpyro_maf.activities.records import LONGEST_GAP, Record, gathered, slot_start
from numpyro_maf.activities.sensors import readings

__all__ = ["Stream"]


class Stream:
    """The probability of each activity now, given the readings so far; made by ``home.filter()``.

    It remembers twelve hours of readings. Its answers are those of ``home.predict(frame, online=True)``.
    """

    def __init__(self, home: Any) -> None:
        self.home = home
        self._width = int(round(home.step * 6e10))
        self._room = int(HORIZON / home.step) + 2
        self._restart()

    def _restart(self) -> None:
        self._slots: list[np.ndarray] = []
        self._walls: list[int] = []
        self._instant: int | None = None
        self._last = 0
        self._before: np.ndarray | None = None
        self._now: np.ndarray | None = None
        self._age = np.zeros(len(self.home.activities))

    def update(self, time: Any, values: Mapping[str, Any]) -> pd.Series:
        """Take the readings of a time, and answer.

        :param time: a time, not before the last one; ``values``: readings by sensor; one that is not there
            is missing.
        :return: the probability of each activity.
        :raises ValueError: for a time before the last one, unknown sensors, and readings of no use.
        """
        stamp = pd.Timestamp(time)
        if stamp is pd.NaT:
            raise ValueError(f"time must be a time, got {time!r}")
        wall = stamp.tz_localize(None).as_unit("ns").value
        instant = wall if stamp.tz is None else stamp.tz_convert("UTC").tz_localize(None).as_unit("ns").value
        row = self._row(values)
        if self._instant is not None and instant < self._instant:
            raise ValueError(f"{time} is before the last reading; times must not go back")
        if self._instant is not None and instant - self._last > max(LONGEST_GAP.value, 3 * self._width):
            self._restart()
        self._last = instant
        if self._instant is None:
            self._instant = slot_start(instant, self._width)
            self._open(wall - instant + self._instant)
        while instant - self._instant >= self._width:  # slots in which nothing came are missing
            self._before = self._now
            self._instant += self._width
            self._open(wall - instant + self._instant)
            if instant - self._instant >= self._width:
                self._answer()
        self._rows.append(row)
        sensors = self.home.sensors
        rows, first = np.stack(self._rows), np.zeros(len(self._rows), np.int64)
        self._slots[-1] = np.array([gathered(rows[:, j], first, 1, s)[0] for j, s in enumerate(sensors)])
        return self._answer()

    def _open(self, wall: int) -> None:
        """Begin a slot, so far without a reading."""
        self._rows: list[np.ndarray] = []
        self._slots.append(np.full(len(self.home.sensors), np.nan))
        self._walls.append(wall)

    @property
    def probabilities(self) -> pd.Series:
        """The last answer.

        :raises ValueError: before the first reading.
        """
        if self._now is None:
            raise ValueError("no reading has come yet: call update(time, values)")
        return pd.Series(self._now, index=list(self.home.activities))

    def forecast(self, minutes: float) -> pd.DataFrame:
        """The probability of each activity in the minutes to come, by time."""
        now = self.probabilities.to_numpy()
        age = self._age * self.home.step / self.home.dynamics.minutes
        return self.home.ahead(minutes, np.datetime64(self._walls[-1], "ns"), now, age)

    def _row(self, values: Mapping[str, Any]) -> np.ndarray:
        names = [s.name for s in self.home.sensors]
        if not isinstance(values, (Mapping, pd.Series)):
            raise TypeError(f"values must be readings by sensor, got {type(values).__name__}")
        others = {self.home.time, self.home.label}
        if unknown := [name for name in dict(values) if name not in names and name not in others]:
            raise ValueError(f"the home has no sensor {unknown[0]!r}; its sensors are {names}")
        row = np.full(len(names), np.nan)
        for j, sensor in enumerate(self.home.sensors):
            value = values.get(sensor.name)
            if value is None:
                continue
            if isinstance(value, (bool, int, float, np.number)) and not sensor.levels:
                if np.isinf(value):
                    raise ValueError(f"sensor {sensor.name!r} is infinite")
                row[j] = float(value)
            else:
                row[j] = readings(pd.Series([value], name=sensor.name), sensor)[0][0]
        return row

    def _answer(self) -> pd.Series:
        home = self.home
        self._slots, self._walls = self._slots[-self._room :], self._walls[-self._room :]
        values = np.stack(self._slots)
        none = np.zeros(len(values), np.int64)
        times = np.array(self._walls, "datetime64[ns]")
        data = Record(times, np.arange(len(values)) == 0, values, none - 1, none, home.step)
        last = features_of(data, home.sensors).rows(slice(-1, None))
        tables = tables_of(home.experts, last, future=False)
        before = self._before
        if before is None:
            chance, _, weight = home.online.step(tables)
            self._now = chance * weight / (chance * weight).sum()
        else:
            self._now = home.online.advance(before, tables)
        previous = None if before is None else int(before.argmax())
        best = int(self._now.argmax())
        if len(self._slots) == 1 or best != previous:
            self._age = np.zeros(len(self._now))
        self._age[best] = self._age[best] + 1 if best == previous else 1
        return self.probabilities
