# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

r"""What is a person at home doing? A hidden Markov chain with flow emissions, and honest probabilities.

    python -m numpyro_maf.examples.smart_home                    # a simulated flat, seven activities
    python -m numpyro_maf.examples.smart_home --data DIR         # the UCI Occupancy Detection files

Once a minute the sensors give features ``x`` (slopes of slow sensors, levels of fast ones). The activity
``z`` is a Markov chain whose transitions follow the time of day, and a conditional flow says how the
features are spread in each activity:

.. math::

    p(z_t | z_{t-1}) = (1 - r_{z_{t-1}})\,[z_t = z_{t-1}] + r_{z_{t-1}}\, s_t(z_t), \qquad
    x_t | z_t \sim \mathrm{flow}(z_t, \mathrm{hour}_t)^{\,b}

- *schedule* :math:`s_t`, the probability of each activity by hour and weekend: a softmax of harmonics.
- *emission*: an ensemble of flows, each trained on random half of the minutes seen.
- *pace* r, how often one thinks again; and *temper* b. Minutes near each other repeat each other's news, and
  a chain that multiplies them as if they were independent is sure of itself and wrong. Both are learned from
  days that the emission has not seen, by how well the smoothed posterior predicts each of their minutes.
- *doubt*, learned with them: the chance that a minute's sensors say nothing about the activity.

Schedule, pace, temper, doubt and the flows' weights are sites of NumPyro models, learned by SVI.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO, init_to_value
from numpyro.infer.autoguide import AutoDelta

import numpyro_maf as nm
from numpyro_maf._arviz import import_arviz
from numpyro_maf.datasets import SensorData, load_occupancy, simulate_flat
from numpyro_maf.diagnostics import classification_scores

# Features -----------------------------------------------------------------------------------------

WINDOW = 15  # minutes to either side over which a slope is taken
SLOW = {"temperature": 0.01, "humidity": 0.02, "co2": 2.0}  # typical slopes, units per minute
FAST = {"light": 100.0, "motion": 1.0, "power": 100.0}  # typical levels
HARMONICS = 4


def slope(series, window: int):
    """Least-squares slope over ``2 * window + 1`` samples, fewer at both ends, ``(T,) -> (T,)``."""
    n = len(series)
    at = np.arange(n)
    low = np.minimum(np.maximum(at - window, 0), max(n - 3, 0))
    high = np.maximum(np.minimum(at + window, n - 1), min(2, n - 1))

    def total(values):
        sums = np.concatenate([[0.0], np.cumsum(values)])
        return sums[high + 1] - sums[low]

    t, y = at - n / 2, series - series.mean()
    count = high - low + 1.0
    spread = count * total(t * t) - total(t) ** 2
    return (count * total(t * y) - total(t) * total(y)) / spread


def features_of(data: SensorData) -> np.ndarray:
    """``(T, F)``: asinh of the slopes of slow sensors and of the levels of fast ones.

    Levels of temperature, humidity and CO2 shift from one week, or one open door, to the next; how they
    change when somebody comes or cooks does not.
    """
    columns = []
    for name, values in zip(data.names, data.values.T):
        if name in SLOW:
            columns.append(np.arcsinh(slope(values, WINDOW) / SLOW[name]))
        elif name in FAST:
            columns.append(np.arcsinh(values / FAST[name]))
    return np.stack(columns, -1).astype(np.float32)


def time_basis(data: SensorData) -> np.ndarray:
    """``(T, 2 * HARMONICS + 2)``: one, sines and cosines of the hour, weekend."""
    angle = 2 * np.pi * data.hour[:, None] * np.arange(1, HARMONICS + 1) / 24
    weekend = (data.weekday >= 5)[:, None]
    one = np.ones_like(weekend)
    return np.concatenate([one, np.sin(angle), np.cos(angle), weekend], -1).astype(np.float32)


def emission_context(activity, basis, states: int, hourly: bool):
    """One-hot activity, ``(..., K)``, with the first sine and cosine of the hour if ``hourly``."""
    hour = basis[..., np.array([1, 1 + HARMONICS])] if hourly else basis[..., :0]
    return jnp.concatenate([jax.nn.one_hot(activity, states), hour], -1)


# The model ----------------------------------------------------------------------------------------


def schedule_model(basis, activity, seen, states):
    """Time of day to activity, once for each member of the ensemble.

    :param basis: ``(T, H)``.
    :param activity: ``(T,)``.
    :param seen: ``(M, T)``, which minutes a member learns from.
    """
    scale = jnp.ones(basis.shape[-1]).at[0].set(10.0)
    prior = dist.Normal(0, scale).expand([states, len(scale)]).to_event(2)
    with numpyro.plate("members", len(seen)):
        weights = numpyro.sample("schedule", prior)
    logits = jnp.einsum("mkh,th->mtk", weights, basis)
    minutes = numpyro.plate("minutes", len(basis), dim=-1)
    with numpyro.plate("learners", len(seen), dim=-2), minutes, handlers.mask(mask=seen):
        numpyro.sample("activity", dist.Categorical(logits=logits), obs=activity)


def emission_model(features, context, seen, balance, flows, noise, batch_size):
    """Activity and hour to features: an ensemble of conditional flows.

    Noise on the features regularises the density (Rothfuss et al. 2019, arXiv:1907.08982).

    :param features: ``(T, F)``.
    :param context: ``(T, C)``.
    :param seen: ``(M, T)``.
    :param balance: ``(T,)``, weights that make activities count alike.
    :param flows: a function of a key that gives an ensemble of M flows.
    """
    flows = nm.flow_module("emission", flows)
    minutes = numpyro.plate("minutes", len(features), subsample_size=batch_size, dim=-1)
    with numpyro.plate("members", len(seen), dim=-2), minutes as rows:
        x, spread = features[rows], flows.event_scale.scale[0]
        x = x + noise * spread * jax.random.normal(numpyro.prng_key(), x.shape)
        d = flows.members(context[rows])
        with handlers.scale(scale=balance[rows]), handlers.mask(mask=seen[:, rows]):
            numpyro.sample("features", d, obs=jnp.broadcast_to(x, (len(seen), *x.shape)))


def chain_sites(states):
    """The sites of the chain: pace ``(K,)``, temper and doubt."""
    pace = numpyro.sample("pace", dist.Beta(1.0, 9.0).expand([states]).to_event(1))
    temper = numpyro.sample("temper", dist.Beta(1.0, 9.0))
    doubt = numpyro.sample("doubt", dist.Beta(1.0, 9.0))
    return pace, temper, doubt


def activity_chain(pace, temper, doubt, schedule, log_density) -> nm.HMM:
    """The chain over activities given the emission's log-densities; leading axes broadcast.

    :param pace: ``(..., K)``.
    :param temper: ``(...)``, like ``doubt``.
    :param schedule: ``(..., T, K)`` probabilities.
    :param log_density: ``(..., T, K)``.
    """
    pace, temper, doubt = (
        jnp.asarray(pace)[..., None, :, None],
        *(jnp.asarray(a)[..., None, None] for a in (temper, doubt)),
    )
    transition = (1 - pace) * jnp.eye(pace.shape[-2]) + pace * schedule[..., 1:, None, :]
    anybody = jax.nn.logsumexp(log_density + jnp.log(schedule), -1, keepdims=True)
    log_density = jnp.logaddexp(jnp.log1p(-doubt) + log_density, jnp.log(doubt) + anybody)
    return nm.HMM(schedule[..., 0, :], transition, temper * log_density)


def calibration_model(schedule, log_density, activity, starts):
    """Judge chains by what their posteriors say of each minute, all emissions and starts at once.

    :param schedule: ``(n, T, K)``, stretches of T minutes.
    :param log_density: ``(E, n, T, K)``, by emission.
    :param activity: ``(n, T)``, -1 where unknown.
    :param starts: how many places the optimiser starts from.
    """
    emissions = len(log_density)
    with numpyro.plate("emissions", emissions, dim=-2), numpyro.plate("starts", starts, dim=-1):
        sites = chain_sites(schedule.shape[-1])
        pace, temper, doubt = (site[:, :, None] for site in sites)
        marginals = activity_chain(pace, temper, doubt, schedule, log_density[:, None]).marginals
        known = jnp.broadcast_to(jnp.maximum(activity, 0)[..., None], (*marginals.shape[:-1], 1))
        p = jnp.take_along_axis(marginals, known, -1)[..., 0]
        score = jnp.where(activity < 0, 0.0, jnp.log(jnp.maximum(p, 1e-12))).sum((-1, -2))
        numpyro.factor("minutes", score)
        numpyro.deterministic("score", score)


# Learning -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How a home is learned; chosen on training days only."""

    members: int = 5  # of the ensemble, for each set of days seen
    folds: int = 2  # sets of consecutive training days, held out in turn to calibrate the chain
    hourly: bool = True  # whether the emission sees the hour; needs more than a few days
    noise: float = 0.5  # in standard deviations of the features
    steps: int = 800
    batch_size: int = 512
    transforms: int = 3
    hidden: tuple[int, ...] = (16,)
    scalar: nm.Scalar = nm.Affine()
    stretch: int = 360  # minutes the chain is calibrated over


# Where calibration starts: its objective has a valley for long memory and one for none.
STARTS = {"pace": (0.1, 0.9), "temper": (0.05, 0.7), "doubt": (0.01, 0.1)}

Table = Callable[[Any, Any], Any]  # features (T, F), basis (T, H) -> log-densities (M, T, K)


def optimise(key, model, steps, rate, *args, guide=None, progress=False, label=""):
    """Maximum a posteriori, or likelihood, by SVI: the values of all sites and parameters."""
    guide = AutoDelta(model) if guide is None else guide
    decay = optax.cosine_decay_schedule(rate, steps)
    svi = SVI(model, guide, numpyro.optim.optax_to_numpyro(optax.adam(decay)), Trace_ELBO())
    if progress:
        print(f"  {label}", file=sys.stderr)
    params = svi.run(key, steps, *args, progress_bar=progress).params
    return {**params, **guide.median(params)} if isinstance(guide, AutoDelta) else params


def flow_emission(key, x, basis, activity, seen, states, settings, progress) -> Table:
    """Train an ensemble of flows, all members at once."""
    shares = np.bincount(activity, minlength=states) / len(activity)
    balance = 1 / (states * np.maximum(shares, 1e-6))[activity]
    spread = nm.Standardize(jnp.asarray(x.mean(0)), jnp.asarray(x.std(0) + 1e-6))
    context = partial(emission_context, states=states, hourly=settings.hourly)
    width = context(activity[:1], basis[:1]).shape[-1]

    def one(key):
        flow = nm.maf(
            key, x.shape[-1], context=width, transforms=settings.transforms,
            hidden=settings.hidden, scalar=settings.scalar,
        )  # fmt: skip
        return replace(flow, event_scale=spread)

    def init(key):
        return nm.Ensemble.init(key, one, len(seen))

    params = optimise(
        key, emission_model, settings.steps, 5e-3, jnp.asarray(x), context(activity, basis),
        jnp.asarray(seen), jnp.asarray(balance), init, settings.noise, settings.batch_size,
        guide=lambda *args: None, progress=progress, label="emission: an ensemble of flows",
    )  # fmt: skip
    flows = init(key).with_weights(params["emission$params"])

    @jax.jit
    def table(x, basis):
        each = [context(jnp.full(len(x), k), basis) for k in range(states)]
        return flows.map(lambda flow: flow(jnp.stack(each, 1)).log_prob(x[:, None]))

    return table


def gaussian_emission(x, activity, seen, states, diagonal) -> Table:
    """A Gaussian for each activity, fitted in closed form to each member's minutes."""
    pooled = np.atleast_2d(np.cov(x.T))

    def fit(rows):
        enough = len(rows) > x.shape[-1]  # an activity that a member has hardly seen is spread out
        covariance = np.atleast_2d(np.cov(rows.T)) if enough else pooled
        covariance = np.diag(np.diag(covariance)) if diagonal else covariance
        mean = rows.mean(0) if enough else x.mean(0)
        return mean, covariance + 1e-4 * np.diag(np.diag(pooled))

    fits = [[fit(x[s & (activity == k)]) for k in range(states)] for s in seen]
    means, covariances = (jnp.array([[f[i] for f in row] for row in fits]) for i in (0, 1))
    d = dist.MultivariateNormal(means, covariances)
    return jax.jit(lambda x, basis: d.log_prob(x[:, None, None]).transpose(1, 0, 2))


@dataclass(frozen=True)
class Home:
    """What was learned of a home with one kind of emission."""

    weights: Any  # (M, K, H), the schedule's, of the members that saw all days
    members: slice  # these members in the table
    emission: Table
    chain: dict[str, Any]  # pace, temper, doubt
    held_out: np.ndarray  # (T, K), training minutes' posterior by members that did not see the day

    def schedule(self, basis):
        """``(T, K)``: the probability of each activity by time of day."""
        return _schedule(self.weights, basis)

    def table(self, x, basis):
        """``(T, K)``: log-density of the features in each activity, the members' mixture."""
        return _mixture(self.emission(x, basis)[self.members])

    def posterior(self, x, basis) -> nm.HMM:
        """The chain given the features: its marginals, most probable path and samples."""
        return activity_chain(**self.chain, schedule=self.schedule(basis), log_density=self.table(x, basis))

    def log_density(self, x, basis):
        """``(T,)``: log p(features | time) of each minute by itself."""
        joint = jnp.log(self.schedule(basis)) + self.table(x, basis)
        return jax.nn.logsumexp(joint, axis=-1)


def _schedule(weights, basis):
    return jax.nn.softmax(jnp.einsum("mkh,th->mtk", weights, basis)).mean(0)


def _mixture(tables):
    return jax.nn.logsumexp(jnp.asarray(tables), axis=0) - np.log(len(tables))


def learn(key, data: SensorData, settings: Settings, progress: bool = True) -> dict[str, Home]:
    """Learn a home with flow and with Gaussian emissions, alike but for the emission."""
    x, basis, activity = features_of(data), time_basis(data), data.activity
    states, count, folds = len(data.activities), settings.members, settings.folds
    keys = jax.random.split(key, 3)
    # Consecutive days make a fold. Each fold is held out by some members; the last see all days.
    day = data.time.astype("datetime64[D]").astype(int)
    fold = (day - day[0]) * folds // (day[-1] - day[0] + 1)
    held_out = np.repeat(np.arange(folds + 1), count)
    half = np.random.default_rng(0).random((len(held_out), len(x))) < 0.5
    seen = (fold != held_out[:, None]) & half
    groups = [slice(f * count, (f + 1) * count) for f in range(folds + 1)]

    weights = optimise(
        keys[0], schedule_model, 600, 0.05, basis, activity, seen, states,
        progress=progress, label="schedule: activity by time of day",
    )["schedule"]  # fmt: skip
    emissions = {
        "flow": flow_emission(keys[1], x, basis, activity, seen, states, settings, progress),
        "gaussian_diagonal": gaussian_emission(x, activity, seen, states, True),
        "gaussian_full": gaussian_emission(x, activity, seen, states, False),
    }

    # Each minute's schedule and table come from the members that have not seen its day.
    def unseen(by_fold):
        return np.asarray(jnp.stack(list(by_fold)))[fold, np.arange(len(fold))]

    schedule = unseen(_schedule(weights[g], basis) for g in groups[:folds])
    tables = [emission(x, basis) for emission in emissions.values()]
    table = np.stack([unseen(_mixture(t[g]) for g in groups[:folds]) for t in tables])
    starts = {
        name: jnp.broadcast_to(jnp.array(values), (len(emissions), len(values)))
        for name, values in STARTS.items()
    }
    starts["pace"] = jnp.repeat(starts["pace"][..., None], states, -1)
    stretches = (
        _stretches(schedule, settings.stretch, 1 / states),
        jnp.stack([_stretches(t, settings.stretch, 0.0) for t in table]),
        _stretches(activity, settings.stretch, -1),
        len(STARTS["pace"]),
    )
    guide = AutoDelta(calibration_model, init_loc_fn=init_to_value(values=starts))
    sites = optimise(
        keys[2], calibration_model, 100, 0.1, *stretches, guide=guide,
        progress=progress, label="chain: pace, temper and doubt, on days not seen",
    )  # fmt: skip
    sites = {name: sites[name] for name in STARTS}
    judged = handlers.trace(handlers.substitute(calibration_model, data=sites))
    best = judged.get_trace(*stretches)["score"]["value"].argmax(-1)
    homes = {}
    for i, (name, emission) in enumerate(emissions.items()):
        chain = {site: value[i, best[i]] for site, value in sites.items()}
        posterior = activity_chain(**chain, schedule=schedule, log_density=table[i])
        homes[name] = Home(weights[groups[-1]], groups[-1], emission, chain, np.asarray(posterior.marginals))
    return homes


def _stretches(array, length, filler):
    """``(T, ...)`` as ``(n, length, ...)``, filled up at the end."""
    missing = -len(array) % length
    end = np.full((missing, *array.shape[1:]), filler, array.dtype)
    return jnp.asarray(np.concatenate([array, end]).reshape(-1, length, *array.shape[1:]))


# Baselines and report -----------------------------------------------------------------------------


def linear_baselines(x, basis, activity):
    """scikit-learn's LDA and logistic regression on the flow's features and the time of day.

    :return: by name, a pair of functions of features and basis: probabilities ``(T, K)``, and LDA's
        log p(features | time) ``(T,)``; logistic regression has no density of the features.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def join(x, basis):
        return np.concatenate([x, basis[:, 1:]], -1).astype(np.float64)

    inputs = join(x, basis)
    lda = LinearDiscriminantAnalysis(store_covariance=True).fit(inputs, activity)
    logistic = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    logistic.fit(inputs, activity)
    width = x.shape[-1]

    def log_mixture(inputs, columns):
        d = dist.MultivariateNormal(lda.means_[:, columns], lda.covariance_[columns, columns])
        return jax.nn.logsumexp(d.log_prob(inputs[:, None, columns]) + np.log(lda.priors_), -1)

    def lda_log_density(x, basis):
        inputs = join(x, basis)
        return log_mixture(inputs, slice(None)) - log_mixture(inputs, slice(width, None))

    return {
        "lda": (lambda *a: lda.predict_proba(join(*a)), lda_log_density),
        "logistic": (lambda *a: logistic.predict_proba(join(*a)), None),
    }


def score_all(homes, baselines, data: SensorData) -> dict[str, dict[str, float | None]]:
    """Scores of every method on data it has not seen."""
    x, basis = features_of(data), time_basis(data)
    methods = {
        name: (lambda *a, home=home: home.posterior(*a).marginals, home.log_density)
        for name, home in homes.items()
    } | baselines
    scores: dict[str, dict[str, float | None]] = {}
    for name, (probabilities, log_density) in methods.items():
        scores[name] = dict(classification_scores(probabilities(x, basis), data.activity))
        density = None if log_density is None else float(np.mean(log_density(x, basis)))
        scores[name]["log_density"] = density
    return scores


def print_table(title: str, scores) -> None:
    """The scores of one test set as lines of text."""
    print(f"\n{title}")
    print(f"  {'':18s}{'log density':>12s}{'accuracy':>10s}{'log-loss':>10s}{'ECE':>8s}")
    for name, s in scores.items():
        density = "-" if s["log_density"] is None else f"{s['log_density']:.3f}"
        numbers = f"{s['accuracy']:10.3f}{s['log_loss']:10.3f}{s['ece']:8.3f}"
        print(f"  {name:18s}{density:>12s}{numbers}")


def choose_evening(data: SensorData, marginals) -> np.datetime64:
    """The day whose evening is the hardest to tell: the most probability off the best guess."""
    evening = data.hour >= EVENING
    doubt = np.where(evening, 1 - np.asarray(marginals).max(-1), 0.0)
    if "washing up" in data.activities:
        cooking, washing = (data.activities.index(a) for a in ("cooking", "washing up"))
        doubt = np.where(evening, np.minimum(marginals[:, cooking], marginals[:, washing]), 0.0)
    days, day = np.unique(data.time.astype("datetime64[D]"), return_inverse=True)
    return days[np.bincount(day, doubt).argmax()]


def save_posterior(path: Path, key, data: SensorData, hmm: nm.HMM, draws: int = 200) -> None:
    """Paths from the posterior with the sensors' readings, as ArviZ netCDF."""
    arviz = import_arviz()
    paths = np.asarray(hmm.sample(key, (draws,)), np.int8)[None]
    groups: dict[str, Any] = {
        "posterior": {"activity": paths},
        "observed_data": {"sensors": data.values, "true_activity": data.activity},
        "constant_data": {"probability": np.asarray(hmm.marginals)},
    }
    dims = {
        "activity": ["time"], "sensors": ["time", "sensor"], "true_activity": ["time"],
        "probability": ["time", "state"],
    }  # fmt: skip
    coords = {
        "time": data.time.astype("datetime64[ns]"), "sensor": list(data.names),
        "state": list(data.activities),
    }  # fmt: skip
    # ArviZ 1.x takes the groups in one dictionary, earlier ones as keywords.
    if int(arviz.__version__.split(".")[0]) >= 1:
        tree = arviz.from_dict(groups, dims=dims, coords=coords)
    else:
        tree = arviz.from_dict(**groups, dims=dims, coords=coords)
    tree.to_netcdf(str(path))


# The two homes -------------------------------------------------------------------------------------

EVENING = 16  # o'clock
OCCUPANCY = Settings(hourly=False)  # five weekdays are too few to learn the hour
FLAT = Settings(noise=0.1, members=2, hidden=(32, 32), steps=1500, scalar=nm.RQSpline())


def run_case(title, name, train, tests, settings, seed, evening, out, picture, progress):
    """Learn from ``train``, report on ``tests``; the metrics by test set."""
    from numpyro_maf.plots import activity_timeline

    print(f"\n{title}: learning from {len(train.time)} minutes", flush=True)
    key = jax.random.key(seed)
    homes = learn(key, train, settings, progress)
    baselines = linear_baselines(features_of(train), time_basis(train), train.activity)
    flow, metrics = homes["flow"], {}
    chain = {site: np.round(np.asarray(value, float), 3).tolist() for site, value in flow.chain.items()}
    print(f"chain learned on held-out days: {chain}")
    for test, data in tests.items():
        metrics[test] = score_all(homes, baselines, data)
        print_table(f"{title}, {test} ({len(data.time)} minutes)", metrics[test])
        hmm = flow.posterior(features_of(data), time_basis(data))
        marginals = np.asarray(hmm.marginals)
        day = choose_evening(data, marginals) if evening is None else np.datetime64(evening)
        rows = (data.time.astype("datetime64[D]") == day) & (data.hour >= EVENING)
        if not rows.any():
            raise SystemExit(f"no evening of {day} in {test}: it has {data.time[0]} to {data.time[-1]}")
        path = picture / f"{name}_{test}.png"
        activity_timeline(data.rows(rows), marginals[rows], path=path, title=f"{title}, {test}, {day}")
        print(f"  picture: {path}")
        if out is not None:
            save_posterior(out / f"{name}_{test}.nc", key, data, hmm)
    return metrics


def main(argv=None) -> dict:
    """The command line; the metrics as they go to ``metrics.json``."""
    parser = argparse.ArgumentParser(
        prog="python -m numpyro_maf.examples.smart_home",
        description="What is a person at home doing? A hidden Markov chain with flow emissions.",
    )
    parser.add_argument("--data", type=Path, help="folder of the UCI Occupancy Detection files")
    parser.add_argument("--out", type=Path, help="folder for pictures, netCDF and metrics.json")
    parser.add_argument("--evening", help="date of the evening in the picture, YYYY-MM-DD")
    parser.add_argument("--days", type=int, default=14, help="training days of the simulated flat")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    missing = [name for name in ("matplotlib", "sklearn", "h5netcdf", "h5py") if find_spec(name) is None]
    if missing:
        raise SystemExit(f"the example needs {', '.join(missing)}: pip install 'numpyro_maf[examples]'")
    began = time.perf_counter()
    picture = Path() if args.out is None else args.out
    picture.mkdir(parents=True, exist_ok=True)
    case = partial(
        run_case, seed=args.seed, evening=args.evening, out=args.out, picture=picture,
        progress=not args.quiet,
    )  # fmt: skip
    if args.data is None:
        train = simulate_flat(args.days, seed=args.seed)
        test = simulate_flat(7, seed=args.seed + 1, start="2024-01-29")
        metrics = {"simulated": case("simulated flat", "flat", train, {"test": test}, FLAT)}
    else:
        files = load_occupancy(args.data)
        metrics = {}
        slow = ("temperature", "humidity", "co2")
        for name, sensors in {"without_light": slow, "with_light": (*slow, "light")}.items():
            chosen = {stem: data.select(sensors) for stem, data in files.items()}
            train = chosen.pop("datatraining")
            metrics[name] = case(f"office {name.replace('_', ' ')}", name, train, chosen, OCCUPANCY)
    if args.out is not None:
        (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(f"\n{time.perf_counter() - began:.0f} s")
    return metrics


if __name__ == "__main__":
    main()
