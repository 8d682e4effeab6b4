"""Calibration: what is right passes, and what is wrong is called by its name."""

import html

import numpy as np
import pytest
from scipy.stats import norm

from numpyro_maf import HMM
from numpyro_maf.diagnostics import c2st, coverage, psis, sbc, tarp

RNG = np.random.default_rng(0)
TRUTH = RNG.normal(size=(500, 2))
SEEN = TRUTH + RNG.normal(size=(500, 2))


def draws(scale=1.0, shift=0.0, count=200):
    """Of the posteriors N(x / 2, 1 / 2), or what a bad approximation makes of them."""
    return SEEN / 2 + shift + scale * np.sqrt(0.5) * np.random.default_rng(1).normal(size=(count, 500, 2))


def test_right_posteriors_pass():
    assert "no miscalibration" in sbc(draws(), TRUTH).verdict
    assert "no miscalibration" in tarp(draws(), TRUTH).verdict


@pytest.mark.parametrize(
    ("wrong", "name"),
    [({"scale": 0.6}, "too narrow"), ({"scale": 1.6}, "too wide"), ({"shift": 0.4}, "too high"),
     ({"shift": -0.4}, "too low")],
)  # fmt: skip
def test_wrong_posteriors_are_named(wrong, name):
    found = sbc({"a": draws(**wrong)}, {"a": TRUTH})
    assert found.verdict.count(name) == 2 and "a[0]" in found.verdict
    if "scale" in wrong:  # balls about uniform points hardly see a shift
        assert "not calibrated" in tarp(draws(**wrong), TRUTH).verdict


def log_prob(x, scale):
    return norm(SEEN / 2, scale * np.sqrt(0.5)).logpdf(x).sum(-1)


def test_coverage_of_densest_regions():
    found = coverage(log_prob(draws(), 1.0), log_prob(TRUTH, 1.0))
    assert "no miscalibration" in found.verdict
    np.testing.assert_allclose(found.at(np.array([0.5, 0.9])), [0.5, 0.9], atol=0.06)
    assert "overconfident" in coverage(log_prob(draws(0.6), 0.6), log_prob(TRUTH, 0.6)).verdict
    assert "underconfident" in coverage(log_prob(draws(1.6), 1.6), log_prob(TRUTH, 1.6)).verdict


def test_discrete_ranks_are_uniform_too():
    truth = np.random.default_rng(2).integers(0, 3, (1000, 1))
    assert "no miscal" in sbc(np.random.default_rng(3).integers(0, 3, (99, 1000, 1)), truth).verdict


def test_discrete_posteriors_pass_all_three():
    rng = np.random.default_rng(0)
    share = rng.beta(1, 1, 500)
    truth, draws = ((rng.random((*n, 500)) < share).astype(float) for n in ((), (99,)))
    density = np.where(draws, np.log(share), np.log1p(-share))
    own = np.where(truth, np.log(share), np.log1p(-share)) * (1 + 1e-7)  # computed apart
    for found in (
        sbc(draws[..., None], truth[:, None]).pvalues[0],
        coverage(density, own).pvalue,
        tarp(draws[..., None], truth[:, None]).pvalue,
    ):
        assert found > 0.01


def test_results_are_shown_by_their_verdicts():
    for found in (sbc(draws(), TRUTH), tarp(draws(0.6), TRUTH), psis(RNG.normal(size=100))):
        shown = repr(found)
        name = type(found).__name__
        assert shown.startswith(f"{name}: {found.verdict[:20]}") and len(shown) < 400
        assert found._repr_html_() == f"<pre>{html.escape(shown)}</pre>"
        assert str(found) == found.verdict and tuple(found) == found
    chain = HMM(np.ones(3) / 3, np.eye(3), np.zeros((2, 5, 3)), np.arange(5) > 0)
    assert repr(chain) == (
        "HMM of 3 states over 5 steps, 80% observed\n  batch shape (2,), one transition matrix"
    )
    assert chain.sample(0, 7).shape == (7, 2, 5)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="20 posteriors or more"):
        sbc(draws()[:, :5], TRUTH[:5])
    with pytest.raises(ValueError, match="draws"):
        tarp(draws(), TRUTH[:5])
    with pytest.raises(ValueError, match="log-densities"):
        coverage(np.zeros((5, 30)), np.zeros(29))


def test_c2st_takes_a_constant_column():
    a, b = np.random.default_rng(0).normal(size=(2, 300, 2))
    a[:, 1] = b[:, 1] = 2.5
    assert abs(c2st(a, b) - 0.5) < 0.1
    b[:, 1] = 3.5  # another number tells them apart
    assert c2st(a, b) > 0.95


def test_weights_beyond_any_tail_are_not_trusted():
    found = psis(np.random.default_rng(0).standard_cauchy(1000) * 30)
    assert found.khat > found.threshold and np.isfinite(found.log_weights).all()
