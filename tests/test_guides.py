"""Flows as guides: known posteriors, NumPyro's own machinery, path gradients, amortisation, the check."""

import os
import pathlib
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from conftest import noisy
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, psis_diagnostic
from numpyro.infer.autoguide import AutoDiagonalNormal, AutoGuideList, AutoMultivariateNormal, AutoNormal
from numpyro.infer.reparam import NeuTraReparam

import numpyro_maf as nm
from numpyro_maf.diagnostics import c2st, psis
from numpyro_maf.inference.gaussian import fit_gaussian
from numpyro_maf.nn.adapters import as_network

GUIDES = {
    "flow": partial(nm.AutoFlow, builder=partial(nm.nsf, transforms=1, hidden=(8,))),
    "maf": partial(nm.AutoMAF, transforms=1, hidden=(8,)),
    "iaf": partial(nm.AutoIAF, transforms=1, hidden=(8,)),
    "realnvp": partial(nm.AutoFlow, builder=partial(nm.realnvp, transforms=2, hidden=(8,))),
}
each_guide = pytest.mark.parametrize("name", GUIDES)
Y = jnp.array([1.0, 2.5, 0.3])


LEVELS = jnp.array([0.1, 0.5, 0.9])


def svi_of(model, guide, rate=5e-3, loss=None):
    return SVI(model, guide, optax.adam(rate), loss or nm.PathELBO(8))


def trained(model, guide, *args, steps=300, rate=5e-3, loss=None):
    return svi_of(model, guide, rate, loss).run(jax.random.key(0), steps, *args, progress_bar=False)


def started(model, guide, *args):
    """Parameters where training starts."""
    svi = svi_of(model, guide)
    return svi.get_params(jax.jit(svi.init)(jax.random.key(0), *args))


def one_number():
    z = numpyro.sample("z", dist.Normal(0, 2))
    numpyro.sample("y", dist.Normal(z, 1).expand([3]).to_event(1), obs=Y)


POSTERIOR = dist.Normal(float(Y.sum() / (3 + 0.25)), (3 + 0.25) ** -0.5)
EVIDENCE = float(dist.MultivariateNormal(jnp.zeros(3), jnp.eye(3) + 4).log_prob(Y))


def mixed():
    """Real, positive and simplex sites, in plates of two sizes."""
    mu = numpyro.sample("mu", dist.Normal(1, 1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1))
    numpyro.sample("share", dist.Dirichlet(jnp.ones(3)))
    with numpyro.plate("groups", 2, dim=-1), numpyro.plate("rows", 3, dim=-2):
        theta = numpyro.sample("theta", dist.Normal(mu, sigma))
        numpyro.sample("y", dist.Normal(theta, 0.5), obs=jnp.tile(Y[:, None], (1, 2)))
    numpyro.deterministic("twice", 2 * mu)


@lru_cache
def of_one_number(name):
    """Guide and result of its training."""
    guide = GUIDES[name](one_number)
    return guide, trained(one_number, guide)


@lru_cache
def of_mixed(name):
    """Guide, and parameters as they may become."""
    guide = GUIDES[name](mixed, warmup=0, init_scale=0.5)
    params = started(mixed, guide)
    return guide, params | {"auto$params": noisy(params["auto$params"], 1, 0.05)}


# With known answers ----------------------------------------------------------------------------


@each_guide
def test_one_latent_number(name):
    guide, result = of_one_number(name)
    z = POSTERIOR.icdf(LEVELS)

    @jax.jit
    def facts(params):
        quantiles = guide.quantiles(params, LEVELS)["z"]
        draws = guide.sample_posterior(1, params, sample_shape=2000)["z"]
        return quantiles, draws, guide.get_posterior(params).log_prob(z[:, None])

    quantiles, draws, log_prob = jax.tree.map(np.asarray, facts(result.params))
    np.testing.assert_allclose(quantiles, z, atol=0.05)
    np.testing.assert_allclose(quantiles[1], POSTERIOR.mean, atol=0.03)
    np.testing.assert_allclose([draws.mean(), draws.std()], [POSTERIOR.mean, POSTERIOR.scale], atol=0.05)
    np.testing.assert_allclose(log_prob, POSTERIOR.log_prob(z), atol=0.05)
    found = nm.check_guide(2, one_number, guide, result.params)
    np.testing.assert_allclose(found.log_evidence, EVIDENCE, atol=0.01)
    # The Gaussian it starts at stays as it is.
    for site, at in zip(("auto_loc", "auto_scale"), guide._gaussian):
        np.testing.assert_array_equal(result.params[site], at)


@each_guide
def test_starts_finite_and_near_the_median(name):
    def far():
        z = numpyro.sample("z", dist.LogNormal(jnp.array([50.0, -3.0]), 0.1).to_event(1))
        numpyro.sample("y", dist.Normal(jnp.log(z).sum(), 1.0), obs=47.0)

    guide = GUIDES[name](far, warmup=0)
    svi = svi_of(far, guide, loss=Trace_ELBO())

    @jax.jit
    def facts(key):
        state = svi.init(key)
        return svi.evaluate(state), guide.median(svi.get_params(state))["z"]

    loss, median = facts(jax.random.key(0))
    assert np.isfinite(loss)
    np.testing.assert_allclose(np.log(median), [50, -3], atol=0.3)


def test_the_gaussian_start_is_exact_for_a_gaussian():
    """Widely different scales, correlated, and far from the start."""
    scale = jnp.array([1e-2, 1.0, 30.0])
    root = scale[:, None] * jnp.array([[1.0, 0, 0], [0.9, 0.4, 0], [-0.5, 0.3, 0.8]])
    loc = jnp.array([3.0, -20.0, 100.0])
    target = dist.MultivariateNormal(loc, scale_tril=root)
    found = fit_gaussian(0, target.log_prob, jnp.zeros(3), 0.1)
    found = dist.MultivariateNormal(found[0], scale_tril=found[1])
    assert -1e-6 < dist.kl_divergence(found, target) < 1e-3  # it is not negative but for rounding
    alone = dist.Normal(loc, scale)
    found = fit_gaussian(0, alone.to_event(1).log_prob, jnp.zeros(3), 0.1, dense=2)
    assert -1e-6 < dist.kl_divergence(dist.Normal(*found), alone).sum() < 1e-3


def test_the_gaussian_start_arrives_from_far_away():
    """A regression whose intercept and slope are nearly collinear, from densities of -1e8 and the like."""
    starts = jnp.array([(-0.7, -1.7, -1.3), (2.0, 2.0, 2.0), (-2.0, 1.0, 2.0)])
    x = np.linspace(57.0, 77.0, 300, dtype=np.float32)
    y = 2.5 + 0.025 * x + 0.4 * np.random.default_rng(0).normal(size=300).astype(np.float32)

    def log_density(z):
        return dist.Normal(z[0] + z[1] * x, jnp.exp(z[2])).log_prob(y).sum()

    locs, _ = jax.jit(jax.vmap(lambda start: fit_gaussian(0, log_density, start, 0.1)))(starts)
    design = np.stack([np.ones(300), x], -1)
    expected, rest, *_ = np.linalg.lstsq(design, y)
    for loc in np.asarray(locs):
        np.testing.assert_allclose(loc[:2], expected, rtol=0.05)
        np.testing.assert_allclose(np.exp(loc[2]), (rest[0] / 300) ** 0.5, rtol=0.02)


def test_the_gaussian_start_survives_where_the_density_is_not_finite():
    def log_density(z):
        return jnp.where(z[0] > 0, dist.Normal(1.0, 0.5).log_prob(z).sum(), jnp.nan)

    found, factor = fit_gaussian(0, log_density, jnp.full(2, 3.0), 0.1)
    assert np.isfinite(found).all() and np.isfinite(factor).all() and found[0] > 0


# Inside NumPyro ----------------------------------------------------------------------------------


@each_guide
def test_sites_plates_and_supports(name):
    guide, params = of_mixed(name)
    assert set(params) == {"auto$params", "auto_loc", "auto_scale"}

    @jax.jit
    def facts(params):
        quantiles = guide.quantiles(params, jnp.array([0.05, 0.95]))
        return quantiles, guide.sample_posterior(jax.random.key(0), params, sample_shape=(4, 5))

    quantiles, draws = jax.tree.map(np.asarray, facts(params))
    assert {k: v.shape[1:] for k, v in quantiles.items()} == {
        "mu": (), "sigma": (), "share": (3,), "theta": (3, 2), "twice": ()
    }  # fmt: skip
    assert (quantiles["sigma"] > 0).all()
    np.testing.assert_allclose(quantiles["share"].sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(quantiles["twice"], 2 * quantiles["mu"], rtol=1e-5)
    assert draws["theta"].shape == (4, 5, 3, 2)


def test_predictive():
    guide, params = of_mixed("iaf")
    draws = jax.jit(Predictive(guide, params=params, num_samples=6))(jax.random.key(0))
    assert draws["share"].shape == (6, 3)


def test_init_under_jit_leaves_nothing_behind():
    guide = GUIDES["maf"](one_number)
    svi = svi_of(one_number, guide, loss=Trace_ELBO())
    state, _ = jax.jit(svi.update)(jax.jit(svi.init)(jax.random.key(0)))
    assert np.isfinite(jax.jit(guide.median)(svi.get_params(state))["z"])
    assert "AutoMAF of one_number: 1 latent numbers" in repr(guide) and len(repr(guide)) < 400


def moments(model, samples, warmup):
    @jax.jit
    def run(key):
        mcmc = MCMC(NUTS(model), num_warmup=warmup, num_samples=samples, progress_bar=False)
        mcmc.run(key)
        return mcmc.get_samples()

    draws = jax.tree.map(np.asarray, run(jax.random.key(samples)))
    return {k: (v.shape[1:], v.mean(0), v.std(0)) for k, v in draws.items()}


@lru_cache
def moments_of_mixed():
    return moments(mixed, 1000, 200)


@pytest.mark.parametrize("name", [pytest.param("iaf", marks=pytest.mark.slow), "maf"])
def test_neutra_with_plates(name):
    found = moments(NeuTraReparam(*of_mixed(name)).reparam(mixed), 400, 200)
    assert found["theta"][0] == (3, 2)
    for site in ("mu", "theta", "share"):
        _, expected, sd = moments_of_mixed()[site]
        np.testing.assert_array_less(abs(found[site][1] - expected) / sd, 0.35)


def test_guide_list_mixes_them():
    guide = AutoGuideList(mixed)
    guide.append(AutoNormal(handlers.block(mixed, expose=["mu", "share"])))
    exposed = handlers.block(mixed, expose=["sigma", "theta", "groups", "rows"])
    guide.append(GUIDES["maf"](exposed, prefix="f", warmup=0))
    params = started(mixed, guide)
    median, quantiles = jax.jit(lambda p: (guide.median(p), guide.quantiles(p, [0.2, 0.8])))(params)
    assert set(median) == {"mu", "share", "sigma", "theta"}
    assert quantiles["theta"].shape == (2, 3, 2)


@pytest.mark.parametrize("builder", [nm.circular, nm.nis])
def test_builders_without_real_events_are_refused(builder):
    guide = nm.AutoFlow(one_number, builder=builder)
    with pytest.raises(ValueError, match="real events"):
        handlers.seed(guide, 0)()


# Path gradients ---------------------------------------------------------------------------------


def correlated():
    z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
    numpyro.sample("y", dist.Normal(z @ jnp.array([1.0, 1.0]), 0.5), obs=1.0)


def test_path_elbo_is_the_elbo_and_its_gradient_right_on_average():
    guide = GUIDES["maf"](correlated, warmup=0, init_scale=0.7)
    params = started(correlated, guide)
    weights = {"auto$params": params.pop("auto$params")}

    def at(elbo):
        def loss(weights):
            return elbo.loss(jax.random.key(1), weights | params, correlated, guide)

        return jax.jit(jax.value_and_grad(loss))(weights)

    (value, gradient), (expected, noisy) = at(nm.PathELBO(20_000)), at(Trace_ELBO(20_000))
    np.testing.assert_allclose(value, expected, atol=0.03)  # other draws
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(noisy)):
        np.testing.assert_allclose(a, b, atol=0.05 + 0.1 * float(abs(b).max()))


def test_path_gradient_vanishes_at_the_posterior():
    """Draw by draw, where the usual gradient does so only on average."""
    guide = AutoMultivariateNormal(correlated)
    started(correlated, guide)
    precision = jnp.eye(2) + 4 * jnp.ones((2, 2))
    covariance = jnp.linalg.inv(precision)
    exact = {
        "auto_loc": covariance @ jnp.array([4.0, 4.0]),
        "auto_scale_tril": jnp.linalg.cholesky(covariance),
    }

    def gradient(elbo):
        def loss(params):
            return elbo.loss(jax.random.key(1), params, correlated, guide)

        return max(float(abs(g).max()) for g in jax.tree.leaves(jax.jit(jax.grad(loss))(exact)))

    assert gradient(nm.PathELBO(4)) < 1e-4
    assert gradient(Trace_ELBO(4)) > 0.1


def test_path_elbo_trains_the_models_own_parameters():
    def model():
        loc = numpyro.param("loc", 0.0)
        z = numpyro.sample("z", dist.Normal(loc, 1))
        numpyro.sample("y", dist.Normal(z, 1), obs=3.0)

    guide = GUIDES["maf"](model)
    result = trained(model, guide, steps=1500, rate=1e-2)
    np.testing.assert_allclose(result.params["loc"], 3.0, atol=0.1)  # maximum likelihood


def test_path_elbo_refuses_mutable_state_and_warns_of_sites_without_guide():
    def stateful():
        numpyro.primitives.mutable("count", jnp.zeros(()))
        one_number()

    guide = AutoNormal(one_number)
    svi = SVI(stateful, guide, optax.adam(1e-3), nm.PathELBO())
    with pytest.raises(ValueError, match="mutable state"):
        svi.run(jax.random.key(0), 1, progress_bar=False)

    def nothing():
        pass

    with pytest.warns(UserWarning, match="model but not guide"):
        nm.PathELBO().loss(jax.random.key(0), {}, one_number, nothing)


# Amortised ---------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
TRUTH = 1 + 1.5 * RNG.normal(size=200)
X = (TRUTH[:, None] + RNG.normal(size=(200, 3))).astype(np.float32)


def local(x, size=32):
    with numpyro.plate("rows", len(x), subsample_size=min(size, len(x))):
        batch = numpyro.subsample(x, 1)
        z = numpyro.sample("z", dist.Normal(1, 1.5))
        numpyro.sample("x", dist.Normal(z[:, None], 1.0).to_event(1), obs=batch)


@pytest.mark.slow
def test_amortised_posteriors_are_those_of_each_row_new_ones_included():
    guide = nm.AutoAmortized(local, "rows", encoder=(16, 8))
    params = trained(local, guide, X, steps=1500, loss=nm.PathELBO(2)).params
    rows = np.concatenate([X, X[:5] + 0.3])
    exact = (1 / 2.25 + rows.sum(1)) / (1 / 2.25 + 3)

    @jax.jit
    def facts(params):
        draws = guide.sample_posterior(1, params, rows, sample_shape=1000)["z"]
        return draws, guide.quantiles(params, LEVELS, rows)["z"], guide.median(params, rows)["z"]

    draws, (low, middle, high), median = facts(params)
    assert draws.shape == (1000, len(rows))
    np.testing.assert_allclose(draws.mean(0), exact, atol=0.2)
    np.testing.assert_allclose(draws.std(0), (1 / 2.25 + 3) ** -0.5, rtol=0.15)
    assert (low < median).all() and (median < high).all()
    np.testing.assert_allclose(middle, median, atol=1e-5)
    assert "1 latent numbers for each row of plate 'rows'" in repr(guide)


def test_amortised_beside_global_variables():
    def model(x):
        scale = numpyro.sample("scale", dist.HalfNormal(2.0))
        with numpyro.plate("columns", 2, dim=-1), numpyro.plate("rows", len(x), subsample_size=10, dim=-2):
            z = numpyro.sample("z", dist.Dirichlet(jnp.ones(3)))
        with numpyro.plate("rows", len(x), subsample_size=10, dim=-2):
            batch = numpyro.subsample(x, 1)
            mean = z.sum(-2, keepdims=True)
            numpyro.sample("x", dist.Normal(mean, scale).to_event(1), obs=batch)

    def plain(x):
        return model(x)

    hidden = handlers.block(plain, hide=["scale"])
    local = nm.AutoAmortized(hidden, "rows", encoder=(8, 4), inputs=lambda x: x[:, 0])
    guide = AutoGuideList(model)
    guide.append(local)
    guide.append(GUIDES["maf"](handlers.block(plain, expose=["scale"]), prefix="global", warmup=0))

    @jax.jit
    def facts(key):
        with handlers.seed(rng_seed=key), handlers.trace() as trace:
            guide(X[:, None])
        assert trace["z"]["fn"].batch_shape == (10, 2)
        return trace["z"]["value"]

    z = facts(jax.random.key(0))
    assert z.shape == (10, 2, 3)
    np.testing.assert_allclose(z.sum(-1), 1, rtol=1e-5)


def test_amortised_guides_want_all_their_sites_in_the_plate():
    with pytest.raises(ValueError, match="'mu' is not in plate"):
        handlers.seed(nm.AutoAmortized(lambda x: mixed(), "rows"), 0)(X)


def encoders():
    linen, nnx = pytest.importorskip("flax.linen"), pytest.importorskip("flax.nnx")
    equinox = pytest.importorskip("equinox")
    return {
        "tuple": (8, 4),
        "linen": linen.Sequential([linen.Dense(8), linen.tanh, linen.Dense(4)]),
        "nnx": nnx.Linear(3, 4, rngs=nnx.Rngs(0)),
        "equinox": equinox.nn.MLP(3, 4, 8, 1, key=jax.random.key(0)),
    }


@pytest.mark.parametrize("kind", ["tuple", "linen", "nnx", "equinox"])
def test_encoders(kind):
    encoder = encoders()[kind]
    weights, apply = as_network(encoder, jax.random.key(1), X[:1])
    apply = jax.jit(apply)
    several, one = (np.asarray(apply(weights, x)) for x in (X[:7], X[2:3]))
    assert several.shape == (7, 4)
    np.testing.assert_allclose(several[2], one[0], rtol=1e-5)
    builder = partial(nm.elementwise, scalar=nm.Affine(), hidden=(4,))
    guide = nm.AutoAmortized(local, "rows", encoder=encoder, builder=builder)
    svi = svi_of(local, guide, loss=Trace_ELBO())

    @jax.jit
    def facts(key):
        state = svi.init(key, X)
        before, after = svi.get_params(state), svi.get_params(svi.update(state, X)[0])
        return before["auto_encoder"], after["auto_encoder"], guide.sample_posterior(0, after, X)

    before, after, draws = jax.tree.map(np.asarray, facts(jax.random.key(0)))
    for part, given, learned in zip(*map(jax.tree.leaves, (weights, before, after))):
        assert part.shape == given.shape == learned.shape and (given != learned).any()
    assert {k: v.shape for k, v in draws.items()} == {"z": (200,)}


def test_encoders_of_other_kinds_are_refused():
    with pytest.raises(ValueError, match="encoder needs hidden widths"):
        as_network((8,), jax.random.key(0), X)
    with pytest.raises(TypeError, match="encoder must be"):
        as_network("resnet", jax.random.key(0), X)


# The check ---------------------------------------------------------------------------------------


def narrow(scale):
    guide = AutoDiagonalNormal(one_number)
    started(one_number, guide)
    return guide, {"auto_loc": jnp.array([POSTERIOR.mean]), "auto_scale": jnp.array([scale])}


def test_check_of_an_exact_guide():
    found = nm.check_guide(jax.random.key(0), one_number, *narrow(POSTERIOR.scale))
    np.testing.assert_allclose([found.elbo, found.log_evidence], EVIDENCE, atol=1e-4)
    assert found.psis.ess > 3999 and "good as it is" in str(found)
    assert repr(found).startswith("GuideCheck: good as it is") and len(repr(found)) < 400
    assert "good as it is" in found._repr_html_()


def test_check_mends_a_wide_guide_and_warns_of_a_narrow_one():
    wide = nm.check_guide(jax.random.key(0), one_number, *narrow(3 * POSTERIOR.scale))
    assert wide.khat < wide.psis.threshold and "weighted draws" in wide.verdict
    np.testing.assert_allclose(wide.log_evidence, EVIDENCE, atol=0.05)
    mended = wide.resample(1)["z"]
    np.testing.assert_allclose(mended.std(), POSTERIOR.scale, rtol=0.08)
    second = wide.mean(lambda sites: {"square": sites["z"] ** 2})["square"]
    np.testing.assert_allclose(second, POSTERIOR.mean**2 + POSTERIOR.variance, rtol=0.05)
    guide, params = narrow(POSTERIOR.scale / 4)
    found = nm.check_guide(jax.random.key(0), one_number, guide, params)
    assert found.khat > found.psis.threshold and "do not trust" in found.verdict
    numpyros = psis_diagnostic(jax.random.key(0), params, one_number, guide, num_particles=4000)
    np.testing.assert_allclose(found.khat, numpyros, atol=0.15)


def test_psis_against_a_pareto_tail():
    """Weights u^-k have a tail of shape k."""
    u = np.random.default_rng(0).uniform(size=20_000)
    for k in (0.3, 0.9):
        found = psis(-k * np.log(u))
        np.testing.assert_allclose(found.khat, k, atol=0.1)
        np.testing.assert_allclose(np.exp(found.log_weights).sum(), 1)
    assert psis(np.zeros(100)).ess == pytest.approx(100)
    with pytest.raises(ValueError, match=r"\(S,\)"):
        psis(np.zeros((2, 100)))
    with pytest.raises(ValueError, match="finite"):
        psis(np.full(100, np.nan))


def test_c2st_tells_apart_what_differs():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 600, 2))
    assert abs(c2st(x, y, folds=2) - 0.5) < 0.05
    assert c2st(x, y + 5, folds=2) > 0.99
    expected = 0.5 * (1 + 2 * dist.Normal(0, 1).cdf(0.5) - 1)  # the best classifier of means 1 apart
    assert abs(c2st(x[:, :1], y[:, :1] + 1, folds=2) - float(expected)) < 0.05
    with pytest.raises(ValueError, match=r"\(N, D\)"):
        c2st(x, y[:-1])


def test_to_arviz_names_plates():
    guide, params = of_mixed("maf")
    checked = nm.check_guide(0, mixed, guide, params, num_samples=100)
    predictive = {"y": np.zeros((100, 3, 2))}
    data = nm.to_arviz(
        checked.samples, mixed, prior={"mu": np.zeros(20)}, posterior_predictive=predictive,
        dims={"share": ["kind"]}, coords={"kind": ["a", "b", "c"]},
    )  # fmt: skip
    posterior = data["posterior"]
    assert posterior["theta"].dims == ("chain", "draw", "rows", "groups")
    assert posterior["share"].dims == ("chain", "draw", "kind")
    assert posterior["share"].coords["kind"].values.tolist() == ["a", "b", "c"]
    assert posterior["theta"].shape == (1, 100, 3, 2)
    assert data["prior"]["mu"].shape == (1, 20)
    assert data["posterior_predictive"]["y"].dims == ("chain", "draw", "rows", "groups")
    np.testing.assert_allclose(data["observed_data"]["y"].values[:, 0], Y)
    assert checked.to_arviz(1, mixed)["posterior"]["theta"].shape == (1, 100, 3, 2)
    with pytest.raises(ValueError, match="as many draws"):
        nm.to_arviz({"mu": jnp.zeros(3), "sigma": jnp.ones(4)}, mixed)


# Real posteriors ------------------------------------------------------------------------------


@pytest.mark.slow
def test_regression_of_a_real_posterior():
    folder = os.environ.get("NUMPYRO_MAF_DATA")
    name = "kidiq-kidscore_momiq"
    if not folder or not (pathlib.Path(folder) / "posteriordb" / f"{name}.npz").exists():
        pytest.skip("NUMPYRO_MAF_DATA names no folder with posteriordb/")
    import json

    path = pathlib.Path(folder) / "posteriordb"
    raw = json.loads((path / f"{name}.data.json").read_text())
    iq, score = jnp.array(raw["mom_iq"]), jnp.array(raw["kid_score"])

    def model():
        flat = dist.ImproperUniform(dist.constraints.real_vector, (), (2,))
        beta = numpyro.sample("beta", flat)
        sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
        numpyro.sample("y", dist.Normal(beta[0] + beta[1] * iq, sigma), obs=score)

    guide = nm.AutoIAF(model)
    params = trained(model, guide, steps=500).params
    draws = jax.jit(partial(guide.sample_posterior, 1, sample_shape=4000))(params)
    with np.load(path / f"{name}.npz") as reference:
        for site, found in [("beta[1]", draws["beta"][:, 0]), ("beta[2]", draws["beta"][:, 1]),
                            ("sigma", draws["sigma"])]:  # fmt: skip
            expected = reference[site].ravel()
            assert abs(found.mean() - expected.mean()) < 0.08 * expected.std()
            np.testing.assert_allclose(found.std(), expected.std(), rtol=0.08)


def test_loss_curves(tmp_path):
    from numpyro_maf.plots import loss_curves

    _, result = of_one_number("maf")
    path = tmp_path / "losses.png"
    figure = loss_curves({"svi": result, "array": np.linspace(3, 1, 40)}, path=path)
    assert path.stat().st_size > 5000
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["svi", "array"]
