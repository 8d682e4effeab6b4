# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Flow guides beside long NUTS on eighteen posteriors: error of every mean in sd, k-hat, verdict.

    python benchmarks/guides.py [--data DIR] [--cache OUT] [--models …] [--guides …]

DIR holds the six posteriors of posteriordb as ``benchmarks/posteriors.py`` reads them, with their reference
draws; the other twelve are in ``guide_models.py``, and their reference is NUTS (4 chains of 2,000 after 1,500
of warm-up) or exact draws. Every guide is trained by 5,000 steps of ``PathELBO`` with 32 draws each. OUT
keeps references and finished cells: the same call goes on where it stopped. The goal of each cell is an error
within 0.3 sd of every mean and k-hat below 0.7, or a verdict that says no.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import jax
import numpy as np
import numpyro
import optax
from guide_models import EXACT, MODELS, TRUTH
from numpyro.infer import MCMC, NUTS, SVI, init_to_uniform, init_to_value
from posteriors import MODELS as POSTERIORDB
from posteriors import OURS, load

import numpyro_maf as nm

GUIDES = {"AutoFlow": nm.AutoFlow, "AutoIAF": nm.AutoIAF, "AutoMAF": nm.AutoMAF}


def reference(name, cache):
    """Draws by site, ``(S, ...)``, and their greatest R-hat; kept in the cache."""
    path = cache / f"{name}.npz"
    if not path.exists():
        model, data = MODELS[name]
        worst = 1.0
        if name in EXACT:
            draws = EXACT[name](jax.random.key(0), 20_000)
        else:
            start = init_to_value(values=TRUTH[name]) if name in TRUTH else init_to_uniform
            nuts = NUTS(model, target_accept_prob=0.95, init_strategy=start)
            mcmc = MCMC(nuts, num_warmup=1500, num_samples=2000, num_chains=4, chain_method="vectorized",
                        progress_bar=False)  # fmt: skip
            mcmc.run(jax.random.key(0), *data)
            draws, chains = mcmc.get_samples(), mcmc.get_samples(group_by_chain=True)
            rhat = numpyro.diagnostics.split_gelman_rubin
            worst = max(float(np.max(rhat(np.asarray(v)))) for v in chains.values())
        np.savez(path, **{k: np.asarray(v) for k, v in draws.items()}, _rhat=worst)
    with np.load(path) as file:
        return {k: file[k] for k in file.files if k != "_rhat"}, float(file["_rhat"])


def posteriordb(name, folder):
    """Model, data, and reference draws by site: their columns ``beta[1]``, ``beta[2]`` put together."""
    data, columns = load(folder, name)
    sites: dict[str, list] = {}
    for column, draws in columns.items():
        sites.setdefault(column.partition("[")[0], []).append(draws)
    joined = {k: np.stack(v, -1) if f"{k}[1]" in columns else v[0] for k, v in sites.items()}
    return POSTERIORDB[name], (data,), joined


def errors(draws, right):
    """The error of every mean, in the reference's sd, of the sites that the reference has."""
    each = {}
    for name, value in right.items():
        off = np.abs((np.asarray(draws[name], np.float64).mean(0) - value.mean(0)) / value.std(0))
        each[name] = float(np.max(off)) if np.isfinite(off).all() else float("inf")
    return each


def train(model, data, make, seed):
    """A trained guide, its parameters, and the seconds that it took."""
    start = time.perf_counter()
    guide = make(model)
    rate = optax.cosine_decay_schedule(OURS["rate"], OURS["steps"])
    svi = SVI(model, guide, optax.adam(rate), OURS["elbo"])
    result = svi.run(jax.random.key(seed), OURS["steps"], *data, progress_bar=False)
    jax.block_until_ready(result.params)
    return guide, result.params, time.perf_counter() - start


def cell(model, data, right, title, seed):
    """One row of the table."""
    guide, params, took = train(model, data, GUIDES[title], seed)
    check = nm.check_guide(jax.random.key(7), model, guide, params, *data, num_samples=10_000)
    own = errors(check.samples, right)
    weighted = errors(check.resample(jax.random.key(8), 10_000), right)
    worst = max(own, key=own.get)
    return {
        "guide": title, "ELBO": f"{check.elbo:.2f}", "k-hat": f"{check.khat:.2f}",
        "ESS": f"{check.psis.ess / 10_000:.0%}", "worst mean error / sd": f"{own[worst]:.2f} ({worst})",
        "after weighing": f"{max(weighted.values()):.2f}", "verdict": check.verdict.partition(":")[0],
        "seconds": f"{took:.0f}",
    }  # fmt: skip


def met(row):
    """Whether the goal is met: right, or a verdict that says no."""
    error = float(row["worst mean error / sd"].split()[0])
    if row["verdict"].startswith("do not trust"):
        return "says no" if error >= 0.3 else "right, says no"
    if row["verdict"].startswith("use the weighted"):
        error = min(error, float(row["after weighing"]))
    return "yes" if error < 0.3 else "NO"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="folder of posteriordb's files")
    parser.add_argument("--cache", default="guides-cache", help="folder for references and finished cells")
    parser.add_argument("--models", nargs="*", default=[*POSTERIORDB, *MODELS])
    parser.add_argument("--guides", nargs="*", default=["AutoFlow", "AutoIAF"])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    cache = Path(given.cache)
    cache.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in given.models:
        if name in POSTERIORDB and not given.data:
            continue
        for title in given.guides:
            path = cache / f"{name}.{title}.{given.seed}.json"
            if not path.exists():
                if name in POSTERIORDB:
                    model, data, right = posteriordb(name, given.data)
                    rhat = 1.0
                else:
                    (model, data), (right, rhat) = MODELS[name], reference(name, cache)
                row = {"model": name.split("-")[-1], "R-hat of NUTS": f"{rhat:.3f}"}
                row |= cell(model, data, right, title, given.seed)
                path.write_text(json.dumps(row | {"goal met": met(row)}))
                jax.clear_caches()
            rows.append(json.loads(path.read_text()))
            print(*rows[-1].values(), sep="  ", flush=True)
    print(
        f"\nPython {platform.python_version()}, jax {jax.__version__}, numpyro {numpyro.__version__}, "
        f"numpyro_maf {nm.__version__}\n"
    )
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(row.values()) + " |")


if __name__ == "__main__":
    main()
