"""Test log-likelihoods of every builder beside flowjax's and zuko's MAF and NSF, on two real data sets.

    python benchmarks/density.py --data FOLDER [--sets digits occupancy] [--models maf nsf …] [--seeds 3]

Same split, same standardisation, same width and depth, same number of steps of Adam with the same cosine
schedule and clipping, best validation epoch: for all alike. What else a library decides, such as activation,
initial weights and permutations, is as it comes. The builders of boxes and angles get the events through the
logistic function. Printed: mean test log-likelihood in nats an event of the
standardised data, plus or minus its standard error over the test events, averaged over seeds of the weights;
the spread between seeds; the difference to the best row, event by event, with its standard error; seconds.
FOLDER holds ``occupancy/``, see ``numpyro_maf.datasets.load_occupancy``.
"""

import argparse
import importlib.metadata
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import numpyro_maf as nm
from numpyro_maf.flows.conditionals import Mixture, Normal
from numpyro_maf.train.loop import train

HIDDEN, BATCH = (64, 64), 128
EPOCHS = {"digits": 150, "occupancy": 40}


def digits(folder):
    """8x8 digits with uniform noise, (1797, 64)."""
    from sklearn.datasets import load_digits

    x = load_digits().data
    return (x + np.random.default_rng(0).uniform(size=x.shape)) / 17


def occupancy(folder):
    """Temperature, humidity, light and CO2 of all three files, with noise of the sensors' resolution."""
    rows = []
    for name in ("datatraining", "datatest", "datatest2"):
        path = pathlib.Path(folder) / "occupancy" / f"{name}.txt"
        rows.append(np.genfromtxt(path, delimiter=",", skip_header=1, usecols=(2, 3, 4, 5)))
    x = np.concatenate(rows)
    return x + np.random.default_rng(0).uniform(size=x.shape) * [0.1, 0.1, 1.0, 1.0]


def split(x):
    """Standardised rows in random order with those held out: 80% train, 10% validation, 10% test."""
    x = x[np.random.default_rng(1).permutation(len(x))]
    test, valid = len(x) // 10, len(x) // 5
    train_rows = x[valid:]
    x = ((x - train_rows.mean(0)) / train_rows.std(0)).astype(np.float32)
    return x[test:], np.arange(len(x) - test) < valid - test, x[:test]


def optimizer(rows, epochs):
    steps = epochs * -(-rows // BATCH)
    return optax.chain(optax.clip_by_global_norm(5.0), optax.adam(optax.cosine_decay_schedule(1e-3, steps)))


OURS = {
    "maf": lambda key, d: nm.maf(key, d, hidden=HIDDEN),
    "maf, mixed": lambda key, d: nm.maf(key, d, hidden=HIDDEN, mixing="linear"),
    "maf MoG": lambda key, d: nm.maf(
        key, d, hidden=HIDDEN, base=nm.made(key, d, columns=Mixture(10), hidden=HIDDEN)
    ),
    "maf CDF": lambda key, d: nm.maf(key, d, hidden=HIDDEN, transforms=2, scalar=nm.MixtureCDF(8)),
    "iaf": lambda key, d: nm.iaf(key, d, hidden=HIDDEN),
    "nsf": lambda key, d: nm.nsf(key, d, hidden=HIDDEN),
    "nsf, relu": lambda key, d: nm.nsf(key, d, hidden=HIDDEN, activation="relu"),
    "maf, relu": lambda key, d: nm.maf(key, d, hidden=HIDDEN, activation="relu"),
    "nsf, mixed": lambda key, d: nm.nsf(key, d, hidden=HIDDEN, mixing="linear"),
    "nsf coupling": lambda key, d: nm.nsf(key, d, hidden=HIDDEN, transforms=6, coupling=True),
    "realnvp": lambda key, d: nm.realnvp(key, d, hidden=HIDDEN),
    "nice": lambda key, d: nm.nice(key, d, hidden=HIDDEN),
    "glow": lambda key, d: nm.glow(key, d, hidden=HIDDEN),
    "flowpp": lambda key, d: nm.flowpp(key, d, transforms=2, hidden=(16, 16), heads=2),
    "ffjord": lambda key, d: nm.ffjord(key, d, hidden=HIDDEN, rtol=1e-3, atol=1e-3),
    "elementwise": lambda key, d: nm.elementwise(key, d),
    "made": lambda key, d: nm.made(key, d, columns=Normal(), hidden=HIDDEN),
    "made MoG": lambda key, d: nm.made(key, d, columns=Mixture(10), hidden=HIDDEN),
    "nis": lambda key, d: nm.nis(key, d, hidden=HIDDEN),
    "circular": lambda key, d: nm.circular(key, d, hidden=HIDDEN),
}
BOXES = {OURS["nis"]: (0, 1), OURS["circular"]: (-np.pi, np.pi)}


def boxed(x, low, high):
    """Real events through the logistic function into a box, and the map's log-determinant."""
    u = 1 / (1 + np.exp(-x.astype(np.float64)))
    log_det = np.log((high - low) * u * (1 - u)).sum(-1)
    return (low + (high - low) * u).astype(np.float32), log_det


def ours(build, x, held_out, test, epochs, seed):
    flow = build(jax.random.key(seed), x.shape[1])
    log_det = 0.0
    if build in BOXES:
        (x, _), (test, log_det) = boxed(x, *BOXES[build]), boxed(test, *BOXES[build])
    result = nm.fit(
        jax.random.key(100 + seed), flow, x, validation=held_out, standardize=False, batch_size=BATCH,
        max_epochs=epochs, patience=epochs, progress=False, optimizer=optimizer((~held_out).sum(), epochs),
    )  # fmt: skip
    return np.asarray(jax.jit(lambda flow, x: flow().log_prob(x))(result.flow, test)) + log_det


def flowjax_model(kind):
    def build(key, d):
        from flowjax.bijections import RationalQuadraticSpline
        from flowjax.distributions import Normal
        from flowjax.flows import masked_autoregressive_flow

        options = dict(flow_layers=5) if kind == "maf" else dict(
            flow_layers=3, transformer=RationalQuadraticSpline(knots=8, interval=5)
        )  # fmt: skip
        return masked_autoregressive_flow(
            key, base_dist=Normal(jnp.zeros(d)), nn_width=HIDDEN[0], nn_depth=len(HIDDEN), **options
        )

    return build


def flowjax(build, x, held_out, test, epochs, seed):
    import equinox as eqx
    import paramax

    flow = build(jax.random.key(seed), x.shape[1])
    params, static = eqx.partition(
        flow, eqx.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable)
    )

    def loss(params, fixed, key, x):
        return -paramax.unwrap(eqx.combine(params, static)).log_prob(x)

    found = train(
        jax.random.key(100 + seed), loss, params, [x], weights=np.ones(len(x)), held_out=held_out,
        batch_size=BATCH, max_epochs=epochs, patience=epochs, progress=False,
        optimizer=optimizer((~held_out).sum(), epochs),
    )  # fmt: skip
    return np.asarray(-jax.jit(lambda p, x: loss(p, None, None, x))(found.params, test))


def zuko_model(kind):
    def build(seed, d):
        import torch
        import zuko

        torch.manual_seed(seed)
        if kind == "maf":
            return zuko.flows.MAF(d, transforms=5, hidden_features=HIDDEN)
        return zuko.flows.NSF(d, transforms=3, bins=8, hidden_features=HIDDEN)

    return build


def zuko(build, x, held_out, test, epochs, seed):
    import copy

    import torch

    flow = build(seed, x.shape[1])
    rows, valid, test = (torch.as_tensor(a) for a in (x[~held_out], x[held_out], test))
    steps = epochs * -(-len(rows) // BATCH)
    adam = torch.optim.Adam(flow.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    best, least = None, np.inf
    for _ in range(epochs):
        for batch in torch.randperm(len(rows)).split(BATCH):
            value = -flow().log_prob(rows[batch]).mean()
            adam.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
            adam.step()
            schedule.step()
        with torch.no_grad():
            value = -flow().log_prob(valid).mean().item()
        if value < least:
            best, least = copy.deepcopy(flow.state_dict()), value
    flow.load_state_dict(best)
    with torch.no_grad():
        return flow().log_prob(test).numpy()


MODELS = {name: (ours, build) for name, build in OURS.items()}
MODELS |= {f"flowjax {kind}": (flowjax, flowjax_model(kind)) for kind in ("maf", "nsf")}
MODELS |= {f"zuko {kind}": (zuko, zuko_model(kind)) for kind in ("maf", "nsf")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--sets", nargs="+", default=list(EPOCHS), choices=list(EPOCHS))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    for name in ("jax", "numpyro", "flowjax", "zuko", "torch"):
        print(f"{name} {importlib.metadata.version(name)}", end="  ")
    print()
    for name in args.sets:
        x, held_out, test = split({"digits": digits, "occupancy": occupancy}[name](args.data))
        print(f"\n{name}: {(~held_out).sum()} training rows, {held_out.sum()} validation, {len(test)} test, "
              f"{x.shape[1]} features, {EPOCHS[name]} epochs")  # fmt: skip
        scores = {}
        for model in args.models:
            run, build = MODELS[model]
            start = time.perf_counter()
            each = [run(build, x, held_out, test, EPOCHS[name], seed) for seed in range(args.seeds)]
            seconds = (time.perf_counter() - start) / args.seeds
            scores[model] = np.mean(each, 0), np.std(np.mean(each, 1)), seconds
            print(f"  {model:14s} {np.mean(each):9.3f}  ({seconds:.0f} s)", flush=True)
        best = max(scores, key=lambda m: scores[m][0].mean())
        root = np.sqrt(len(test))
        print(f"{'model':14s} {'log-likelihood':>20s} {'seeds':>7s} {'below the best':>20s} {'seconds':>8s}")
        for model, (row, spread, seconds) in sorted(scores.items(), key=lambda item: -item[1][0].mean()):
            gap = scores[best][0] - row
            print(f"{model:14s} {row.mean():11.3f} ± {row.std() / root:6.3f} {spread:7.3f} "
                  f"{gap.mean():11.3f} ± {gap.std() / root:6.3f} {seconds:8.0f}")  # fmt: skip


if __name__ == "__main__":
    main()
