# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Answers in one call, and models compared, where posterior and evidence are known."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
from numpyro.infer.autoguide import AutoDelta

import numpyro_maf as nm
from numpyro_maf.answers.comparison import Comparison, Evidence
from numpyro_maf.answers.routes import gap

RNG = np.random.default_rng(0)
X = RNG.normal(size=(20, 2))
Y = X @ [1.0, -0.5] + 0.5 * RNG.normal(size=20)
QUIET = dict(progress=False)


def regression(x, y=None):
    b = numpyro.sample("b", dist.Normal(0, 1).expand([x.shape[1]]).to_event(1))
    numpyro.sample("y", dist.Normal(x @ b, 0.5).to_event(1), obs=y)


def exact_evidence(x, y=Y):
    return scipy.stats.multivariate_normal(np.zeros(len(y)), x @ x.T + 0.25 * np.eye(len(y))).logpdf(y)


def answer(x=X, key=0, **options):
    return nm.infer(key, regression, {"y": Y}, model_args=(x,), **QUIET | options)


def test_a_model_with_densities_is_answered_and_corrected():
    found = answer()
    precision = np.eye(2) + 4 * X.T @ X
    mean, sd = np.linalg.solve(precision, 4 * X.T @ Y), np.sqrt(np.diag(np.linalg.inv(precision)))
    np.testing.assert_allclose(found.draws["b"].mean(0), mean, atol=0.1 * sd.min())
    np.testing.assert_allclose(found.draws["b"].std(0), sd, rtol=0.05)
    assert found.trusted and found.verdict.startswith("corrected by importance, k-hat")
    assert "tempering agrees within" in found.verdict
    assert [stage.name for stage in found.stages] == ["guide", "tempering"]
    assert abs(found.log_evidence - exact_evidence(X)) < 0.05 and 0 <= found.log_evidence_error < 0.05
    lines = repr(found)
    assert "Answer: b given y" in lines and "guide, then tempering" in lines and len(lines) < 400
    assert found.sample(1, (3, 2))["b"].shape == (3, 2, 2) and found.sample(1, 5000)["b"].shape == (5000, 2)
    data = found.to_arviz(1, 50)
    assert data.posterior["b"].shape[:2] == data.posterior_predictive["y"].shape[:2] == (1, 50)

    first = nm.smc(
        0, regression, {"y": Y}, model_args=(X[:, :1],), num_particles=2000, moves=5, last_moves=1, **QUIET
    )
    odds = nm.compare({"both": found, "first": first})
    log, error = odds.log_odds("both", "first")
    assert abs(log - (exact_evidence(X) - exact_evidence(X[:, :1]))) < 0.1 and error < 0.1
    assert next(iter(odds.evidences)) == "both" and "more probable" in odds.verdict
    np.testing.assert_allclose(odds.probabilities["first"], 1 / (1 + np.exp(log)))


def test_modes_that_the_guide_misses_are_found_and_said():
    def model(y=None):
        z = numpyro.sample("z", dist.Normal(0, 10))
        numpyro.sample("y", dist.Normal(jnp.abs(z), 1), obs=y)

    found = nm.infer(0, model, {"y": 8.0}, **QUIET)
    assert found.trusted and "the guide has missed a part" in found.verdict
    assert abs((found.draws["z"] > 0).mean() - 0.5) < 0.05
    exact = np.log(2) + scipy.stats.norm(0, np.sqrt(101)).logpdf(8.0)
    assert abs(found.log_evidence - exact) < 0.1


def simulator(count, x=None):
    m = numpyro.sample("m", dist.Normal(0, 1))
    with numpyro.plate("rows", count):
        numpyro.sample("x", nm.Simulator(lambda key, m: m + 0.5 * jax.random.normal(key), m), obs=x)


def small(key, features, *, context):
    return nm.elementwise(key, features, context=context, scalar=nm.Affine(), hidden=(16,))


def test_a_simulator_is_answered_by_two_routes(tmp_path):
    x = np.array([0.1, 0.5, 0.3, 0.9])
    options = dict(model_args=(4,), simulations=1000, builder=small, **QUIET)
    found = nm.infer(0, simulator, {"x": x}, checkpoint=tmp_path, **options)
    assert found.trusted and found.verdict.startswith("two routes agree within")
    names = ["simulations", "neural posterior", "likelihood and tempering"]
    assert [stage.name for stage in found.stages] == names
    assert abs(found.draws["m"].mean() - 4 * x.sum() / 17) < 0.15 / 17**0.5
    np.testing.assert_allclose(found.draws["m"].std(), 1 / 17**0.5, rtol=0.1)
    exact = scipy.stats.multivariate_normal(np.zeros(4), np.ones((4, 4)) + 0.25 * np.eye(4)).logpdf(x)
    assert abs(found.log_evidence - exact) < 0.15
    again = nm.infer(0, simulator, {"x": x}, checkpoint=tmp_path, **options)
    np.testing.assert_array_equal(again.draws["m"], found.draws["m"])
    assert (tmp_path / "posterior").is_dir() and (tmp_path / "likelihood-x").is_dir()


def test_missing_numbers_of_a_simulator_are_left_out():
    def model(x=None):
        m = numpyro.sample("m", dist.Normal(0, 1))
        with numpyro.plate("rows", 3):
            numpyro.sample("x", nm.Simulator(lambda key, m: m + jax.random.normal(key), m), obs=x)

    x = np.array([1.5, np.nan, 0.5])
    found = nm.infer(0, model, {"x": x}, simulations=3000, builder=small, max_epochs=30, **QUIET)
    assert [stage.name for stage in found.stages] == ["simulations", "neural posterior"]
    assert found.trusted and found.verdict.startswith("one route only")
    assert abs(found.draws["m"].mean() - 2 / 3) < 0.12  # of two rows; three with 0 would give 1/2
    assert abs(found.draws["m"].std() - 3**-0.5) < 0.08
    with pytest.raises(ValueError, match="'y' has numbers that are missing .* a site with a density"):
        nm.infer(0, regression, {"y": np.full(20, np.nan)}, model_args=(X,), **QUIET)


def test_an_observation_outside_what_was_simulated_is_not_answered_with_trust():
    options = dict(model_args=(4,), simulations=300, builder=small, max_epochs=3, **QUIET)
    found = nm.infer(0, simulator, {"x": np.full(4, 30.0)}, **options)
    assert not found.trusted and "outside what was simulated" in found.verdict
    with pytest.warns(UserWarning, match="cannot be trusted"):
        odds = nm.compare({"a": found})
    assert odds.verdict.startswith("do not rely on it: a:")


def test_what_infer_does_not_take():
    with pytest.raises(ValueError, match="no site 'z'; there are"):
        nm.infer(0, simulator, {"z": 1.0}, model_args=(4,))
    with pytest.raises(ValueError, match=r"'x' has shape \(3,\), the model's has \(4,\)"):
        nm.infer(0, simulator, {"x": np.zeros(3)}, model_args=(4,))
    with pytest.raises(TypeError, match="dictionary"):
        nm.infer(0, simulator, np.zeros(4), model_args=(4,))
    with pytest.raises(ValueError, match="no latent sites"):
        nm.infer(0, simulator, {"x": np.zeros(4), "m": 0.0}, model_args=(4,))


def normal_gamma(y=None):
    precision = numpyro.sample("precision", dist.Gamma(2.0, 1.0))
    mean = numpyro.sample("mean", dist.Normal(0, 1 / jnp.sqrt(0.5 * precision)))
    numpyro.sample("y", dist.Normal(mean, 1 / jnp.sqrt(precision)).expand([5]).to_event(1), obs=y)


def test_evidences_of_tempering_are_right_and_their_errors_too():
    y = np.array([0.3, 1.2, -0.4, 0.8, 1.9])
    scale = np.eye(5) + np.ones((5, 5)) / 0.5  # integrating both out leaves a t distribution
    exact = scipy.stats.multivariate_t(np.zeros(5), scale / 2, df=4).logpdf(y)
    runs = [
        nm.smc(k, normal_gamma, {"y": y}, num_particles=2000, moves=5, last_moves=1, **QUIET)
        for k in range(6)
    ]
    logs = np.array([run.log_evidence for run in runs])
    errors = np.array([run.log_evidence_error for run in runs])
    assert abs(logs.mean() - exact) < 0.05
    assert 0.3 < logs.std() / errors.mean() < 2
    assert "standard error" in repr(runs[0])


def point(y):
    mu = numpyro.sample("mu", dist.Normal(0, 10))
    numpyro.sample("y", dist.Normal(mu, 1).expand([3]).to_event(1), obs=y)


def test_a_guide_of_one_point_is_not_trusted():
    found = nm.fit_guide(0, point, np.ones(3), guide=AutoDelta, steps=50, num_particles=1, **QUIET)
    assert found.check is None and "has no density: its weights tell nothing" in found.verdict
    with pytest.raises(TypeError, match="the guide has no evidence"):
        nm.compare({"a": found})


def test_guides_of_other_data_are_not_compared():
    runs = [nm.fit_guide(0, point, np.ones(3) * i, guide=nm.AutoMAF, steps=50, **QUIET) for i in (1, 2)]
    with pytest.raises(ValueError, match="seen other data"):
        nm.compare(dict(enumerate(runs)))
    y = np.array([0.1, 0.7, 1 / 3])  # which float32 rounds
    runs = [nm.fit_guide(0, point, y, guide=nm.AutoMAF, steps=50, **QUIET),
            nm.smc(0, lambda: point(None), {"y": y}, num_particles=1000, moves=5, **QUIET)]  # fmt: skip
    log, error = nm.compare({"a": runs[0], "b": runs[1]}).log_odds("a", "b")
    exact = scipy.stats.multivariate_normal(np.zeros(3), 100 + np.eye(3)).logpdf(y)
    assert abs(log) < 0.3 and abs(runs[0].check.log_evidence - exact) < 0.02


def test_draws_that_are_no_numbers_do_not_agree():
    assert gap({"a": np.zeros(9)}, {"a": np.full(9, np.nan)}) == (np.inf, "a")
    apart, where = gap({"a": np.zeros(9), "b": np.r_[0.0, 1.0]}, {"a": np.zeros(9), "b": np.r_[1.0, 2.0]})
    assert (apart, where) == (2.0, "b")


@pytest.mark.parametrize("error", [KeyboardInterrupt, KeyError("x")])
def test_what_goes_wrong_later_loses_nothing(error, monkeypatch):
    def broken(*args):
        raise error

    monkeypatch.setattr("numpyro_maf.answers.inferring.tempered", broken)
    found = nm.infer(0, point, {}, model_args=(np.ones(3),), guide=partial(nm.AutoMAF, hidden=(4,)), **QUIET)
    assert abs(found.draws["mu"].mean() - 1) < 0.1
    outcome = "interrupted" if error is KeyboardInterrupt else "failed: KeyError: 'x'"
    assert found.stages[1].outcome == outcome
    assert ("interrupted in tempering" in found.verdict) == (error is KeyboardInterrupt)


def test_comparisons_say_what_they_cannot():
    with pytest.raises(TypeError, match="compare takes what has an evidence"):
        nm.compare({"a": 3.0})
    with pytest.raises(ValueError, match="at least one result"):
        nm.compare({})
    near = Comparison({"a": Evidence(-3.0, 0.2), "b": Evidence(-3.1, 0.2)})
    assert near.verdict.startswith("undecided")
    with pytest.raises(ValueError, match="no model 'c'"):
        near.log_odds("a", "c")
    y = np.zeros(5)
    one, other = (nm.smc(0, normal_gamma, {"y": y + i}, num_particles=100, moves=1, last_moves=1, **QUIET)
                  for i in (0, 1))  # fmt: skip
    with pytest.raises(ValueError, match="seen other data"):
        nm.compare({"a": one, "b": other})


def test_a_ratio_compares_no_models():
    sims = nm.simulate(0, simulator, 200, 1, **QUIET)
    ratio = nm.nre(0, simulator, sims, model_args=(1,), contrasts=2, hidden=(4,), max_epochs=1, **QUIET)
    found = nm.smc(
        0, simulator, {"x": np.zeros(1)}, {"x": ratio}, model_args=(1,), num_particles=100, moves=1,
        last_moves=1, **QUIET,
    )  # fmt: skip
    with pytest.raises(ValueError, match="a ratio is relative"):
        nm.compare({"a": found})
