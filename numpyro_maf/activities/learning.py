# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Learning a home from a labelled table."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from numpyro_maf.activities.chain import RedrawChain, calibrate, calibrating, smoothed
from numpyro_maf.activities.durations import Dynamics
from numpyro_maf.activities.experts import TABLES, Experts, Tables, learn_experts, record_tables
from numpyro_maf.activities.features import features_at, slope
from numpyro_maf.activities.home import Home
from numpyro_maf.activities.records import Record, as_frame, label_names, record, times_of
from numpyro_maf.activities.sensors import Sensor, find_kind, find_sensors, readings, scaled
from numpyro_maf.rng import as_key, split

__all__ = ["fit"]

MOST_ROWS = 200_000  # slots that the experts learn from; more are thinned out
MANY_UNKNOWN = 0.2  # share of slots without a label from which it pays to fill them in
FEW_DAYS = 10  # fewer do not tell how an hour differs from another


def fit(
    frame: Any,
    *,
    time: str,
    label: str,
    sensors: Sequence[str] | Mapping[str, str | None] | None = None,
    minutes: float | None = None,
    key: Any = 0,
    members: int = 3,
    folds: int = 3,
    hidden: int = 32,
    steps: int = 1000,
    noise: float = 0.2,
    ridge: float = 1.0,
    rounds: int = 1,
    progress: bool = True,
) -> Home:
    """Learn what a person at home is doing from a table of sensor readings and labels.

    Rows may come in any order and at irregular times; readings and labels may be missing. Slots without a
    label teach too: their activities are drawn from the posterior that the labelled ones give, and all is
    learned once more (stochastic EM); that is kept only where it predicts held-out labels better.

    :param frame: a DataFrame of pandas, polars or xarray, with a row for each time. For a list of events see
        :func:`from_events`.
    :param time: the column of times, with or without a zone; wall time decides the hour of the day.
    :param label: the column of activities; empty where the activity is not known.
    :param sensors: columns, or kinds by column: ``"slow"``, ``"fast"``, ``"count"``, ``"binary"``,
        ``"categorical"``, None to find out. None takes all columns but time and label.
    :param minutes: length of a slot; None for the usual distance of rows.
    :param key: a ``jax.random`` key, or an integer.
    :param members: experts that answer together; ``folds``: sets of days held out in turn to learn the chain.
    :param hidden: width of the networks; ``steps``: of training; ``noise``: on continuous readings, in
        typical spreads; ``ridge``: precision of the prior on the recogniser's weights.
    :param rounds: how often slots without a label are filled in and all is learned again; 0 for never.
    :return: a :class:`Home`.
    :raises TypeError: for what is no table.
    :raises ValueError: for columns that are not there, text among numbers, fewer than two activities and
        other tables that cannot be learned from; the message names column and row.
    """
    frame = as_frame(frame)
    names = label_names(frame, label)
    if len(names) < 2:
        raise ValueError(
            f"column {label!r} holds {'one activity, ' + repr(names[0]) if names else 'no label'}: to tell "
            "activities apart it must hold two or more"
        )
    if label == time:
        raise ValueError(f"time and label are the same column, {label!r}")
    if len(names) > 200:
        raise ValueError(f"column {label!r} holds {len(names)} different labels; is it a column of labels?")
    if members < 1 or folds < 2 or steps < 1:
        raise ValueError(f"members and steps must be at least 1 and folds 2, got {members}, {steps}, {folds}")
    given = find_sensors(frame, sensors, {time, label})
    kinds = _sensors(frame, time, given)
    data = record(frame, time, kinds, label=label, activities=names, minutes=minutes)
    found = [_scaled(sensor, data.values[:, j], data.step) for j, sensor in enumerate(kinds)]
    init_key, fit_key, fill_key, again_key = split(as_key(key), 4)
    fold = _folds(data, folds)
    folds = int(fold.max()) + 1
    held_out = np.repeat(np.arange(folds + 1), members)
    groups = [slice(g * members, (g + 1) * members) for g in range(folds + 1)]
    labelled = data.label >= 0
    unlabelled = ~labelled & ~np.isnan(data.values).all(1)
    fill = bool(rounds) and unlabelled.mean() > MANY_UNKNOWN
    rows = _thinned(labelled) | (_thinned(unlabelled) if fill else False)
    features = features_at(data, found, rows)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(fill_key)))
    seen = (fold[rows, None] != held_out) & labelled[rows, None]
    seen = seen * (0.5 + rng.random(seen.shape))  # members weigh slots differently
    options = dict(steps=steps, noise=noise, ridge=ridge, progress=progress)
    days = len(np.unique(data.day[labelled]))
    start = Experts.init(init_key, found, features, len(names), len(held_out), days >= FEW_DAYS, hidden)
    activity = np.repeat(np.maximum(data.label[rows], 0)[:, None], len(held_out), 1)
    experts = learn_experts(fit_key, start, found, features, activity, seen, **options)
    chains, loss = _calibrated(experts, groups, fold, found, data)
    for _ in range(rounds if fill else 0):
        filled = _filled(fill_key, experts, groups, chains[0], found, data, rows)
        extra = seen + 0.5 * unlabelled[rows, None]
        again = learn_experts(again_key, experts, found, features, filled, extra, **options)
        new_chains, new_loss = _calibrated(again, groups, fold, found, data)
        if new_loss >= loss:
            break
        experts, chains, loss = again, new_chains, new_loss
    return Home(
        tuple(found), names, data.step, experts.group(groups[-1]), *chains, Dynamics.of(data, len(names)),
        time, label, float(loss),
    )  # fmt: skip


def _sensors(frame, time: str, given) -> list[Sensor]:
    """The sensors with their kinds; columns that never change are left out, with a warning."""
    order = np.argsort(times_of(frame, time)[0].to_numpy(), kind="stable")
    found = []
    for name, kind in given:
        values, names = readings(frame[name])
        known = values[~np.isnan(values)]
        if not len(known):
            warnings.warn(f"sensor {name!r} has no reading; it is left out", stacklevel=3)
            continue
        if known.min() == known.max():
            warnings.warn(f"sensor {name!r} is constant, {known[0]:g}; it is left out", stacklevel=3)
            continue
        kind = kind or find_kind(values[order], names)
        if kind == "categorical" and not names:
            raise ValueError(
                f"sensor {name!r} is to be categorical, and holds numbers; turn its codes into text: "
                f"frame[{name!r}].astype(str)"
            )
        if kind != "categorical" and names:
            raise ValueError(f"sensor {name!r} holds the names {list(names)}: its kind must be 'categorical'")
        wrong = known[~np.isin(known, (0, 1))]
        if kind == "binary" and len(wrong):
            raise ValueError(f"sensor {name!r} is to be binary, and holds {wrong[0]:g}")
        if kind == "count" and (known < 0).any():
            raise ValueError(f"sensor {name!r} is to be a count, and holds {known.min():g}")
        found.append(Sensor(name, kind, names))
    if not found:
        raise ValueError("no sensor has two different readings; there is nothing to learn from")
    return found


def _scaled(sensor: Sensor, values: np.ndarray, step: float) -> Sensor:
    window = max(int(round(15 / step)), 1)
    slopes = slope(values, window, window) / step if sensor.kind == "slow" else np.zeros(1)
    return scaled(sensor, values, slopes)


def _folds(data: Record, folds: int) -> np.ndarray:
    """``(T,)``: days with labels are dealt in turn, so that each fold lacks days of both kinds.

    Were all weekends in one fold, the experts that are judged there would know none. Of fewer days than
    folds, hours are dealt.
    """
    labelled = data.label >= 0
    days, first = np.unique(data.day[labelled], return_index=True)
    if len(days) >= folds:
        weekend = data.weekend[np.flatnonzero(labelled)[first]]
        dealt = np.empty(len(days), int)
        dealt[np.lexsort((days, weekend))] = np.arange(len(days)) % folds
        return dealt[np.searchsorted(days, data.day).clip(0, len(days) - 1)]
    order = np.cumsum(labelled)
    return np.minimum(order * folds // (order[-1] + 1), folds - 1)


def _thinned(rows: np.ndarray) -> np.ndarray:
    """Which of very many slots to learn from."""
    every = -(-int(rows.sum()) // MOST_ROWS)
    return rows & (np.cumsum(rows) % every == 0) if every > 1 else rows


def _unseen(experts, groups, fold, sensors, data: Record, rows, *, future=True) -> Tables:
    """The tables of some slots, each by the members that have not seen its day."""
    parts = record_tables([experts.group(g) for g in groups[:-1]], data, sensors, future=future, rows=rows)
    return Tables(*(np.choose(fold[rows, None], [getattr(p, n) for p in parts]) for n in TABLES))


def _calibrated(experts, groups, fold, sensors, data) -> tuple[tuple[RedrawChain, RedrawChain], float]:
    """The chains for looking back and for the moment, and the log-loss of the first."""
    rows = calibrating(data.label)
    label, starts = data.label[rows], data.starts[rows]
    chain, loss = calibrate(_unseen(experts, groups, fold, sensors, data, rows), label, starts)
    unseen = _unseen(experts, groups, fold, sensors, data, rows, future=False)
    online, _ = calibrate(unseen, label, starts, start=chain)
    return (chain, online), loss


def _filled(key, experts, groups, chain, sensors, data: Record, rows) -> np.ndarray:
    """Labels of some slots for each member, drawn from its group's posterior where there is none."""
    known = data.label[rows] >= 0
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    columns = []
    for group in groups:
        (tables,) = record_tables([experts.group(group)], data, sensors)
        p = smoothed(chain, tables, data.starts, label=data.label)[rows]
        for _ in range(group.stop - group.start):
            drawn = (p.cumsum(1) < rng.random((len(p), 1))).sum(1).clip(0, p.shape[1] - 1)
            columns.append(np.where(known, data.label[rows], drawn))
    return np.stack(columns, -1)
