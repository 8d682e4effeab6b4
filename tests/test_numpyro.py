"""Flows inside NumPyro: inference with known answers, handlers, plates, imports."""

import ast
import graphlib
import os
import pathlib
import subprocess
import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import FLOWS, context_of, normals
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, log_likelihood
from numpyro.infer.initialization import init_to_value
from numpyro.infer.reparam import TransformReparam
from numpyro.infer.util import log_density
from numpyro.optim import Adam

import numpyro_maf as nm

NAMES = ["maf", "iaf", "nsf"]
small = partial(nm.maf, features=2, transforms=2, hidden=(8,))


def total(model, *args, params=None):
    """The log-joint of a model, compiled."""
    return jax.jit(lambda params: log_density(model, args, {}, params)[0])(params or {})


@jax.jit
def score(d, y):
    return d.log_prob(y)


# Inference with known answers ------------------------------------------------------------------


def quadrature_posterior(log_joint):
    """Mean and standard deviation of a 2-D density by a sum over a grid."""
    axis = np.linspace(-6, 6, 301)
    z = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    weight = np.asarray(jax.nn.softmax(jax.jit(log_joint)(z)), float)
    mean = weight @ z
    return mean, np.sqrt(weight @ (z - mean) ** 2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reparam", [False, True])
def test_nuts_with_a_flow_as_prior(name, reparam):
    d, y = FLOWS[name]()(), jnp.array([0.8, -0.3])

    def model():
        z = numpyro.sample("z", d)
        numpyro.sample("y", dist.Normal(z, 0.7).to_event(1), obs=y)

    def log_joint(z):
        return d.log_prob(z) + dist.Normal(z, 0.7).log_prob(y).sum(-1)

    mean, sd = quadrature_posterior(log_joint)
    if reparam:
        model = handlers.reparam(model, config={"z": TransformReparam()})
    mcmc = MCMC(NUTS(model), num_warmup=300, num_samples=1000, progress_bar=False)
    mcmc.run(jax.random.key(0))
    draws = np.asarray(mcmc.get_samples()["z"])
    effective = numpyro.diagnostics.effective_sample_size(draws[None])
    assert (effective > 100).all()
    assert (abs(draws.mean(0) - mean) < 5 * sd / effective**0.5).all()
    np.testing.assert_allclose(draws.std(0), sd, rtol=0.25)


def test_svi_with_a_flow_as_guide_recovers_a_correlated_posterior():
    """Normal prior and likelihoods: posterior and evidence are known in closed form."""
    design = jnp.array([[1.0, 1.0], [1.0, 0.8], [0.5, 1.2]])
    y = jnp.array([1.0, 0.4, 1.5])

    def model():
        z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.sample("y", dist.Normal(design @ z, 0.5).to_event(1), obs=y)

    def guide():
        flow = nm.flow_module("q", lambda key: nm.iaf(key, 2, transforms=2, hidden=(8,)))
        numpyro.sample("z", flow())

    svi = SVI(model, guide, Adam(lambda step: 1e-2 * 0.998**step), Trace_ELBO(num_particles=16))
    result = svi.run(jax.random.key(0), 2000, progress_bar=False)
    evidence = dist.MultivariateNormal(jnp.zeros(3), design @ design.T + 0.25 * jnp.eye(3)).log_prob(y)

    @jax.jit
    def facts(params):
        elbo = -Trace_ELBO(num_particles=4000).loss(jax.random.key(1), params, model, guide)
        return elbo, Predictive(guide, params=params, num_samples=4000)(jax.random.key(2))["z"]

    elbo, draws = map(np.asarray, facts(result.params))
    assert evidence - 0.02 < elbo < evidence + 0.02
    covariance = np.linalg.inv(np.eye(2) + design.T @ design / 0.25)
    mean = covariance @ design.T @ y / 0.25
    np.testing.assert_allclose(draws.mean(0), mean, atol=0.05)
    np.testing.assert_allclose(np.cov(draws.T), covariance, atol=0.03)


@pytest.mark.parametrize("context", [0, 1])
def test_svi_fits_a_flow_in_a_model_and_moves_weights_only(context):
    rng = np.random.default_rng(0)
    y = rng.normal(size=(200, 2)) @ np.array([[1.0, 0.9], [0.0, 0.4]]) + np.array([1.0, -1.0])
    c = rng.normal(size=(200, context)) if context else None
    base = dist.StudentT(8.0).expand([2]).to_event(1)
    scaled = nm.Standardize(jnp.array([0.5, 0.0]), jnp.array([2.0, 1.0]))
    init = replace(small(jax.random.key(0), context=context, base=base), event_scale=scaled)
    seen = []

    def model(y):
        flow = nm.flow_module("y", init)
        seen.append(flow)
        with numpyro.plate("rows", len(y)):
            numpyro.sample("obs", flow(c) if context else flow(), obs=y)

    svi = SVI(model, lambda y: None, Adam(1e-2), Trace_ELBO())
    result = svi.run(jax.random.key(0), 300, y, progress_bar=False)
    assert set(result.params) == {"y$params"}
    assert jax.tree.structure(result.params["y$params"]) == jax.tree.structure(init.bijectors)
    assert result.losses[-1] < result.losses[0] - 50
    moved = zip(*map(jax.tree.leaves, (result.params["y$params"], init.bijectors)), strict=True)
    assert any((a != b).any() for a, b in moved)
    assert all(flow.event_scale is scaled and flow.base is base for flow in seen)


def test_evaluating_the_fitted_model_uses_the_trained_weights():
    flow = FLOWS["maf"]()
    y = jnp.array([0.3, -0.2])

    def model():
        numpyro.sample("y", nm.flow_module("f", small)(), obs=y)

    actual = total(model, params={"f$params": flow.bijectors})
    np.testing.assert_allclose(actual, score(flow(), y), rtol=1e-6)


def test_flow_module_initialises_by_the_models_key():
    def model():
        return nm.flow_module("f", small)

    first, second = (handlers.seed(model, jax.random.key(seed))() for seed in (0, 1))
    again = handlers.seed(model, jax.random.key(0))()
    assert jax.tree.structure(first) == jax.tree.structure(second)
    weights = [f.bijectors[0].net.weights[0] for f in (first, second, again)]
    assert (weights[0] != weights[1]).any()
    np.testing.assert_array_equal(weights[0], weights[2])
    with pytest.raises(TypeError, match="expected a Flow or a function key -> Flow, got int"):
        nm.flow_module("f", 3)


# Bayesian flows --------------------------------------------------------------------------------


def test_random_flow_module_names_every_weight():
    template = small(jax.random.key(0))

    def model():
        return nm.random_flow_module("f", template, dist.Normal(0, 0.3))

    trace = handlers.trace(handlers.seed(model, 0)).get_trace()
    leaves, _ = jax.tree_util.tree_flatten_with_path(template.bijectors)
    expected = {f"f/{jax.tree_util.keystr(path)}": leaf.shape for path, leaf in leaves}
    assert {name: site["value"].shape for name, site in trace.items()} == expected
    assert "f/[0].net.weights[1]" in expected
    made = handlers.substitute(model, {name: jnp.ones(s) for name, s in expected.items()})()
    assert jax.tree.structure(made) == jax.tree.structure(template)
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(made.bijectors))


def test_random_flow_module_takes_priors_by_path_and_shape():
    seen = {}

    def prior(path, shape):
        seen[path] = shape
        return dist.Normal(0, 0.1 if "weights" in path else 1.0).expand(shape).to_event(len(shape))

    def model():
        flow = nm.random_flow_module("f", small, prior)
        numpyro.sample("y", flow(), obs=jnp.zeros((3, 2)))

    trace = handlers.trace(handlers.seed(model, 0)).get_trace()
    assert seen == {k[2:]: s["value"].shape for k, s in trace.items() if k != "y"}
    values = {name: site["value"] for name, site in trace.items() if name != "y"}
    actual = total(model, params=values)
    scale = {name: 0.1 if "weights" in name else 1.0 for name in values}
    expected = sum(dist.Normal(0, scale[k]).log_prob(v).sum() for k, v in values.items())
    likelihood = trace["y"]["fn"].log_prob(jnp.zeros((3, 2))).sum()
    np.testing.assert_allclose(actual, expected + likelihood, rtol=1e-5)


@pytest.mark.parametrize(
    "prior",
    [
        dist.Normal(jnp.zeros(3), 1.0),
        lambda path, shape: dist.Normal(0, 1).expand(shape),
        lambda path, shape: dist.Normal(0, 1).expand([7]).to_event(1),
    ],
)
def test_random_flow_module_checks_its_priors(prior):
    with handlers.seed(rng_seed=0), pytest.raises(ValueError, match=r"prior of \[0\].*event shape"):
        nm.random_flow_module("f", small, prior)


# Plates and handlers -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, "maf-context", "iaf-context"])
@pytest.mark.parametrize("subsample", [None, 2])
def test_plates_sum_and_subsamples_scale(name, subsample):
    case = FLOWS[name]
    flow, contexts = case(), context_of(case, 6)
    y = jnp.asarray(normals(3, 6, 2))

    def model():
        with numpyro.plate("rows", 6, subsample_size=subsample) as rows:
            d = flow() if contexts is None else flow(contexts[rows])
            numpyro.sample("y", d, obs=y[rows])

    d = flow() if contexts is None else flow(contexts)
    rows = jnp.array([4, 1]) if subsample else jnp.arange(6)
    data = {"rows": rows} if subsample else {}
    expected = score(d, y)[rows].sum() * 6 / len(rows)
    actual = total(handlers.substitute(model, data))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_plates_draw_independent_rows_and_scale_and_mask_act():
    d = FLOWS["maf"]()()

    def model():
        with numpyro.plate("outer", 3), numpyro.plate("inner", 4):
            return numpyro.sample("y", d)

    y = handlers.seed(model, 0)()
    assert y.shape == (4, 3, 2) and len(np.unique(y[..., 0])) == 12
    data, log_prob = {"y": y}, score(d, y)
    np.testing.assert_allclose(total(model, params=data), log_prob.sum(), rtol=1e-5)
    scaled = handlers.scale(model, scale=0.5)
    np.testing.assert_allclose(total(scaled, params=data), log_prob.sum() / 2, rtol=1e-5)
    keep = jnp.arange(12).reshape(4, 3) % 2 == 0
    masked = handlers.mask(model, mask=keep)
    expected = log_prob[keep].sum()
    np.testing.assert_allclose(total(masked, params=data), expected, rtol=1e-5)


@pytest.mark.parametrize("name", [*NAMES, "maf-heavy"])
def test_handlers(name):
    d, fixed = FLOWS[name]()(), jnp.array([0.1, 0.2])

    def model():
        z = numpyro.sample("z", d)
        return z, numpyro.sample("y", dist.Normal(z, 1).to_event(1))

    seeded = handlers.seed(model, jax.random.key(0))
    trace = handlers.trace(seeded).get_trace()
    z = trace["z"]["value"]
    np.testing.assert_array_equal(handlers.trace(seeded).get_trace()["z"]["value"], z)
    for handler in (handlers.condition, handlers.substitute):
        np.testing.assert_array_equal(handler(seeded, data={"z": fixed})()[0], fixed)
    conditioned = handlers.trace(handlers.condition(seeded, data={"z": fixed})).get_trace()
    assert conditioned["z"]["is_observed"]
    np.testing.assert_allclose(score(conditioned["z"]["fn"], fixed), score(d, fixed), rtol=1e-5)
    replayed = handlers.replay(handlers.seed(model, 1), trace=trace)
    np.testing.assert_array_equal(replayed()[0], z)
    blocked = handlers.trace(handlers.block(seeded, hide=["z"])).get_trace()
    assert set(blocked) == {"y"}
    done = handlers.do(seeded, data={"z": fixed})()[0]
    np.testing.assert_array_equal(done, fixed)


@pytest.mark.parametrize("name", [*NAMES, "maf-context", "maf-bounded"])
def test_transform_reparam_draws_from_the_flow(name):
    case = FLOWS[name]
    d = case()(context_of(case)) if case.context else case()()

    def model():
        with numpyro.plate("rows", 5):
            return numpyro.sample("z", d)

    centred = handlers.reparam(model, config={"z": TransformReparam()})
    trace = handlers.trace(handlers.seed(centred, 0)).get_trace()
    x = trace["z_base"]["value"]
    y = nm.decode(d, x)
    np.testing.assert_allclose(trace["z"]["value"], y, rtol=1e-5)
    assert trace["z"]["type"] == "deterministic" and y.shape == (5, 2)
    actual = total(centred, params={"z_base": x})
    np.testing.assert_allclose(actual, d.base_dist.log_prob(x).sum(), rtol=1e-5)


@pytest.mark.parametrize("parallel", [True, False])
def test_predictive_and_log_likelihood(parallel):
    flow = FLOWS["maf-context"]()

    def model(y=None):
        shift = numpyro.sample("shift", dist.Normal(0, 1).expand([2]).to_event(1))
        with numpyro.plate("rows", 3):
            numpyro.sample("y", flow(shift), obs=y)

    draws = Predictive(model, num_samples=4, parallel=parallel)(jax.random.key(0))
    assert draws["y"].shape == (4, 3, 2)
    posterior = {"shift": draws["shift"]}
    y = jnp.ones((3, 2)) / 3
    actual = log_likelihood(model, posterior, y=y, parallel=parallel)["y"]
    expected = score(flow(draws["shift"][:, None]), y)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_legacy_and_typed_keys_give_the_same():
    d = FLOWS["maf"]()()
    legacy, typed = jax.random.PRNGKey(3), jax.random.key(3)
    np.testing.assert_array_equal(d.sample(legacy, (4,)), d.sample(typed, (4,)))
    a, b = small(legacy), small(typed)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    values = [handlers.seed(lambda: numpyro.sample("z", d), key)() for key in (legacy, typed)]
    np.testing.assert_array_equal(*values)


@pytest.mark.parametrize("name", ["maf", "maf-bounded"])
def test_validation_turns_bad_values_into_no_density(name):
    made = FLOWS[name]()
    d = made()
    checked = nm.FlowDistribution(d.base_dist, d.transforms, validate_args=True)
    trusting = nm.FlowDistribution(d.base_dist, d.transforms, validate_args=False)
    good, bad = jnp.zeros(2), jnp.array([jnp.nan, 0.0])
    np.testing.assert_allclose(score(checked, good), score(trusting, good), rtol=1e-6)
    assert jax.jit(checked.log_prob)(bad) == -np.inf
    assert not np.isfinite(jax.jit(trusting.log_prob)(bad))


def test_nuts_takes_param_sites_as_they_are_given():
    flow, y = FLOWS["maf"](), jnp.array([0.4, 0.1])

    def model():
        z = numpyro.sample("z", nm.flow_module("prior", flow)())
        numpyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=y)

    def closed():
        z = numpyro.sample("z", flow())
        numpyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=y)

    draws = []
    for m in (model, closed):
        kernel = NUTS(m, init_strategy=init_to_value(values={"z": y}))
        mcmc = MCMC(kernel, num_warmup=10, num_samples=10, progress_bar=False)
        mcmc.run(jax.random.key(0))
        draws.append(mcmc.get_samples()["z"])
    np.testing.assert_allclose(*draws, rtol=1e-3, atol=1e-3)


# The package -------------------------------------------------------------------------------------


def test_importing_is_silent_and_computes_nothing():
    code = "import numpyro_maf, jax; assert not jax.live_arrays()"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_arviz_makes_no_announcement(tmp_path):
    """ArviZ 0.23 warns once a day, and remembers in the user's cache that it did."""
    code = "import numpy; from numpyro_maf.diagnostics import psis; psis(numpy.arange(30.0))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True, text=True, check=False, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


PACKAGE = pathlib.Path(nm.__file__).parent
# Rooms of the house from the ground up: a file imports rooms below its own, or files beside it in its folder.
FLOORS = [
    {
        "rng",
        "inputs",
        "pytrees",
        "traces",
        "codec",
        "fingerprints",
        "locks",
        "tensors",
        "_version",
        "_arviz",
        "datasets",
    },
    {"nn", "diagnostics", "hmm", "plots", "inference_data"},
    {"semi_markov", "baum_welch"},
    {"flows"},
    {"train"},
    {"inference"},
    {"sbi"},
    {"answers", "migrations"},
    {"io"},
    {"activities"},
    {"commands"},
    {"__main__"},
]
# Public paths of what lives elsewhere.
PATHS = {"embeddings", "conditionals", "encoders", "guides", "sites", "flow"}


def module_of(path):
    """``("flows", "sweep")`` of a file."""
    return path.relative_to(PACKAGE).with_suffix("").parts


def own_imports(path):
    """The package's modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = tuple(name.split("."))
            if parts[0] == "numpyro_maf":
                yield parts[1:]


def test_imports_go_down():
    level = {name: i for i, names in enumerate(FLOORS) for name in names}
    beside = {}
    for path in PACKAGE.rglob("*.py"):
        module = module_of(path)
        if module[0] in ("__init__", "examples") or module[0] in PATHS:
            continue
        assert module[0] in level, f"{path.name} is on no floor"
        for parts in own_imports(path):
            assert parts[0] in level, f"{path.name} imports {parts}, which is on no floor"
            if parts[0] != module[0]:
                assert level[parts[0]] < level[module[0]], f"{path.name} imports {parts}, which is not below"
            elif module[-1] != "__init__" and len(parts) > 1:
                beside.setdefault(module, set()).add((module[0], parts[1]))
    graphlib.TopologicalSorter(beside).prepare()  # raises CycleError for a circle


def test_no_module_is_named_as_what_it_defines():
    public = set(nm.__all__) - {"conditionals"}
    for path in PACKAGE.rglob("*.py"):
        *_, name = module_of(path)
        assert name not in public, f"{path} would be shadowed by the public name"
        defined = {n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)}
        assert name not in defined, f"{path} shares its name with a function in it"
