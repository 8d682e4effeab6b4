"""A home learned from a table: any names and kinds, missing cells and labels, and clear errors."""

import warnings
from functools import lru_cache

import jax
import numpy as np
import pandas as pd
import pytest

import numpyro_maf as nm
from numpyro_maf import activities
from numpyro_maf.activities import chain as chains
from numpyro_maf.activities import features, learning
from numpyro_maf.activities.durations import Dynamics
from numpyro_maf.activities.experts import Tables
from numpyro_maf.activities.features import features_of, slope
from numpyro_maf.activities.records import record
from numpyro_maf.activities.scores import confident_and_wrong
from numpyro_maf.activities.sensors import find_kind

NAMES = ["cook", "rest", "sleep"]


def simulated(days, seed=0, start="2024-03-04"):
    """Nights, rests and meals; a bed, motion, a stove and the temperature of the kitchen."""
    rng = np.random.default_rng(seed)
    label, hour = [], 0.0
    while len(label) < days * 288:
        hour = len(label) / 12 % 24
        if hour < 7 or hour > 22.5:
            label += [2] * int(rng.integers(60, 90))
        else:
            label += [int(rng.random() < 0.4) ^ 1] * int(rng.integers(4, 12))
    label = np.array(label[: days * 288])
    bed = np.where(rng.random(len(label)) < 0.02, 1 - (label == 2), label == 2)
    stove = (label == 0) & (rng.random(len(label)) < 0.5)
    steps = rng.poisson(np.array([1.5, 0.5, 0.02])[label])
    heat = np.zeros(len(label))
    for t in range(1, len(label)):
        heat[t] = 0.9 * heat[t - 1] + 0.4 * (label[t] == 0)
    return pd.DataFrame({
        "when": pd.date_range(start, periods=len(label), freq="5min"),
        "what": np.array(NAMES, object)[label],
        "bed mat": bed.astype(bool),
        "Küche: Bewegung": steps,
        "stove": np.where(stove, "on", "off"),
        "°C": 20 + heat + 0.1 * rng.normal(size=len(label)),
    })  # fmt: skip


@lru_cache
def learned():
    """A home of eight days, in which some cells and two days' labels are missing."""
    frame = simulated(8)
    frame.loc[100:300, "°C"] = np.nan
    frame.loc[frame.index[5 * 288 : 7 * 288], "what"] = None
    frame = frame.sample(frac=0.97, random_state=0)  # rows are shuffled, and some are not there
    return activities.fit(frame, time="when", label="what", members=2, folds=2, steps=250, progress=False)


@lru_cache
def fresh():
    frame = simulated(3, seed=1, start="2024-04-01")
    return frame, learned().predict(frame)


def test_kinds_are_found():
    kinds = {s.name: s.kind for s in learned().sensors}
    assert kinds == {"bed mat": "binary", "Küche: Bewegung": "count", "stove": "binary", "°C": "slow"}
    assert learned().step == 5
    rng = np.random.default_rng(0)
    jumps = np.repeat(rng.choice([0.0, 300.0], 50), 20) + rng.normal(size=1000)
    assert find_kind(jumps, ()) == "fast"
    assert find_kind(np.cumsum(rng.normal(size=1000)), ()) == "slow"
    assert find_kind(rng.integers(0, 3, 100).astype(float), ("a", "b", "c")) == "categorical"


def test_probabilities_of_a_new_home_are_right_and_calibrated():
    frame, p = fresh()
    assert list(p.columns) == NAMES and p.index.equals(frame.index)
    np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-4)
    scores = learned().score(frame)
    share = frame.what.value_counts(normalize=True)
    assert scores["log_loss"] < 0.4 * -(share * np.log(share)).sum()
    assert scores["accuracy"] > 0.9 and scores["ece"] < 0.05
    assert scores["minutes"] == 5 * len(frame)


def test_order_and_labels_of_rows_do_not_matter():
    frame, p = fresh()
    shuffled = frame.drop(columns="what").sample(frac=1, random_state=1)
    again = learned().predict(shuffled)
    np.testing.assert_allclose(again.loc[p.index], p, atol=1e-5)


def test_a_zone_and_a_clock_change():
    frame = simulated(2, start="2024-03-30").drop(columns="what")
    zoned = frame.assign(when=frame.when.dt.tz_localize("UTC").dt.tz_convert("Europe/Berlin"))
    data = record(zoned, "when", learned().sensors, minutes=5)
    assert len(data) == len(frame) and data.starts.sum() == 1
    assert data.hour[0] == 1 and data.hour[-1] == pytest.approx(1 + 55 / 60)  # winter time, then summer time
    text = zoned.assign(when=zoned.when.astype(str))
    np.testing.assert_allclose(learned().predict(text), learned().predict(zoned), atol=1e-6)


def test_missing_sensors_say_nothing_and_leave_doubt():
    frame, p = fresh()
    without = learned().predict(frame.drop(columns=["bed mat"]))
    known = p.to_numpy()[np.arange(len(p)), [NAMES.index(w) for w in frame.what]]
    known_without = without.to_numpy()[np.arange(len(p)), [NAMES.index(w) for w in frame.what]]
    assert 0 < np.log(known).mean() - np.log(known_without).mean() < 1
    empty = frame.assign(**dict.fromkeys(["bed mat", "stove", "°C", "Küche: Bewegung"], np.nan))
    nothing = learned().predict(empty)
    night = (frame.when.dt.hour < 5).to_numpy()
    day = frame.when.dt.hour.between(12, 20).to_numpy()
    assert nothing["sleep"][night].mean() > 0.6
    assert abs(nothing["rest"][day].mean() - 0.6) < 0.15  # as often as it is at that hour


def test_a_stream_gives_what_the_table_gives():
    frame = fresh()[0].iloc[:150]
    expected = learned().predict(frame, online=True)
    stream = learned().filter()
    columns = [s.name for s in learned().sensors]
    for i, row in frame.iterrows():
        if 60 <= i < 64:  # nothing comes for twenty minutes
            continue
        found = stream.update(row["when"], {c: row[c] for c in columns})
        if i < 60:
            np.testing.assert_allclose(found, expected.loc[i], atol=2e-4)
    cut = pd.concat([frame.iloc[:60], frame.iloc[64:]])
    np.testing.assert_allclose(found, learned().predict(cut, online=True).iloc[-1], atol=2e-4)
    ahead = stream.forecast(30)
    np.testing.assert_allclose(ahead, learned().forecast(30, cut), atol=2e-3)
    with pytest.raises(ValueError, match="before the last reading"):
        stream.update("2020-01-01", {})
    with pytest.raises(ValueError, match="no sensor 'bedmat'"):
        stream.update("2030-01-01", {"bedmat": 1})
    with pytest.raises(ValueError, match="no reading has come"):
        _ = learned().filter().probabilities


def test_forecasts_begin_with_now_and_end_with_the_hour():
    frame = fresh()[0]
    evening = frame[frame.when < "2024-04-02 23:30"]
    ahead = learned().forecast(16 * 60, evening)
    assert len(ahead) == 192 and ahead.index[0] == pd.Timestamp("2024-04-02 23:30")
    np.testing.assert_allclose(ahead.sum(axis=1), 1, atol=1e-4)
    assert ahead["sleep"].iloc[0] > 0.8 > 0.3 > ahead["sleep"].iloc[-1]


def test_fast_recursions_are_those_of_the_hidden_markov_chain():
    rng = np.random.default_rng(0)
    steps, states = 300, 4
    tables = Tables(*(rng.normal(size=(steps, states)).astype(np.float32) for _ in range(3)))
    starts = rng.random(steps) < 0.02
    starts[0] = True
    label = np.where(rng.random(steps) < 0.05, rng.integers(0, states, steps), -1)
    chain = chains.RedrawChain(rng.uniform(0.05, 0.9, states).astype(np.float32), 0.7, 0.5, 0.01, 0.02)
    parts = tables.schedule, tables.emission, tables.recogniser
    hmm = chain.hmm(*parts, starts, label=label)
    found = chains.smoothed(chain, tables, starts, label=label)
    np.testing.assert_allclose(found, hmm.marginals, atol=1e-4)
    filtered = chains.smoothed(chain, tables, starts, label=label, what="filtered")
    np.testing.assert_allclose(filtered, hmm.filtered, atol=1e-4)
    path = chains.smoothed(chain, tables, starts, label=label, what="path")
    np.testing.assert_allclose(hmm.log_prob(path), hmm.log_prob(hmm.mode), rtol=1e-5)


def test_decoded_paths_and_explanations():
    frame, p = fresh()
    path = learned().decode(frame)
    assert (path == frame.what).mean() > 0.9 and (path == p.idxmax(axis=1)).mean() > 0.9
    night = frame.when[(frame.what == "sleep") & (frame["bed mat"])].iloc[20]
    why = learned().explain(frame, night)
    assert set(why.index) == {"bed mat", "Küche: Bewegung", "stove", "°C", "time of day"}
    assert why.loc["time of day", "sleep"] > 0
    with pytest.raises(ValueError, match="is not in the frame"):
        learned().explain(frame, "2030-01-01")


def test_drawn_days_look_like_days():
    drawn = learned().sample(4, key=0)
    share = drawn.what.value_counts(normalize=True)
    true = simulated(8).what.value_counts(normalize=True)
    assert abs(share.get("sleep", 0) - true["sleep"]) < 0.15
    assert drawn["bed mat"][drawn.what == "sleep"].mean() > 0.8
    assert drawn["Küche: Bewegung"][drawn.what == "cook"].mean() > drawn["Küche: Bewegung"][
        drawn.what == "sleep"].mean()  # fmt: skip


def test_files_hold_the_home_and_no_code(tmp_path):
    learned().save(tmp_path / "home")
    again = activities.load(tmp_path / "home")
    assert repr(again) == repr(learned())
    frame, p = fresh()
    np.testing.assert_array_equal(again.predict(frame), p)
    assert isinstance(nm.load(tmp_path / "home"), activities.Home)
    nm.save(tmp_path / "flow", nm.maf(0, 2))
    with pytest.raises(ValueError, match="not a Home"):
        activities.load(tmp_path / "flow")


def test_pictures_show_every_activity(tmp_path):
    pytest.importorskip("matplotlib")
    frame = fresh()[0].copy()
    frame.loc[50:80, "what"] = None
    figure = learned().plot(frame, path=tmp_path / "day.png", day="2024-04-01")
    texts = [t.get_text() for t in figure.axes[0].texts]
    assert texts == NAMES and (tmp_path / "day.png").stat().st_size > 10_000
    assert len(figure.axes) == 3  # activities, sensors that are on or off, the temperature
    with pytest.raises(ValueError, match="has no 2024-05-01"):
        learned().plot(frame, day="2024-05-01")


def fit(frame, **options):
    return activities.fit(frame, time="when", label="what", progress=False, **options)


BAD = {
    "no time": (lambda f: f.drop(columns="when"), "no column 'when'"),
    "no label": (lambda f: f.drop(columns="what"), "no column 'what'"),
    "no rows": (lambda f: f.iloc[:0], "no rows"),
    "one activity": (lambda f: f.assign(what="rest"), "one activity, 'rest'"),
    "no label known": (lambda f: f.assign(what=None), "holds no label"),
    "no sensor": (lambda f: f[["when", "what"]], "no sensor"),
    "numbers as times": (lambda f: f.assign(when=np.arange(len(f))), "holds numbers, not times"),
    "a bad time": (lambda f: f.assign(when=["soon", *f.when.astype(str)[1:]]), "'soon' at row 0"),
    "text among numbers": (
        lambda f: f.assign(**{"°C": f["°C"].astype(object).where(f.index != 7, "warm")}), "'warm' at row 7",
    ),
    "infinite": (lambda f: f.assign(**{"°C": f["°C"].where(f.index != 9, np.inf)}), "infinite at row 9"),
    "all constant": (lambda f: f[["when", "what"]].assign(a=1.0), "two different readings"),
}  # fmt: skip


@pytest.mark.parametrize("change, words", BAD.values(), ids=BAD)
def test_bad_tables_are_refused_with_column_and_row(change, words):
    with warnings.catch_warnings(), pytest.raises(ValueError, match=words):
        warnings.simplefilter("ignore")
        fit(change(simulated(1)))


def test_bad_arguments_are_refused():
    frame = simulated(1)
    with pytest.raises(ValueError, match="no column 'x'"):
        fit(frame, sensors=["x"])
    with pytest.raises(ValueError, match="kind must be one of"):
        fit(frame, sensors={"°C": "warm"})
    with pytest.raises(ValueError, match="is to be binary, and holds"):
        fit(frame, sensors={"°C": "binary"})
    with pytest.raises(TypeError, match="DataFrame of pandas, polars or xarray"):
        fit([1, 2, 3])
    with pytest.raises(ValueError, match="'dance' at row 5 is an activity that was not in training"):
        learned().score(frame.assign(what=frame.what.where(frame.index != 5, "dance")))
    with pytest.raises(ValueError, match="none of the sensors"):
        learned().predict(frame[["when"]])
    with pytest.raises(ValueError, match="no label to score"):
        learned().score(frame.assign(what=None))


def test_one_row_and_an_xarray_table():
    frame = fresh()[0]
    assert learned().predict(frame.iloc[[100]]).shape == (1, 3)
    table = frame.drop(columns="what").set_index("when").to_xarray()
    np.testing.assert_allclose(learned().predict(table), fresh()[1], atol=1e-6)


def test_events_become_a_table():
    events = pd.DataFrame({
        "sensor": ["door", "door", "bed"],
        "start": pd.to_datetime(["2024-01-01 10:00:10", "2024-01-01 10:03:00", "2024-01-01 10:01:30"]),
        "end": pd.to_datetime(["2024-01-01 10:00:20", None, "2024-01-01 10:02:10"]),
    })  # fmt: skip
    labels = pd.DataFrame({
        "activity": ["up", "lie"],
        "start": ["2024-01-01 10:00:00", "2024-01-01 10:01:20"],
        "end": ["2024-01-01 10:01:10", "2024-01-01 10:02:59"],
    })  # fmt: skip
    table = activities.from_events(events, labels)
    assert list(table.columns) == ["time", "bed", "door", "activity"]
    assert table.door.tolist() == [1, 0, 0, 1] and table.bed.tolist() == [0, 1, 1, 0]
    assert table.activity.tolist()[:3] == ["up", "lie", "lie"] and pd.isna(table.activity[3])
    wrong = events.assign(end=events.start - pd.Timedelta(seconds=5))
    wrong = pd.concat([events, wrong.iloc[:1].assign(sensor="window")])
    with pytest.warns(UserWarning, match="before it starts"):
        kept = activities.from_events(wrong, labels)
    pd.testing.assert_frame_equal(kept, table)
    with pytest.raises(ValueError, match="'sensor' is empty at row 1"):
        activities.from_events(events.assign(sensor=["door", None, "bed"]))


def test_rows_of_one_slot_are_one_reading():
    frame = fresh()[0].iloc[:60]
    twice = pd.concat([frame, frame.assign(when=frame.when + pd.Timedelta("2min"))]).sort_values("when")
    data = record(twice, "when", learned().sensors, minutes=5)
    once = record(frame, "when", learned().sensors, minutes=5)
    sums = np.array([2 if s.kind == "count" else 1 for s in learned().sensors])
    np.testing.assert_allclose(data.values, once.values * sums)
    stream = learned().filter()
    for _, row in twice.iterrows():
        found = stream.update(row["when"], row.drop(["when", "what"]))
    np.testing.assert_allclose(found, learned().predict(twice, online=True).iloc[-1], atol=2e-4)


def test_slopes_are_least_squares():
    rng = np.random.default_rng(0)
    values = rng.normal(size=40)
    values[10:14] = np.nan
    found = slope(values, 5, 3)
    for t in (0, 7, 12, 20, 39):
        window = np.arange(max(t - 5, 0), min(t + 4, 40))
        kept = window[~np.isnan(values[window])]
        np.testing.assert_allclose(found[t], np.polyfit(kept, values[kept], 1)[0], atol=1e-9)


def test_features_ahead_and_of_missing_sensors_are_marked():
    frame = simulated(1)
    sensors = learned().sensors
    data = record(frame, "when", sensors, minutes=5)
    whole = features_of(data, sensors)
    later = frame.copy()
    for column in ("bed mat", "stove"):
        later.loc[150:, column] = frame[column].iloc[::-1].to_numpy()[150:]
    other = features_of(record(later, "when", sensors, minutes=5), sensors)
    past = ~whole.ahead
    np.testing.assert_array_equal(whole.memory[:150, past], other.memory[:150, past])
    changed = np.abs(whole.memory[:150] - other.memory[:150]).max(0) > 0
    assert changed.any() and whole.ahead[changed].all()


def test_features_block_by_block_are_those_of_the_whole(monkeypatch):
    sensors = learned().sensors
    data = record(fresh()[0], "when", sensors, minutes=5)
    whole = features_of(data, sensors)
    monkeypatch.setattr(features, "BLOCK", 200)
    rows = np.random.default_rng(0).random(len(data)) < 0.5
    parts = features.features_at(data, sensors, rows)
    for name in features.Features.OF_ROWS:
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name)[rows], atol=1e-4, err_msg=name)
    assert len(list(features.blocks(data, sensors))) == -(-len(data) // 200) > 3


def test_lengths_of_visits_are_those_that_were_seen():
    label = np.tile(np.repeat([0, 1], [30, 10]), 20)
    time = np.datetime64("2024-01-01", "ns") + np.arange(800) * np.timedelta64(60, "s")
    none = np.zeros(800, int)
    data = nm.activities.records.Record(time, none == np.arange(800), label[:, None] * 1.0, label, none, 1.0)
    found = Dynamics.of(data, 2)
    lengths = np.arange(1, found.durations.shape[1] + 1)
    assert abs((found.durations @ lengths)[0] - 30) < 5
    assert abs((found.durations @ lengths)[1] - 10) < 6
    np.testing.assert_allclose(found.moves, [[0, 1], [1, 0]], atol=0.06)


def test_minutes_that_are_confident_and_wrong():
    p = np.tile([0.99, 0.01], (40, 1))
    label = np.zeros(40, int)
    label[5:20] = 1  # 15 minutes
    label[30:35] = 1  # five do not count
    assert confident_and_wrong(p, label, 1.0) == 15
    assert confident_and_wrong(np.full((40, 2), 0.5), label, 1.0) == 0


def test_the_command_does_all(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from numpyro_maf.activities.command import main

    learned().save(tmp_path / "home")
    frame = fresh()[0].iloc[:288]
    frame.to_csv(tmp_path / "new.csv", index=False)
    out = tmp_path / "out"
    arguments = ["--home", str(tmp_path / "home"), "--predict", str(tmp_path / "new.csv"), "--out", str(out)]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "log_loss" in said and "report.html" in said
    written = pd.read_csv(out / "probabilities_new.csv")
    np.testing.assert_allclose(written[NAMES], learned().predict(frame), atol=2e-5)
    page = (out / "report.html").read_text()
    assert page.count("<img") == 1 and "expected calibration error" in page
    assert main(["--home", "a", "b.csv"]) == 2
    (tmp_path / "bad.csv").write_text("when,what,a\n2024-01-01,x,1\n2024-01-02,y,two\n2024-01-03,y,3\n")
    bad = [str(tmp_path / "bad.csv"), "--time", "when", "--label", "what", "--save", str(tmp_path / "h")]
    assert main(bad) == 1
    assert "'two' at row 3" in capsys.readouterr().err
    assert main(["--home", str(tmp_path / "nothing"), "--predict", "x.csv"]) == 1
    assert main(["--help"]) == 0 and jax.devices()


def test_each_fold_lacks_weekdays_and_weekends():
    frame = simulated(14, start="2024-03-04")  # a Monday
    data = record(frame, "when", learned().sensors, label="what", activities=NAMES, minutes=5)
    fold = learning._folds(data, 3)
    for number in range(3):
        for weekend in (False, True):
            days = np.unique(data.day[(fold == number) & (data.weekend == weekend)])
            assert len(days) in ((3, 4) if not weekend else (1, 2))
    assert all(len(np.unique(fold[data.day == day])) == 1 for day in np.unique(data.day))
    short = record(frame[:100], "when", learned().sensors, label="what", activities=NAMES, minutes=5)
    assert np.bincount(learning._folds(short, 3)).min() > 30
