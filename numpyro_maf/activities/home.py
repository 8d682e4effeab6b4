# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""What was learned of a home, and what it answers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd

from numpyro_maf.activities.chain import RedrawChain, smoothed
from numpyro_maf.activities.durations import Dynamics
from numpyro_maf.activities.experts import Experts, Tables, record_tables, tables_of
from numpyro_maf.activities.features import features_of, time_basis
from numpyro_maf.activities.records import Record, as_frame, record
from numpyro_maf.activities.scores import scores_of
from numpyro_maf.activities.sensors import MOST_COUNT, Sensor
from numpyro_maf.activities.streams import Stream
from numpyro_maf.codec import storable
from numpyro_maf.hmm import HMM
from numpyro_maf.io import load as load_any
from numpyro_maf.io import save as save_any
from numpyro_maf.pytrees import Described
from numpyro_maf.rng import as_key, split

__all__ = ["Home", "load"]


@storable
@dataclass(frozen=True, eq=False, repr=False)
class Home(Described):
    """What was learned of a home; made by :func:`~numpyro_maf.activities.fit`.

    Frames that it is asked about have the columns of the one that it learned from, by name, without the
    label if need be. A sensor that a frame lacks, or whose cells are empty, is missing: it says nothing.

    :param sensors: S sensors; ``activities``: K names; ``step``: minutes of a slot.
    :param experts: the ensemble; ``chain``: for looking back, ``online``: for the moment.
    :param dynamics: lengths of visits and moves; ``time`` and ``label``: names of columns.
    :param held_out_loss: mean log-loss of slots in training days that the experts had not seen.
    """

    sensors: tuple[Sensor, ...]
    activities: tuple[str, ...]
    step: float
    experts: Experts
    chain: RedrawChain
    online: RedrawChain
    dynamics: Dynamics
    time: str
    label: str
    held_out_loss: float

    def _describe(self) -> list[str]:
        kinds = ", ".join(f"{s.name} ({s.kind})" for s in self.sensors)
        return [
            f"Home with {len(self.sensors)} sensors and {len(self.activities)} activities, "
            f"a slot {self.step:g} min",
            f"  activities: {', '.join(self.activities)}",
            f"  sensors: {kinds}",
            f"  log-loss on training days held out: {self.held_out_loss:.3f}",
        ]

    # Probabilities ----------------------------------------------------------------------------

    def predict(self, frame: Any, *, online: bool = False) -> pd.DataFrame:
        """The probability of each activity at each row, given all rows.

        :param frame: as in training; the label, if there is one, is not looked at.
        :param online: given the rows so far only, as :meth:`filter` answers.
        :return: a row for each row of the frame, with its index; a column for each activity.
        :raises ValueError: for a frame without any of the sensors, and as ``fit`` does.
        """
        frame, data = self._read(frame)
        return self._framed(frame, self.smoothed(data, online=online)[data.slot])

    def smoothed(self, data: Record, *, online: bool = False) -> np.ndarray:
        """``(T, K)``: the probability of each activity in each slot of a record."""
        tables = self.tables(data, future=not online)
        if online:
            return smoothed(self.online, tables, data.starts, what="filtered")
        return smoothed(self.chain, tables, data.starts)

    def decode(self, frame: Any) -> pd.Series:
        """The most probable path of activities, all rows together (Viterbi)."""
        frame, data = self._read(frame)
        tables = self.tables(data)
        path = smoothed(self.chain, tables, data.starts, what="path")
        return pd.Series(np.array(self.activities, object)[path[data.slot]], frame.index, name=self.label)

    def filter(self) -> Stream:
        """A stream: readings go in as they come, probabilities come out."""
        return Stream(self)

    def posterior(self, frame: Any) -> HMM:
        """The chain over a frame's slots: its samples are whole paths, its marginals the probabilities."""
        data = self._read(frame)[1]
        tables = self.tables(data)
        return self.chain.hmm(tables.schedule, tables.emission, tables.recogniser, data.starts)

    def tables(self, data: Record, *, future: bool = True) -> Tables:
        """What each expert says of each slot of a record."""
        return record_tables([self.experts], data, self.sensors, future=future)[0]

    def _read(self, frame: Any, *, labels: bool = False) -> tuple[pd.DataFrame, Record]:
        frame = as_frame(frame)
        if not any(s.name in frame.columns for s in self.sensors):
            raise ValueError(
                f"the frame has none of the sensors {[s.name for s in self.sensors]}; its columns are "
                f"{list(frame.columns)}"
            )
        label = self.label if labels else None
        return frame, record(
            frame, self.time, self.sensors, label=label, activities=self.activities, minutes=self.step
        )

    def _framed(self, frame, table) -> pd.DataFrame:
        return pd.DataFrame(np.asarray(table), index=frame.index, columns=list(self.activities))

    # Ahead ------------------------------------------------------------------------------------

    def forecast(self, minutes: float, frame: Any) -> pd.DataFrame:
        """The probability of each activity in the minutes after the last row of a frame.

        :param minutes: how far to look ahead; ``frame``: what was recorded until now.
        :return: a row for each step to come, by time; a column for each activity.
        :raises ValueError: for minutes that are not positive, or more than a week.
        """
        _, data = self._read(frame)
        p = self.smoothed(data, online=True)
        age = _ages(p, data.starts) * self.step / self.dynamics.minutes
        return self.ahead(minutes, data.time[-1], p[-1], age)

    def ahead(self, minutes: float, now: Any, probability: np.ndarray, age: np.ndarray) -> pd.DataFrame:
        """As :meth:`forecast`, from the probability of each activity and its age in steps of the dynamics."""
        if not 0 < minutes <= 7 * 1440:
            raise ValueError(f"minutes must be between 0 and {7 * 1440}, got {minutes}")
        width = self.dynamics.minutes
        count = max(int(np.ceil(minutes / width)), 1)
        times = np.datetime64(now, "ns") + (np.arange(count + 1) * width * 6e10).astype("timedelta64[ns]")
        schedule = self._schedule(times)
        hsmm = self.dynamics.ahead(probability, schedule, age)
        index = pd.DatetimeIndex(times[1:], name=self.time)
        return pd.DataFrame(np.asarray(hsmm.marginals)[1:], index, columns=list(self.activities))

    def _schedule(self, times: np.ndarray) -> np.ndarray:
        no = np.zeros(len(times))
        basis = time_basis(Record(times, no > 0, no[:, None], no.astype(int), no.astype(int), self.step))
        logs = np.asarray(self.experts.scheduled(basis))
        return np.asarray(jax.nn.logsumexp(logs, 0)) - np.log(len(logs))

    def sample(self, days: int = 1, *, key: Any = 0, start: str = "2024-01-01") -> pd.DataFrame:
        """Days that this home might have: activities by the semi-Markov chain, readings by the emission.

        :param start: date of the first day.
        :return: the columns of a training frame. A slow sensor's readings start at its typical level and
            follow the drawn slopes, drawn back to it within hours.
        """
        if days < 1:
            raise ValueError(f"days must be at least 1, got {days}")
        path_key, emission_key = split(as_key(key), 2)
        width = self.dynamics.minutes
        count = int(days * 1440 / width)
        times = np.datetime64(start, "ns") + (np.arange(count) * width * 6e10).astype("timedelta64[ns]")
        schedule = self._schedule(times)
        path = np.asarray(self.dynamics.ahead(np.exp(schedule[0]), schedule).sample(path_key))
        flow = jax.tree.map(lambda a: a[0], self.experts.emission)
        no = np.zeros(count)
        basis = time_basis(Record(times, no > 0, no[:, None], path, path, width))
        now = np.asarray(
            flow(self.experts.context(path, np.ones((count, len(self.sensors))), basis)).sample(emission_key)
        )
        columns: dict[str, Any] = {self.time: times}
        for j, sensor in enumerate(self.sensors):
            columns[sensor.name] = _reading(now[:, j], sensor, width)
        return pd.DataFrame({**columns, self.label: np.array(self.activities, object)[path]})

    # Judging and looking ----------------------------------------------------------------------

    def score(self, frame: Any, *, online: bool = False) -> dict[str, float]:
        """How good the probabilities are where the frame has labels.

        :return: ``accuracy``, ``macro_f1``, ``log_loss``, ``ece`` (15 bins), ``minutes`` scored, and
            ``confident_and_wrong_minutes``: how long, in stretches of more than ten minutes, a wrong
            activity had more than 95%.
        :raises ValueError: for a frame without any label.
        """
        _, data = self._read(frame, labels=True)
        p = self.smoothed(data, online=online)
        return scores_of(p, data.label, self.step)

    def explain(self, frame: Any, when: Any) -> pd.DataFrame:
        """Which sensors spoke for what at a time.

        :param when: a time in the frame.
        :return: a row for each sensor and one for the time of day; a column for each activity: by how much
            the log-odds of that activity fall when the sensor is taken away. Positive speaks for it.
        :raises ValueError: for a time outside the frame.
        """
        _, data = self._read(frame)
        instant = np.datetime64(pd.Timestamp(when).tz_localize(None), "ns")
        ago = instant - data.time
        inside = (ago >= np.timedelta64(0, "ns")) & (ago < np.timedelta64(int(self.step * 6e10), "ns"))
        if not inside.any():
            raise ValueError(f"{when} is not in the frame, which goes from {data.time[0]} to {data.time[-1]}")
        at = int(inside.argmax())
        features = features_of(data, self.sensors)
        whole = _log_odds(self._at(features, data, at))
        rows = {}
        for j, sensor in enumerate(self.sensors):
            known, there = features.known.copy(), features.there.copy()
            known[:, j], there[:, j] = False, False
            rows[sensor.name] = whole - _log_odds(self._at(features, data, at, known=known, there=there))
        chance = np.exp(tables_of(self.experts, features).schedule[at])
        rows["time of day"] = _log_odds(chance) - _log_odds(np.full(len(chance), 1 / len(chance)))
        table = pd.DataFrame(rows, index=list(self.activities)).T
        return table.reindex(table.abs().max(axis=1).sort_values(ascending=False).index)

    def _at(self, features, data, at, **options) -> np.ndarray:
        return smoothed(self.chain, tables_of(self.experts, features, **options), data.starts)[at]

    def plot(
        self, frame: Any, *, day: Any = None, path: str | os.PathLike[str] | None = None, title: str = ""
    ):
        """The picture of a day: the probability of each activity, its label above, and the sensors below.

        :param day: a date; None for the first day of the frame.
        :return: the matplotlib figure.
        :raises ValueError: for a day that the frame does not have.
        """
        from numpyro_maf.activities.pictures import day_picture

        data = self.read(frame)
        return day_picture(self, data, self.smoothed(data), day=day, path=path, title=title)

    def read(self, frame: Any) -> Record:
        """A frame on the grid of slots, with its labels if it has any."""
        frame = as_frame(frame)
        return self._read(frame, labels=self.label in frame.columns)[1]

    def check_fit(self) -> None:
        """Trace the tables, which costs no memory.

        :raises ValueError: for weights that do not fit together.
        """
        try:
            self.experts.trace(len(self.sensors))
        except (TypeError, ValueError, IndexError) as error:
            raise ValueError(f"its weights do not fit together: {error}") from error
        states = len(self.activities)
        shapes = {np.shape(self.chain.pace), np.shape(self.online.pace), np.shape(self.dynamics.share)}
        if shapes != {(states,)} or self.experts.states != states:
            raise ValueError(f"its chain is not one of {states} activities")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the home to a file; :func:`load` reads it. No code is in the file."""
        save_any(Path(path), self)


def load(path: str | os.PathLike[str]) -> Home:
    """Read a home that was saved.

    :raises ValueError: for a file that holds something else, or is damaged, as :func:`numpyro_maf.load` does.
    """
    home = load_any(path)
    if not isinstance(home, Home):
        raise ValueError(f"{path} holds a {type(home).__name__}, not a Home")
    return home


def _log_odds(p):
    p = np.clip(p, 1e-7, 1 - 1e-7)
    return np.log(p) - np.log1p(-p)


def _ages(p: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """``(K,)``: for how many slots each activity has been the likeliest; 0 for all but the last one."""
    best = p.argmax(1)
    change = np.flatnonzero((best != best[-1]) | np.r_[starts[1:], False])
    age = np.zeros(p.shape[1])
    age[best[-1]] = len(best) - (change[-1] + 1 if len(change) else 0)
    return age


def _reading(now: np.ndarray, sensor: Sensor, minutes: float) -> np.ndarray:
    """Readings from what the emission draws."""
    if sensor.kind == "categorical":
        return np.array(sensor.levels, object)[now.astype(int).clip(0, len(sensor.levels) - 1)]
    if sensor.is_event:
        return now.round().clip(0, 1 if sensor.kind == "binary" else MOST_COUNT).astype(int)
    if sensor.kind == "fast":
        return sensor.centre + sensor.spread * np.sinh(now)
    level, levels = 0.0, []
    keep = np.exp(-minutes / 240)
    for slope in np.sinh(now) * sensor.slope * minutes:
        level = keep * level + slope
        levels.append(level)
    return sensor.centre + np.array(levels)
