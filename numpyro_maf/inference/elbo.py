# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""The evidence lower bound with path gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array, lax
from jax.typing import ArrayLike
from numpyro.handlers import replay, seed, substitute, trace
from numpyro.infer import Trace_ELBO
from numpyro.infer.util import log_density
from numpyro.util import check_model_guide_match

__all__ = ["PathELBO"]


class PathELBO(Trace_ELBO):
    """NumPyro's ``Trace_ELBO`` with a gradient whose noise vanishes as the guide nears the posterior.

    Roeder, Wu & Duvenaud, *Sticking the Landing* (2017): the gradient of ``log q(z)`` takes the path through
    the draw z alone, since the part left out has mean 0. The value is the ELBO's own. It scores each draw
    anew, so the guide must be quick in both directions, as all of this package's flows are.

    :param num_particles: draws for each step.
    :param vectorize_particles: as for ``Trace_ELBO``.
    :raises ValueError: for models and guides with mutable state, which it does not carry.
    """

    def __init__(self, num_particles: int = 1, vectorize_particles: bool = True) -> None:
        super().__init__(num_particles, vectorize_particles)

    def loss_with_mutable_state(
        self,
        rng_key: ArrayLike,
        param_map: dict[str, Any],
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        def particle(key: Array) -> Any:
            model_key, guide_key = jax.random.split(key)
            seeded = seed(guide, guide_key)
            drawn = trace(substitute(seeded, data=param_map)).get_trace(*args, **kwargs)
            # Delta sites follow from the others.
            values = {
                name: site["value"]
                for name, site in drawn.items()
                if site["type"] == "sample" and not isinstance(site["fn"], dist.Delta)
            }
            replayed = substitute(seeded, data=values)
            guide_log, _ = log_density(replayed, args, kwargs, lax.stop_gradient(param_map))
            replayed = replay(seed(model, model_key), drawn)
            model_log, run = log_density(replayed, args, kwargs, param_map)
            check_model_guide_match(run, drawn)
            mutable = [k for k, site in (drawn | run).items() if site["type"] == "mutable"]
            if mutable:
                raise ValueError(f"PathELBO does not carry the mutable state {mutable}: use Trace_ELBO")
            return model_log - guide_log

        if self.num_particles == 1:
            elbo = particle(jnp.asarray(rng_key))
        else:
            elbo = self.vectorize_particles_fn(particle, jax.random.split(rng_key, self.num_particles))
        return {"loss": -jnp.mean(elbo), "mutable_state": None}
