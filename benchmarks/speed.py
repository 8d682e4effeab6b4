# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Sampling, scoring and the gradient through sampling, beside flowjax's MAF of the same shape.

One process, both compiled, rounds interleaved, the best of each taken: ratios of one run. Run with

    python benchmarks/speed.py            # all shapes
    python benchmarks/speed.py --rows 0 1 # some of them
"""

import argparse
import platform
import time
from functools import partial
from importlib.metadata import version

import equinox as eqx
import flowjax.distributions
import flowjax.flows
import jax
import jax.numpy as jnp
import paramax

import numpyro_maf

SHAPES = [  # features, hidden, batch, transforms; goals: sampling ÷ scoring, times flowjax's sampling
    (8, (64, 64), 1000, 5, 4, 2),
    (32, (128, 128), 1000, 5, 3, 5),
    (64, (512, 512), 1000, 1, 3, 10),
    (784, (1024,), 100, 1, 4, 50),
]


def ours(features, hidden, transforms, activation):
    flow = numpyro_maf.maf(
        jax.random.key(0), features, transforms=transforms, hidden=hidden, activation=activation
    )

    def total(flow, key, batch):
        return jnp.sum(jnp.square(flow().sample(key, (batch,))))

    return (
        flow,
        jax.jit(lambda flow, x: flow().log_prob(x)),
        jax.jit(lambda flow, key, batch: flow().sample(key, (batch,)), static_argnums=2),
        jax.jit(jax.grad(total), static_argnums=2),
    )


def theirs(features, hidden, transforms, activation):
    flow = flowjax.flows.masked_autoregressive_flow(
        jax.random.key(0),
        base_dist=flowjax.distributions.Normal(jnp.zeros(features)),
        flow_layers=transforms,
        nn_width=hidden[0],
        nn_depth=len(hidden),
        nn_activation=getattr(jax.nn, activation),
    )

    def score(flow, x):
        return paramax.unwrap(flow).log_prob(x)

    @eqx.filter_jit
    def sample(flow, key, batch):
        return paramax.unwrap(flow).sample(key, (batch,))

    return flow, eqx.filter_jit(score), sample, None


def best_of(functions, rounds, budget):
    """Seconds of the fastest call of each function, rounds interleaved, within a time budget."""
    for function in functions:
        jax.block_until_ready(function())
    best, spent = [float("inf")] * len(functions), [0.0] * len(functions)
    for i in range(rounds):
        for j, function in enumerate(functions):
            if i >= 3 and spent[j] > budget:
                continue
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds = time.perf_counter() - start
            best[j], spent[j] = min(best[j], seconds), spent[j] + seconds
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="*", default=range(len(SHAPES)))
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--budget", type=float, default=4.0, help="seconds for each function")
    parser.add_argument("--activation", default="relu", help="of both libraries' networks")
    args = parser.parse_args()
    versions = [f"{name} {version(name)}" for name in ("flowjax", "numpyro", "jax", "jaxlib")]
    print(f"Python {platform.python_version()}, numpyro_maf {numpyro_maf.__version__}", *versions, sep=", ")
    print(f"{jax.devices()[0].device_kind}, activation {args.activation}, milliseconds then ratios")
    header = ("shape", "score", "sample", "gradient", "fj score", "fj sample")
    header += ("sample/score", "goal", "fj/our sample", "goal", "fj/our score", "grad/sample", "MB")
    print(" | ".join(header))
    for row in args.rows:
        features, hidden, batch, transforms, goal, faster = SHAPES[row]
        x = jax.random.normal(jax.random.key(1), (batch, features))
        key = jax.random.key(2)
        shape = (features, hidden, transforms, args.activation)
        flow, score, sample, gradient = ours(*shape)
        peer, peer_score, peer_sample, _ = theirs(*shape)
        seconds = best_of(
            [
                partial(score, flow, x),
                partial(sample, flow, key, batch),
                partial(gradient, flow, key, batch),
                partial(peer_score, peer, x),
                partial(peer_sample, peer, key, batch),
            ],
            args.rounds,
            args.budget,
        )
        memory = gradient.lower(flow, key, batch).compile().memory_analysis().temp_size_in_bytes
        a, b, c, d, e = (1e3 * s for s in seconds)
        print(
            f"D={features} H={'x'.join(map(str, hidden))} B={batch} T={transforms}",
            *(f"{ms:.2f}" for ms in (a, b, c, d, e)),
            f"{b / a:.2f}", f"<= {goal}", f"{e / b:.1f}", f">= {faster}", f"{d / a:.2f}",
            f"{c / b:.2f}", f"{memory / 2**20:.0f}",
            sep=" | ", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
