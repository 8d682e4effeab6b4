"""Likelihood-free inference against models whose posteriors are known."""

import math
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS, Predictive
from scipy.special import logsumexp
from scipy.stats import norm

import numpyro_maf as nm
from numpyro_maf import sbi
from numpyro_maf.nn.embeddings import DeepSet
from numpyro_maf.sbi import Simulator
from numpyro_maf.sbi.methods import Method, Proposal, Truncated
from numpyro_maf.sbi.neural_posterior import fit_posterior
from numpyro_maf.sbi.options import PosteriorOptions
from numpyro_maf.sbi.preprocessing import Prepared

pytestmark = pytest.mark.xdist_group("sbi")  # what was trained once serves all

# Trainings share one compiled step: two latent and two observed numbers, up to 1024 rows, one size of batch.
ROWS = 1000
SMALL = partial(nm.maf, transforms=1, hidden=(16,))
QUICK = dict(progress=False, max_epochs=25, learning_rate=5e-3, batch_size=256, average=0.9)
LEARN = QUICK | dict(builder=SMALL, regression=True)
ONCE = LEARN | dict(max_epochs=1)
X = np.array([0.6, -1.0])
NOISE = 0.5


def noisy(key, theta):
    return theta + NOISE * jax.random.normal(key, theta.shape)


def gaussian(x=None):
    theta = numpyro.sample("theta", dist.Normal(0, 1).expand([2]).to_event(1))
    numpyro.sample("x", Simulator(noisy, theta, event_shape=(2,)), obs=x)


# Its posterior has mean x / (1 + NOISE^2) and this variance.
VARIANCE = NOISE**2 / (1 + NOISE**2)


@cache
def simulations(seed=0):
    return nm.simulate(seed, gaussian, ROWS, progress=False)


@cache
def posterior():
    return nm.npe(1, gaussian, simulations(), **LEARN)


def assert_known(draws, x=X, mean=0.07, variance=0.04):
    np.testing.assert_allclose(draws.mean(0), x / (1 + NOISE**2), atol=mean)
    np.testing.assert_allclose(np.cov(draws.T), VARIANCE * np.eye(2), atol=variance)


# Simulators ---------------------------------------------------------------------------------------


def host_noisy(key, theta):
    if theta[0] > 2:
        raise ArithmeticError("too large")
    if theta[0] < -2:
        time.sleep(2)
    return theta + np.random.default_rng(key).normal(size=2)


def host_model(x=None):
    theta = numpyro.sample("theta", dist.Normal(0, 1).expand([2]).to_event(1))
    y = numpyro.sample("x", Simulator(host_noisy, theta, event_shape=(2,)), obs=x)
    numpyro.sample("after", dist.Normal(y.sum(), 1))


def test_simulators_are_distributions_without_density():
    d = Simulator(noisy, jnp.ones(2), event_shape=(2,))
    assert d.event_shape == (2,) and d.batch_shape == ()
    draws = jax.jit(lambda key: d.sample(key, (5000,)))(jax.random.key(0))
    np.testing.assert_allclose(draws.mean(0), 1, atol=0.03)
    assert d.expand((3,)).sample(jax.random.key(0)).shape == (3, 2)
    with pytest.raises(NotImplementedError, match=r"npe.*nle"):
        d.log_prob(jnp.zeros(2))
    with pytest.raises(ValueError, match="gave shape"):
        Simulator(noisy, jnp.ones(3), event_shape=(2,)).sample(jax.random.key(0))


def test_leading_axes_of_parameters_are_batch_axes_where_the_shape_says_so():
    each = Simulator(lambda key, mean, sd: mean + sd * jax.random.normal(key), jnp.arange(3.0), 0.1)
    assert each.batch_shape == (3,) and each.theta.shape == (3, 2)
    np.testing.assert_allclose(each.sample(jax.random.key(0), (2000,)).mean(0), [0, 1, 2], atol=0.02)
    assert Simulator(noisy, jnp.ones((4, 2)), event_shape=(2,)).batch_shape == (4,)


def test_host_simulators_say_how_to_run_them_and_run_eagerly():
    d = Simulator(host_noisy, jnp.zeros(2), event_shape=(2,))
    assert d.sample(jax.random.key(0), (3,)).shape == (3, 2)
    with pytest.raises(TypeError, match="simulate"):
        Predictive(host_model, num_samples=2)(jax.random.key(0))


# Simulations --------------------------------------------------------------------------------------


def test_simulations_are_those_of_the_model_and_repeatable():
    sims = simulations()
    assert set(sims) == {"theta", "x"} and sims.errors == {}
    np.testing.assert_allclose(np.std(sims["x"] - sims["theta"]), NOISE, atol=0.02)
    again = nm.simulate(jax.random.key(0), gaussian, ROWS, progress=False)
    np.testing.assert_array_equal(again["x"], sims["x"])
    given = nm.simulate(
        jax.random.key(0), gaussian, 3, given={"theta": 100 * np.ones((3, 2))}, progress=False
    )
    assert (given["x"] > 90).all()


def test_failures_and_timeouts_of_host_simulators_are_recorded_by_row():
    sims = nm.simulate(
        jax.random.key(0), host_model, 100, executor=ThreadPoolExecutor(8), timeout=0.5, progress=False
    )
    first = sims["theta"][:, 0]
    assert {row for row, what in sims.errors.items() if "ArithmeticError: too large" in what} == set(
        np.flatnonzero(first > 2)
    )
    assert {row for row, what in sims.errors.items() if what == "x: timeout"} == set(
        np.flatnonzero(first < -2)
    )
    assert np.isnan(sims["x"][sims.failed]).all() and np.isfinite(sims["after"][~sims.failed]).all()
    rest = sims["after"] - sims["x"].sum(1)
    assert 0.6 < np.nanstd(rest) < 1.4  # what comes after a simulator saw its results


def test_all_failing_says_why():
    def fails(key, theta):
        raise RuntimeError(f"no licence for {float(theta):.0f}")

    def model():
        numpyro.sample("x", Simulator(fails, 1.0))

    with pytest.raises(ValueError, match="all 4 simulations failed, the first with: x: RuntimeError: no lic"):
        nm.simulate(jax.random.key(0), model, 4, executor=ThreadPoolExecutor(1), progress=False)


def flaky(x=None):
    theta = numpyro.sample("theta", dist.Normal(0, 1).expand([2]).to_event(1))
    fails = lambda key, t: jnp.where(t[0] > 1, jnp.nan, noisy(key, t))  # noqa: E731
    numpyro.sample("x", Simulator(fails, theta, event_shape=(2,)), obs=x)


def test_numbers_that_are_not_finite_are_failures():
    sims = nm.simulate(0, flaky, ROWS, progress=False)
    np.testing.assert_array_equal(sims.failed, sims["theta"][:, 0] > 1)
    with pytest.warns(UserWarning, match=rf"npe leaves out {sims.failed.sum()} of {ROWS}"):
        found = nm.npe(0, flaky, sims, **ONCE)
    assert found.excluded == sims.failed.sum()
    for learn in (nm.nle, nm.nre):
        with pytest.raises(ValueError, match="failures='exclude'"):
            learn(0, flaky, sims)


def padded(x=None):
    theta = numpyro.sample("theta", dist.Normal(0, 1))

    def some(key, theta):
        x = theta + jax.random.normal(key, (6,))
        return jnp.where(jnp.arange(6) < jax.random.randint(key, (), 1, 7), x, jnp.nan)

    numpyro.sample("x", Simulator(some, theta, event_shape=(6,)), obs=x)


def test_padding_by_the_simulator_is_no_failure():
    sims = nm.simulate(0, padded, 100, missing=("x",), progress=False)
    assert not sims.errors and np.isnan(sims["x"]).any()
    found = nm.npe(1, padded, sims, missing=True, **ONCE)
    assert found.excluded == 0
    seen = {"x": np.array([0.5, 1.0, *[np.nan] * 4])}
    count = found(seen).check_predictive(0, lambda data: jnp.isnan(data["x"]).sum(), 200)
    np.testing.assert_allclose(
        count, 1 / 4, atol=0.1
    )  # all six lengths are as frequent, two as long or shorter
    sbi.calibrate(0, found, sims, num_samples=20)


def several(a=None, b=None):
    theta = numpyro.sample("theta", dist.Normal(0, 1))
    numpyro.sample("a", dist.Normal(theta, 1), obs=a)
    numpyro.sample("b", dist.Normal(theta, 1), obs=b)


# Preparation --------------------------------------------------------------------------------------


def prepared(model, sims, observed, vectors=True, **options):
    return Prepared.of(jax.random.key(0), "it", model, sims, observed, vectors=vectors, **options)


def test_rows_count_if_any_of_several_sites_is_there():
    sims = nm.simulate(0, several, 60, progress=False)
    shown = {**sims, "a": np.where(np.arange(60) % 2, np.nan, sims["a"])}
    shown["b"] = np.where(np.arange(60) % 4, shown["b"], np.nan)
    assert prepared(several, shown, ("a", "b"), missing=True).excluded == 0
    shown["a"][0] = np.nan  # now row 0 has nothing
    with pytest.warns(UserWarning, match="leaves out 1 of 60"):
        assert prepared(several, shown, ("a", "b"), missing=True).excluded == 1


def test_weights_masks_and_failures_are_filtered_together():
    sims = nm.simulate(0, flaky, 100, progress=False)
    weights, mask, good = np.arange(100.0), np.arange(100) % 5 == 0, ~sims.failed
    with pytest.warns(UserWarning, match="leaves out"):
        found = prepared(flaky, sims, "x", weights=weights, validation=mask)
    np.testing.assert_allclose(found.weights * weights[good].max(), weights[good])
    np.testing.assert_array_equal(found.held_out, mask[good])
    np.testing.assert_array_equal(found.arrays[0], sims["x"][good])
    np.testing.assert_allclose(found.theta, sims["theta"][good])
    kept = prepared(flaky, sims, "x", failures="keep", weights=np.where(good, 1.0, np.nan))
    np.testing.assert_array_equal(kept.weights, good)
    np.testing.assert_allclose(kept.theta, sims["theta"])  # all may be atoms
    assert np.isfinite(kept.arrays[0]).all() and kept.excluded == sims.failed.sum()


def plates(x=None):
    theta = numpyro.sample("theta", dist.Normal(0, 1))
    fails = lambda key, t: jnp.where(t > 1, jnp.nan, t + jax.random.normal(key))  # noqa: E731
    with numpyro.plate("repeats", 3):
        numpyro.sample("x", Simulator(fails, theta), obs=x)


def test_rows_of_plates_have_the_weights_and_the_mask_of_their_simulation():
    sims = nm.simulate(0, plates, 100, progress=False)
    weights, mask, good = 1.0 + np.arange(100), np.arange(100) % 4 == 0, ~sims.failed
    options = dict(weights=weights, validation=mask, failures="exclude")
    with pytest.warns(UserWarning, match=f"leaves out {(~good).sum()} of 100"):
        found = prepared(plates, sims, "x", vectors=False, **options)
    np.testing.assert_array_equal(found.theta[:, 0], np.repeat(sims["theta"][good], 3))
    np.testing.assert_array_equal(found.arrays[0], sims["x"][good].ravel())
    np.testing.assert_allclose(found.weights * weights[good].max(), np.repeat(weights[good], 3))
    np.testing.assert_array_equal(found.held_out, np.repeat(mask[good], 3))
    with pytest.warns(UserWarning, match="leaves out"):  # a share holds out whole simulations
        share = prepared(plates, sims, "x", vectors=False, failures="exclude").held_out.reshape(-1, 3)
    assert (share == share[:, :1]).all() and share[:, 0].sum() == round(0.1 * good.sum())
    few = dict(progress=False, max_epochs=1)
    with pytest.warns(UserWarning, match="nle leaves out"):
        assert nm.nle(0, plates, sims, builder=SMALL, regression=True, **options, **few).context == 1
    with pytest.warns(UserWarning, match="nre leaves out"):
        assert nm.nre(0, plates, sims, hidden=(8,), **options, **few).context == 1


def test_weights_and_masks_are_checked():
    learn = partial(prepared, gaussian, simulations(), "x")
    for name, wrong, what in [
        ("weights", np.ones(7), r"weights must be \(1000,\), one for each simulation, got float64 of shape"),
        ("weights", -np.ones(ROWS), "weights must be not negative"),
        ("validation", np.zeros(7, bool), r"validation must be \(1000,\), one for each simulation"),
        ("validation", np.ones(ROWS, bool), "validation holds out every row"),
        ("failures", "ignore", "failures must be"),
    ]:
        with pytest.raises(ValueError, match=what):
            learn(**{name: wrong})


def test_a_model_is_traced_once():
    calls = []

    def model(x=None):
        calls.append(1)
        gaussian(x)

    prepared(model, simulations(), "x")
    prepared(model, simulations(), "x", vectors=False)
    assert len(calls) == 2


def test_supports_that_depend_on_other_sites():
    def model(x=None):
        top = numpyro.sample("top", dist.Uniform(1, 2))
        numpyro.sample("share", dist.Uniform(jnp.zeros(2), jnp.array([1.0, 3.0])).to_event(1))
        numpyro.sample("below", dist.Uniform(0, top))
        numpyro.sample("x", dist.Uniform(0, top), obs=x)

    sims = nm.simulate(0, model, 50, progress=False)
    with pytest.raises(ValueError, match="the support of site 'below' depends on other sites"):
        prepared(model, sims, "x")
    found = prepared(model, sims, "x", latent=["top", "share"])
    np.testing.assert_array_equal(found.sites.supports[1].base_constraint.upper_bound, [1, 3])
    assert found.supports["x"] is dist.constraints.real


# Neural posteriors --------------------------------------------------------------------------------


def test_npe_finds_the_known_posterior_and_its_density():
    post = posterior()({"x": X})
    draws = np.asarray(post.sample(jax.random.key(0), (4000,))["theta"])
    assert_known(draws)
    np.testing.assert_array_equal(post.sample(0, 4000)["theta"], draws)  # integers for key and shape
    exact = norm(X / (1 + NOISE**2), math.sqrt(VARIANCE)).logpdf(draws).sum(-1)
    np.testing.assert_allclose(post.log_prob({"theta": draws}).mean(), exact.mean(), atol=0.05)
    bare = posterior()(X)
    np.testing.assert_array_equal(bare.log_prob({"theta": draws[:3]}), post.log_prob({"theta": draws[:3]}))


def test_many_observations_at_once():
    post = posterior()({"x": np.stack([X, X + 1, X - 1])})
    draws = post.sample(jax.random.key(0), (2000,))["theta"]
    assert draws.shape == (2000, 3, 2) and post.batch_shape == (3,)
    assert post.log_prob({"theta": draws}).shape == (2000, 3)
    for i, shift in enumerate([0, 1, -1]):
        assert_known(np.asarray(draws[:, i]), X + shift, mean=0.12, variance=0.06)


def test_observations_unlike_all_simulations_warn():
    with pytest.warns(UserWarning, match=r"outside what was simulated: distance \d+"):
        post = posterior()({"x": np.array([30.0, 0.0])})
    assert post.surprise.share == 0
    assert posterior()({"x": X}).surprise.share > 0.1


def bounded(x=None):
    scale = numpyro.sample("scale", dist.LogNormal(0, 0.5))
    share = numpyro.sample("share", dist.Uniform(2, 5))
    numpyro.sample("x", dist.Normal(jnp.stack([share, -share]), scale).to_event(1), obs=x)


@cache
def bounded_posterior():
    return nm.npe(1, bounded, nm.simulate(0, bounded, ROWS, progress=False), **LEARN)


def test_draws_never_leave_the_support_and_the_density_integrates_to_one():
    post = bounded_posterior()({"x": np.array([2.0, -2.0])})
    draws = post.sample(0, 2000)
    assert ((draws["share"] > 2) & (draws["share"] < 5)).all() and (draws["scale"] > 0).all()
    share, scale = np.meshgrid(np.linspace(2, 5, 203)[1:-1], np.linspace(0, 8, 803)[1:-1])
    mass = np.exp(post.log_prob({"share": share, "scale": scale})).sum() * (3 / 202) * (8 / 802)
    np.testing.assert_allclose(mass, 1, atol=0.02)
    assert np.isfinite(post.log_prob({name: value[:3] for name, value in draws.items()})).all()
    outside = {"scale": np.ones(3), "share": np.array([1.9, 3.0, 5.1])}
    np.testing.assert_array_equal(np.isneginf(post.log_prob(outside)), [True, False, True])
    assert np.isneginf(posterior()(X).log_prob({"theta": np.array([np.nan, 0.0])}))
    with pytest.raises(ValueError, match="latent must be some of"):
        nm.npe(1, bounded, nm.simulate(0, bounded, 20, progress=False), latent=["shape"])


def mixed(x=None):
    kind = numpyro.sample("kind", dist.Categorical(jnp.array([0.2, 0.3, 0.5])))
    shift = numpyro.sample("shift", dist.Normal(0, 1))
    numpyro.sample("x", dist.Normal(2.0 * kind + shift, 0.5), obs=x)


@cache
def mixed_posterior():
    sims = nm.simulate(0, mixed, ROWS, progress=False)
    return nm.npe(1, mixed, sims, builder=partial(nm.made, hidden=(32,)), **(QUICK | {"max_epochs": 60}))


def test_discrete_and_mixed_parameters():
    post = mixed_posterior()({"x": 1.5})
    draws = post.sample(0, 4000)
    assert jnp.issubdtype(draws["kind"].dtype, jnp.integer)
    known = np.array([0.2, 0.3, 0.5]) * norm(2 * np.arange(3), math.sqrt(1.25)).pdf(1.5)
    shares = np.bincount(np.asarray(draws["kind"]), minlength=3) / 4000
    np.testing.assert_allclose(shares, known / known.sum(), atol=0.08)
    kind, shift = np.meshgrid(np.arange(3), np.linspace(-8, 8, 1001))
    total = np.exp(post.log_prob({"kind": kind, "shift": shift})).sum() * 0.016
    np.testing.assert_allclose(total, 1, atol=0.01)
    marginal = post.marginal(
        1, "kind", num_samples=ROWS, builder=partial(nm.made, hidden=(8,)), max_epochs=20
    )
    np.testing.assert_allclose(np.exp(marginal.log_prob({"kind": np.arange(3)})), shares, atol=0.07)


@cache
def ensemble():
    return nm.npe(1, gaussian, simulations(), ensemble=3, **LEARN)


def test_ensembles_are_mixtures_and_tell_how_far_members_disagree():
    post = ensemble()({"x": X})
    assert ensemble().members == len(ensemble().flows) == 3
    assert 0 <= post.disagreement(jax.random.key(0)) < 0.5
    draws = post.sample(0, 4000)
    assert_known(np.asarray(draws["theta"]), mean=0.1, variance=0.06)
    each = [flow(c).log_prob(draws["theta"]) for flow, c in zip(ensemble().flows, post.contexts)]
    np.testing.assert_allclose(post.log_prob(draws), logsumexp(each, 0) - math.log(3), atol=1e-4)
    with pytest.raises(ValueError, match="needs an ensemble"):
        posterior()({"x": X}).disagreement(jax.random.key(0))


def test_observations_of_other_shapes_and_signs_are_refused():
    with pytest.raises(ValueError, match=r"'x' must have a shape that ends in \(2,\), got \(1, 1\)"):
        posterior()({"x": np.zeros((1, 1))})
    with pytest.raises(ValueError, match="'x' must have a shape that ends in"):
        ratio()(np.zeros(2), np.zeros(1))
    made = sets()
    with pytest.raises(ValueError, match="'x' must be positive, got -1.0"):
        made({"x": np.array([1.0, 2.0, -1.0]), "y": 0.0})
    zeros = made({"x": np.array([1.0, 2.0, 0.0]), "y": 0.0}, warn=False)
    assert np.isfinite(zeros.sample(jax.random.key(0), (10,))["theta"]).all()


def test_what_is_integrated_out_is_not_scored():
    sims = nm.simulate(0, bounded, ROWS, progress=False)
    options = ONCE | dict(latent=["share"])
    post = nm.npe(0, bounded, sims, **options)({"x": np.array([2.0, -2.0])}, warn=False)
    for use in (post.importance, post.nuts):
        with pytest.raises(ValueError, match=r"the posterior is not of \['scale'\]"):
            use(jax.random.key(0))
    with pytest.raises(ValueError, match="leave out latent="):
        nm.snpe(0, bounded, {"x": np.ones(2)}, simulations=100, **options)


def test_npe_names_what_is_wrong():
    with pytest.raises(ValueError, match="observed site 'y'"):
        nm.npe(0, gaussian, simulations(), observed=("y",))
    with pytest.raises(ValueError, match="lack the latent sites"):
        nm.npe(0, gaussian, {"x": simulations()["x"]})
    with pytest.raises(ValueError, match="needs the sites"):
        posterior()({"y": X})
    with pytest.raises(ValueError, match="'x' is not finite"):
        posterior()({"x": X * np.nan})
    with pytest.raises(TypeError, match=r"dictionary of the sites \['x', 'y'\]"):
        sets()(X)
    with pytest.raises(TypeError, match="key must be an integer or"):
        posterior()(X).sample("seed")
    with pytest.raises(TypeError, match="sample_shape must be"):
        posterior()(X).sample(0, 1.5)


def test_options_that_are_none_name_the_function_and_the_nearest():
    for learn in (nm.npe, nm.nle, nm.nre):
        with pytest.raises(TypeError, match=f"{learn.__name__} got an unknown option 'epochs'.*'max_epochs'"):
            learn(0, gaussian, simulations(), epochs=3)
    with pytest.raises(TypeError, match="snpe got an unknown option 'embeding'.*'embedding'"):
        nm.snpe(0, gaussian, {"x": X}, embeding=(4, 2))
    with pytest.raises(TypeError, match="snpe got an unknown option 'ensemble'"):
        nm.snpe(0, gaussian, {"x": X}, method="a", ensemble=2)


def pair(x=None, y=None):
    theta = numpyro.sample("theta", dist.Uniform(-0.7, 2.3).expand([2]).to_event(1))
    kind = numpyro.sample("kind", dist.Bernoulli(0.5))
    numpyro.sample("x", dist.LogNormal(theta.sum() + kind, 1).expand([3]).to_event(1), obs=x)
    numpyro.sample("y", dist.Normal(theta[0], 1), obs=y)


@cache
def sets():
    """Of mixed sites and two observed ones, hardly trained."""
    sims = nm.simulate(0, pair, 100, progress=False)
    embedding = {"x": DeepSet(4, (8,)), "y": (4, 2)}
    options = QUICK | dict(builder=partial(nm.made, hidden=(8,)), max_epochs=1)
    return nm.npe(1, pair, sims, ("x", "y"), missing=True, embedding=embedding, **options)


LEARNED = {"flow": posterior, "ensemble": ensemble, "sets": sets}


@pytest.mark.parametrize("name", LEARNED)
def test_files_give_equal_posteriors(name, tmp_path):
    before = LEARNED[name]()
    nm.save(tmp_path / "posterior", before)
    after = nm.load(tmp_path / "posterior")
    assert repr(after) == repr(before)
    seen = {"x": np.array([1.0, 2.0, 0.5]), "y": 1.0} if name == "sets" else {"x": X}
    posts = [made(seen) for made in (before, after)]
    draws = [post.sample(jax.random.key(0), (5,)) for post in posts]
    jax.tree.map(np.testing.assert_array_equal, *draws)
    np.testing.assert_array_equal(*(post.log_prob(draws[0]) for post in posts))
    assert posts[0].surprise == posts[1].surprise


def test_models_are_given_back_to_posteriors_from_files(tmp_path):
    nm.save(tmp_path / "posterior", posterior())
    loaded = nm.load(tmp_path / "posterior")
    with pytest.raises(ValueError, match=r"use posterior.with_model\(model\)"):
        loaded({"x": X}).predictive(jax.random.key(0), 3)
    with pytest.raises(ValueError, match="of other sites than this model's"):
        loaded.with_model(lambda: numpyro.sample("theta", dist.Uniform(0, 1)))
    found = [
        made({"x": X}).predictive(jax.random.key(0), 3)["x"]
        for made in (posterior(), loaded.with_model(gaussian))
    ]
    np.testing.assert_array_equal(*found)


def test_networks_of_other_libraries_stay_out_of_files(tmp_path):
    linen = pytest.importorskip("flax.linen")
    two = dict(zip(("theta", "x"), np.random.default_rng(0).normal(size=(2, 20, 2))))
    found = nm.npe(0, gaussian, two, embedding=linen.Dense(2), builder=SMALL, max_epochs=1, progress=False)
    with pytest.raises(TypeError, match="a value of type Dense cannot be written to a file"):
        nm.save(tmp_path / "posterior", found)


def test_maps_marginals_and_conditionals_by_name():
    found = bounded_posterior()({"x": np.array([3.0, -3.0])})
    options = dict(num_samples=ROWS, builder=SMALL, max_epochs=2)
    marginal = found.marginal(0, "share", **options)
    assert marginal.sample(jax.random.key(0), (5,)).keys() == {"share"}
    at, draws = found.map(0, steps=100), found.sample(2, 1000)
    assert found.log_prob(at) >= found.log_prob(draws).max() - 1e-3
    given = mixed_posterior()({"x": 1.5}).conditional(0, {"kind": 1}, 500)  # shift has the mean -0.4
    assert (given["kind"] == 1).all()
    np.testing.assert_allclose([given["shift"].mean(), given["shift"].var()], [-0.4, 0.2], atol=0.12)


def known(x=None):
    theta = numpyro.sample("theta", dist.Normal(0, 1).expand([2]).to_event(1))
    numpyro.sample("x", dist.Normal(theta, NOISE).to_event(1), obs=x)


@cache
def tractable():
    return nm.npe(1, known, nm.simulate(0, known, ROWS, progress=False), **LEARN)({"x": X})


EVIDENCE = norm(0, math.sqrt(1 + NOISE**2)).logpdf(X).sum()


def test_known_densities_correct_draws_and_start_nuts():
    check = tractable().importance(jax.random.key(0), 2000)
    np.testing.assert_allclose(check.log_evidence, EVIDENCE, atol=0.05)
    assert check.khat < check.psis.threshold
    assert_known(np.asarray(check.resample(jax.random.key(1), 4000)["theta"]))
    options = dict(num_warmup=100, num_samples=500, num_chains=2, progress=False)
    assert_known(np.asarray(tractable().nuts(jax.random.key(0), **options).get_samples()["theta"]), mean=0.08)
    with pytest.raises(NotImplementedError, match="no density"):
        posterior()({"x": X}).importance(jax.random.key(0), 100)


def test_predictions_checks_and_arviz():
    post = posterior()({"x": X})
    runs = post.predictive(jax.random.key(0), 1000)
    np.testing.assert_allclose(runs["x"].mean(0), X / (1 + NOISE**2), atol=0.08)
    seen = np.array([X, [0.0, 1.5]])
    exact = norm(seen / (1 + NOISE**2), math.sqrt(VARIANCE + NOISE**2)).sf(seen)
    for observation, expected in ((X, exact[0]), (seen, exact)):
        bound = posterior()({"x": observation})
        found = bound.check_predictive(jax.random.key(0), lambda v: {"each": v["x"]}, 2000)["each"]
        np.testing.assert_allclose(found, expected, atol=0.06)
    data = post.to_arviz(jax.random.key(0), 50)
    groups = {"posterior", "prior", "posterior_predictive", "observed_data"}
    assert groups <= {name.strip("/") for name in (data.groups() if callable(data.groups) else data.groups)}
    np.testing.assert_allclose(data.observed_data["x"], X, rtol=1e-6)


# Learned likelihoods and ratios -------------------------------------------------------------------


def groups(x=None):
    centre = numpyro.sample("centre", dist.Normal(0, 1))
    with numpyro.plate("groups", 3):
        theta = numpyro.sample("theta", dist.Normal(centre, 0.5))
        with numpyro.plate("repeats", 5):
            numpyro.sample("x", Simulator(lambda key, t: t + 0.5 * jax.random.normal(key), theta), obs=x)


@cache
def likelihood():
    sims = nm.simulate(0, groups, 60, progress=False)  # 900 rows
    return nm.nle(1, groups, sims, **LEARN)


def test_likelihoods_are_flows_of_the_simulators_own_parameters():
    grid = np.linspace(-3, 3, 50)
    assert isinstance(likelihood(), nm.Flow) and likelihood().context == 1
    found = likelihood()(jnp.array([0.7])).log_prob(grid[:, None])
    np.testing.assert_allclose(np.exp(found), norm(0.7, 0.5).pdf(grid), atol=0.06)


@pytest.mark.slow
def test_hierarchical_inference_with_a_learned_likelihood_by_nuts():
    x = nm.simulate(jax.random.key(5), groups, 1, progress=False)["x"][0]
    mcmc = MCMC(
        NUTS(nm.learned(groups, {"x": likelihood()})), num_warmup=200, num_samples=1000, progress_bar=False
    )
    mcmc.run(jax.random.key(0), jnp.asarray(x))
    draws = mcmc.get_samples()
    # Exact: given the centre each group is conjugate, and the means of the groups tell of the centre.
    noise = 0.25 / 5
    spread = 0.25 + noise
    precision = 1 + 3 / spread
    centre = x.mean(0).sum() / spread / precision
    np.testing.assert_allclose(draws["centre"].mean(), centre, atol=0.1)
    np.testing.assert_allclose(draws["centre"].var(), 1 / precision, atol=0.06)
    expected = (x.mean(0) / noise + centre / 0.25) / (1 / noise + 1 / 0.25)
    np.testing.assert_allclose(draws["theta"].mean(0), expected, atol=0.08)


def test_likelihoods_of_other_sites_take_all_latents_and_keep_the_support():
    def positive(x=None):
        numpyro.sample("b", dist.Normal(0, 1))
        a = numpyro.sample("a", dist.Normal(0, 1))
        numpyro.sample("x", dist.LogNormal(a, 0.5), obs=x)

    sims = nm.simulate(0, positive, ROWS, progress=False)
    flow = nm.nle(1, positive, sims, **LEARN)
    grid = np.linspace(0.01, 8, 400)
    found = np.exp(flow(jnp.array([1.0, 0.3])).log_prob(grid[:, None]))  # b first: the model's order
    np.testing.assert_allclose(found, np.exp(dist.LogNormal(0.3, 0.5).log_prob(grid)), atol=0.1)
    run = numpyro.handlers.trace(numpyro.handlers.seed(nm.learned(positive, {"x": flow}), 0)).get_trace()
    assert run["x"]["value"] > 0 and jnp.shape(run["x"]["value"]) == ()


@cache
def ratio():
    return nm.nre(0, gaussian, simulations(), hidden=(32, 32), **QUICK)


def test_ratios_are_those_of_likelihood_and_evidence():
    rng = np.random.default_rng(0)
    theta = rng.normal(size=(500, 2))
    x = theta + NOISE * rng.normal(size=(500, 2))
    evidence = norm(0, math.sqrt(1 + NOISE**2)).logpdf(x).sum(-1)
    exact = norm(theta, NOISE).logpdf(x).sum(-1) - evidence
    found = np.asarray(ratio()(theta, x))
    assert np.corrcoef(found, exact)[0, 1] > 0.85
    np.testing.assert_allclose(found.mean(), exact.mean(), atol=0.25)


def test_likelihoods_among_several_data_sites():
    sims = nm.simulate(0, several, ROWS, progress=False)
    found = {name: nm.nle(0, several, sims, name, latent=["theta"], **LEARN) for name in ("a", "b")}
    post = nm.smc(0, several, {"a": 1.0, "b": 2.0}, found, num_particles=2000, progress=False)
    draws = post.sample(0, 2000)["theta"]
    np.testing.assert_allclose([draws.mean(), draws.std()], [1.0, math.sqrt(1 / 3)], atol=0.12)
    both = nm.nre(0, several, sims, ("a", "b"), hidden=(8,), **(QUICK | {"max_epochs": 1}))
    with pytest.raises(ValueError, match=r"a ratio of several sites, \['a', 'b'\], stands at none"):
        nm.learned(several, {"a": both})
    with pytest.raises(ValueError, match="lie on the edge of its support"):
        nm.nle(0, pair, nm.simulate(0, pair, 50, progress=False) | {"x": np.zeros((50, 3))}, "x")


def test_ratios_of_simulators_whose_batch_is_an_event():
    def model(x=None):
        theta = numpyro.sample("theta", dist.Normal(0, 1).expand([4]).to_event(1))
        each = Simulator(lambda key, t: t + jax.random.normal(key), theta)
        numpyro.sample("x", each.to_event(1), obs=x)

    sims = nm.simulate(jax.random.key(0), model, 100, progress=False)
    options = QUICK | dict(max_epochs=1, hidden=(8,))
    assert nm.nre(0, model, sims, **options)(np.zeros((5, 1)), np.zeros(5)).shape == (5,)
    with pytest.raises(ValueError, match=r"weights must be \(100,\)"):
        nm.nre(0, model, sims, weights=np.ones(3), **options)
    with pytest.raises(ValueError, match="10 contrasts need a batch_size of 20 or more"):
        nm.nre(0, model, sims, **(options | {"batch_size": 8}))


def test_files_give_equal_ratios(tmp_path):
    nm.save(tmp_path / "ratio", ratio())
    loaded = nm.load(tmp_path / "ratio")
    theta = jnp.array([[0.1, 0.2], [1.0, -1.0]])
    np.testing.assert_array_equal(loaded(theta, X), ratio()(theta, X))
    assert repr(loaded) == repr(ratio())


def test_learned_refuses_what_does_not_fit():
    with pytest.raises(TypeError, match="'x' must be what nle or nre gave"):
        nm.learned(gaussian, {"x": 3})
    other = nm.learned(gaussian, {"x": likelihood()})
    with pytest.raises(ValueError, match="takes 1 parameters, the site has 2"):
        numpyro.handlers.seed(other, 0)()
    scored = nm.learned(gaussian, {"x": ratio()})
    with pytest.raises(NotImplementedError, match="scored, not drawn"):
        numpyro.handlers.seed(scored, 0)()


# Sequential Monte Carlo and rounds ----------------------------------------------------------------


def test_smc_finds_both_modes_and_the_evidence():
    def two_modes(x=None):
        theta = numpyro.sample("theta", dist.Uniform(-4, 4))
        numpyro.sample("x", dist.Normal(jnp.abs(theta), 0.2), obs=x)

    post = nm.smc(jax.random.key(0), two_modes, {"x": 2.0}, num_particles=1000, progress=False)
    draws = np.asarray(post.sample(jax.random.key(1), (1000,))["theta"])
    np.testing.assert_allclose(np.mean(draws > 0), 0.5, atol=0.08)
    np.testing.assert_allclose([np.abs(draws).mean(), np.abs(draws).std()], [2, 0.2], atol=0.03)
    np.testing.assert_allclose(post.log_evidence, math.log(2 / 8), atol=0.12)
    grid = np.linspace(-3.99, 3.99, 999)
    mass = np.exp(post.log_prob({"theta": grid})).sum() * (grid[1] - grid[0])
    np.testing.assert_allclose(mass, 1, atol=0.12)


METHODS = {
    "truncated": partial(nm.snpe, method="truncated", **LEARN),
    "c": partial(nm.snpe, method="c", **LEARN),
    "a": partial(nm.snpe, method="a", components=1, **QUICK),
    "nle": partial(nm.snle, num_particles=2000, **LEARN),
    "nre": partial(nm.snre, hidden=(32, 32), num_particles=2000, **QUICK),
}


@cache
def rounds(method):
    return METHODS[method](0, gaussian, {"x": X}, rounds=2, simulations=500)


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[pytest.mark.slow] if m == "nle" else []) for m in METHODS]
)
def test_rounds_find_the_known_posterior(method):
    found = rounds(method)
    assert [len(r.sims["x"]) for r in found.rounds] == [500, 1000]
    assert all(r.leakage < 0.05 and r.effective >= 1 and not r.stopped for r in found.rounds)
    assert found.rounds[1].effective > 2 * found.rounds[0].effective or method in ("truncated", "a")
    exact = method in ("truncated", "nle")  # others divide by the proposal, or tell parameters apart
    wide = dict(mean=0.12, variance=0.06) if exact else dict(mean=0.2, variance=0.12)
    assert_known(np.asarray(found.sample(0, 2000)["theta"]), **wide)
    assert "round 2: 1000 simulations" in str(found)
    if method == "truncated":
        first, second = found.rounds
        fresh = {"theta": second.sims["theta"][500:]}
        assert second.acceptance < 0.8
        assert (first.posterior.log_prob(fresh) >= second.threshold - 1e-3).all()


class Again(Method):
    """Draws of the prior once more; what is learned is an ensemble of one."""

    who, options = "again", PosteriorOptions

    def propose(self, key, last, setting, count):
        return Proposal()

    def learn(self, key, prepared, observation, proposal, **options):
        found = fit_posterior(key, prepared, **options)
        return found(observation), found, bool(found.losses.stopped)


def test_methods_are_objects():
    found = nm.snpe(0, gaussian, {"x": X}, rounds=2, simulations=200, method=Again(), **ONCE)
    first, second = found.rounds
    assert second.acceptance == 1 and abs(second.sims["theta"][200:].std() - 1) < 0.1
    wide, narrow = (
        sbi.next_round(0, gaussian, {"x": X}, (first,), 200, method, **ONCE)
        for method in (Truncated(epsilon=1e-6), Truncated(epsilon=0.5))
    )
    assert narrow.acceptance < 0.5 * wide.acceptance and narrow.threshold > wide.threshold
    with pytest.raises(ValueError, match=r"Atomic takes no \['epsilon'\]"):
        sbi.next_round(0, gaussian, {"x": X}, (), 100, "c", epsilon=0.1)
    with pytest.raises(ValueError, match="method must be one of"):
        nm.snpe(0, gaussian, {"x": X}, method="b")
    with pytest.raises(TypeError, match="observation must be a dictionary by site"):
        nm.snpe(0, gaussian, X)


def test_atoms_may_be_parameters_whose_simulations_failed():
    options = dict(rounds=2, simulations=500, method="c", **LEARN)
    with pytest.raises(ValueError, match=r"without them APT learns .* failures='exclude'"):
        nm.snpe(0, flaky, {"x": np.array([0.8, 0.0])}, **options)
    found = nm.snpe(0, flaky, {"x": np.array([0.8, 0.0])}, failures="exclude", **options)
    assert found.rounds[0].learned.excluded == len(found.rounds[0].sims.errors) > 50
    draws = np.asarray(found.sample(0, 2000)["theta"])
    assert (draws[:, 0] > 1).mean() < 0.2  # of the posterior without failures it is 0.21


def test_rounds_stop_after_a_stopped_training_and_keep_the_complete_ones():
    options = dict(rounds=3, simulations=200, **ONCE)
    with pytest.warns(UserWarning, match="interrupted: keeping 1 of 3 rounds"):
        found = nm.snpe(0, gaussian, {"x": X}, callback=lambda state: True, **options)
    assert found.rounds[0].stopped and found.last.neural.losses.stopped == "callback"
    calls = []

    def later(state):
        calls.append(state)
        return len(calls) == 2

    with pytest.warns(UserWarning, match="interrupted: keeping 1 of 3 rounds"):
        found = nm.snpe(0, gaussian, {"x": X}, callback=later, **options)
    assert len(calls) == 2 and [r.stopped for r in found.rounds] == [False]


def test_effective_draws_are_weighed_by_what_they_were_drawn_from():
    before, last = rounds("a").rounds
    new = {"theta": last.sims["theta"][-500:]}
    weights = np.exp(last.posterior.log_prob(new) - before.posterior.merged.log_prob(new))
    np.testing.assert_allclose(last.effective, weights.sum() ** 2 / (weights**2).sum(), rtol=1e-3)
    with pytest.raises(ValueError, match=r"one observation, got a batch of shape \(2,\)"):
        last.learned({"x": np.ones((2, 2))})


def counted(x=None):
    p = numpyro.sample("p", dist.Beta(2, 2))
    numpyro.sample("x", dist.Binomial(10, p), obs=x)


def test_smc_takes_discrete_data():
    post = nm.smc(0, counted, {"x": 3}, num_particles=2000, progress=False)
    np.testing.assert_allclose(post.sample(jax.random.key(0), (2000,))["p"].mean(), 5 / 14, atol=0.02)


# Calibration --------------------------------------------------------------------------------------


def test_calibration_of_many_posteriors_in_one_call(tmp_path):
    from numpyro_maf import plots

    sims = nm.simulate(9, gaussian, 300, progress=False)
    found = sbi.calibrate(0, posterior(), sims, num_samples=200)
    assert found.sbc.ranks.shape == (300, 2) and found.sbc.names == ("theta[0]", "theta[1]")
    assert found.verdict.count("no miscalibration") == 3
    plots.calibration(found, path=tmp_path / "calibration.png", title="known")
    assert (tmp_path / "calibration.png").stat().st_size > 10_000


def test_everything_is_shown_in_a_few_lines():
    post = posterior()(X)
    found = sbi.calibrate(0, posterior(), nm.simulate(9, gaussian, 30, progress=False), num_samples=50)
    shown = [
        nm.simulate(0, flaky, 20, progress=False), posterior(), post, ensemble(), posterior()(X[None]),
        ratio(), post.surprise, rounds("nle").last, rounds("a"), rounds("a").last, rounds("a").rounds[0],
        found,
    ]  # fmt: skip
    for it in shown:
        lines = repr(it).splitlines()
        assert len(repr(it)) < 400 and 1 <= len(lines) <= 6, it
        assert lines[0].startswith(type(it).__name__)
        assert it._repr_html_().startswith("<pre>")
    assert found.sbc.verdict in repr(found).replace("...", found.sbc.verdict)
    assert post.surprise.verdict[:40] in repr(post)
