"""The main job: its parts against known answers, and both homes from the command line."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers
from numpyro.infer.util import log_density
from scipy.special import softmax

import numpyro_maf as nm
from numpyro_maf.datasets import simulate_flat
from numpyro_maf.diagnostics import classification_scores, expected_calibration_error
from numpyro_maf.examples import smart_home as home

METHODS = {"flow", "gaussian_diagonal", "gaussian_full", "lda", "logistic"}


@pytest.mark.parametrize("size", [3, 4, 40, 100])
def test_slope_is_that_of_least_squares(size):
    series = np.random.default_rng(0).normal(size=size)
    slopes = home.slope(series, 15)
    for t in range(size):
        low, high = max(t - 15, 0), min(t + 15, size - 1)
        window = slice(min(low, size - 3), max(high, 2) + 1)  # three at least
        expected = np.polyfit(np.arange(size)[window], series[window], 1)[0]
        np.testing.assert_allclose(slopes[t], expected, atol=1e-9)


def test_features_ignore_a_shift_of_slow_levels_but_not_of_fast_ones():
    data = simulate_flat(2)
    shift = np.array([3.0, 5.0, 200.0, 0.0, 0.0, 0.0])
    moved = home.replace(data, values=data.values + shift)
    np.testing.assert_allclose(home.features_of(moved), home.features_of(data), atol=1e-4)
    brighter = home.replace(data, values=data.values + shift[::-1])
    assert np.abs(home.features_of(brighter) - home.features_of(data))[:, 3:].min() > 1e-4


def test_time_basis_repeats_daily_and_knows_the_weekend():
    data = simulate_flat(8)  # starts on a Monday
    basis = home.time_basis(data)
    np.testing.assert_allclose(basis[: 4 * 1440], basis[1440 : 5 * 1440], atol=1e-5)
    assert set(data.weekday[basis[:, -1] == 1]) == {5, 6}


def test_chain_without_memory_is_bayes_rule_and_doubt_keeps_a_density():
    rng = np.random.default_rng(0)
    schedule = softmax(rng.normal(size=(5, 3)), -1)
    table = 3 * rng.normal(size=(5, 3))
    chain = home.activity_chain(jnp.ones(3), 1.0, 1e-12, schedule, table)
    rule = softmax(table + np.log(schedule), -1)
    np.testing.assert_allclose(chain.marginals, rule, atol=1e-5)
    nothing = home.activity_chain(jnp.ones(3), 1.0, 1 - 1e-7, schedule, table)
    np.testing.assert_allclose(nothing.marginals, schedule, atol=1e-4)
    # Doubt moves density between activities, not out of the schedule's mixture.
    half = home.activity_chain(jnp.ones(3), 1.0, 0.5, schedule, table)
    np.testing.assert_allclose(half.log_prob(), chain.log_prob(), rtol=1e-5)


def test_calibration_counts_known_minutes_only():
    schedule = jnp.full((2, 4, 2), 0.5)
    table = np.random.default_rng(0).normal(size=(1, 2, 4, 2)).astype(np.float32)
    activity = jnp.array([[0, 1, -1, -1], [1, 1, 0, -1]])
    sites = {
        "pace": jnp.full((1, 1, 2), 0.3),
        "temper": jnp.full((1, 1), 0.4),
        "doubt": jnp.full((1, 1), 0.1),
    }
    model = handlers.substitute(home.calibration_model, data=sites)

    @jax.jit
    def facts(table):
        score = handlers.trace(model).get_trace(schedule, table, activity, 1)["score"]["value"]
        return score, home.activity_chain(jnp.full(2, 0.3), 0.4, 0.1, schedule, table[0]).marginals

    score, marginals = facts(table)
    expected = sum(
        np.log(marginals[i, t, activity[i, t]]) for i in range(2) for t in range(4) if activity[i, t] >= 0
    )
    np.testing.assert_allclose(score, [[expected]], rtol=1e-5)


def test_schedule_model_learns_the_share_of_each_hour():
    data = simulate_flat(6)
    basis, seen = home.time_basis(data), np.ones((1, len(data.time)), bool)
    weights = home.optimise(jax.random.key(0), home.schedule_model, 400, 0.05, basis, data.activity, seen, 7)[
        "schedule"
    ]
    p = home._schedule(weights, basis)
    share = np.bincount(data.activity, minlength=7) / len(data.activity)
    np.testing.assert_allclose(p.mean(0), share, atol=0.02)
    night = (data.hour > 2) & (data.hour < 5)
    assert p[night, 0].mean() > 0.9


def test_scores_by_hand():
    p = np.array([[0.8, 0.2], [0.4, 0.6], [0.1, 0.9], [0.7, 0.3]])
    scores = classification_scores(p, np.array([0, 0, 1, 0]))
    assert scores["accuracy"] == 0.75
    np.testing.assert_allclose(scores["log_loss"], -np.log([0.8, 0.4, 0.9, 0.7]).mean())
    np.testing.assert_allclose(scores["ece"], (0.2 + 0.6 + 0.1 + 0.3) / 4)  # each in a bin of its own
    np.testing.assert_allclose(expected_calibration_error([0.75] * 4, [1, 1, 1, 0]), 0)
    with pytest.raises(ValueError, match="labels"):
        classification_scores(p, np.zeros(3, int))


def test_sites_of_the_models_are_the_documented_ones():
    data = simulate_flat(1)
    x, basis = home.features_of(data), home.time_basis(data)

    def one(key):
        return nm.maf(key, 6, context=9, transforms=1, hidden=(4,))

    flows = nm.Ensemble.init(0, one, 2)
    context = home.emission_context(data.activity, basis, 7, True)
    seen = np.random.default_rng(0).random((2, len(x))) < 0.5

    @jax.jit
    def facts(key):
        arguments = jnp.asarray(x), context, jnp.asarray(seen), jnp.ones(len(x)), flows, 0.0, None
        trace = handlers.trace(handlers.seed(home.emission_model, key)).get_trace(*arguments)
        assert trace["emission$params"]["type"] == "param"
        site = trace["features"]
        each = flows.map(lambda flow: flow(context).log_prob(x))
        total, _ = log_density(handlers.seed(home.emission_model, key), arguments, {}, {})
        return site["fn"].log_prob(site["value"]), each, total

    # Without noise, balance and subsampling the site is the members' own log-densities, masked.
    found, each, total = facts(jax.random.key(0))
    np.testing.assert_allclose(found, np.where(seen, each, 0), rtol=1e-4, atol=1e-4)
    assert total < 0


# The command line, with fewer members and steps than the demo's: what is claimed holds all the same.
SMALLER = """
import sys
from dataclasses import replace
from numpyro_maf.examples import smart_home as home
home.OCCUPANCY = replace(home.OCCUPANCY, members=2, steps=400)
home.FLAT = replace(home.FLAT, members=1, steps=600)
home.main(sys.argv[1:])
"""


def run(folder, *arguments):
    command = [sys.executable, "-W", "error", "-c", SMALLER, "--quiet"]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_DISABLE_MOST_OPTIMIZATIONS"}
    done = subprocess.run(
        [*command, "--out", str(folder), *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "metrics.json").read_text()), done.stdout


def assert_complete(tests):
    for scores in tests.values():
        assert set(scores) == METHODS
        for name, s in scores.items():
            assert set(s) == {"accuracy", "log_loss", "ece", "log_density"}
            assert (s["log_density"] is None) == (name == "logistic")


@pytest.mark.slow
def test_simulated_flat_from_the_command_line(tmp_path):
    metrics, printed = run(tmp_path)
    assert set(metrics) == {"simulated"} and set(metrics["simulated"]) == {"test"}
    assert_complete(metrics["simulated"])
    scores = metrics["simulated"]["test"]
    for rival in METHODS - {"flow"}:
        assert scores["flow"]["log_loss"] < scores[rival]["log_loss"]
        assert scores["flow"]["accuracy"] > scores[rival]["accuracy"]
    assert scores["flow"]["ece"] < 0.03
    assert (tmp_path / "flat_test.png").read_bytes().startswith(b"\x89PNG")
    xarray = pytest.importorskip("xarray")
    posterior = xarray.open_dataset(tmp_path / "flat_test.nc", group="posterior", engine="h5netcdf")
    assert posterior["activity"].shape == (1, 200, 7 * 1440)
    assert "washing up" in printed or "log-loss" in printed


@pytest.mark.slow
def test_office_from_the_command_line(tmp_path, data_dir):
    metrics, _ = run(tmp_path, "--data", str(data_dir / "occupancy"))
    assert set(metrics) == {"without_light", "with_light"}
    goals = {"datatest": (0.96, 0.12, 0.04), "datatest2": (0.93, 0.20, 0.04)}
    for tests in metrics.values():
        assert_complete(tests)
        assert set(tests) == set(goals)
    for test, (accuracy, log_loss, ece) in goals.items():
        flow = metrics["without_light"][test]["flow"]
        assert flow["accuracy"] >= accuracy and flow["log_loss"] <= log_loss and flow["ece"] <= ece
        with_light = metrics["with_light"][test]
        assert with_light["flow"]["log_loss"] < with_light["lda"]["log_loss"]
        assert with_light["flow"]["ece"] < with_light["lda"]["ece"]
