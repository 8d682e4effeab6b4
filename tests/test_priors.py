"""Learned priors: named sites as one flow, and Bayesian flows."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.initialization import init_to_value
from scipy import stats

import numpyro_maf as nm
from numpyro_maf import Joint
from numpyro_maf.inference.sites import Sites

# All flows of two numbers are trained on 4,000 rows or 200, so they share two compilations.
SMALL = dict(progress=False, max_epochs=60, learning_rate=3e-3, patience=10)


def small(key, features):
    return nm.maf(key, features, transforms=2, hidden=(16,))


def two():
    numpyro.sample("mu", dist.Normal(0, 5))
    numpyro.sample("tau", dist.HalfNormal(1))


def model(y=None):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    tau = numpyro.sample("tau", dist.HalfNormal(1))
    numpyro.sample("share", dist.Dirichlet(jnp.ones(3)))
    with numpyro.plate("rows", 2):
        theta = numpyro.sample("theta", dist.Beta(2, 3))
    numpyro.deterministic("sum", theta.sum())
    numpyro.sample("y", dist.Normal(mu, tau), obs=y)


def prior_draws(n, seed=0):
    rng = np.random.default_rng(seed)
    draws = {
        "mu": rng.normal(size=n),
        "tau": abs(rng.normal(size=n)),
        "share": rng.dirichlet(np.ones(3), n),
        "theta": rng.beta(2, 3, (n, 2)),
    }
    return {name: value.astype(np.float32) for name, value in draws.items()}


# Sites -------------------------------------------------------------------------------------------


def test_sites_round_trip_and_jacobian():
    sites = Sites.of(model, model_args=(0.5,))
    assert sites.names == ("mu", "tau", "share", "theta") and sites.width == 1 + 1 + 2 + 2
    values = prior_draws(4)
    vector = jax.jit(sites.unconstrain)(values)
    assert vector.shape == (4, 6)
    for name, value in jax.jit(sites.constrain)(vector).items():
        np.testing.assert_allclose(value, values[name], rtol=1e-4, atol=1e-6)

    def free(vector):
        """All numbers but the simplex's last, which follows from the others."""
        found = sites.constrain(vector)
        return jnp.concatenate([found["mu"][None], found["tau"][None], found["share"][:2], found["theta"]])

    jacobian, log_det = jax.jit(lambda v: (jax.vmap(jax.jacfwd(free))(v), sites.log_det(v)))(vector)
    np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobian)[1], rtol=1e-4, atol=1e-4)
    assert (
        repr(sites)
        == "Sites: mu (), tau () Positive(lower_bound=0.0), share (3,) Simplex(), theta (2,) "
        "UnitInterval(lower_bound=0.0, upper_bound=1.0)"
        or len(repr(sites)) < 400
    )
    shapes = [jax.eval_shape(sites.log_det, v).shape for v in (vector[0], vector[None])]
    assert shapes == [(), (1, 4)]


def test_sites_say_what_they_cannot_hold():
    def discrete():
        numpyro.sample("k", dist.Bernoulli(0.5))

    def nested():
        top = numpyro.sample("top", dist.HalfNormal(1))
        numpyro.sample("low", dist.Uniform(0, top))

    with pytest.raises(ValueError, match="'k' is discrete"):
        Sites.of(discrete)
    with pytest.raises(ValueError, match="'low' depends on other sites"):
        Sites.of(nested)
    with pytest.raises(ValueError, match="none of the model's latent sites"):
        Sites.of(model, {"nothing"})
    with pytest.raises(ValueError, match="no values for site 'tau'"):
        Sites.of(model).unconstrain({"mu": jnp.zeros(3)})


# Fitting -----------------------------------------------------------------------------------------


def test_fit_sites_finds_the_density_on_the_supports():
    values = prior_draws(4000)
    joint = nm.fit_sites(0, values, model, builder=small, **SMALL)
    new = prior_draws(500, seed=1)
    expected = (
        stats.norm.logpdf(new["mu"]) + stats.halfnorm.logpdf(new["tau"]) + np.log(2)  # Dirichlet(1, 1, 1)
        + stats.beta(2, 3).logpdf(new["theta"]).sum(-1)
    )  # fmt: skip
    # The mean difference is the divergence: not below 0 but for noise, and small.
    found, draws = jax.jit(lambda new: (joint.log_prob(new), joint.sample(1, 1000)))(new)
    difference = np.asarray(expected - found)
    assert -0.1 < difference.mean() < 0.25
    assert (draws["tau"] > 0).all() and draws["theta"].shape == (1000, 2)
    np.testing.assert_allclose(draws["share"].sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(draws["theta"].mean(0), 0.4, atol=0.03)


def test_samples_come_as_dict_mcmc_or_arviz():
    mcmc = MCMC(NUTS(two), num_warmup=20, num_samples=200, progress_bar=False)
    mcmc.run(jax.random.key(0))
    options = dict(builder=small, progress=False, max_epochs=2)
    data = nm.to_arviz(mcmc.get_samples(), two)
    found = [
        nm.fit_sites(jax.random.key(0), samples, two, **options)
        for samples in (mcmc.get_samples(), mcmc, data)
    ]
    for joint in found[1:]:
        for a, b in zip(jax.tree.leaves(joint), jax.tree.leaves(found[0])):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="samples must be"):
        nm.fit_sites(jax.random.key(0), [1, 2], two)


def test_weights_count_and_outliers_from_the_support_are_refused():
    rng = np.random.default_rng(0)
    x = rng.uniform(-3, 3, 5000)
    values = {"mu": x, "tau": np.exp(rng.normal(size=5000))}
    joint = nm.fit_sites(0, values, two, weights=np.exp(-0.5 * (x - 1) ** 2), builder=small, **SMALL)
    draws = np.asarray(jax.jit(Joint.sample, static_argnums=2)(joint, jax.random.key(1), (4000,))["mu"])
    np.testing.assert_allclose([draws.mean(), draws.std()], [0.96, 0.93], atol=0.08)
    with pytest.raises(ValueError, match=r"samples\['tau'\] lies outside"):
        nm.fit_sites(jax.random.key(0), prior_draws(100) | {"tau": -jnp.ones(100)}, model)


def test_save_and_load_a_joint(tmp_path):
    def bounded():
        numpyro.sample("u", dist.Uniform(-1, 3))
        numpyro.sample("mu", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.sample("order", dist.ImproperUniform(dist.constraints.ordered_vector, (), (2,)))
        numpyro.sample("many", dist.HalfNormal(1).expand([2, 2]).to_event(2))
        numpyro.sample("share", dist.Dirichlet(jnp.ones(3)))
        numpyro.sample("above", dist.Pareto(1.0, 2.0))

    sites = Sites.of(bounded)
    joint = nm.Joint(small(jax.random.key(0), sites.width), sites)
    nm.save(tmp_path / "joint.safetensors", joint)
    again = nm.load(tmp_path / "joint.safetensors")
    facts = jax.jit(lambda joint: (draws := joint.sample(1, 5), joint.log_prob(draws)))
    jax.tree.map(np.testing.assert_array_equal, facts(again), facts(joint))


# In models ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def joint():
    """Correlated: mu ~ N(1, 0.5^2), log tau | mu ~ N(0.5 mu - 1, 0.2^2)."""
    rng = np.random.default_rng(0)
    mu = rng.normal(1, 0.5, 5000)
    tau = np.exp(0.5 * mu - 1 + 0.2 * rng.normal(size=5000))

    return nm.fit_sites(0, {"mu": mu, "tau": tau}, two, builder=small, **SMALL)


def user(joint, y, frozen=True):
    sites = nm.sample_sites("prior", joint, frozen=frozen)
    numpyro.sample("y", dist.Normal(sites["mu"], 0.5), obs=y)
    return sites


def test_a_joint_is_shown_in_a_few_lines(joint):
    assert repr(joint).startswith("Joint of mu (), tau () Positive") and len(repr(joint)) < 400
    assert joint._repr_html_().startswith("<pre>Joint of mu ()")


def test_nuts_with_a_learned_prior(joint):
    mcmc = MCMC(NUTS(user), num_warmup=200, num_samples=1000, progress_bar=False)
    mcmc.run(jax.random.key(0), joint, 2.0)
    draws = mcmc.get_samples()
    assert set(draws) == {"prior", "mu", "tau"}
    # Two equal precisions: mu has mean 1.5 and variance 0.125; log tau follows mu.
    np.testing.assert_allclose([draws["mu"].mean(), draws["mu"].std()], [1.5, 0.125**0.5], atol=0.08)
    np.testing.assert_allclose(jnp.log(draws["tau"]).mean(), -0.25, atol=0.08)


@pytest.mark.parametrize("frozen", [True, False])
def test_svi_moves_the_weights_only_when_asked(joint, frozen):
    def fixed(y):
        return user(joint, y, frozen)

    svi = SVI(fixed, AutoNormal(fixed), optax.adam(1e-3), Trace_ELBO())
    result = svi.run(jax.random.key(0), 20, 2.0, progress_bar=False)
    assert ("prior$params" in result.params) == (not frozen)
    if not frozen:
        before, after = jax.tree.leaves(joint.flow.weights), jax.tree.leaves(result.params["prior$params"])
        assert any(abs(a - b).max() > 1e-4 for a, b in zip(after, before))
    else:

        @jax.jit
        def facts(key):
            with numpyro.handlers.seed(rng_seed=key), numpyro.handlers.trace() as trace:
                numpyro.handlers.substitute(fixed, result.params)(2.0)
            return trace["prior"]["fn"].log_prob(jnp.zeros(2)), joint.flow().log_prob(jnp.zeros(2))

        np.testing.assert_array_equal(*facts(jax.random.key(0)))


def test_frozen_wants_a_flow():
    with pytest.raises(TypeError, match="frozen=True takes a Flow"):
        nm.flow_module("f", lambda key: nm.maf(key, 2), frozen=True)
    with pytest.raises(TypeError, match="takes a Joint"):
        numpyro.handlers.seed(nm.sample_sites, 0)("prior", {"mu": 1})


@pytest.mark.slow
def test_ten_days_of_yesterdays_posterior_as_todays_prior():
    """Normal data of unknown mean and precision: the normal-gamma posterior is exact (Murphy 2007)."""
    rng = np.random.default_rng(3)
    days = rng.normal(2.0, 1.5, (10, 5)).astype(np.float32)

    def first(y):
        tau = numpyro.sample("tau", dist.Gamma(3.0, 3.0))
        mu = numpyro.sample("mu", dist.Normal(0, 2 / jnp.sqrt(tau)))
        numpyro.sample("y", dist.Normal(mu, tau**-0.5), obs=y)

    def today(joint, y):
        sites = nm.sample_sites("prior", joint)
        numpyro.sample("y", dist.Normal(sites["mu"], sites["tau"] ** -0.5), obs=y)

    mcmc = MCMC(NUTS(first), num_warmup=300, num_samples=2000, progress_bar=False)
    mcmc.run(jax.random.key(0), days[0])
    later = MCMC(NUTS(today), num_warmup=300, num_samples=2000, progress_bar=False, jit_model_args=True)
    options = dict(model_args=(days[0],), builder=small, batch_size=512, **SMALL)
    for i, y in enumerate(days[1:]):
        samples = (mcmc if i == 0 else later).get_samples()
        joint = nm.fit_sites(jax.random.key(i), samples, first, **options)
        later.run(jax.random.key(i), joint, y)
    k, m, a, b = 0.25, 0.0, 3.0, 3.0
    for y in days:
        n, mean = len(y), y.mean()
        b += 0.5 * ((y - mean) ** 2).sum() + k * n * (mean - m) ** 2 / (2 * (k + n))
        m, k, a = (k * m + n * mean) / (k + n), k + n, a + n / 2
    draws = later.get_samples()
    sd = {"mu": (b / (k * (a - 1))) ** 0.5, "tau": a**0.5 / b}
    assert abs(draws["mu"].mean() - m) < 0.35 * sd["mu"]
    assert abs(draws["tau"].mean() - a / b) < 0.35 * sd["tau"]
    np.testing.assert_allclose(draws["mu"].std(), sd["mu"], rtol=0.2)
    np.testing.assert_allclose(draws["tau"].std(), sd["tau"], rtol=0.2)


# Bayesian flows ------------------------------------------------------------------------------


def bayesian(x):
    def tiny(key):
        return nm.elementwise(key, 1, scalar=nm.Affine())

    flow = nm.random_flow_module("f", tiny, dist.Normal(0, 1))
    numpyro.sample("x", flow().expand([len(x)]), obs=x)
    numpyro.deterministic("density", jnp.exp(flow().log_prob(jnp.array([[0.0], [1.0]]))))


@pytest.mark.slow
def test_bayesian_flow_by_nuts_and_svi_against_quadrature():
    """An affine flow of one number: its two weights' posterior is a sum over a grid."""
    x = jnp.array([[0.9], [1.6], [0.4], [1.2]])
    scalar = nm.Affine()
    grid = np.stack(np.meshgrid(*2 * [np.linspace(-4, 4, 161, dtype=np.float32)], indexing="ij"))
    at = np.array([*x[:, 0], 0.0, 1.0])

    @jax.jit
    def quadrature(weights):
        u, log_slope = scalar.forward(weights[..., None], at)
        log_density = dist.Normal(0, 1).log_prob(u) + log_slope
        log_posterior = log_density[:, :4].sum(-1) + dist.Normal(0, 1).log_prob(weights).sum(0)
        return jax.nn.softmax(log_posterior) @ jnp.exp(log_density[:, 4:])

    expected = quadrature(grid.reshape(2, -1))

    start = init_to_value(values={})
    mcmc = MCMC(NUTS(bayesian, init_strategy=start), num_warmup=300, num_samples=2000, progress_bar=False)
    mcmc.run(jax.random.key(0), x)
    np.testing.assert_allclose(mcmc.get_samples()["density"].mean(0), expected, rtol=0.06)

    guide = AutoNormal(bayesian)
    svi = SVI(bayesian, guide, optax.adam(1e-2), Trace_ELBO(4))
    params = svi.run(jax.random.key(1), 1500, x, progress_bar=False).params
    sample = partial(guide.sample_posterior, sample_shape=(2000,))
    draws = jax.jit(sample)(jax.random.key(2), params, x)
    np.testing.assert_allclose(draws["density"].mean(0), expected, rtol=0.15)


# By name ------------------------------------------------------------------------------------------


def gaussian_joint():
    """A joint distribution whose flow is the identity: mu normal, tau log-normal."""

    def model():
        numpyro.sample("mu", dist.Normal(0, 1))
        numpyro.sample("tau", dist.LogNormal(0, 1))

    flow = nm.maf(0, 2, transforms=1, hidden=(4,))
    return Joint(flow.with_weights(jax.tree.map(jnp.zeros_like, flow.weights)), Sites.of(model))


def test_a_check_compares_by_name_and_tells_what_differs():
    joint, rng = gaussian_joint(), np.random.default_rng(3)
    z = rng.normal(size=(3000, 2))
    same = joint.check({"mu": z[:, 0], "tau": np.exp(z[:, 1]), "other": z[:, 0]})
    assert same.good and same.verdict.startswith("no difference found: the distribution functions of ")
    assert list(same.table) == ["mu", "tau"] and same.distance < same.bound < 0.06
    assert repr(same).startswith("JointCheck: no difference found") and len(repr(same)) < 400
    shifted = joint.check({"mu": z[:, 0] + 0.5, "tau": np.exp(z[:, 1])})
    assert not shifted.good and "differs from the samples in mu: " in shifted.verdict
    np.testing.assert_allclose(shifted.distance, 2 * stats.norm.cdf(0.25) - 1, atol=0.04)
    tied = joint.check({"mu": z[:, 0], "tau": np.exp(0.9 * z[:, 0] + 0.44 * z[:, 1])})
    assert "rank correlation of mu and tau is " in tied.verdict and not tied.good
    weights = np.exp(0.5 * z[:, 0])  # which shift a normal by a half
    back = joint.check({"mu": z[:, 0] - 0.5, "tau": np.exp(z[:, 1])}, weights=weights)
    assert back.good and back.count < 3000
    for wrong, text in (({"mu": z[:, 0]}, "lacks the site 'tau'"), ({"mu": z, "tau": z[:, 0]}, "must be")):
        with pytest.raises(ValueError, match=text):
            joint.check(wrong)


@pytest.mark.parametrize("given", ["dictionary", "mcmc"])
def test_arviz_shows_the_sites_of_a_learned_prior_by_name(given):
    joint = gaussian_joint()

    def model(y=None):
        sites = nm.sample_sites("prior", joint)
        with numpyro.plate("rows", 3):
            numpyro.sample("y", dist.Normal(sites["mu"], sites["tau"]), obs=y)

    vector = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
    samples = {"prior": vector}
    if given == "mcmc":
        chains = {"prior": vector.reshape(2, 25, 2), **joint.sites.constrain(vector.reshape(2, 25, 2))}
        chains["auto_shared_latent"] = np.zeros((2, 25, 3))  # as NeuTra leaves one
        samples = SimpleNamespace(get_samples=lambda group_by_chain: chains)
    found = nm.to_arviz(samples, model, (np.zeros(3, np.float32),)).posterior
    assert set(found.data_vars) == {"mu", "tau"}
    assert found["mu"].shape == ((2, 25) if given == "mcmc" else (1, 50))
    expected = joint.sites.constrain(vector)
    np.testing.assert_allclose(np.ravel(found["tau"]), expected["tau"], rtol=1e-5)


def test_a_joint_distribution_goes_to_arviz_by_name():
    sites = Sites.of(model, model_args=(0.5,))
    joint = Joint(nm.maf(0, sites.width, transforms=1, hidden=(4,)), sites)
    found = joint.to_arviz(0, 20, dims={"share": ["kind"]}).posterior
    assert {name: found[name].shape[2:] for name in found.data_vars} == {
        "mu": (), "tau": (), "share": (3,), "theta": (2,)
    }  # fmt: skip
    assert found["share"].dims[-1] == "kind"
