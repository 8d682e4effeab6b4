"""The simulation-based inference benchmark: our methods beside the published table, and sbi and flowjax.

    python benchmarks/sbibm.py DATA/sbibm                              # NPE, 1,000 and 10,000 simulations
    python benchmarks/sbibm.py DATA/sbibm --methods npe nle nre snle snre truncated c
    python benchmarks/sbibm.py DATA/sbibm --methods npe sbi            # sbi's NPE in the same run
    python benchmarks/sbibm.py DATA/sbibm --budgets 100000
    python benchmarks/sbibm.py DATA/sbibm --tasks sir --methods npe sbi   # a task without published table
    python benchmarks/sbibm.py DATA/sbibm --speed --tasks two_moons slcp   # time and C2ST beside the peers

Lueckmann et al. (2021): for each of ten observations 10,000 draws are compared with 10,000 reference draws by
a classifier's cross-validated accuracy, 0.5 being perfect. One set of settings, the defaults, for all tasks;
sequential methods take ``--rounds`` rounds. Every cell is written to ``--save`` as it is done.
"""

import argparse
import csv
import importlib.metadata
import importlib.util
import json
import platform
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from fast_c2st import c2st
from sbi_tasks import load, vector

import numpyro_maf as nm

TASKS = ["two_moons", "slcp", "gaussian_linear", "bernoulli_glm", "lotka_volterra"]
MORE = ["gaussian_linear_uniform", "gaussian_mixture", "slcp_distractors", "bernoulli_glm_raw", "sir"]
SEQUENTIAL = {"truncated": "SNPE", "c": "SNPE", "a": "SNPE", "snle": "SNLE", "snre": "SNRE"}
QUIET = dict(progress=False)


def posteriors(method, key, model, task, budget, observations, rounds):
    """For each observation a function of a key that draws the parameters, and the seconds of learning."""
    sims_key, fit_key = jax.random.split(key)
    if method in SEQUENTIAL:
        for i, x in enumerate(observations):
            start = time.perf_counter()
            run = {"snle": nm.snle, "snre": nm.snre}.get(method, nm.snpe)
            options = {} if method in ("snle", "snre") else {"method": method}
            options |= dict(rounds=rounds, simulations=budget // rounds, **QUIET)
            found = run(jax.random.fold_in(fit_key, i), model, {"x": x}, **options)
            yield lambda k, found=found: vector(found.sample(k, (10_000,)), task), time.perf_counter() - start
        return
    sims = nm.simulate(sims_key, model, budget, **QUIET)
    start = time.perf_counter()
    if method == "npe":
        learned = nm.npe(fit_key, model, sims, **QUIET)
    elif method == "npe5":
        learned = nm.npe(fit_key, model, sims, ensemble=5, **QUIET)
    elif method == "sbi":
        draw = by_sbi(model, sims, vector(sims, task), np.asarray(sims["x"], np.float32))
    else:
        learned = getattr(nm, method)(fit_key, model, sims, **QUIET)
    seconds = time.perf_counter() - start
    for i, x in enumerate(observations):
        if method == "sbi":
            yield lambda _, x=x: draw(x), seconds
        elif method.startswith("npe"):
            found = learned({"x": x}, warn=False)
            yield lambda k, found=found: vector(found.sample(k, (10_000,)), task), seconds
        else:
            found = nm.smc(jax.random.fold_in(fit_key, i), model, {"x": x}, {"x": learned}, **QUIET)
            yield lambda k, found=found: vector(found.sample(k, (10_000,)), task), seconds


def published(folder):
    """C2ST by task, algorithm and budget."""
    with open(folder / "published_c2st.csv", newline="") as file:
        return {
            (row["task"], row["algorithm"], int(row["num_simulations"])): float(row["mean_c2st"])
            for row in csv.DictReader(file)
        }


def table(arguments):
    """C2ST of every task, budget and method."""
    known = published(arguments.folder)
    done = {}
    if arguments.save and arguments.save.exists():
        for line in arguments.save.read_text().splitlines():
            row = json.loads(line)
            done[row["task"], row["budget"], row["method"]] = row
    print(f"{'task':24}{'budget':>8} {'method':10}{'C2ST':>7}{'worst':>7}{'published':>11}", end="")
    print(f"{'best seq.':>11}{'s':>7}")
    for budget in arguments.budgets:
        for task in arguments.tasks:
            model, seen, reference = load(task, arguments.folder)
            seen = seen[: arguments.observations]
            for method in arguments.methods:
                key = task, budget, method
                if key not in done:
                    scores, spent = [], []
                    seed = jax.random.key(arguments.seed)
                    made = posteriors(method, seed, model, task, budget, seen, arguments.rounds)
                    for i, (draw, seconds) in enumerate(made):
                        scores.append(c2st(reference[i], draw(jax.random.key(i))))
                        spent.append(seconds)
                    done[key] = dict(
                        task=task, budget=budget, method=method, c2st=scores, seconds=float(np.mean(spent))
                    )
                    if arguments.save:
                        with open(arguments.save, "a") as out:
                            out.write(json.dumps(done[key]) + "\n")
                row = done[key]
                name = SEQUENTIAL.get(method, "NPE" if method in ("npe5", "sbi") else method.upper())
                best = min(known.get((task, a, budget), np.nan) for a in ("SNPE", "SNLE", "SNRE"))
                print(
                    f"{task:24}{budget:8} {method:10}{np.mean(row['c2st']):7.3f}{max(row['c2st']):7.3f}"
                    f"{known.get((task, name, budget), np.nan):11.3f}{best:11.3f}{row['seconds']:7.1f}"
                    f"   ({len(row['c2st'])} observations)",
                    flush=True,
                )


def speed(arguments):
    """Seconds from simulations to 10,000 draws, compilation included, and C2ST, beside the peers."""
    for budget in arguments.budgets:
        for task in arguments.tasks:
            model, seen, reference = load(task, arguments.folder)
            seen = seen[: arguments.observations]
            sims = nm.simulate(jax.random.key(arguments.seed), model, budget, **QUIET)
            theta, x = np.asarray(sims["theta"]), np.asarray(sims["x"])
            for name, learn in [("ours", ours), ("flowjax", by_flowjax), ("sbi", by_sbi)]:
                if name != "ours" and importlib.util.find_spec(name) is None:
                    continue
                start = time.perf_counter()
                draw = learn(model, sims, theta, x)
                first = draw(seen[0])
                seconds = time.perf_counter() - start
                draws = [first, *(draw(o) for o in seen[1:])]
                scores = [c2st(r, d) for r, d in zip(reference, draws)]
                print(
                    f"{task:12}{budget:8} {name:8}{seconds:8.1f} s   C2ST {np.mean(scores):.3f}", flush=True
                )


def ours(model, sims, theta, x):
    learned = nm.npe(jax.random.key(0), model, sims, **QUIET)
    return lambda seen: np.asarray(
        learned({"x": seen}, warn=False).sample(jax.random.key(1), (10_000,))["theta"]
    )


def by_flowjax(model, sims, theta, x):
    """For priors uniform in a box: an autoregressive spline flow of logits, 5 layers, 50 x 2, 8 knots."""
    import flowjax.bijections
    import flowjax.distributions
    import flowjax.flows
    import flowjax.train
    import jax.numpy as jnp

    bound = np.abs(theta).max().round()
    share = (theta / bound + 1) / 2
    logits = np.log(share) - np.log1p(-share)
    means, sds = (logits.mean(0), x.mean(0)), (logits.std(0), x.std(0))
    z, c = (jnp.asarray((a - m) / s) for a, m, s in zip((logits, x), means, sds))
    flow = flowjax.flows.masked_autoregressive_flow(
        jax.random.key(0), base_dist=flowjax.distributions.Normal(jnp.zeros(theta.shape[1])),
        transformer=flowjax.bijections.RationalQuadraticSpline(knots=8, interval=5.0),
        cond_dim=x.shape[1], flow_layers=5, nn_width=50, nn_depth=2,
    )  # fmt: skip
    flow, _ = flowjax.train.fit_to_data(
        jax.random.key(1), flow, (z, c), max_patience=20, max_epochs=1000, batch_size=256,
        learning_rate=1e-3, show_progress=False,
    )  # fmt: skip

    def draw(seen):
        z = flow.sample(jax.random.key(2), (10_000,), condition=(jnp.asarray(seen) - means[1]) / sds[1])
        return np.asarray(bound * (2 * jax.nn.sigmoid(z * sds[0] + means[0]) - 1))

    return draw


def by_sbi(model, sims, theta, x):
    """sbi's default NPE, with the model's prior."""
    import torch
    from sbi.inference import NPE

    inference = NPE(prior=torch_prior(model), show_progress_bars=False)
    inference.append_simulations(torch.tensor(theta), torch.tensor(x)).train()
    posterior = inference.build_posterior()
    return lambda seen: posterior.sample(
        (10_000,), x=torch.tensor(seen), show_progress_bars=False
    ).numpy()  # fmt: skip


def torch_prior(model):
    """The prior of one of the tasks as a distribution of PyTorch."""
    import torch
    from sbi.utils import BoxUniform

    def tensor(a):
        return torch.tensor(np.array(a, np.float32))

    trace = numpyro.handlers.trace(numpyro.handlers.seed(model, jax.random.key(0))).get_trace()
    priors = [site["fn"] for name, site in trace.items() if name != "x"]
    inner = [p.base_dist if isinstance(p, dist.Independent) else p for p in priors]
    if isinstance(inner[0], dist.LogNormal):
        locs, scales = (
            tensor(np.hstack([np.asarray(getattr(p, a)) for p in inner])) for a in ("loc", "scale")
        )
        return torch.distributions.Independent(torch.distributions.LogNormal(locs, scales), 1)
    (prior,) = priors
    if isinstance(prior, dist.MultivariateNormal):
        return torch.distributions.MultivariateNormal(tensor(prior.mean), tensor(prior.covariance_matrix))
    if isinstance(prior.support.base_constraint, type(dist.constraints.real)):
        return torch.distributions.MultivariateNormal(tensor(prior.mean), torch.diag(tensor(prior.variance)))
    ends = prior.support.base_constraint
    low, high = (torch.full(prior.event_shape, float(e)) for e in (ends.lower_bound, ends.upper_bound))
    return BoxUniform(low, high)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="with the benchmark's files")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS + MORE)
    parser.add_argument("--budgets", nargs="+", type=int, default=[1000, 10_000])
    choices = ["npe", "npe5", "nle", "nre", *SEQUENTIAL, "sbi"]
    parser.add_argument("--methods", nargs="+", default=["npe"], choices=choices)
    parser.add_argument("--observations", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="a file of cells: those there are taken, others added")
    parser.add_argument("--speed", action="store_true", help="time beside sbi and flowjax")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    packages = ["numpyro_maf", "jax", "numpyro", "flowjax", "sbi", "torch", "scikit-learn"]
    versions = [f"{p} {importlib.metadata.version(p)}" for p in packages if _installed(p)]
    print(f"Python {platform.python_version()}, {', '.join(versions)}")
    speed(arguments) if arguments.speed else table(arguments)


def _installed(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
