"""The ten tasks of the simulation-based inference benchmark (Lueckmann et al. 2021) as NumPyro models.

Five come with the benchmark's observations and reference draws, in files; for the others what is not in these
is drawn here, the reference from the exact posterior.
"""

from functools import partial
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import random
from numpyro.infer import Predictive
from numpyro.infer.util import log_density
from scipy.stats import truncnorm

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
    theta = numpyro.sample("theta", dist.Uniform(-3, 3).expand([5]).to_event(1))
    numpyro.sample("x", Simulator(slcp_points, theta, event_shape=(8,)), obs=x)


def slcp_points(key, theta):
    s1, s2, rho = theta[2] ** 2, theta[3] ** 2, jnp.tanh(theta[4])
    e1, e2 = random.normal(key, (2, 4))
    first, second = s1 * e1, s2 * (rho * e1 + jnp.sqrt(1 - rho**2) * e2)
    return (theta[:2] + jnp.stack([first, second], -1)).ravel()


def gaussian_linear(x=None):
    def noisy(key, theta):
        return theta + jnp.sqrt(0.1) * random.normal(key, theta.shape)

    theta = numpyro.sample("theta", dist.Normal(0, jnp.sqrt(0.1)).expand([10]).to_event(1))
    numpyro.sample("x", Simulator(noisy, theta, event_shape=(10,)), obs=x)


def gaussian_linear_uniform(x=None):
    def noisy(key, theta):
        return theta + jnp.sqrt(0.1) * random.normal(key, theta.shape)

    theta = numpyro.sample("theta", dist.Uniform(-1, 1).expand([10]).to_event(1))
    numpyro.sample("x", Simulator(noisy, theta, event_shape=(10,)), obs=x)


def gaussian_mixture(x=None):
    def noisy(key, theta):
        which, noise = random.split(key)
        scale = jnp.where(random.bernoulli(which), 1.0, 0.1)
        return theta + scale * random.normal(noise, theta.shape)

    theta = numpyro.sample("theta", dist.Uniform(-10, 10).expand([2]).to_event(1))
    numpyro.sample("x", Simulator(noisy, theta, event_shape=(2,)), obs=x)


def slcp_distractors(x=None):
    """SLCP's eight numbers hidden among 92 of a mixture of Student's t that tell nothing."""

    def points(key, theta):
        data, noise = random.split(key)
        return hidden(noise, slcp_points(data, theta))

    theta = numpyro.sample("theta", dist.Uniform(-3, 3).expand([5]).to_event(1))
    numpyro.sample("x", Simulator(points, theta, event_shape=(100,)), obs=x)


def hidden(key, data):
    rng = np.random.default_rng(42)
    locs = 15 * rng.normal(size=(20, 92))
    factors = np.tril(rng.normal(size=(20, 92, 92))) + np.eye(92) * np.exp(rng.normal(size=(20, 1, 92)))
    order = rng.permutation(100)
    which, normal, chi2 = random.split(key, 3)
    i = random.randint(which, (), 0, 20)
    t = random.normal(normal, (92,)) / jnp.sqrt(random.exponential(chi2))  # two degrees of freedom
    noise = jnp.asarray(locs)[i] + 3 * jnp.asarray(factors)[i] @ t
    return jnp.concatenate([data, noise])[order]


def bernoulli_glm(x=None, *, design, raw=False):
    design = np.asarray(design)

    def spikes(key, theta):
        y = random.bernoulli(key, jax.nn.sigmoid(design @ theta)).astype(float)
        return y if raw else y @ design

    size = 9
    difference = np.eye(size) - np.eye(size, k=-1)
    factor = difference @ difference + np.diag(np.sqrt(np.arange(size) / size))
    precision = np.zeros((10, 10))
    precision[0, 0], precision[1:, 1:] = 0.5, factor.T @ factor
    prior = dist.MultivariateNormal(jnp.zeros(10), precision_matrix=jnp.array(precision))
    shape = (len(design) if raw else 10,)
    numpyro.sample("x", Simulator(spikes, numpyro.sample("theta", prior), event_shape=shape), obs=x)


def sir(x=None):
    """Infected among a thousand tested, every 17 days."""

    def slope(t, state, theta):
        susceptible, infected = jnp.exp(state)  # shares
        return jnp.stack([-theta[0] * infected, theta[0] * susceptible - theta[1]])

    theta = numpyro.sample(
        "theta", dist.LogNormal(jnp.log(jnp.array([0.4, 0.125])), jnp.array([0.5, 0.2])).to_event(1)
    )
    path = diffrax.diffeqsolve(
        diffrax.ODETerm(slope), diffrax.Tsit5(), 0.0, 153.0, 0.1, jnp.array([-1e-6, np.log(1e-6)]), theta,
        saveat=diffrax.SaveAt(ts=jnp.arange(0.0, 154, 17)), max_steps=2**12,
        stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-5), throw=False,
    ).ys  # fmt: skip
    tested = dist.Binomial(1000, probs=jnp.exp(jnp.minimum(path[:, 1], 0.0)))
    numpyro.sample("x", tested.to_event(1), obs=x)


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
    """A task's model, observations ``(10, ...)`` and reference draws ``(10, 10000, D)``."""
    source = {"slcp_distractors": "slcp", "bernoulli_glm_raw": "bernoulli_glm"}.get(name, name)
    if source in EXACT:
        model = globals()[name]
        seen = Predictive(model, num_samples=10)(random.key(2021))["x"]
        rng = np.random.default_rng(0)
        return model, np.asarray(seen), np.stack([EXACT[name](rng, x) for x in np.asarray(seen)])
    file = np.load(Path(folder) / f"{source}.npz")
    seen, reference = file["observations"], file["reference_posterior"]
    if source == "bernoulli_glm":
        raw = name != source
        model = partial(bernoulli_glm, design=file["design_matrix"], raw=raw)
        return model, file["observations_raw"] if raw else seen, reference
    if name == "slcp_distractors":
        seen = np.asarray(jax.vmap(hidden)(random.split(random.key(2021), 10), jnp.asarray(seen)))
    return globals()[name], seen, reference


def exact_linear_uniform(rng, x):
    """Independent normals about x, each cut to the prior's box."""
    return truncnorm.rvs((-1 - x) / 0.1**0.5, (1 - x) / 0.1**0.5, x, 0.1**0.5, (10_000, 10), random_state=rng)


def exact_mixture(rng, x):
    """Two normals about x, those draws that lie in the prior's box."""
    scale = np.where(rng.random((100_000, 1)) < 0.5, 1.0, 0.1)
    draws = x + scale * rng.normal(size=(100_000, 2))
    return draws[(np.abs(draws) < 10).all(1)][:10_000]


def exact_sir(rng, x):
    """From a grid over the logarithms, narrowed to where the density is until that fills it."""
    log_joint = jax.jit(
        jax.vmap(lambda z: log_density(sir, (x,), {}, {"theta": jnp.exp(z)})[0] + z.sum())
    )  # fmt: skip
    center, prior = np.log([0.4, 0.125]), np.array([0.5, 0.2])
    low, high = center - 5 * prior, center + 5 * prior
    for _ in range(8):
        axes = [np.linspace(a, b, 200) for a, b in zip(low, high)]
        grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
        logs = np.nan_to_num(np.asarray(log_joint(jnp.asarray(grid)), np.float64), nan=-np.inf)
        there, cell = grid[logs > logs.max() - 18], (high - low) / 199
        low, high = there.min(0) - 2 * cell, there.max(0) + 2 * cell
    weights = np.exp(logs - logs.max())
    chosen = rng.choice(len(grid), 10_000, p=weights / weights.sum())
    return np.exp(grid[chosen] + cell * (rng.random((10_000, 2)) - 0.5))


EXACT = dict(gaussian_linear_uniform=exact_linear_uniform, gaussian_mixture=exact_mixture, sir=exact_sir)


def vector(draws, name: str) -> np.ndarray:
    """Draws by site as the columns of the reference draws."""
    return np.stack([draws[k] for k in COLUMNS[name]], -1) if name in COLUMNS else np.asarray(draws["theta"])
