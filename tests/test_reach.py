"""What guides reach: densities that overflow, supports that depend on others, far modes, rows, SteinVI."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.contrib.einstein import RBFKernel, SteinVI
from numpyro.distributions import constraints
from numpyro.infer import SVI, init_to_value
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.reparam import NeuTraReparam
from numpyro.infer.util import log_density, potential_energy

import numpyro_maf as nm
from numpyro_maf.inference.gaussian import fit_gaussian
from numpyro_maf.inference.guides import tame
from numpyro_maf.inference.unconstrained import dependent_supports

ELEMENTWISE = partial(nm.elementwise, scalar=nm.Affine())


def started(model, guide, *args):
    svi = SVI(model, guide, optax.adam(1e-3), nm.PathELBO(4))
    return svi.get_params(jax.jit(svi.init)(jax.random.key(0), *args))


# Densities that overflow -----------------------------------------------------------------------------


def test_the_gaussian_start_finds_counts_of_an_exponential_link():
    """From starts where most draws overflow, the Gaussian goes to the maximum, which Newton's steps give."""
    rng = np.random.default_rng(5)
    x = np.stack([np.ones(100), rng.uniform(100, 300, 100), rng.uniform(0, 50, 100)], -1)
    y = rng.poisson(np.exp(x @ [0.5, 0.01, -0.02]))
    at = np.linalg.lstsq(x, np.log(y + 0.5), rcond=None)[0]
    for _ in range(20):
        rate = np.exp(x @ at)
        at = at + np.linalg.solve((x.T * rate) @ x, x.T @ (y - rate))
    sd = np.sqrt(np.diagonal(np.linalg.inv((x.T * np.exp(x @ at)) @ x)))
    design, counts = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)

    def log_density(z):
        line = design @ z
        return (counts * line - jnp.exp(line)).sum()

    starts = jnp.array([(0.0, 0.25, 0.0), (1.0, -0.3, 0.4), (0.0, 0.1, 1.0)])
    locs, roots = jax.vmap(lambda start: fit_gaussian(0, log_density, start, 0.3))(starts)
    np.testing.assert_array_less(np.abs(locs - at) / sd, 0.3)
    np.testing.assert_allclose(jnp.sqrt((roots**2).sum(-1)), np.tile(sd, (3, 1)), rtol=0.1)


def test_the_gaussian_start_takes_the_best_of_several_starts():
    """Two modes of weights 0.01 and 0.99: from both, the greater; from the lesser alone, that one."""
    mixture = dist.MixtureSameFamily(
        dist.Categorical(jnp.array([0.01, 0.99])), dist.Normal(jnp.array([-9.0, 9.0]), 1.0)
    )

    def log_density(z):
        return mixture.log_prob(z[0])

    starts = jnp.array([[-8.0], [8.0]])
    np.testing.assert_allclose(fit_gaussian(0, log_density, starts, 0.1)[0], 9, atol=0.1)
    np.testing.assert_allclose(fit_gaussian(0, log_density, starts[0], 0.1)[0], -9, atol=0.1)


def test_a_density_that_is_finite_at_one_point_alone_is_an_error():
    def model():
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.factor("nowhere", jnp.where(z == 0.0, 0.0, jnp.nan))

    guide = nm.AutoFlow(model, builder=ELEMENTWISE, warmup=2, init_loc_fn=init_to_value(values={"z": 0.0}))
    with pytest.raises(ValueError, match="finite around none of 3 starts: give init_loc_fn"):
        handlers.seed(guide, 0)()


def test_gradients_of_draws_that_overflow_are_dropped():
    """The third draw overflows, the second's gradient is astronomical; the others' are as they were."""
    z = jnp.array([[1.0, 2.0], [50.0, 0.0], [200.0, 0.0], [-1.0, 0.5]])
    scale = jnp.array([[2.0, 0.0], [0.0, 1.0]])

    def loss(z):
        return (jnp.exp(jnp.minimum(z[..., 0], 1e9)) + jnp.square(z[..., 1])).sum()

    plain, tamed = jax.grad(loss)(z), jax.grad(lambda z: loss(tame(z, scale)))(z)
    np.testing.assert_array_equal(tamed[jnp.array([0, 3])], plain[jnp.array([0, 3])])
    np.testing.assert_array_equal(tamed[2], 0)
    np.testing.assert_allclose(tamed[1], [50.0, 0.0], rtol=1e-5)  # 100 of its own units, which are 2 wide


def test_training_goes_on_after_a_draw_that_overflows():
    def model():
        z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.factor("wall", jnp.where(z[0] > 1.5, jnp.exp(1e3 * z[0]), 0.0))

    guide = nm.AutoFlow(model, builder=ELEMENTWISE, warmup=0, init_scale=1.0)
    result = SVI(model, guide, optax.adam(1e-3), nm.PathELBO(16)).run(
        jax.random.key(0), 30, progress_bar=False
    )
    assert not np.isfinite(result.losses).all()  # said as it is
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.params))


# Supports that depend on other sites -------------------------------------------------------------------

COUNTS = np.array([15, 30, 10, 20])


def shares(counts):
    a = numpyro.sample("a", dist.Uniform(0, 1))
    with numpyro.plate("two", 2):
        b = numpyro.sample("b", dist.Uniform(0, (1 - a) / 2))
    left = numpyro.deterministic("left", 1 - a - b.sum())
    numpyro.sample("y", dist.Multinomial(probs=jnp.stack([a, b[0], b[1], left]), total_count=75), obs=counts)


def exact_shares():
    """Means and evidence on a grid: ``a`` and ``b / (1 - a)`` have independent priors."""
    n = 60
    mid = (np.arange(n) + 0.5) / n
    a, u, v = np.meshgrid(mid, mid / 2, mid / 2, indexing="ij")
    b, c = u * (1 - a), v * (1 - a)
    parts = np.stack([a, b, c, 1 - a - b - c])
    log_prob = np.asarray(dist.Multinomial(probs=jnp.moveaxis(parts, 0, -1), total_count=75).log_prob(COUNTS))
    weight = np.exp(log_prob)
    means = [(weight * part).sum() / weight.sum() for part in parts]
    middle = np.argsort(b.ravel())
    b_median = b.ravel()[middle][np.searchsorted(np.cumsum(weight.ravel()[middle]), weight.sum() / 2)]
    return means, b_median, np.log(weight.mean())


@lru_cache
def of_shares():
    guide = nm.AutoFlow(shares, builder=ELEMENTWISE, starts=1, quantile_samples=2000)
    return guide, started(shares, guide, COUNTS)


def test_supports_that_depend_on_other_sites_are_followed():
    guide, params = of_shares()
    assert guide._dependent == ["b"]
    means, b_median, evidence = exact_shares()
    check = nm.check_guide(1, shares, guide, params, COUNTS)
    np.testing.assert_allclose(check.log_evidence, evidence, atol=0.02)
    draws = guide.sample_posterior(2, params, COUNTS, sample_shape=(40, 100))
    a, b, left = draws["a"], draws["b"], draws["left"]
    assert b.shape == (40, 100, 2) and (b >= 0).all() and (b <= (1 - a[..., None]) / 2).all()
    np.testing.assert_allclose([a.mean(), *b.mean((0, 1)), left.mean()], means, atol=0.015)
    np.testing.assert_allclose(guide.median(params)["b"][0], b_median, atol=0.015)


def test_neutra_follows_supports():
    """Its log-density is the model's of the guide's values, and the log-determinant of the way to them."""
    guide, params = of_shares()
    straight = NeuTraReparam(guide, params).reparam(shares)

    @jax.jit
    def facts(key):
        seeded = handlers.substitute(handlers.seed(guide, key), data=params)
        log_guide, drawn = log_density(seeded, (COUNTS,), {}, {})
        base = guide.get_transform(params).inv(drawn["_auto_latent"]["value"])
        log_guide = log_guide - guide.get_base_dist().log_prob(base)
        values = {"a": drawn["a"]["value"], "b": drawn["b"]["value"]}
        found = log_density(straight, (COUNTS,), {}, {"auto_shared_latent": base})[0]
        return found, log_density(shares, (COUNTS,), {}, values)[0] - log_guide

    for seed in range(3):
        np.testing.assert_allclose(*facts(jax.random.key(seed)), rtol=1e-4)


def test_supports_that_depend_are_followed_through_scan():
    def rising():
        def step(last, _):
            last = numpyro.sample("x", dist.TruncatedNormal(0.0, 1.0, low=last))
            return last, last

        scan(step, jnp.array(-1.0), None, length=3)

    guide = nm.AutoFlow(rising, builder=ELEMENTWISE, warmup=0, init_scale=1.0)

    @jax.jit
    def facts(key):
        drawn = handlers.trace(handlers.seed(guide, key)).get_trace()
        x = drawn["x"]["value"]
        found = log_density(rising, (), {}, {"x": x})[0] - drawn["x"]["fn"].log_prob(x).sum()
        return x, found, -potential_energy(rising, (), {}, {"x": drawn["_auto_latent"]["value"]})

    x, *densities = facts(jax.random.key(0))
    assert -1 < x[0] < x[1] < x[2]
    np.testing.assert_allclose(*densities, rtol=1e-4)


def test_which_supports_depend_is_read_off_the_program():
    def model(data):
        low = numpyro.param("low", 0.0)
        a = numpyro.sample("a", dist.HalfNormal(1.0))
        numpyro.sample("constant", dist.Uniform(data.min(), data.max() * 2))
        numpyro.sample("scaled", dist.Normal(a, a).expand([3]).to_event(1))
        numpyro.sample("above", dist.TruncatedNormal(0.0, 1.0, low=a))
        numpyro.sample("param", dist.Uniform(low, low + 1))

    sites = {name: jnp.zeros(()) for name in ("a", "constant", "above", "param")} | {"scaled": jnp.zeros(3)}
    found = dependent_supports(model, (jnp.arange(3.0),), {}, sites, {"low": jnp.zeros(())})
    assert found == ["above", "param"]


def test_supports_that_depend_on_another_guides_site_are_refused():
    hidden = handlers.block(shares, expose=["b", "two"])
    with pytest.raises(ValueError, match="support of site 'b' depends on sites that this guide"):
        jax.eval_shape(handlers.seed(nm.AutoFlow(hidden, builder=ELEMENTWISE), 0), COUNTS)


def test_amortised_guides_refuse_supports_that_depend():
    def model(x):
        with numpyro.plate("rows", len(x)):
            a = numpyro.sample("a", dist.Uniform(0, 1))
            numpyro.sample("b", dist.Uniform(0, 1 - a))

    with pytest.raises(ValueError, match="support of site 'b' depends on other sites"):
        jax.eval_shape(handlers.seed(nm.AutoAmortized(model, "rows"), 0), jnp.zeros((4, 2)))


# Far modes ---------------------------------------------------------------------------------------------


def test_far_modes_have_their_weights():
    """Three normals at the corners of a triangle of sides 10, under a flat prior; before any training."""
    width = 10
    corners = np.zeros((3, width), np.float32)
    corners[1, 0], corners[2, 0], corners[2, 1] = 10, 5, 75**0.5
    weights = np.array([0.2, 0.3, 0.5])
    mixture = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(corners, 1.0).to_event(1))

    def model():
        z = numpyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (width,)))
        numpyro.factor("mixture", mixture.log_prob(z))

    guide = nm.AutoFlow(model, builder=ELEMENTWISE, modes=4)
    params = started(model, guide)
    check = nm.check_guide(1, model, guide, params, num_samples=20_000)
    z = np.asarray(check.samples["z"])
    nearest = np.argmin(((z[:, None] - corners) ** 2).sum(-1), -1)
    np.testing.assert_allclose(np.bincount(nearest) / len(z), weights, rtol=0.05)
    np.testing.assert_allclose([check.elbo, check.log_evidence], 0, atol=0.05)
    assert "a mode that no draw reached does not show" in check.verdict


def test_modes_are_checked():
    for options, match in [({"modes": 0}, "modes must be"), ({"modes": 3, "starts": 2}, "at least as many"),
                           ({"modes": 2, "warmup": 0}, "in the warm-up")]:  # fmt: skip
        with pytest.raises(ValueError, match=match):
            nm.AutoFlow(shares, **options)


# Rows --------------------------------------------------------------------------------------------------


def minibatch(batch, total=100):
    with numpyro.plate("rows", total, subsample_size=len(batch)):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("x", dist.Normal(z[:, None], 1).to_event(1), obs=batch)


def test_a_minibatch_as_argument_has_the_models_scale():
    guide = nm.AutoAmortized(minibatch, "rows", encoder=(4, 2), builder=ELEMENTWISE)
    for rows in (20, 10):  # set up with the first, called with the second

        def facts(batch, rows=rows):
            trace = handlers.trace(handlers.seed(guide, 0)).get_trace(batch)
            assert trace["z"]["scale"] == trace["_auto_latent"]["scale"] == 100 / rows
            return trace["z"]["value"]

        assert jax.eval_shape(facts, jnp.zeros((rows, 3))).shape == (rows,)
    other = nm.AutoAmortized(minibatch, "rows", encoder=(4, 2), inputs=lambda batch: batch[:7])
    with pytest.raises(ValueError, match="the 100 rows of plate 'rows', or the 20 that it draws, got 7"):
        jax.eval_shape(handlers.seed(other, 0), jnp.zeros((20, 3)))


X = np.random.default_rng(0).normal(size=20).astype(np.float32)


def local(x, size=None, scale=None):
    width = 1.0 if scale is None else numpyro.sample("scale", scale)
    with numpyro.plate("rows", len(x), subsample_size=size):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("x", dist.Normal(z, width), obs=numpyro.subsample(x, 0))


def conjugate(x, size=None, scale=None, wrong=()):
    """The exact posterior of each row, but for the wrong ones, which are a sixth as wide."""
    if scale is not None:
        numpyro.sample("scale", dist.LogNormal(0, 0.1))
    with numpyro.plate("rows", len(x), subsample_size=size) as index:
        narrow = jnp.isin(index, jnp.asarray(wrong, int)) if wrong else 0
        sd = jnp.sqrt(0.5) * (1 - 5 / 6 * narrow)
        numpyro.sample("z", dist.Normal(numpyro.subsample(x, 0) / 2, sd))


def test_rows_are_judged_one_by_one():
    check = nm.check_guide(0, local, conjugate, {}, X, num_samples=1000)
    evidence = dist.Normal(0, 2**0.5).log_prob(X).sum()
    np.testing.assert_allclose([check.elbo, check.log_evidence], evidence, rtol=1e-5)
    assert check.verdict.startswith("good as it is: 20 of 20 rows of 'rows'")
    wrong = nm.check_guide(0, local, partial(conjugate, wrong=(3, 17)), {}, X, num_samples=1000)
    assert wrong.verdict.startswith("do not trust it for 2 rows (3, 17)") and "NeuTra" not in wrong.verdict
    drawn = wrong.resample(1)["z"]
    assert drawn.shape == (1000, 20)
    np.testing.assert_allclose(drawn[:, 0].std(), 0.5**0.5, rtol=0.1)
    np.testing.assert_allclose(check.mean(lambda sites: sites["z"]), X / 2, atol=0.12)


def test_rows_of_a_subsample_are_judged_given_what_is_outside():
    options = {"size": 5, "scale": dist.LogNormal(0, 0.1)}
    check = nm.check_guide(0, local, conjugate, {}, X, num_samples=500, **options)
    assert "5 of 20 rows of 'rows'" in check.verdict and "given one draw of scale" in check.verdict
    assert np.isnan(check.log_evidence) and check.resample(0)["z"].shape == (500, 5)
    whole = nm.check_guide(0, local, partial(conjugate), {}, X, num_samples=500, size=5)
    exact = 4 * dist.Normal(0, 2**0.5).log_prob(X[whole.rows.index]).sum()
    np.testing.assert_allclose(whole.log_evidence, exact, rtol=1e-5)


def test_rows_that_cannot_be_judged_are_refused():
    def coupled(x):
        with numpyro.plate("rows", len(x), subsample_size=10):
            z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.factor("sum", -jnp.square(z.sum()))

    with pytest.raises(ValueError, match="'sum' is outside plate 'rows' and depends on"):
        nm.check_guide(0, coupled, partial(conjugate, size=10), {}, X, num_samples=100)

    def likelihood(x):
        mean = numpyro.sample("mean", dist.Normal(0, 1))
        with numpyro.plate("rows", len(x), subsample_size=10):
            numpyro.sample("x", dist.Normal(mean, 1), obs=numpyro.subsample(x, 0))

    guide = AutoNormal(likelihood)
    params = started(likelihood, guide, X)
    with pytest.raises(ValueError, match="weights need all rows; check it with a model .* subsample_size=20"):
        nm.check_guide(0, likelihood, guide, params, X)


def test_a_guide_without_finite_weights_is_an_error():
    def off():
        numpyro.sample("z", dist.Normal(jnp.nan, 1, validate_args=False))

    with pytest.raises(ValueError, match="no draw of the guide has a finite weight"):
        nm.check_guide(0, lambda: numpyro.sample("z", dist.Normal(0, 1)), off, {}, num_samples=100)


def test_advice_fits_what_was_checked():
    narrow = nm.diagnostics.psis(np.random.default_rng(0).standard_cauchy(1000) * 30)
    neural = nm.GuideCheck({}, 0.0, 0.0, narrow)
    assert "simulate more" in neural.verdict and "NeuTra" not in neural.verdict


# A trained base, SteinVI -------------------------------------------------------------------------------


def test_a_trained_base_is_used():
    def builder(key, features):
        base = nm.made(key, features, columns=nm.conditionals.Normal(), hidden=(4,))
        return nm.maf(key, features, transforms=1, hidden=(4,), base=base)

    def model():
        numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))

    guide = nm.AutoFlow(model, builder=builder, warmup=0, init_scale=1.0)
    params = started(model, guide)
    moved = params | {"auto$params": params["auto$params"] + 0.7}

    @jax.jit
    def facts(params):
        posterior = guide.get_posterior(params)
        latent = handlers.trace(handlers.substitute(handlers.seed(guide, 0), data=params)).get_trace()
        latent = latent["_auto_latent"]
        log_probs = posterior.log_prob(latent["value"]), latent["fn"].log_prob(latent["value"])
        drawn = posterior.sample(jax.random.key(0), (10_000,))
        return guide.median(params)["z"], jnp.median(drawn, 0), log_probs

    first, (median, drawn, log_probs) = facts(params)[0], facts(moved)
    np.testing.assert_allclose(median, drawn, atol=0.05)
    np.testing.assert_allclose(*log_probs, rtol=1e-4)
    assert jnp.abs(median - first).max() > 0.3


@pytest.mark.filterwarnings("ignore:Found auxiliary vars")  # NumPyro's own, for every such guide
def test_steinvi_takes_flow_guides():
    def model():
        numpyro.sample("z", dist.Normal(jnp.array([1.0, -2.0]), 0.5).to_event(1))

    guide = nm.AutoFlow(model, builder=ELEMENTWISE, starts=1)
    options = {"num_stein_particles": 2, "num_elbo_particles": 1}
    stein = SteinVI(model, guide, numpyro.optim.Adam(1e-2), RBFKernel(), **options)
    state = stein.init(jax.random.key(0))
    params = stein.get_params(jax.jit(stein.update)(state)[0])
    posteriors = jax.vmap(guide.get_posterior)(params)
    draws = jax.vmap(lambda d: d.sample(jax.random.key(1), (4000,)))(posteriors)
    np.testing.assert_allclose(draws.mean(1), [[1, -2]] * 2, atol=0.2)
    np.testing.assert_allclose(draws.std(1), 0.5, atol=0.2)
