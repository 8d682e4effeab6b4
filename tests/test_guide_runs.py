# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Guides in one call, on a posterior that is known."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
from numpyro import handlers
from numpyro.infer import Predictive
from numpyro.infer.autoguide import AutoNormal

import numpyro_maf as nm

Y = np.array([1.1, 0.4, 1.9, 1.3], np.float32)


def model(y, scale=1.0):
    mean = numpyro.sample("mean", dist.Normal(0, 2))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(mean, scale), obs=y)


def exact(y=Y):
    """Mean and standard deviation of the posterior, and the log evidence."""
    variance = 1 / (1 / 4 + len(y))
    covariance = np.eye(len(y)) + 4
    evidence = scipy.stats.multivariate_normal(np.zeros(len(y)), covariance).logpdf(y)
    return variance * y.sum(), variance**0.5, evidence


SMALL = dict(num_particles=8, steps=400, progress=False)


def small(model):
    return nm.AutoMAF(model, transforms=1, hidden=(4,), warmup=0, init_scale=1.0)


@lru_cache
def run():
    return nm.fit_guide(0, model, Y, guide=small(model), **SMALL)


def test_a_guide_in_one_call_finds_the_posterior():
    mean, sd, evidence = exact()
    draws = run().sample(1, 4000)["mean"]
    np.testing.assert_allclose(draws.mean(), mean, atol=0.1 * sd)
    np.testing.assert_allclose(draws.std(), sd, rtol=0.05)
    np.testing.assert_allclose(run().check.log_evidence, evidence, atol=0.01)
    np.testing.assert_allclose(run().losses[-1], -evidence, atol=0.05)
    assert run().check.verdict == run().verdict and run().verdict.startswith("good")
    assert "AutoMAF of model" in repr(run()) and "ELBO" in repr(run()) and len(repr(run())) < 400


def test_what_a_run_gives():
    assert run().sample(1)["mean"].shape == () and run().sample(1, (2, 3))["mean"].shape == (2, 3)
    data = run().to_arviz(2, 50)
    assert data.posterior["mean"].shape == (1, 50) and data.observed_data["y"].dims == ("rows",)
    neutra = run().neutra()
    trace = handlers.trace(handlers.seed(neutra.reparam(model), 0)).get_trace(Y)
    assert trace["mean"]["type"] == "deterministic"
    samples = neutra.transform_sample(np.random.default_rng(0).normal(size=(4000, 1)))
    assert abs(samples["mean"].mean() - exact()[0]) < 0.1 * exact()[1]


def test_a_run_resumes_and_goes_on(tmp_path):
    whole = run()
    found = nm.fit_guide(0, model, Y, guide=small(model), checkpoint=tmp_path, **SMALL | {"steps": 150})
    assert found.trained.state.steps == 150
    resumed = nm.fit_guide(0, model, Y, guide=small(model), checkpoint=tmp_path, **SMALL)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    with pytest.raises(ValueError, match="another loss"):
        nm.fit_guide(0, model, Y + 1, guide=small(model), checkpoint=tmp_path, **SMALL)
    nm.save(tmp_path / "guide", whole.params)
    loaded = nm.fit_guide(0, model, Y, guide=small(model), init_params=nm.load(tmp_path / "guide"), steps=0)
    np.testing.assert_array_equal(loaded.sample(1, 5)["mean"], whole.sample(1, 5)["mean"])


def test_guides_of_other_kinds():
    found = nm.fit_guide(0, model, Y, guide=AutoNormal, scale=1.0, learning_rate=0.05, **SMALL)
    assert abs(found.sample(1, 4000)["mean"].mean() - exact()[0]) < 0.15 * exact()[1]

    def guide(y, scale=1.0):
        loc = numpyro.param("loc", 0.0)
        size = numpyro.param("size", 1.0, constraint=dist.constraints.positive)
        numpyro.sample("mean", dist.Normal(loc, size))

    found = nm.fit_guide(0, model, Y, guide=guide, learning_rate=0.05, **SMALL)
    draws = found.sample(1, (2, 2000))["mean"]
    assert draws.shape == (2, 2000) and found.params["size"] > 0
    assert abs(draws.mean() - exact()[0]) < 0.15 * exact()[1]
    assert Predictive(guide, params=found.params, num_samples=3)(jax.random.key(0), Y)["mean"].shape == (3,)


def test_what_cannot_be_judged_is_said():
    found = nm.fit_guide(0, model, Y, guide=small(model), check=False, **SMALL | {"steps": 50})
    assert found.check is None and found.verdict == "not checked" and "still improving" in repr(found)
    with pytest.raises(ValueError, match="steps and num_particles must be positive, got 0 and 8"):
        nm.fit_guide(0, model, Y, **SMALL | {"steps": 0})


def test_an_elbo_that_is_not_finite_is_an_error():
    def broken():
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.factor("no number", jnp.log(-jnp.exp(z)))

    def guide():
        numpyro.sample("z", dist.Normal(numpyro.param("loc", 0.0), 1))

    with pytest.raises(FloatingPointError, match="the loss is nan at step 0"):
        nm.fit_guide(0, broken, guide=guide, **SMALL)
