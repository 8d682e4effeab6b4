"""Five tasks of the simulation-based inference benchmark (Lueckmann et al. 2021) as NumPyro models."""

from functools import partial
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import random

from numpyro_maf import Simulator

COLUMNS = {"lotka_volterra": ("alpha", "beta", "gamma", "delta")}


def two_moons(x=None):
    def moons(key, theta):
        angle, radius = random.split(key)
        a = random.uniform(angle, minval=-jnp.pi / 2, maxval=jnp.pi / 2)
        r = 0.1 + 0.01 * random.normal(radius)
        shift = jnp.stack([-jnp.abs(theta[0] + theta[1]), theta[1] - theta[0]]) / jnp.sqrt(2.0)
        return jnp.stack([r * jnp.cos(a) + 0.25, r * jnp.sin(a)]) + shift

    theta = numpyro.sample("theta", dist.Uniform(-1, 1).expand([2]).to_event(1))
    numpyro.sample("x", Simulator(moons, theta, event_shape=(2,)), obs=x)


def slcp(x=None):
    def points(key, theta):
        s1, s2, rho = theta[2] ** 2, theta[3] ** 2, jnp.tanh(theta[4])
        e1, e2 = random.normal(key, (2, 4))
        first, second = s1 * e1, s2 * (rho * e1 + jnp.sqrt(1 - rho**2) * e2)
        return (theta[:2] + jnp.stack([first, second], -1)).ravel()

    theta = numpyro.sample("theta", dist.Uniform(-3, 3).expand([5]).to_event(1))
    numpyro.sample("x", Simulator(points, theta, event_shape=(8,)), obs=x)


def gaussian_linear(x=None):
    def noisy(key, theta):
        return theta + jnp.sqrt(0.1) * random.normal(key, theta.shape)

    theta = numpyro.sample("theta", dist.Normal(0, jnp.sqrt(0.1)).expand([10]).to_event(1))
    numpyro.sample("x", Simulator(noisy, theta, event_shape=(10,)), obs=x)


def bernoulli_glm(x=None, *, design):
    design = np.asarray(design)

    def spikes(key, theta):
        y = random.bernoulli(key, jax.nn.sigmoid(design @ theta))
        return y.astype(float) @ design

    size = 9
    difference = np.eye(size) - np.eye(size, k=-1)
    factor = difference @ difference + np.diag(np.sqrt(np.arange(size) / size))
    precision = np.zeros((10, 10))
    precision[0, 0], precision[1:, 1:] = 0.5, factor.T @ factor
    prior = dist.MultivariateNormal(jnp.zeros(10), precision_matrix=jnp.array(precision))
    numpyro.sample("x", Simulator(spikes, numpyro.sample("theta", prior), event_shape=(10,)), obs=x)


def lotka_volterra(x=None):
    loc = {"alpha": -0.125, "beta": -3.0, "gamma": -0.125, "delta": -3.0}
    theta = [numpyro.sample(name, dist.LogNormal(loc[name], 0.5)) for name in COLUMNS["lotka_volterra"]]

    def slope(t, state, theta):
        u, v = jnp.exp(state)
        return jnp.stack([theta[0] - theta[1] * v, theta[3] * u - theta[2]])

    # The logarithms of the populations, which stay positive.
    path = diffrax.diffeqsolve(
        diffrax.ODETerm(slope), diffrax.Tsit5(), 0.0, 18.9, 0.05, jnp.log(jnp.array([30.0, 1.0])),
        jnp.stack(theta), saveat=diffrax.SaveAt(ts=jnp.linspace(0, 18.9, 10)), max_steps=2**13,
        stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-5), throw=False,
    ).ys  # fmt: skip
    log_means = jnp.clip(path.T.ravel(), np.log(1e-10), np.log(1e4))
    numpyro.sample("x", dist.LogNormal(log_means, 0.1).to_event(1), obs=x)


def load(name: str, folder: Path):
    """A task's model and file: observations, reference draws, true parameters."""
    file = np.load(Path(folder) / f"{name}.npz")
    models = dict(
        two_moons=two_moons, slcp=slcp, gaussian_linear=gaussian_linear, lotka_volterra=lotka_volterra
    )
    if name == "bernoulli_glm":
        return partial(bernoulli_glm, design=file["design_matrix"]), file
    return models[name], file


def vector(draws, name: str) -> np.ndarray:
    """Draws by site as the columns of the reference draws."""
    return np.stack([draws[k] for k in COLUMNS[name]], -1) if name in COLUMNS else np.asarray(draws["theta"])
