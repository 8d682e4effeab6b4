"""MADE on MNIST in Larochelle's fixed binarisation: test negative log-likelihood, and draws against scores.

    python benchmarks/mnist.py --data FOLDER [--hidden 3000] [--passes 4] [--out FOLDER]

One hidden layer, one order (raster), one mask, direct connections. To keep a wide network from learning the
50,000 images by heart, each is also shown shifted by up to one pixel each way, and the network is told
the shift as its context; what is scored is the density given no shift. Germain et al. (2015) have 88.40 nats
with one hidden layer of 8,000 units and one mask, 86.64 with two layers and 32 masks. FOLDER holds
``binarized_mnist/``.
"""

import argparse
import importlib.metadata
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import numpyro_maf as nm
from numpyro_maf.datasets import load_binarized_mnist
from numpyro_maf.flows.conditionals import Bernoulli

BATCH = 200
SHIFTS = [(0, 0)] + [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]


def context(shift, count):
    """A shift by rows and by columns, each one-hot: ``(count, 6)``."""
    row = np.zeros((2, 3), np.float32)
    row[[0, 1], np.add(shift, 1)] = 1
    return np.broadcast_to(row.ravel(), (count, 6))


def shifted(x, shift):
    """Images moved by whole pixels; what enters is empty."""
    images = np.pad(x.reshape(-1, 28, 28), [(0, 0), (1, 1), (1, 1)])
    down, right = np.subtract(1, shift)
    return images[:, down : down + 28, right : right + 28].reshape(-1, 784)


def seconds(function, *args, rounds=5):
    """The fastest of some rounds, compiled before."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return min(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", required=True, type=pathlib.Path)
    parser.add_argument("--hidden", type=int, default=3000)
    parser.add_argument("--passes", type=int, default=4, help="over the images and their shifted copies")
    parser.add_argument("--rows", type=int, default=50_000, help="training images, fewer for a trial")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    for name in ("jax", "numpyro", "numpyro_maf"):
        print(f"{name} {importlib.metadata.version(name)}", end="  ")
    print(f"{os.cpu_count()} cores", flush=True)
    data = load_binarized_mnist(args.data / "binarized_mnist")
    train = data.train[: args.rows]
    copies = [shifted(train, shift) for shift in SHIFTS] + [data.validation]
    x = np.concatenate(copies)
    told = [context(shift, len(train)) for shift in SHIFTS] + [context((0, 0), len(data.validation))]
    held_out = np.arange(len(x)) >= len(SHIFTS) * len(train)

    start = time.perf_counter()
    flow = nm.made(
        jax.random.key(0), 784, columns=Bernoulli(), context=6, hidden=(args.hidden,), activation="relu"
    )
    steps = args.passes * -(-(~held_out).sum() // BATCH)
    optimizer = optax.chain(
        optax.clip_by_global_norm(5.0), optax.adam(optax.cosine_onecycle_schedule(int(steps), 2e-3, 0.05))
    )
    result = nm.fit(
        jax.random.key(1), flow, x, np.concatenate(told), validation=held_out, standardize=False,
        batch_size=BATCH, max_epochs=args.passes, patience=args.passes, optimizer=optimizer, progress=False,
    )  # fmt: skip
    minutes = (time.perf_counter() - start) / 60
    flow, still = result.flow, jnp.asarray(context((0, 0), 1)[0])

    score = jax.jit(lambda flow, x: flow(still).log_prob(x))
    draw = jax.jit(lambda flow, key: flow(still).sample(key, (1000,)))
    nats = -np.concatenate([np.asarray(score(flow, part)) for part in np.split(data.test, 10)])
    print(f"hidden {args.hidden}, {args.passes} passes over {(~held_out).sum()} rows: {minutes:.1f} minutes")
    print(f"by pass: training {result.train_loss.round(2)}, validation {result.validation_loss.round(2)}")
    print(f"test negative log-likelihood {nats.mean():.2f} ± {nats.std() / len(nats) ** 0.5:.2f} nats")
    scoring = seconds(score, flow, data.test[:1000])
    sampling = seconds(draw, flow, jax.random.key(2))
    print(f"1,000 draws {sampling:.3f} s, 1,000 scores {scoring:.3f} s: ratio {sampling / scoring:.2f}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        nm.save(args.out / "mnist_made.safetensors", flow)
        picture(np.asarray(draw(flow, jax.random.key(3)))[:40], data.test[::250], args.out / "mnist.png")


def picture(draws, images, path):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4))
    for axis, rows, title in zip(axes, (images, draws), ("test images", "draws")):
        axis.imshow(rows.reshape(4, 10, 28, 28).swapaxes(1, 2).reshape(112, 280), cmap="gray_r")
        axis.set_title(title)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
