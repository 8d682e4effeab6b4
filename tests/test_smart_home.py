"""The example: a simulated flat and a real office, through the library."""

import json

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from numpyro_maf.activities.scores import scores_of
from numpyro_maf.datasets import simulate_flat
from numpyro_maf.diagnostics import classification_scores, expected_calibration_error
from numpyro_maf.examples import smart_home

METHODS = {"home", "online", "lda", "logistic"}


def test_scores_by_hand():
    p = np.array([[0.8, 0.2], [0.4, 0.6], [0.1, 0.9], [0.7, 0.3]])
    label = np.array([0, 0, 1, 0])
    scores = scores_of(p, label, 1.0)
    assert scores["accuracy"] == 0.75 and scores["minutes"] == 4
    np.testing.assert_allclose(scores["log_loss"], -np.log([0.8, 0.4, 0.9, 0.7]).mean())
    np.testing.assert_allclose(scores["ece"], (0.2 + 0.6 + 0.1 + 0.3) / 4)  # each in a bin of its own
    # Activity 0: two hits, no false alarm, one missed; activity 1: one hit, one false alarm.
    np.testing.assert_allclose(scores["macro_f1"], (2 * 2 / (2 + 3) + 2 * 1 / (2 + 1)) / 2)
    np.testing.assert_allclose(expected_calibration_error([0.75] * 4, [1, 1, 1, 0]), 0)
    with pytest.raises(ValueError, match="labels"):
        classification_scores(p, np.zeros(3, int))


def test_frames_hold_what_the_data_hold():
    data = simulate_flat(1)
    frame = smart_home.frame_of(data)
    np.testing.assert_array_equal(frame[list(data.names)], data.values)
    assert frame.activity.tolist() == [data.activities[k] for k in data.activity]


@pytest.mark.slow
def test_simulated_flat_from_the_command_line(tmp_path, capsys):
    metrics = smart_home.main(["--out", str(tmp_path), "--quiet"])
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    scores = metrics["simulated"]["test"]
    assert set(scores) == METHODS
    for rival in ("lda", "logistic"):
        assert scores["home"]["log_loss"] < scores[rival]["log_loss"]
        assert scores["home"]["accuracy"] > scores[rival]["accuracy"]
    assert scores["home"]["log_loss"] < 0.25 and scores["home"]["ece"] < 0.03
    assert (tmp_path / "flat" / "report.html").read_text().count("<img") == 7
    assert "report.html" in capsys.readouterr().out


@pytest.fixture(scope="module")
def office(data_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("office")
    return smart_home.main(
        ["--data", str(data_dir / "occupancy"), "--out", str(out), "--quiet", "--steps", "1000"]
    )


@pytest.mark.slow
def test_office_with_light(office):
    for scores in office["with_light"].values():
        assert scores["home"]["log_loss"] < scores["lda"]["log_loss"]
        assert scores["home"]["ece"] < min(scores["lda"]["ece"], 0.04)


@pytest.mark.slow
def test_office_without_light(office):
    goals = {"datatest": (0.96, 0.12, 0.04), "datatest2": (0.93, 0.20, 0.04)}
    for test, (accuracy, log_loss, ece) in goals.items():
        home = office["without_light"][test]["home"]
        assert home["accuracy"] >= accuracy and home["log_loss"] <= log_loss and home["ece"] <= ece
