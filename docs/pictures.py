"""Draw the pictures of the gallery and of the README: python docs/pictures.py [NAME ...]

Each function is shown beside its picture in docs/gallery.md.
"""

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS

import numpyro_maf as nm
from numpyro_maf import plots, sbi

matplotlib.use("agg")
FOLDER = Path(__file__).parent / "gallery"


def throw(key, speed, angle):
    """How far a ball flies, in the wind."""
    return speed**2 * jnp.sin(2 * angle) / 9.81 + 0.1 * jax.random.normal(key)


def thrown(x=None):
    speed = numpyro.sample("speed", dist.LogNormal(1.5, 0.3))
    angle = numpyro.sample("angle", dist.Uniform(0.2, 1.3))
    numpyro.sample("x", nm.Simulator(throw, speed, angle), obs=x)


def funnel(y=None):
    width = numpyro.sample("width", dist.LogNormal(0, 1))
    with numpyro.plate("rows", 3):
        effect = numpyro.sample("effect", dist.Normal(0, width))
        numpyro.sample("y", dist.Normal(effect, 0.5), obs=y)


def moons():
    """A flow of two half moons, fitted once."""
    if not hasattr(moons, "flow"):
        x = nm.datasets.two_moons(4000)
        start = nm.nsf(0, 2, transforms=4, hidden=(64, 64))
        moons.x, moons.result = x, nm.fit(1, start, x, learning_rate=3e-3, max_epochs=60, progress=False)
        moons.flow = moons.result.flow
    return moons.flow


def posterior():
    """A neural posterior of the throw, trained once."""
    if not hasattr(posterior, "it"):
        posterior.sims = nm.simulate(0, thrown, 5000, progress=False)
        posterior.it = nm.npe(1, thrown, posterior.sims, progress=False)
    return posterior.it


# Each of these is a picture -----------------------------------------------------------------------


def density():
    flow = moons()
    plots.density(flow, data=moons.x, path=FOLDER / "density.png")


def warp():
    plots.warp(moons(), path=FOLDER / "warp.png")


def losses():
    moons()
    plots.losses(moons.result, path=FOLDER / "losses.png")


def pairs():
    post = posterior()({"x": 2.0})
    prior = {name: posterior.sims[name] for name in ("speed", "angle")}
    plots.pairs(post.sample(2, (8000,)), prior=prior, zoom=False, path=FOLDER / "pairs.png")


def guide():
    y = np.array([1.0, -0.5, 0.2])
    run = nm.fit_guide(0, funnel, y, progress=False)
    mcmc = MCMC(NUTS(funnel), num_warmup=1000, num_samples=4000, progress_bar=False)
    mcmc.run(jax.random.key(1), y)
    plots.pairs(
        run.sample(2, (8000,)), reference=mcmc, names=["width", "effect[0]"], log=["width"],
        path=FOLDER / "guide.png",
    )  # fmt: skip


def calibration():
    fresh = nm.simulate(3, thrown, 500, progress=False)
    plots.calibration(sbi.calibrate(4, posterior(), fresh), path=FOLDER / "calibration.png")


def recovery():
    fresh = nm.simulate(5, thrown, 200, progress=False)
    draws = posterior()({"x": fresh["x"]}).sample(6, (500,))
    plots.recovery(draws, fresh, path=FOLDER / "recovery.png")


def predictive():
    def line(t, y=None):
        slope = numpyro.sample("slope", dist.Normal(0, 1))
        scale = numpyro.sample("scale", dist.HalfNormal(1))
        with numpyro.plate("times", len(t)):
            numpyro.sample("y", dist.Normal(slope * t, scale), obs=y)

    t = np.linspace(0, 4, 30)
    y = 0.8 * t + 0.3 * np.random.default_rng(0).normal(size=30)
    answer = nm.infer(0, line, {"y": y}, model_args=(t,), progress=False)
    prior = nm.simulate(1, line, 1000, t, progress=False)
    runs = answer.predictive(2)
    plots.predictive(runs, {"y": y}, prior=prior, coords={"y": t}, path=FOLDER / "predictive.png")


def overview():
    """The picture of the README: three uses of one object."""
    import matplotlib.pyplot as plt

    _, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.7), layout="constrained")
    plots.density(moons(), data=moons.x[:800], limits=[(-1.5, 2.5), (-1, 1.5)], axes=left)
    left.set_title("a learned prior: samples become a density")

    def banana(y=None):
        z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.sample("y", dist.Normal(z[1] - z[0] ** 2, 0.3), obs=y)

    run = nm.fit_guide(0, banana, 0.5, progress=False)
    drawn = np.asarray(run.sample(1, (3000,))["z"])
    x, y = np.meshgrid(np.linspace(-2.5, 2.5, 200), np.linspace(-2, 4, 200), indexing="ij")
    exact = np.exp(-(x**2 + y**2) / 2 - (0.5 - y + x**2) ** 2 / 0.18)
    middle.contour(x, y, exact, levels=exact.max() * np.array([0.03, 0.3, 0.8]), colors="k", linewidths=0.9)
    middle.scatter(*drawn.T, s=3, color=plots.palette(2)[0], lw=0, alpha=0.5)
    middle.set(xlim=(-2.5, 2.5), ylim=(-1.6, 3.5), xlabel="z[0]", ylabel="z[1]")
    middle.set_title("a guide: draws on the exact contours")
    post = posterior()({"x": 2.0})
    plots.density(post, axes=right)
    right.set_title("a neural posterior of a simulator")
    for axis in (middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    left.figure.savefig(FOLDER / "overview.png", dpi=130)
    plt.close(left.figure)


PICTURES = [overview, density, warp, losses, pairs, guide, calibration, recovery, predictive]

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for picture in PICTURES:
        if len(sys.argv) < 2 or picture.__name__ in sys.argv[1:]:
            began = time.perf_counter()
            picture()
            print(f"{picture.__name__}: {time.perf_counter() - began:.0f} s")
