"""RealNVP, Glow and Flow++ on scikit-learn's 8x8 digits as images: bits per dimension of the test set.

    python benchmarks/digits.py [--models realnvp glow flowpp] [--epochs 40] [--out FOLDER]

17 grey levels, 1,437 images to train and 360 to test, drawn at random once. Printed: the mean of the bound
on the negative log-probability in bits per dimension, with one sample of the noise and with 16 (importance
weighted), plus or minus its standard error over test images, and seconds. With FOLDER, a picture of draws.
For scale: the empirical frequencies of each pixel's levels, as if pixels were independent, and 17 equal ones.
"""

import argparse
import importlib.metadata
import pathlib
import time

import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import numpyro_maf as nm

SHAPE, LEVELS, BATCH = (8, 8, 1), 17, 128
FLOW = dict(features=SHAPE, logit=0.05)


def noise(key):
    return nm.realnvp(key, SHAPE, context=64, transforms=2, hidden=(16,), levels=1, logit=0.0)


MODELS = {
    "realnvp": lambda key: nm.realnvp(key, transforms=3, hidden=(16, 16), **FLOW),
    "glow": lambda key: nm.glow(key, transforms=4, hidden=(16, 16), **FLOW),
    "flowpp": lambda key: nm.flowpp(key, transforms=1, hidden=(16, 16), **FLOW),
}
KINDS = {"uniform": None, "variational": noise}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--noise", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    for name in ("jax", "numpyro", "numpyro_maf"):
        print(f"{name} {importlib.metadata.version(name)}", end="  ")
    images = load_digits().images[np.random.default_rng(0).permutation(1797), :, :, None]
    test, rest = images[:360], images[360:]
    counts = np.stack([(rest == level).mean(0) for level in range(LEVELS)]) + 1e-3
    levels = test.reshape(360, 64).astype(int)
    table = (counts / counts.sum(0)).reshape(LEVELS, 64)
    independent = -np.log2(table[levels, np.arange(64)]).mean()
    print(f"\nindependent pixels {independent:.3f}, equal levels {np.log2(LEVELS):.3f} bits per dimension")
    print(f"{'model':10s} {'noise':12s} {'1 sample':>16s} {'16 samples':>16s} {'seconds':>8s}")
    drawn = {}
    for name in args.models:
        for kind in args.noise:
            made = KINDS[kind]
            dequantize = nm.Dequantize(LEVELS, made and made(jax.random.key(1)))
            flow = MODELS[name](jax.random.key(0))
            start = time.perf_counter()
            first, _ = nm.Dequantize(LEVELS).sample(jax.random.key(2), rest[:512], 3)
            flow = flow.initialized(first)
            steps = args.epochs * -(-int(0.9 * len(rest)) // BATCH)
            optimizer = optax.chain(
                optax.clip_by_global_norm(5.0), optax.adam(optax.cosine_decay_schedule(2e-3, steps))
            )
            result = nm.fit(
                jax.random.key(3), flow, rest, dequantize=dequantize, batch_size=BATCH,
                max_epochs=args.epochs, patience=args.epochs, standardize=False, progress=False,
                optimizer=optimizer,
            )  # fmt: skip
            seconds = time.perf_counter() - start
            row = f"{name:10s} {kind:12s}"
            for samples in (1, 16):
                bound = jax.jit(result.dequantize.bound, static_argnames="samples")
                nats = bound(result.flow, jax.random.key(4), test, samples=samples)
                bits = np.asarray(nm.bits_per_dimension(nats, 64))
                row += f" {bits.mean():8.3f} ± {bits.std() / np.sqrt(len(bits)):.3f}"
            print(f"{row} {seconds:8.0f}", flush=True)
            drawn[f"{name}, {kind}"] = np.asarray(result.flow().sample(jax.random.key(5), (8,)))[..., 0]
    if args.out:
        draw(drawn, test[:8, ..., 0], args.out)


def draw(drawn, test, folder):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = {"data": (test + 0.5) / LEVELS, **drawn}
    figure, axes = plt.subplots(len(rows), 8, figsize=(7, 0.95 * len(rows)), squeeze=False)
    for line, (name, images) in zip(axes, rows.items()):
        for axis, image in zip(line, images):
            axis.imshow(image, cmap="gray_r", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name.replace(", ", "\n"), rotation=0, ha="right", va="center")
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "digits.png", dpi=110)


if __name__ == "__main__":
    main()
