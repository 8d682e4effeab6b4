"""How the files in v1 were written: by version 0.1 of this package, format version 1. Later ones cannot.

Each file lies beside log-densities that the same objects gave when they were written, in ``densities.json``.
"""

import json
import pathlib
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

import numpyro_maf as nm
from numpyro_maf.conditionals import Bernoulli, Categorical, Mixture, Normal
from numpyro_maf.embeddings import GRU, Attention, Conv, DeepSet

HERE = pathlib.Path(__file__).parent / "v1"
small = dict(transforms=2, hidden=(4,))
key = jax.random.key(0)


def shaken(flow):
    leaves, tree = jax.tree.flatten(flow.weights)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [a + 0.3 * jax.random.normal(k, jnp.shape(a)) for a, k in zip(leaves, keys)]
    return flow.with_weights(jax.tree.unflatten(tree, moved))


def scaled(flow):
    width = flow.features
    scale = nm.Standardize(jnp.linspace(-1.0, 1.0, width), jnp.linspace(0.5, 2.0, width))
    flow = replace(flow, event_scale=scale)
    if flow.context:
        c = flow.context
        flow = replace(flow, context_scale=nm.Standardize(jnp.full(c, 0.3), jnp.full(c, 1.7)))
    return flow


uniform = dist.Uniform(-1.0, 1.0).expand([2]).to_event(1)
beta = dist.Beta(5.0, 4.0).expand([2]).to_event(1)
student = dist.StudentT(jnp.array([5.0, 7.0]), 0.5, 2.0).to_event(1)
mixed = (Categorical(3), Normal(), Bernoulli(), Mixture(2))
FLOWS = {
    "maf": scaled(nm.maf(key, 3, context=2, **small, order=(2, 0, 1))),
    "iaf": scaled(nm.iaf(key, 2, **small, activation="tanh", mixing="random")),
    "nsf": nm.nsf(key, 2, **small, scalar=nm.RQSpline(bins=4, bound=3.0), mixing="linear"),
    "maf_bounded": nm.maf(key, 2, **small, base=uniform),
    "maf_cdf": nm.maf(key, 2, **small, scalar=nm.MixtureCDF(2, "gaussian"), base=beta),
    "maf_heavy": nm.maf(key, 2, **small, base=student),
    "maf_mog": nm.maf(key, 2, **small, base=nm.made(key, 2, columns=Mixture(3), hidden=(4,))),
    "maf_logit": nm.maf(key, 2, **small, logit=0.05),
    "maf_onto": nm.maf(key, 2, **small).onto(constraints.positive),
    "maf_onto_interval": nm.maf(key, 2, **small).onto(constraints.interval(-2.0, 3.0)),
    "realnvp_image": nm.realnvp(key, (2, 2, 1), context=1, **small, logit=0.05, levels=1),
    "glow": nm.glow(key, 2, **small),
    "flowpp": nm.flowpp(key, 2, transforms=1, hidden=(4,), heads=2),
    "nice": nm.nice(key, 2, **small),
    "nis": nm.nis(key, 2, **small, scalar=nm.PiecewiseQuadratic(4)),
    "circular": nm.circular(key, 2, context=1, **small, scalar=nm.CircularSpline(4)),
    "ffjord": nm.ffjord(key, 2, hidden=(4,)),
    "elementwise": nm.elementwise(key, 2, context=1, hidden=(4,)),
    "compose": nm.maf(key, 2, **small, scalar=nm.Compose((nm.MixtureCDF(2), nm.Affine(bound=3.0)))),
    "made": scaled(nm.made(key, 4, columns=mixed, hidden=(4,), masks=2, context=1)),
    "made_normal": nm.made(key, 2, hidden=(4,), order=(1, 0), direct=False),
}
densities = {}
for name, flow in FLOWS.items():
    flow = shaken(flow)
    nm.save(HERE / f"flow_{name}.safetensors", flow)
    grid = np.linspace(0.1, 0.9, 3 * flow.features).reshape(3, *flow.event_shape)
    if name == "made":
        grid = np.array([[0, 0.3, 1, -0.4], [2, -0.3, 0, 0.4], [1, 1.3, 1, 0.0]])
    c = np.linspace(-1, 1, 3 * flow.context).reshape(3, -1) if flow.context else None
    densities[f"flow_{name}"] = np.asarray(flow(c).log_prob(jnp.asarray(grid, jnp.float32))).tolist()

rng = np.random.default_rng(0)
x = np.stack([rng.normal(size=60), rng.gamma(2.0, size=60)], 1).astype(np.float32)
context = (x[:, :1] + rng.normal(size=(60, 1))).astype(np.float32)
result = nm.fit(
    2, shaken(nm.maf(key, 2, context=1, **small)), x, context, regression=True, max_epochs=2, progress=False
)
nm.save(HERE / "flow_regressed.safetensors", result.flow)
densities["flow_regressed"] = np.asarray(result.flow(context[:3]).log_prob(x[:3])).tolist()


def prior_model():
    numpyro.sample("a", dist.Normal(0, 1))
    numpyro.sample("b", dist.HalfNormal(1.0).expand([2]).to_event(1))
    numpyro.sample("c", dist.Uniform(-1.0, 2.0))
    numpyro.sample("s", dist.Dirichlet(jnp.ones(3)))


def drawn(names, n, model):
    sims = nm.simulate(jax.random.key(3), model, n, progress=False)
    return {k: np.asarray(sims[k]) for k in names}


samples = drawn("abcs", 80, prior_model)
joint = nm.fit_sites(
    key, samples, prior_model, builder=partial(nm.maf, **small), max_epochs=2, progress=False
)
nm.save(HERE / "joint.safetensors", joint)
densities["joint"] = np.asarray(joint.log_prob({k: jnp.asarray(v[:3]) for k, v in samples.items()})).tolist()


def model(x=None, y=None):
    a = numpyro.sample("a", dist.Normal(0, 1))
    b = numpyro.sample("b", dist.HalfNormal(1.0))
    numpyro.sample("x", dist.Normal(a, b).expand([6]).to_event(1), obs=x)
    numpyro.sample("y", dist.Gamma(2.0, b), obs=y)


sims = nm.simulate(jax.random.key(3), model, 90, progress=False)
seen = {"x": np.asarray(sims["x"][:2]), "y": np.asarray(sims["y"][:2])}
theta = {"a": jnp.asarray(sims["a"][:2]), "b": jnp.asarray(sims["b"][:2])}
builder = partial(nm.nsf, transforms=1, hidden=(4,))
common = dict(observed=("x", "y"), builder=builder, max_epochs=2, progress=False)
POSTERIORS = {
    "plain": dict(ensemble=2),
    "deepset": dict(embedding={"x": DeepSet(outputs=2, hidden=(4,))}, missing=True),
    "mlp": dict(embedding={"x": (4, 2)}),
    "conv": dict(embedding={"x": Conv(outputs=2, channels=(2,), kernel=3)}),
    "gru": dict(embedding={"x": GRU(outputs=2, width=2)}),
    "attention": dict(embedding={"x": Attention(outputs=2, width=4, heads=2, blocks=1)}),
}
for name, options in POSTERIORS.items():
    posterior = nm.npe(key, model, sims, **common, **options)
    nm.save(HERE / f"posterior_{name}.safetensors", posterior)
    densities[f"posterior_{name}"] = np.asarray(posterior(seen).log_prob(theta)).tolist()


def discrete_model(x=None):
    k = numpyro.sample("k", dist.Categorical(probs=jnp.array([0.2, 0.5, 0.3])))
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    numpyro.sample("x", dist.Normal(k + m, 0.5), obs=x)


sims_k = nm.simulate(jax.random.key(3), discrete_model, 90, progress=False)
posterior = nm.npe(
    key, discrete_model, sims_k, builder=partial(nm.made, hidden=(4,)), max_epochs=2, progress=False
)
nm.save(HERE / "posterior_discrete.safetensors", posterior)
at = posterior({"x": np.asarray(sims_k["x"][:2])})
densities["posterior_discrete"] = np.asarray(
    at.log_prob({"k": jnp.asarray(sims_k["k"][:2]), "m": jnp.asarray(sims_k["m"][:2])})
).tolist()
likelihood = nm.nle(key, model, sims, "y", builder=builder, max_epochs=2, latent=("a", "b"), progress=False)
nm.save(HERE / "likelihood.safetensors", likelihood)
at = np.stack([theta["a"], theta["b"]], 1)
densities["likelihood"] = np.asarray(likelihood(at).log_prob(seen["y"][:, None])).tolist()
ratio = nm.nre(key, model, sims, ("x", "y"), embedding={"x": DeepSet(outputs=2, hidden=(4,))}, hidden=(4,), contrasts=3,
               batch_size=32, max_epochs=2, validation=0.2, progress=False)  # fmt: skip
nm.save(HERE / "ratio.safetensors", ratio)
densities["ratio"] = np.asarray(ratio(at, seen)).tolist()
inputs = {
    "context": context[:3].tolist(), "x": x[:3].tolist(),
    "samples": {k: v[:3].tolist() for k, v in samples.items()},
    "seen": {k: v.tolist() for k, v in seen.items()}, "theta": {k: np.asarray(v).tolist() for k, v in theta.items()},
    "discrete": {k: np.asarray(sims_k[k][:2]).tolist() for k in ("k", "m", "x")},
}  # fmt: skip
(HERE / "densities.json").write_text(json.dumps({"densities": densities, "inputs": inputs}, indent=1))
