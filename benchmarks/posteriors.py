# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Guides on real posteriors with reference draws, beside NumPyro's own; and NeuTra beside plain NUTS.

    python benchmarks/posteriors.py DIR [--models …] [--guides …] [--neutra]

DIR holds posteriordb's ``NAME.data.json`` and ``NAME.npz``, each array of reference draws (chains, draws).
Every guide is trained by Adam. Those of NumPyro take 10,000 steps of its ``Trace_ELBO`` with 10 draws each
at a rate of 1e-3; ours take 5,000 steps of ``PathELBO`` with 32 draws each at 5e-3, decaying.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import lax
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO, autoguide
from numpyro.infer.reparam import NeuTraReparam

import numpyro_maf as nm
from numpyro_maf.diagnostics import c2st, psis
from numpyro_maf.inference.checks import draw_and_score

# The models -------------------------------------------------------------------------------------


def eight_schools(data):
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("schools", data["J"]):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, data["sigma"]), obs=data["y"])


def kidscore_momiq(data):
    beta = numpyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (2,)))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    mean = beta[0] + beta[1] * data["mom_iq"]
    numpyro.sample("kid_score", dist.Normal(mean, sigma), obs=data["kid_score"])


def log10earn_height(data):
    beta = numpyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (2,)))
    sigma = numpyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    mean = beta[0] + beta[1] * data["height"]
    numpyro.sample("log10_earn", dist.Normal(mean, sigma), obs=jnp.log10(data["earn"]))


def ark(data):
    y, k = data["y"], data["K"]
    alpha = numpyro.sample("alpha", dist.Normal(0, 10))
    beta = numpyro.sample("beta", dist.Normal(0, 10).expand([k]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    lagged = jnp.stack([y[k - 1 - i : len(y) - 1 - i] for i in range(k)], -1)
    numpyro.sample("y", dist.Normal(alpha + lagged @ beta, sigma), obs=y[k:])


def low_dim_gauss_mix(data):
    mu = numpyro.sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    numpyro.factor("mu_prior", dist.Normal(0, 2).log_prob(mu).sum())
    sigma = numpyro.sample("sigma", dist.HalfNormal(2).expand([2]).to_event(1))
    theta = numpyro.sample("theta", dist.Beta(5, 5))
    which = dist.Categorical(jnp.stack([theta, 1 - theta]))
    numpyro.sample("y", dist.MixtureSameFamily(which, dist.Normal(mu, sigma)), obs=data["y"])


def gp_regr(data):
    rho = numpyro.sample("rho", dist.Gamma(25, 4))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1))
    x = data["x"]
    kernel = alpha**2 * jnp.exp(-((x[:, None] - x) ** 2) / (2 * rho**2)) + sigma * jnp.eye(len(x))
    numpyro.sample("y", dist.MultivariateNormal(0.0, kernel), obs=data["y"])


MODELS = {
    "eight_schools-eight_schools_noncentered": eight_schools,
    "kidiq-kidscore_momiq": kidscore_momiq,
    "earnings-log10earn_height": log10earn_height,
    "arK-arK": ark,
    "low_dim_gauss_mix-low_dim_gauss_mix": low_dim_gauss_mix,
    "gp_pois_regr-gp_regr": gp_regr,
}

# The guides: a guide of a model, its loss, its optimiser ----------------------------------------

PEER = {"elbo": Trace_ELBO(10), "rate": 1e-3, "steps": 10_000, "decay": False}
OURS = {"elbo": nm.PathELBO(32), "rate": 5e-3, "steps": 5_000, "decay": True}
GUIDES = {
    "AutoNormal": (autoguide.AutoNormal, PEER),
    "AutoMultivariateNormal": (autoguide.AutoMultivariateNormal, PEER),
    "AutoIAFNormal": (autoguide.AutoIAFNormal, PEER),
    "AutoBNAFNormal": (autoguide.AutoBNAFNormal, PEER),
    "AutoMAF": (nm.AutoMAF, OURS),
    "AutoIAF": (nm.AutoIAF, OURS),
    "AutoFlow(nsf)": (nm.AutoFlow, OURS),
}


def load(folder, name):
    raw = json.loads((Path(folder) / f"{name}.data.json").read_text())
    data = {k: np.asarray(v, np.float32) if isinstance(v, list) else v for k, v in raw.items()}
    with np.load(Path(folder) / f"{name}.npz") as file:
        return data, {k: file[k].reshape(-1) for k in file.files}


def columns(draws, names):
    """Draws by site as an array with the reference's columns, ``mu[1]`` for the first of a vector."""
    made = []
    for name in names:
        site, _, index = name.partition("[")
        value = np.asarray(draws[site])
        made.append(value[..., int(index[:-1]) - 1] if index else value)
    return np.stack(made, -1)


def weigher(model, guide, data):
    """A function of parameters, key and number of draws: log target minus log guide, and the draws."""

    @partial(jax.jit, static_argnums=2)
    def weigh(params, key, num_samples):
        draws, log_weights = draw_and_score(key, model, guide, params, (data,), {}, num_samples)
        return log_weights, draws

    return weigh


def run(model, data, make, settings, chunks, key):
    """Train a guide.

    Return it, parameters and the time since the start from time to time, and how long set-up and
    compilation took.
    """
    start = time.perf_counter()
    steps, rate = settings["steps"], settings["rate"]
    rate = optax.cosine_decay_schedule(rate, steps) if settings["decay"] else rate
    guide = make(model)
    svi = SVI(model, guide, optax.adam(rate), settings["elbo"])
    state = svi.init(key, data)
    history = [(time.perf_counter() - start, svi.get_params(state))]

    @jax.jit
    def several(state):
        return lax.scan(lambda s, _: svi.update(s, data), state, length=steps // chunks)

    several = several.lower(state).compile()
    set_up = time.perf_counter() - start
    for _ in range(chunks):
        state, losses = several(state)
        jax.block_until_ready(losses)
        history.append((time.perf_counter() - start, svi.get_params(state)))
    return guide, history, set_up


def bench(folder, name, guides, chunks, seed):
    """Rows of one model; C2ST, which takes longest, comes later."""
    model = MODELS[name]
    data, reference = load(folder, name)
    names = list(reference)
    reference = np.stack([reference[k] for k in names], -1)
    mean, sd = reference.mean(0), reference.std(0)
    target, rows = None, []
    for title in guides:
        make, settings = GUIDES[title]
        jax.clear_caches()  # nobody profits from what an earlier guide compiled
        guide, history, set_up = run(model, data, make, settings, chunks, jax.random.key(seed))
        took, params = history[-1]
        weigh = weigher(model, guide, data)
        log_weights, draws = weigh(params, jax.random.key(7), 10_000)
        log_weights, draws = np.asarray(log_weights, np.float64), columns(draws, names)
        if not np.isfinite(log_weights).any():
            print(f"{name}  {title}: no finite log-weight", flush=True)
            continue
        log_weights = np.where(np.isnan(log_weights), -np.inf, log_weights)
        found = psis(log_weights)
        row = {
            "model": name.split("-")[-1], "guide": title, "ELBO": f"{log_weights.mean():.3f}",
            "k-hat": f"{found.khat:.2f}", "ESS": f"{found.ess / len(log_weights):.0%}",
            "worst mean error / sd": f"{np.abs((draws.mean(0) - mean) / sd).max():.3f}",
            "seconds": f"{took:.1f}", "of them compiling": f"{set_up:.1f}",
            "time to AutoIAFNormal's ELBO": "", "steps alone": "",
        }  # fmt: skip
        if title == "AutoIAFNormal":
            target = log_weights.mean(), took, took - set_up
        elif settings is OURS and target is not None:
            row["time to AutoIAFNormal's ELBO"] = "never"
            for seconds, params in history:
                if weigh(params, jax.random.key(8), 2000)[0].mean() >= target[0]:
                    row["time to AutoIAFNormal's ELBO"] = f"{seconds / target[1]:.2f}"
                    row["steps alone"] = f"{max(seconds - set_up, 0) / target[2]:.2f}"
                    break
        print(*row.values(), sep="  ", flush=True)
        rows.append((row, reference, draws))
    return rows


def table(rows, jobs):
    """Print the rows with their C2ST."""
    print("\n| " + " | ".join([*rows[0][0], "C2ST"]) + " |")
    print("|---" * (len(rows[0][0]) + 1) + "|", flush=True)
    for row, reference, draws in rows:
        finite = np.isfinite(draws).all()
        score = f"{c2st(reference, draws[: len(reference)], jobs=jobs):.3f}" if finite else "not finite"
        print("| " + " | ".join([*row.values(), score]) + " |", flush=True)


def neutra(folder, seed, num_samples=5000):
    """Effective samples a second of NUTS on eight schools, centred, plain and through a trained guide."""
    data, _ = load(folder, next(iter(MODELS)))

    def sample(title, model, extra=0.0):
        start = time.perf_counter()
        mcmc = MCMC(NUTS(model), num_warmup=1000, num_samples=num_samples, progress_bar=False)
        mcmc.run(jax.random.key(seed), data, extra_fields=("diverging", "num_steps"))
        draws = mcmc.get_samples(group_by_chain=True)
        jax.block_until_ready(draws)
        total = time.perf_counter() - start
        # Once more, compiled, from other draws: the time of sampling alone.
        start = time.perf_counter()
        mcmc.post_warmup_state = mcmc.last_state
        mcmc.run(jax.random.key(seed + 1), data, extra_fields=("diverging", "num_steps"))
        draws = mcmc.get_samples(group_by_chain=True)
        jax.block_until_ready(draws)
        took = time.perf_counter() - start
        fields = mcmc.get_extra_fields()
        sites = {"mu": draws["mu"], "log_tau": jnp.log(draws["tau"]), "theta": draws["theta"]}
        ess = min(
            float(np.min(numpyro.diagnostics.effective_sample_size(np.asarray(v)))) for v in sites.values()
        )
        print(
            f"| {title} | {ess:.0f} | {ess / took:.0f} | {ess / (total + extra):.0f} "
            f"| {int(fields['diverging'].sum())} | {float(fields['num_steps'].mean()):.1f} |", flush=True,
        )  # fmt: skip

    print("\n| sampler | least ESS | ESS a second | with warmup, compile, guide | divergences | steps |")
    print("|---|---|---|---|---|---|", flush=True)
    sample("NUTS", eight_schools)
    for title, make in [("AutoIAF", nm.AutoIAF), ("AutoMAF", nm.AutoMAF), ("AutoFlow(nsf)", nm.AutoFlow)]:
        guide, history, _ = run(eight_schools, data, make, OURS, 1, jax.random.key(seed))
        took, params = history[-1]
        sample(f"NeuTra, {title}", NeuTraReparam(guide, params).reparam(eight_schools), took)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="folder of posteriordb's files")
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--guides", nargs="*", default=list(GUIDES))
    parser.add_argument("--chunks", type=int, default=100, help="how often the ELBO is looked at")
    parser.add_argument("--jobs", type=int, default=1, help="processes for C2ST")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--neutra", action="store_true", help="only NeuTra")
    given = parser.parse_args()
    print(
        f"Python {platform.python_version()}, jax {jax.__version__}, numpyro {numpyro.__version__}, "
        f"numpyro_maf {nm.__version__}\n"
    )
    rows = []
    for name in [] if given.neutra else given.models:
        rows += bench(given.data, name, given.guides, given.chunks, given.seed)
    neutra(given.data, given.seed)
    if rows:
        table(rows, given.jobs)


if __name__ == "__main__":
    main()
