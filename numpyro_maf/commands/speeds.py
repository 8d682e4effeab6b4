# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""How fast the family scores and samples on this machine."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpyro

from numpyro_maf.flows import builders, coupling_builders
from numpyro_maf.inputs import nearest

__all__ = ["run"]

_BUILDERS = {
    name: getattr(module, name)
    for module, names in (
        (builders, ("maf", "iaf", "nsf", "made", "circular", "elementwise", "ffjord")),
        (coupling_builders, ("realnvp", "nice", "glow", "flowpp", "nis")),
    )
    for name in names
}
_USUAL = ("maf", "iaf", "nsf", "made", "realnvp", "nice", "glow", "flowpp", "nis", "circular", "elementwise")


def run(
    features: int = 8, batch: int = 1000, hidden: Sequence[int] = (64, 64), rounds: int = 5,
    builders: Sequence[str] | None = None,
) -> int:  # fmt: skip
    """Print a table of times by builder.

    :raises ValueError: for an unknown builder, and sizes that are not positive.
    """
    for name, value in (
        ("features", features),
        ("batch", batch),
        ("rounds", rounds),
        ("hidden", min(hidden)),
    ):
        if value < 1:
            raise ValueError(f"--{name} must be positive, got {value}")
    chosen = tuple(builders or _USUAL)
    for name in chosen:
        if name not in _BUILDERS:
            raise ValueError(f"there is no builder {name!r}{nearest(name, _BUILDERS)}")
    device = jax.devices()[0]
    print(
        f"{features} features, {batch} events, hidden layers {tuple(hidden)}; {device.platform} "
        f"({os.cpu_count()} cores), jax {jax.__version__}, numpyro {numpyro.__version__}, "
        f"Python {platform.python_version()}"
    )
    print("milliseconds, compiled, best of", rounds, "rounds; first call: with compilation, seconds\n")
    print("| builder | scoring | sampling | sampling ÷ scoring | first calls |")
    print("| --- | --- | --- | --- | --- |")
    for name in chosen:
        score, sample, first = _times(name, features, batch, tuple(hidden), rounds)
        print(
            f"| {name} | {1e3 * score:.2f} | {1e3 * sample:.2f} | {sample / score:.1f} | {first:.1f} |",
            flush=True,
        )
    return 0


def _times(name: str, features: int, batch: int, hidden: tuple[int, ...], rounds: int) -> tuple[float, ...]:
    """Best time of scoring, of sampling, and the time of both first calls, in seconds."""
    flow = _BUILDERS[name](0, features, hidden=hidden)
    key = jax.random.key(1)
    score = jax.jit(lambda flow, x: flow().log_prob(x))
    sample = jax.jit(lambda flow, key: flow().sample(key, (batch,)))
    began = time.perf_counter()
    x = jnp.asarray(jax.block_until_ready(sample(flow, key)))
    jax.block_until_ready(score(flow, x))
    first = time.perf_counter() - began
    best = [float("inf"), float("inf")]
    for _ in range(rounds):
        for i, call in enumerate((lambda: score(flow, x), lambda: sample(flow, key))):
            repeats, spent = 0, 0.0
            while spent < 0.02:  # so that the clock's own grain does not show
                start = time.perf_counter()
                jax.block_until_ready(call())
                spent, repeats = spent + time.perf_counter() - start, repeats + 1
            best[i] = min(best[i], spent / repeats)
    return best[0], best[1], first
