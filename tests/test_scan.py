"""Flows inside NumPyro's own scan: right, alone, under plates, and with enumerated states."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import FLOWS, normals
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.contrib.funsor import config_enumerate, enum
from numpyro.contrib.funsor import log_density as enumerated_log_density
from numpyro.infer import MCMC, NUTS
from numpyro.infer.util import log_density
from scipy.special import logsumexp

STATES, STEPS, HOMES = 2, 4, 3
INITIAL = jnp.array([0.6, 0.4])
TRANSITION = jnp.array([[0.7, 0.3], [0.2, 0.8]])
CODES = jnp.array([[1.0, -0.5], [-1.0, 2.0]])


def observations(*shape):
    return jnp.asarray(normals(5, *shape, 2))


@jax.jit
def score(d, y):
    return d.log_prob(y)


@pytest.mark.parametrize("name", ["maf", "iaf", "nsf", "maf-heavy"])
@pytest.mark.parametrize("homes", [None, HOMES])
def test_scan_without_states_equals_the_sum_over_steps(name, homes):
    d = FLOWS[name]()()
    y = observations(STEPS, *(() if homes is None else (homes,)))

    def model(y):
        def step(carry, y):
            if homes is None:
                numpyro.sample("y", d, obs=y)
            else:
                with numpyro.plate("homes", homes):
                    numpyro.sample("y", d, obs=y)
            return carry, None

        scan(step, 0.0, y)

    total = jax.jit(lambda y: log_density(model, (y,), {}, {})[0])(y)
    np.testing.assert_allclose(total, score(d, y).sum(), rtol=1e-5)


@pytest.mark.parametrize("name", ["maf-context", "iaf-context", "nsf-context"])
@pytest.mark.parametrize("homes", [None, HOMES])
def test_enumerated_scan_equals_brute_force(name, homes):
    case = FLOWS[name]
    flow, codes = case(), CODES[:, : case.context]
    batch = () if homes is None else (homes,)
    y = observations(STEPS, *batch)

    def model(y):
        def step(previous, y):
            def body():
                state = numpyro.sample(
                    "state",
                    dist.Categorical(TRANSITION[previous]),
                    infer={"enumerate": "parallel"},
                )
                numpyro.sample("y", flow(codes[state]), obs=y)
                return state

            if homes is None:
                return body(), None
            with numpyro.plate("homes", homes):
                return body(), None

        scan(step, jnp.zeros(batch, int), y)

    @jax.jit
    def evidence(y):
        marked = enum(handlers.seed(config_enumerate(model), 0), -1 - len(batch))
        return enumerated_log_density(marked, (y,), {}, {})[0]

    table = score(flow(codes), y[..., None, :])  # (T, homes, K)
    table = np.asarray(table).reshape(STEPS, -1, STATES)
    paths = np.array(list(itertools.product(range(STATES), repeat=STEPS)))
    steps = np.log(np.asarray(TRANSITION))[np.c_[np.zeros(len(paths), int), paths[:, :-1]], paths].sum(1)
    expected = sum(
        logsumexp([s + table[range(STEPS), h, z].sum() for s, z in zip(steps, paths)])
        for h in range(table.shape[1])
    )
    np.testing.assert_allclose(evidence(y), expected, rtol=1e-5)


def test_scan_draws_differ_by_step_and_follow_the_flow():
    d = FLOWS["maf"]()()

    def model():
        return scan(lambda c, _: (c, numpyro.sample("y", d)), 0.0, None, length=2000)[1]

    draws, direct = jax.jit(
        lambda key: (handlers.seed(model, key)(), d.sample(jax.random.fold_in(key, 1), (2000,)))
    )(jax.random.key(0))
    spread = direct.std(0)
    np.testing.assert_allclose((draws.mean(0) - direct.mean(0)) / spread, 0, atol=5 / 2000**0.5)
    assert len(np.unique(draws[:, 0])) == 2000


@pytest.mark.slow
def test_nuts_through_an_enumerated_scan_runs():
    flow = FLOWS["maf-context"]()
    y = observations(6)

    def model(y):
        shift = numpyro.sample("shift", dist.Normal(0, 1))

        def step(previous, y):
            state = numpyro.sample(
                "state", dist.Categorical(TRANSITION[previous]), infer={"enumerate": "parallel"}
            )
            numpyro.sample("y", flow(CODES[state] + shift), obs=y)
            return state, None

        scan(step, 0, y)

    mcmc = MCMC(NUTS(model, max_tree_depth=3), num_warmup=5, num_samples=5, progress_bar=False)
    mcmc.run(jax.random.key(0), y)
    assert np.isfinite(mcmc.get_samples()["shift"]).all()
