# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Three small jobs with their code: a density, the density as a prior, the posterior of a simulator."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS

from numpyro_maf.datasets import two_moons, two_moons_entropy
from numpyro_maf.flows.builders import nsf
from numpyro_maf.sbi import Simulator, npe, simulate
from numpyro_maf.train.likelihood import fit

__all__ = ["run"]


def run(out: str | None = None, quick: bool = False, only: Sequence[str] | None = None) -> int:
    """Print code and results; draw pictures into a folder, if there is one.

    :raises ModuleNotFoundError: when pictures are wanted and matplotlib is not installed.
    """
    if out is not None and find_spec("matplotlib") is None:
        raise ModuleNotFoundError("pictures need matplotlib: pip install 'numpyro_maf[plots]'")
    folder = None if out is None else Path(out)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    jobs = tuple(only or ("density", "prior", "posterior"))
    print("import jax, numpyro, numpyro_maf as nm\n")
    flow: Any = None
    if {"density", "prior"} & {*jobs}:
        flow = _density(folder, quick)
    if "prior" in jobs:
        _prior(flow, folder, quick)
    if "posterior" in jobs:
        _posterior(folder, quick)
    where = f"; pictures are in {folder}" if folder is not None else ""
    print(f"Each job is a page of the documentation: a learned prior, a guide, a neural posterior{where}.")
    return 0


def _density(folder: Path | None, quick: bool) -> Any:
    """A flow of two half moons."""
    rows, epochs = (500, 3) if quick else (4000, 60)
    print(f"""# 1. A density, learned from {rows:,} samples
x = nm.datasets.two_moons({rows})                       # {rows} points on two half moons
flow = nm.nsf(0, 2, transforms=2, hidden=(32, 32))
result = nm.fit(1, flow, x, learning_rate=3e-3, max_epochs={epochs})
d = result.flow()                                     # a NumPyro distribution: d.sample, d.log_prob""")
    began, x = time.perf_counter(), two_moons(rows)
    start = nsf(0, 2, transforms=2, hidden=(32, 32))
    result = fit(1, start, x, learning_rate=3e-3, max_epochs=epochs, progress=False)
    test = two_moons(5000, seed=1)
    loss = float(-jnp.mean(result.flow().log_prob(jnp.asarray(test, jnp.float32))))
    spent = time.perf_counter() - began
    print(f"-> {spent:.0f} s. Loss on new points {loss:.3f} nats; the least is {two_moons_entropy():.3f}.\n")
    if folder is not None:
        from numpyro_maf import plots

        plots.density(result.flow, data=x, title="density and samples", path=folder / "density.png")
        plots.warp(result.flow, title="a grid, before and after the flow", path=folder / "warp.png")
    return result.flow


def _prior(flow: Any, folder: Path | None, quick: bool) -> None:
    """NUTS with the flow as the prior."""
    print("""# 2. The density as the prior of a model, by NUTS
def model(y):
    z = numpyro.sample("z", flow())
    numpyro.sample("y", dist.Normal(z[0], 0.1), obs=y)
mcmc = MCMC(NUTS(model), num_warmup=300, num_samples=1000)
mcmc.run(jax.random.key(2), 1.5)                      # only the lower moon reaches 1.5""")

    def model(y=None):
        z = numpyro.sample("z", flow())
        numpyro.sample("y", dist.Normal(z[0], 0.1), obs=y)

    began, count = time.perf_counter(), 50 if quick else 1000
    mcmc = MCMC(NUTS(model), num_warmup=20 if quick else 300, num_samples=count, progress_bar=False)
    mcmc.run(jax.random.key(2), 1.5)
    z = np.asarray(mcmc.get_samples()["z"])
    spent, mean = time.perf_counter() - began, z[:, 1].mean()
    print(f"-> {spent:.0f} s. The number that was not observed is {mean:.2f} +- {z[:, 1].std():.2f}.\n")
    if folder is not None:
        from numpyro_maf import plots

        prior = {"z": np.asarray(flow().sample(jax.random.key(3), (2000,)))}
        plots.pairs(mcmc, prior=prior, zoom=False, title="prior and posterior", path=folder / "prior.png")


def _posterior(folder: Path | None, quick: bool) -> None:
    """A neural posterior of a throw."""
    count = 300 if quick else 5000
    print(f"""# 3. The posterior of a simulator, for any observation
def throw(key, speed, angle):
    return speed**2 * jnp.sin(2 * angle) / 9.81 + 0.1 * jax.random.normal(key)
def model(x=None):
    speed = numpyro.sample("speed", dist.LogNormal(1.5, 0.3))
    angle = numpyro.sample("angle", dist.Uniform(0.2, 1.3))
    numpyro.sample("x", nm.Simulator(throw, speed, angle), obs=x)
sims = nm.simulate(0, model, {count})
posterior = nm.npe(1, model, sims)
draws = posterior({{"x": 2.0}}).sample(2, (4000,))""")

    def throw(key, speed, angle):
        return speed**2 * jnp.sin(2 * angle) / 9.81 + 0.1 * jax.random.normal(key)

    def model(x=None):
        speed = numpyro.sample("speed", dist.LogNormal(1.5, 0.3))
        angle = numpyro.sample("angle", dist.Uniform(0.2, 1.3))
        numpyro.sample("x", Simulator(throw, speed, angle), obs=x)

    began = time.perf_counter()
    options: dict[str, Any] = {}
    if quick:
        options = dict(builder=partial(nsf, transforms=1, hidden=(16,)), max_epochs=3)
    sims = simulate(0, model, count, progress=False)
    posterior = npe(1, model, sims, progress=False, **options)
    draws = {name: np.asarray(value) for name, value in posterior({"x": 2.0}).sample(2, (4000,)).items()}
    spent = time.perf_counter() - began
    r = np.corrcoef(draws["speed"], np.sin(2 * draws["angle"]))[0, 1]
    mean, sd = draws["speed"].mean(), draws["speed"].std()
    print(f"-> {spent:.0f} s. Speed {mean:.2f} +- {sd:.2f}; its correlation with sin(2 angle) is {r:.2f}.\n")
    if folder is not None:
        from numpyro_maf import plots

        prior = {name: sims[name] for name in draws}
        plots.pairs(
            draws, prior=prior, zoom=False, title="a throw that reached 2 m", path=folder / "posterior.png"
        )
