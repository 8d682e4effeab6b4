"""Amortised hierarchical posteriors beside exact ones: C2ST of the global sites, and of a local one.

    python benchmarks/hierarchical.py [--simulations 10000] [--observations 5]

* ``gaussian``: random effects with known variances; one network for 2, 10 and 100 groups; exact posterior.
* ``scales``: the same with an unknown spread between the groups; NUTS.
* ``schools``: the eight schools, each with its own standard error; NUTS.
* ``diffusion``: choices and times of several subjects, each with a drift of its own, in 20 trials each; NUTS
  over the exact Wiener likelihood, which the simulator hides.
* ``epidemics``: chain binomials in several cities; NUTS over the exact likelihood of all counts.

A classifier cannot tell a local site of its own: so the classifier sees the global draws and one group's
local draw together. 0.5 is perfect.
"""

import argparse
import time
import warnings
from functools import partial

import jax
import numpy as np
import numpyro
from hierarchical_models import diffusion, epidemics, gaussian, scales, schools
from numpyro.infer import MCMC, NUTS

import numpyro_maf as nm
from numpyro_maf.diagnostics import c2st

DRAWS = 2000


def exact(y, rng):
    n = len(y)
    prior = np.ones((n + 1, n + 1)) + np.diag([0, *[0.49] * n])
    gain = prior[:, 1:] @ np.linalg.inv(prior[1:, 1:] + 0.25 * np.eye(n))
    drawn = rng.multivariate_normal(gain @ y, prior - gain @ prior[1:], DRAWS)
    return {"mu": drawn[:, 0], "z": drawn[:, 1:]}


def nuts(model, n, seen):
    def started(**seen):
        model(n, **seen)

    mcmc = MCMC(NUTS(started, target_accept_prob=0.95), num_warmup=1000, num_samples=2000, num_chains=4,
                chain_method="vectorized", thinning=4, progress_bar=False)  # fmt: skip
    mcmc.run(jax.random.key(0), **seen)
    return {k: np.asarray(v)[:DRAWS] for k, v in mcmc.get_samples().items()}


CASES = {
    "gaussian": (gaussian, (2, 10, 100), ("y",)),
    "scales": (scales, (10,), ("y",)),
    "schools": (schools, (8,), ("y", "sigma")),
    "diffusion": (diffusion, (8,), ("y",)),
    "epidemics": (epidemics, (8,), ("y",)),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=10_000)
    parser.add_argument("--observations", type=int, default=5)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    print(f"numpyro {numpyro.__version__}, jax {jax.__version__}, numpyro_maf {nm.__version__}")
    print(
        "| model | groups | training, s | C2ST globals | C2ST globals and a local |\n|---|---|---|---|---|",
        flush=True,
    )
    for name in args.cases:
        model, sizes, observed = CASES[name]
        each = args.simulations // len(sizes)
        sims = [nm.simulate(n, model, each, n, progress=False) for n in sizes]
        began = time.perf_counter()
        posterior = nm.npe(0, model, sims, observed, progress=False)
        seconds = time.perf_counter() - began
        fresh = {n: nm.simulate(1000 + n, model, args.observations, n, progress=False) for n in sizes}
        for n in sizes:
            found = []
            for i in range(args.observations):
                seen = {site: np.asarray(fresh[n][site])[i] for site in observed}
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    ours = posterior(seen).sample(i, DRAWS)
                reference = partial(model, exact=True) if name in ("diffusion", "epidemics") else model
                right = exact(seen["y"], rng) if name == "gaussian" else nuts(reference, n, seen)
                names = [site for site in ours if site != "z"]
                both = [np.stack([np.asarray(d[k]) for k in names], 1) for d in (ours, right)]
                group = rng.integers(n)
                local = [
                    np.concatenate([b, np.asarray(d["z"]).reshape(DRAWS, n)[:, [group]]], 1)
                    for b, d in zip(both, (ours, right))
                ]
                found.append([c2st(both[1], both[0]), c2st(local[1], local[0])])
            mean = np.mean(found, 0)
            print(f"| {name} | {n} | {seconds:.0f} | {mean[0]:.3f} | {mean[1]:.3f} |", flush=True)


if __name__ == "__main__":
    main()
