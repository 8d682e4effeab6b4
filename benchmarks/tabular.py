# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Test log-likelihoods on POWER, GAS, HEPMASS, MINIBOONE and BSDS300, beside those that the papers print.

    python benchmarks/tabular.py --data FOLDER [--names power gas …] [--models maf5 nsf-ar …] [--epochs N]
    python benchmarks/tabular.py --data FOLDER --quick

FOLDER holds the published files, see ``numpyro_maf.datasets.load_tabular``. Models, widths, steps and
optimizers are those of table 1 of Papamakarios, Pavlakou & Murray, *Masked Autoregressive Flow* (2017), as in
their code, and of table 1 of Durkan, Bekasov, Murray & Papamakarios, *Neural Spline Flows* (2019), appendix
B.1: the latter were written down without the appendix at hand, so check them before quoting a difference. As
in the first, of networks with one and with two hidden layers the one that validates better counts.

What differs: no batch normalisation between layers (MAF, RealNVP); one network for scale and shift instead of
two (RealNVP); plain networks of as many layers instead of residual ones, no dropout, no splines on the half
that a coupling keeps, no linear map at the ends of the flow, and validation after each epoch instead of every
250 steps (NSF).

Printed: the mean in nats a row, plus or minus two standard errors over the test rows, as in both papers; what
the paper has; seconds; the chosen hidden layers and the best epoch. ``gaussian`` takes seconds and checks the
data: it must agree with the paper. With --quick, 1,000 rows of each part, tiny networks and two epochs show
that all of it runs.
"""

import argparse
import importlib.metadata
import time

import jax
import numpy as np
import optax

import numpyro_maf as nm
from numpyro_maf.datasets import Splits, load_tabular
from numpyro_maf.flows.conditionals import Mixture

NAMES = ("power", "gas", "hepmass", "miniboone", "bsds300")

PAPERS = {  # in the order of NAMES: log-likelihood, two standard errors
    "gaussian": [(-7.74, 0.02), (-3.58, 0.75), (-27.93, 0.02), (-37.24, 1.07), (96.67, 0.25)],
    "made": [(-3.08, 0.03), (3.56, 0.04), (-20.98, 0.02), (-15.59, 0.50), (148.85, 0.28)],
    "mademog": [(0.40, 0.01), (8.47, 0.02), (-15.15, 0.02), (-12.27, 0.47), (153.71, 0.28)],
    "realnvp5": [(-0.02, 0.01), (4.78, 1.80), (-19.62, 0.02), (-13.55, 0.49), (152.97, 0.28)],
    "realnvp10": [(0.17, 0.01), (8.33, 0.14), (-18.71, 0.02), (-13.84, 0.52), (153.28, 1.78)],
    "maf5": [(0.14, 0.01), (9.07, 0.02), (-17.70, 0.02), (-11.75, 0.44), (155.69, 0.28)],
    "maf10": [(0.24, 0.01), (10.08, 0.02), (-17.73, 0.02), (-12.24, 0.45), (154.93, 0.28)],
    "mafmog5": [(0.30, 0.01), (9.59, 0.02), (-17.39, 0.02), (-11.68, 0.44), (156.36, 0.28)],
    "nsf-c": [(0.64, 0.01), (13.09, 0.02), (-14.75, 0.03), (-9.67, 0.47), (157.54, 0.28)],
    "nsf-ar": [(0.66, 0.01), (13.09, 0.02), (-14.01, 0.03), (-9.22, 0.48), (157.31, 0.28)],
}

MAF = {  # MAF paper: activation, and hidden layers to choose from
    "power": dict(activation="relu", hidden=[(100,), (100, 100)]),
    "gas": dict(activation="tanh", hidden=[(100,), (100, 100)]),
    "hepmass": dict(activation="relu", hidden=[(512,), (512, 512)]),
    "miniboone": dict(activation="relu", hidden=[(512,), (512, 512)]),
    "bsds300": dict(activation="relu", hidden=[(512,), (512, 512), (1024,), (1024, 1024)]),
}
BATCH, PATIENCE, DECAY, LONGEST = 100, 30, 1e-6, 10_000  # rows, epochs, of all weights, epochs
RATES = {"made": 1e-3, "mademog": 1e-3, "realnvp5": 1e-4, "realnvp10": 1e-4}  # of Adam
RATES |= {"maf5": 1e-4, "maf10": 1e-4, "mafmog5": 1e-4}

NSF_COLUMNS = "batch_size", "steps", "rate", "transforms", "blocks", "width", "bins"
NSF = {  # NSF paper: by name, for coupling (C) and autoregressive (AR) flows
    "nsf-c": {
        "power": (512, 400_000, 5e-4, 10, 2, 256, 8),
        "gas": (512, 400_000, 5e-4, 10, 2, 256, 8),
        "hepmass": (256, 400_000, 5e-4, 20, 1, 128, 8),
        "miniboone": (128, 200_000, 3e-4, 10, 1, 32, 4),
        "bsds300": (512, 400_000, 5e-4, 20, 1, 128, 8),
    },
    "nsf-ar": {
        "power": (512, 400_000, 5e-4, 10, 2, 256, 8),
        "gas": (512, 400_000, 5e-4, 10, 2, 256, 8),
        "hepmass": (512, 400_000, 5e-4, 10, 2, 256, 8),
        "miniboone": (64, 250_000, 3e-4, 10, 1, 64, 4),
        "bsds300": (512, 400_000, 5e-4, 10, 2, 512, 8),
    },
}
BOUND, CLIP = 3.0, 5.0


def maf_flow(model, key, d, hidden, activation):
    """A flow of the MAF paper; numbers in the names are those of the transforms."""
    options = dict(hidden=hidden, activation=activation)
    backwards = tuple(range(d))[::-1]  # after five reversals
    match model:
        case "made":
            return nm.made(key, d, **options)
        case "mademog":
            return nm.made(key, d, columns=Mixture(10), **options)
        case "mafmog5":
            base = nm.made(jax.random.fold_in(key, 1), d, columns=Mixture(10), order=backwards, **options)
            return nm.maf(key, d, transforms=5, base=base, **options)
        case "realnvp5" | "realnvp10":
            return nm.realnvp(
                key, d, transforms=int(model.removeprefix("realnvp")), mixing="alternate", **options
            )
        case _:
            return nm.maf(key, d, transforms=int(model.removeprefix("maf")), **options)


def runs(model, name, rows, d, epochs, key, quick):
    """Hidden layers, flow and options of ``fit`` of each training that a result takes."""
    if model in NSF:
        p = dict(zip(NSF_COLUMNS, NSF[model][name], strict=True))
        if quick:
            p |= dict(transforms=2, width=8)
        hidden = (p["width"],) * (1 + 2 * p["blocks"])
        flow = nm.nsf(
            key, d, transforms=p["transforms"], hidden=hidden, scalar=nm.RQSpline(p["bins"], BOUND),
            activation="relu", mixing="linear", coupling=model == "nsf-c",
        )  # fmt: skip
        per_epoch = -(-rows // p["batch_size"])
        epochs = epochs or -(-p["steps"] // per_epoch)
        rate = optax.cosine_decay_schedule(p["rate"], epochs * per_epoch)
        optimizer = optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(rate))
        options = dict(batch_size=p["batch_size"], patience=epochs, max_epochs=epochs)
        yield hidden, flow, dict(optimizer=optimizer, **options)
        return
    options = dict(batch_size=BATCH, patience=PATIENCE, max_epochs=epochs or LONGEST)
    for hidden in [(8,), (8, 8)] if quick else MAF[name]["hidden"]:
        # The decay is part of the loss there, so Adam sees its gradient.
        optimizer = optax.chain(optax.add_decayed_weights(DECAY), optax.adam(RATES[model]))
        flow = maf_flow(model, key, d, hidden, MAF[name]["activation"])
        yield hidden, flow, dict(optimizer=optimizer, **options)


def trained(model, name, splits, epochs, seed, quick):
    """Test log-likelihoods of the model that validates best, and what it was."""
    x = np.concatenate([splits.train, splits.validation])
    held_out = np.arange(len(x)) >= len(splits.train)
    key, fit_key = jax.random.split(jax.random.key(seed))
    best = None
    for hidden, flow, options in runs(model, name, len(splits.train), x.shape[1], epochs, key, quick):
        result = nm.fit(fit_key, flow, x, validation=held_out, standardize=False, **options)
        loss = result.validation_loss[result.best_epoch]
        if best is None or loss < best[0]:
            best = loss, result, hidden
    _, result, hidden = best
    score = jax.jit(lambda flow, x: flow().log_prob(x))
    parts = np.array_split(splits.test, -(-len(splits.test) // 4096))
    scores = np.concatenate([np.asarray(score(result.flow, part), np.float64) for part in parts])
    return scores, f"{'x'.join(map(str, hidden))}, epoch {result.best_epoch}"


def gaussian(splits):
    """Test log-likelihoods of a normal distribution with the training rows' mean and covariance."""
    x = splits.train.astype(np.float64)
    factor = np.linalg.cholesky(np.cov(x, rowvar=False, bias=True))
    white = np.linalg.solve(factor, (splits.test - x.mean(0)).T)
    log_det = np.log(2 * np.pi) * x.shape[1] / 2 + np.log(np.diag(factor)).sum()
    return -(white**2).sum(0) / 2 - log_det, ""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", required=True, metavar="FOLDER")
    parser.add_argument("--names", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--models", nargs="+", default=list(PAPERS), choices=list(PAPERS))
    parser.add_argument("--epochs", type=int, help="at most so many, for the papers' steps")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of rows")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    epochs = args.epochs or (2 if args.quick else None)
    for package in ("numpyro_maf", "numpyro", "jax", "optax"):
        print(f"{package} {importlib.metadata.version(package)}", end="  ")
    print(f"on {jax.devices()[0].device_kind}")
    for name in args.names:
        splits = load_tabular(name, args.data)
        if args.quick:
            splits = Splits(splits.train[:1000], splits.validation[:1000], splits.test[:1000])
        sizes = [len(part) for part in (splits.train, splits.validation, splits.test)]
        print(f"\n{name}: {splits.train.shape[1]} features; rows to train, validate and test: {sizes}")
        print(f"{'model':10s} {'log-likelihood':>18s} {'paper':>18s} {'seconds':>8s}")
        for model in args.models:
            start = time.perf_counter()
            value, error = PAPERS[model][NAMES.index(name)]
            paper = f"{value:9.2f} ± {error:6.2f}"
            try:
                if model == "gaussian":
                    scores, chosen = gaussian(splits)
                else:
                    scores, chosen = trained(model, name, splits, epochs, args.seed, args.quick)
            except FloatingPointError as error:
                print(f"{model:10s} {'diverged':>18s} {paper}  {error}", flush=True)
                continue
            spread = 2 * scores.std() / np.sqrt(len(scores))
            seconds = time.perf_counter() - start
            ours = f"{scores.mean():9.2f} ± {spread:6.2f}"
            print(f"{model:10s} {ours} {paper} {seconds:8.0f}  {chosen}", flush=True)


if __name__ == "__main__":
    main()
