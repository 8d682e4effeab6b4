"""Data in any units: far from 0, tiny, heavy-tailed, constant. Known densities are the judges."""

import warnings
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats

import numpyro_maf as nm

SMALL = partial(nm.maf, transforms=1, hidden=(8,))
OPTIONS = dict(max_epochs=40, learning_rate=5e-3, progress=False)


def fitted(x, context=None, **options):
    flow = SMALL(jax.random.key(0), x.shape[1], context=0 if context is None else context.shape[1])
    return nm.fit(jax.random.key(1), flow, x, context, **OPTIONS | options).flow


@pytest.mark.parametrize(
    "loc, sd, told",
    [
        (2_460_000.5, 0.01, True),  # Julian dates
        (1.7e9, 60.0, True),  # seconds since 1970
        (1.4e9, 3e-3, True),  # times of satellites
        (300.0, 0.03, False),
        (0.0, 1e-30, False),
    ],
)
def test_a_normal_is_learned_in_its_units(loc, sd, told):
    x = loc + sd * np.random.default_rng(0).normal(size=(3000, 1))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        flow = fitted(x)
    assert any("x: column 0 varies by" in str(w.message) for w in said) == told
    new = loc + sd * np.random.default_rng(1).normal(size=(500, 1))
    found, right = flow().log_prob(new), scipy.stats.norm(loc, sd).logpdf(new[:, 0])
    assert abs(np.mean(np.asarray(found, float) - right)) < 0.05


def test_contexts_are_taken_in_their_units():
    rng = np.random.default_rng(0)
    time = 1.7e9 + 60 * rng.normal(size=(3000, 1))
    x = (time - 1.7e9) / 60 + 0.1 * rng.normal(size=(3000, 1))
    with pytest.warns(UserWarning, match="context: column 0 varies by"):
        flow = fitted(x, time, regression=True)
    right = scipy.stats.norm((time[:, 0] - 1.7e9) / 60, 0.1).logpdf(x[:, 0])
    assert abs(np.mean(np.asarray(flow(time).log_prob(x), float) - right)) < 0.05


def test_scalings_in_double_precision_survive_files_and_jit(tmp_path):
    x = 1.7e9 + 60 * np.random.default_rng(0).normal(size=(500, 2))
    with pytest.warns(UserWarning, match="varies by"):
        flow = fitted(x, max_epochs=2)
    nm.save(tmp_path / "flow", flow)
    np.testing.assert_array_equal(nm.load(tmp_path / "flow")().log_prob(x), flow().log_prob(x))
    assert np.isfinite(jax.jit(lambda flow, x: flow().log_prob(x))(flow, x)).all()


def test_a_constant_column_is_named():
    x = np.random.default_rng(0).normal(size=(200, 2))
    x[:, 1] = 3.0
    with pytest.warns(UserWarning, match="x: column 1 is constant"):
        fitted(x, max_epochs=1)


@pytest.mark.parametrize("tails", [scipy.stats.cauchy(1, 2.5), scipy.stats.t(1.5, -30, 0.01)])
def test_heavy_tails_keep_their_quartiles(tails):
    def model():
        numpyro.sample("b", dist.Normal())

    b = tails.rvs(4000, random_state=0)
    joint = nm.fit_sites(jax.random.key(0), {"b": b}, model, average=0.99, **OPTIONS)
    draws = np.asarray(joint.sample(jax.random.key(1), (20_000,))["b"])
    levels = np.array([0.02, 0.25, 0.5, 0.75, 0.98])
    ranks = tails.cdf(np.quantile(draws, levels))
    np.testing.assert_allclose(ranks, levels, atol=0.03)


@pytest.mark.parametrize("learn", [nm.npe, nm.nre])
def test_simulations_that_float32_cannot_tell_apart_are_named(learn):
    def model(x=None):
        a = numpyro.sample("a", dist.Normal(0, 1))
        numpyro.sample("x", dist.Normal(2_460_000.5 + 0.01 * a, 0.01), obs=x)

    rng = np.random.default_rng(0)
    a = rng.normal(size=200)
    sims = {"a": a, "x": 2_460_000.5 + 0.01 * (a + rng.normal(size=200))}
    with pytest.warns(UserWarning, match="observed site 'x': column 0 varies by 0.01"):
        learn(0, model, sims, max_epochs=1, progress=False)


def test_single_precision_on_the_host_is_standardised_there_too():
    flow = nm.maf(0, 1, transforms=1, hidden=(8,))
    flow = replace(flow, event_scale=nm.Standardize(np.array([1.7e9 + 50]), np.array([600.0])))
    x = (1.7e9 + 600 * np.random.default_rng(0).normal(size=(50, 1))).astype(np.float32)
    np.testing.assert_allclose(flow().log_prob(x), flow().log_prob(x.astype(float)), atol=1e-6)
