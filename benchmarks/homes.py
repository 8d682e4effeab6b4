"""Real homes: activities from binary sensors, one day left out at a time, beside what others would do.

    python benchmarks/homes.py DATA/ordonez --homes A B --out FOLDER

The data (Ordonez, de Toledo & Sanchis 2013, Sensors 13, 5460-5477; UCI 271) are for non-commercial use and
are not part of this project. In 60-second slices; slices without a label are not scored. All methods see the
same days; the classifiers get, for each sensor, whether it is on, whether it changed, whether it was the last
to be on, how long ago, and the hour. Writes figures as JSON and, for one day a home, a picture.
"""

import argparse
import json
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import sklearn
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression

import numpyro_maf as nm
from numpyro_maf import activities
from numpyro_maf.activities.durations import Dynamics
from numpyro_maf.activities.features import _since
from numpyro_maf.activities.records import record
from numpyro_maf.activities.scores import scores_of
from numpyro_maf.datasets import load_ordonez


def classifier_inputs(frame, sensors, *, hours: bool):
    """On, changed, last on, minutes since, and the hour as one of 24 or as harmonics."""
    on = frame[sensors].to_numpy(bool)
    changed = np.zeros_like(on)
    changed[1:] = on[1:] != on[:-1]
    since = _since(on, 600)
    last = (since == since.min(1, keepdims=True)) & (since < 600)
    hour = frame.time.dt.hour.to_numpy()
    angle = 2 * np.pi * (hour + frame.time.dt.minute.to_numpy() / 60) / 24
    harmonics = np.stack([f(k * angle) for k in (1, 2, 3) for f in (np.sin, np.cos)], -1)
    parts = [on, changed, last] + ([] if hours else [np.log1p(since) / np.log(601)])
    return np.concatenate([*parts, np.eye(24)[hour] if hours else harmonics], -1)


def bernoulli_chains(train, test, sensors, names):
    """A hidden Markov and a hidden semi-Markov chain with independent Bernoulli sensors, counted."""
    switches = [activities.Sensor(name, "binary") for name in sensors]
    data = record(train, "time", switches, label="activity", activities=names, minutes=1)
    known = data.label >= 0
    on = np.stack([(data.values[known & (data.label == k)].sum(0) + 0.5) for k in range(len(names))])
    count = np.bincount(data.label[known], minlength=len(names))[:, None] + 1.0
    rate = on / count
    x = test[sensors].to_numpy(float)
    table = x @ np.log(rate).T + (1 - x) @ np.log1p(-rate).T
    moves = np.full((len(names), len(names)), 0.1)
    both = known[1:] & known[:-1] & ~data.starts[1:]
    np.add.at(moves, (data.label[:-1][both], data.label[1:][both]), 1)
    moves /= moves.sum(1, keepdims=True)
    initial = (count / count.sum()).ravel()
    dynamics = Dynamics.of(data, len(names))
    semi = nm.HSMM(initial, dynamics.moves, jnp.asarray(table, jnp.float32), dynamics.durations)
    return {"bernoulli hmm": nm.HMM(initial, moves, table).marginals, "bernoulli hsmm": semi.marginals}


def crf(inputs, codes, day, own, states, ridge=1.0, steps=200):
    """A linear-chain conditional random field (Lafferty, McCallum & Pereira 2001), ``(T, K)`` for ``own``.

    Weights of the inputs, and a score for each pair of neighbours, under a normal prior of precision
    ``ridge``. Each calendar day is a chain; slots without a label are summed over.
    """
    x = np.concatenate([inputs, np.ones((len(inputs), 1))], -1).astype(np.float32)
    chain = np.unique(day, return_inverse=True)[1]
    place = np.arange(len(x)) - np.searchsorted(chain, chain)
    stacked = np.zeros((chain.max() + 1, place.max() + 1, x.shape[1]), np.float32)
    stacked[chain, place] = x
    allowed = np.zeros((*stacked.shape[:2], states), np.float32)
    allowed[chain, place] = np.where((codes < 0)[:, None] | (codes[:, None] == np.arange(states)), 0, -1e9)
    learns = np.ones(len(stacked), np.float32)
    learns[chain[own]] = 0

    def normaliser(params, extra):
        """``(N,)``: log of the sum over paths of each chain."""
        table = stacked @ params["weights"] + extra

        def step(before, now):
            return jax.nn.logsumexp(before[..., None] + params["moves"], 1) + now, None

        last, _ = jax.lax.scan(step, table[:, 0], jnp.moveaxis(table[:, 1:], 1, 0))
        return jax.nn.logsumexp(last, -1)

    def loss(params):
        lost = (learns * (normaliser(params, 0.0) - normaliser(params, allowed))).sum()
        return (lost + 0.5 * ridge * sum(jnp.sum(p**2) for p in params.values())) / len(x)

    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, steps))
    params = {"weights": jnp.zeros((x.shape[1], states)), "moves": jnp.zeros((states, states))}

    @jax.jit
    def learned(params):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)[0][0]

    params = learned(params)
    # The gradient of the log-normaliser for the scores of a slot is the slot's probabilities.
    marginals = jax.jit(jax.grad(lambda extra: normaliser(params, extra).sum()))(jnp.zeros(allowed.shape))
    return np.asarray(marginals)[chain[own], place[own]]


def one_day(frame, day, days, sensors, names, few, options):
    """Probabilities of every method for a day, learned from the others."""
    own = frame.time.dt.normalize() == day
    train, test = frame[~own].copy(), frame[own]
    if few:
        number = np.searchsorted(days, train.time.dt.normalize().to_numpy())
        train.loc[number % few != int(np.searchsorted(days, day)) % few, "activity"] = None
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        home = activities.fit(train, time="time", label="activity", progress=False, **options)
    p = {"numpyro_maf": home.predict(test), "numpyro_maf online": home.predict(test, online=True)}
    seconds = time.perf_counter() - began
    labelled = train.activity.notna().to_numpy()
    methods = {
        "logistic": (LogisticRegression(max_iter=500), True),
        "logistic, time since": (LogisticRegression(max_iter=500), False),
        "forest": (RandomForestClassifier(100, random_state=0), True),
        "forest, time since": (RandomForestClassifier(100, random_state=0), False),
        "boosting": (HistGradientBoostingClassifier(max_iter=50, random_state=0), True),
        "boosting, time since": (HistGradientBoostingClassifier(max_iter=50, random_state=0), False),
    }
    for name, (method, hours) in methods.items():
        inputs = classifier_inputs(frame, sensors, hours=hours)
        method.fit(inputs[~own][labelled], train.activity[labelled])
        p[name] = pd.DataFrame(method.predict_proba(inputs[own]), columns=method.classes_)
    known = sorted(set(train.activity.dropna()))
    codes = pd.Categorical(frame.activity, categories=known).codes.astype(int)
    codes[~own] = pd.Categorical(train.activity, categories=known).codes
    inputs = classifier_inputs(frame, sensors, hours=True)
    table = crf(inputs, codes, frame.time.dt.date, own.to_numpy(), len(known))
    p["conditional random field"] = pd.DataFrame(table, columns=known)
    for name, table in bernoulli_chains(train, test, sensors, known).items():
        p[name] = pd.DataFrame(np.asarray(table), columns=known)
    return home, {k: v.reindex(columns=names, fill_value=0.0).to_numpy() for k, v in p.items()}, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--homes", nargs="+", default=["A", "B"])
    parser.add_argument("--few", type=int, default=0, help="labels on one day in FEW only")
    parser.add_argument("--every", type=int, default=1, help="leave out one day in EVERY only")
    parser.add_argument("--out", type=Path, default=Path("build/homes"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    about = {"numpyro_maf": nm.__version__, "scikit-learn": sklearn.__version__}
    for name in args.homes:
        frame = activities.from_events(*load_ordonez(args.data, name))
        sensors = [c for c in frame.columns if c not in ("time", "activity")]
        names = sorted(set(frame.activity.dropna()))
        days = np.unique(frame.time[frame.activity.notna()].dt.normalize())
        codes = pd.Categorical(frame.activity, categories=names).codes.astype(int)
        found: dict[str, list] = {}
        rows, seconds = [], []
        for number, day in enumerate(days[:: args.every]):
            home, tables, spent = one_day(frame, day, days, sensors, names, args.few, {})
            own = np.flatnonzero(frame.time.dt.normalize() == day)
            rows.append(own)
            seconds.append(spent)
            for method, table in tables.items():
                found.setdefault(method, []).append(np.maximum(table, 1e-9))
            if number == 1:
                home.plot(
                    frame.iloc[own],
                    path=args.out / f"ordonez_{name}.png",
                    title=f"home {name}, a day left out",
                )
            score = scores_of(found["numpyro_maf"][-1], codes[own], 1.0)
            print(f"{name} {str(day)[:10]}: log-loss {score['log_loss']:.4f}, {spent:.0f} s", flush=True)
            index = np.concatenate(rows)
            results = {m: scores_of(np.concatenate(t), codes[index], 1.0) for m, t in found.items()}
            summary = {
                "versions": about,
                "days": len(rows),
                "few": args.few,
                "seconds": seconds,
                "scores": results,
            }
            tag = f"_few{args.few}" if args.few else ""
            (args.out / f"ordonez_{name}{tag}.json").write_text(json.dumps(summary, indent=1) + "\n")
        print(f"home {name}, {len(rows)} days" + (f", labels on one day in {args.few}" if args.few else ""))
        for method, s in results.items():
            print(
                f"  {method:26s} accuracy {s['accuracy']:.4f}  macro-F1 {s['macro_f1']:.3f}  "
                f"log-loss {s['log_loss']:.4f}  ECE {s['ece']:.4f}", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
