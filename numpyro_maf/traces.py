# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""One run of a model, for what can be read off its sites."""

from __future__ import annotations

import threading
from typing import Any

import jax
from numpyro import handlers
from numpyro.infer.initialization import init_to_uniform

__all__ = ["ONE_AT_A_TIME", "latent_names", "run_once"]

# NumPyro keeps one stack of handlers for all threads, so models run one at a time.
ONE_AT_A_TIME = threading.RLock()


def run_once(model, model_args=(), model_kwargs=None, seed: int = 0) -> dict[str, Any]:
    """The trace of one run of a model; sites with improper priors, which draw nothing, are started."""
    seeded = handlers.seed(model, jax.random.key(seed))
    started = handlers.substitute(seeded, substitute_fn=init_to_uniform)
    with ONE_AT_A_TIME, handlers.block():
        return dict(handlers.trace(started).get_trace(*model_args, **(model_kwargs or {})))


def latent_names(model, model_args=(), model_kwargs=None, but=()) -> list[str]:
    """The names of a model's latent sites but some."""
    trace = run_once(model, model_args, model_kwargs)
    kinds = {k: s for k, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}
    return [name for name in kinds if name not in but]
