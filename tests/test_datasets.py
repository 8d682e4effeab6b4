"""Occupancy loader, and the physics, diary and sensors of the simulated flat."""

import os
from pathlib import Path

import numpy as np
import pytest

from numpyro_maf import datasets
from numpyro_maf.datasets import (
    FLAT_ACTIVITIES,
    OCCUPANCY_SHA256,
    SensorData,
    balance,
    load_occupancy,
    saturation_pressure,
    simulate_flat,
)

ROWS = {
    "datatraining": [
        '"1","2015-02-04 17:51:00",23.18,27.272,426,721.25,0.00479298817650529,1',
        '"2","2015-02-04 17:51:59",23.15,27.2675,429.5,714,0.00478344094931065,0',
    ],
    "datatest": ['"140","2015-02-02 14:19:00",23.7,26.272,585.2,749.2,0.00476416302416414,1'],
    "datatest2": ['"1",2015-02-11 14:48:00,21.76,31.13,437.3,1029.7,0.00502101089021385,1'],
}
HEADER = '"date","Temperature","Humidity","Light","CO2","HumidityRatio","Occupancy"'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files in the format of the published ones, dates quoted in two of the three."""
    for stem, rows in ROWS.items():
        (tmp_path / f"{stem}.txt").write_text("\n".join([HEADER, *rows, ""]))
    return tmp_path


@pytest.fixture(scope="module")
def flat() -> SensorData:
    return simulate_flat(days=14, seed=0)


# Physics: closed forms and tabulated values.


@pytest.mark.parametrize(("celsius", "pascal"), [(0, 611.2), (10, 1228), (20, 2339), (30, 4247)])
def test_saturation_pressure_agrees_with_steam_tables(celsius, pascal):
    assert saturation_pressure(celsius) == pytest.approx(pascal, rel=0.004)


def test_co2_of_an_occupied_room_follows_the_closed_form():
    changes, outdoor, emission, volume = 0.5, 420.0, 16.0, 125.0  # 1/h, ppm, L/h, m3
    minutes = np.arange(1, 3001)
    rate = np.full(minutes.size, changes / 60)
    co2 = balance(700.0, rate, rate * outdoor + 1000 * emission / volume / 60)
    steady = 676.0  # ppm: 420 + 1000 * 16 / (0.5 * 125)
    expected = steady + (700.0 - steady) * np.exp(-changes * minutes / 60)
    np.testing.assert_allclose(co2, expected, rtol=1e-12)


def test_closed_room_keeps_all_that_is_emitted():
    source = np.random.default_rng(0).uniform(0, 5, 500)
    np.testing.assert_allclose(balance(3.0, np.zeros(500), source), 3 + np.cumsum(source))


def test_all_that_is_emitted_leaves_through_ventilation():
    source = np.where(np.arange(4000) < 10, 7.0, 0.0)
    path = np.append(0, balance(0.0, np.full(4000, 0.01), source))
    assert 0.01 * np.sum(path[1:] + path[:-1]) / 2 == pytest.approx(70.0, rel=1e-4)


def test_balance_is_exact_for_any_step():
    rate, source = np.random.default_rng(1).uniform(0, 0.1, (2, 50))
    halves = balance(2.0, np.repeat(rate, 2) / 2, np.repeat(source, 2) / 2)
    np.testing.assert_allclose(halves[1::2], balance(2.0, rate, source))


@pytest.mark.parametrize(
    ("outdoor", "target", "steady"),
    [
        (5.0, 0.0, 10.0),  # radiator shut: outdoor + gains / loss
        (5.0, 20.0, (1000 * 20 + 60 * 5 + 300) / 1060),  # valve within its band
        (-40.0, 20.0, -40 + (300 + 2500) / 60),  # radiator at its limit
    ],
)
def test_heat_balance_reaches_its_steady_state(outdoor, target, steady):
    loss, gains, gain, limit, per_watt = 60.0, 300.0, 1000.0, 2500.0, 60 / 3e6
    ones = np.ones(20_000)
    path = balance(
        15.0,
        per_watt * loss * ones,
        per_watt * (loss * outdoor + gains) * ones,
        target,
        per_watt * gain,
        per_watt * limit,
    )
    assert path[-1] == pytest.approx(steady, abs=1e-6)


# The simulated flat.


def test_flat_has_a_row_a_minute_of_finite_readings(flat):
    assert flat.activities == FLAT_ACTIVITIES and len(FLAT_ACTIVITIES) == 7
    assert flat.names == ("temperature", "humidity", "co2", "light", "motion", "power")
    assert flat.units == ("degC", "%", "ppm", "lux", "events/min", "W")
    assert flat.values.shape == (14 * 1440, 6) and flat.values.dtype == np.float64
    assert flat.activity.shape == flat.time.shape == (14 * 1440,)
    assert flat.time.dtype == "datetime64[s]"
    assert set(np.diff(flat.time).astype(int)) == {60}
    assert np.isfinite(flat.values).all()


@pytest.mark.parametrize("start", ["2024-01-01", "2024-07-01"])
def test_readings_are_plausible_in_winter_and_summer(start):
    data = simulate_flat(days=14, seed=1, start=start)
    lower = [13, 15, 330, 0, 0, 0]
    # No more CO2 than the steady state of the most active person at the lowest ventilation.
    most = 1000 * datasets.CO2_EMISSION.max() / (datasets.VOLUME * datasets.LEAKAGE)
    upper = [35, 100, datasets.OUTDOOR_CO2 + most + 80, 2000, 60, 9000]
    assert (data.values >= lower).all() and (data.values <= upper).all()
    assert (data.values.std(axis=0) > [0.5, 2, 50, 50, 0.5, 100]).all()


def test_readings_are_digital(flat):
    ticks = flat.values / datasets.RESOLUTION
    np.testing.assert_allclose(ticks, np.round(ticks), atol=1e-8)


def test_same_seed_same_data(flat):
    again, other = simulate_flat(days=14, seed=0), simulate_flat(days=14, seed=1)
    np.testing.assert_array_equal(again.values, flat.values)
    np.testing.assert_array_equal(again.activity, flat.activity)
    assert (other.values != flat.values).any() and (other.activity != flat.activity).any()


def test_step_thins_the_readings(flat):
    coarse = simulate_flat(days=14, seed=0, step=5)
    np.testing.assert_array_equal(coarse.values, flat.values[::5])
    np.testing.assert_array_equal(coarse.time, flat.time[::5])


@pytest.mark.parametrize("seed", range(5))
def test_a_fortnight_has_every_activity_in_plausible_shares(seed):
    shares = np.bincount(simulate_flat(14, seed).activity, minlength=7) / (14 * 1440)
    lower = [0.25, 0.02, 0.01, 0.03, 0.06, 0.05, 0.10]
    upper = [0.40, 0.08, 0.05, 0.10, 0.25, 0.30, 0.40]
    assert (shares > lower).all() and (shares < upper).all(), shares


def test_sensors_respond_to_activities(flat):
    mean = {
        name: dict(zip(flat.names, flat.values[flat.activity == k].mean(axis=0), strict=True))
        for k, name in enumerate(flat.activities)
    }
    assert mean["sleeping"]["co2"] > mean["away"]["co2"] + 50
    assert mean["cooking"]["motion"] > 3 * mean["watching television"]["motion"]
    assert mean["away"]["motion"] == 0 < mean["sleeping"]["motion"] < 0.1
    assert mean["cooking"]["power"] > mean["washing up"]["power"] > 2 * mean["working"]["power"]
    assert min(mean["cooking"]["humidity"], mean["washing up"]["humidity"]) > (mean["away"]["humidity"] + 2)
    assert mean["working"]["light"] > mean["watching television"]["light"] > mean["sleeping"]["light"]


def test_cooking_and_washing_up_overlap_but_differ():
    def wet(seed):
        data = simulate_flat(28, seed)
        data = data.rows(np.isin(data.activity, [1, 2]))
        inputs = np.column_stack([np.ones(data.time.size), data.values, data.hour])
        return inputs, data.activity == 1

    inputs, cooking = wet(0)
    share = np.where(cooking, cooking.mean(), 1 - cooking.mean())
    weights = np.linalg.lstsq(inputs / share[:, None], (2.0 * cooking - 1) / share, rcond=None)[0]
    inputs, cooking = wet(1)
    right = (inputs @ weights > 0) == cooking
    assert 0.58 < (right[cooking].mean() + right[~cooking].mean()) / 2 < 0.9


@pytest.mark.parametrize(
    "wrong", [{"days": 0}, {"step": 0}, {"step": 7}, {"start": "tomorrow"}, {"start": ""}]
)
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match="days|isoformat"):
        simulate_flat(**wrong)


# SensorData.


def test_hour_and_weekday():
    data = simulate_flat(days=2, start="2024-02-29")  # a Thursday
    assert data.hour[[0, 90, 1439, 1440]] == pytest.approx([0, 1.5, 1439 / 60, 0])
    assert data.weekday[[0, 1439, 1440]].tolist() == [3, 3, 4]


def test_select_keeps_values_units_and_the_asked_order(flat):
    part = flat.select(["power", "co2"])
    assert (part.names, part.units) == (("power", "co2"), ("W", "ppm"))
    np.testing.assert_array_equal(part.values, flat.values[:, [5, 2]])


def test_select_names_unknown_sensors(flat):
    with pytest.raises(ValueError, match="radar"):
        flat.select(["co2", "radar"])


def test_rows_by_mask_numbers_and_slice_agree(flat):
    mask = flat.activity == 2
    numbers = np.flatnonzero(mask)
    for part in flat.rows(mask), flat.rows(numbers):
        np.testing.assert_array_equal(part.values, flat.values[numbers])
        np.testing.assert_array_equal(part.time, flat.time[numbers])
        assert set(part.activity) == {2}
    np.testing.assert_array_equal(flat.rows(slice(3, 9)).hour, flat.hour[3:9])


def test_shapes_that_disagree_are_refused(flat):
    with pytest.raises(ValueError, match="shapes"):
        SensorData(flat.time[:-1], flat.values, flat.names, flat.units, flat.activity, flat.activities)
    with pytest.raises(ValueError, match="shapes"):
        SensorData(flat.time, flat.values, flat.names, flat.units[:-1], flat.activity, flat.activities)


# Occupancy files.


def test_loader_reads_rows_with_quoted_and_bare_dates(folder):
    data = load_occupancy(folder, verify=False)
    assert set(data) == {"datatraining", "datatest", "datatest2"}
    train = data["datatraining"]
    assert (
        train.time.tolist()
        == np.array(["2015-02-04T17:51", "2015-02-04T17:51:59"], dtype="datetime64[s]").tolist()
    )
    np.testing.assert_array_equal(train.values[1], [23.15, 27.2675, 429.5, 714, 0.00478344094931065])
    assert train.names == ("temperature", "humidity", "light", "co2", "humidity_ratio")
    assert train.activity.tolist() == [1, 0] and train.activities == ("vacant", "occupied")
    assert data["datatest2"].time[0] == np.datetime64("2015-02-11T14:48:00")


def test_loader_refuses_other_files(folder):
    with pytest.raises(ValueError, match=r"datatraining\.txt.*expected") as error:
        load_occupancy(folder)
    assert OCCUPANCY_SHA256["datatraining"] in str(error.value)


def test_loader_says_which_file_is_missing_and_where_it_is(folder):
    (folder / "datatest2.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"datatest2\.txt.*archive\.ics\.uci\.edu"):
        load_occupancy(folder, verify=False)


@pytest.mark.parametrize(
    "row",
    [
        '"2",2015-02-02 14:20:00,23.7,26.2,585,749,1',
        '"2",2015-02-02 14:20:00,23.7,wet,585,749,0.0047,1',
        '"2",yesterday,23.7,26.2,585,749,0.0047,1',
        '"2",2015-02-02 14:20:00,23.7,26.2,585,749,0.0047,2',
        "2",
    ],
)
def test_loader_names_file_and_line_of_a_bad_row(folder, row):
    with (folder / "datatest.txt").open("a") as file:
        file.write(row + "\n")
    with pytest.raises(ValueError, match=r"datatest\.txt, line 3"):
        load_occupancy(folder, verify=False)


def test_loader_reads_the_published_files():
    if not (root := os.environ.get("NUMPYRO_MAF_DATA")):
        pytest.skip("NUMPYRO_MAF_DATA is not set to a directory that contains occupancy/")
    data = load_occupancy(Path(root) / "occupancy")
    counts = {stem: (part.time.size, part.activity.sum()) for stem, part in data.items()}
    assert counts == {
        "datatraining": (8143, 1729), "datatest": (2665, 972), "datatest2": (9752, 2049),
    }  # fmt: skip
    for part in data.values():
        gaps = np.diff(part.time).astype(int)
        assert set(gaps) == {59, 60, 61}
    np.testing.assert_array_equal(
        data["datatest"].values[0], [23.7, 26.272, 585.2, 749.2, 0.00476416302416414]
    )
