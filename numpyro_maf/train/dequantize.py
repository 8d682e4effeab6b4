# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

r"""Dequantisation: continuous flows for integer data, such as pixels.

For x in 0, …, L - 1 and noise u in the unit box, the flow models ``y = (x + u) / L``. Then

.. math:: \log P(x) \ge E_{q(u|x)}\left[\log p(y) - D \log L - \log q(u|x)\right],

with q uniform (Theis, van den Oord & Bethge 2016) or itself a conditional flow (Ho et al. 2019, eq. 12).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass
from jax.typing import ArrayLike

from numpyro_maf.flows.flow import Flow
from numpyro_maf.inputs import as_labels, as_numbers
from numpyro_maf.pytrees import static
from numpyro_maf.rng import as_key

__all__ = ["Dequantize", "bits_per_dimension"]


@register_dataclass
@dataclass(frozen=True, eq=False)
class Dequantize:
    """Noise for integer events, and the bound on their probability that it gives.

    :param levels: L, how many values each number has.
    :param noise: None for uniform noise; or a flow with ``logit=0.0`` whose events are the noise and whose
        context, as wide as an event, is the data in [0, 1].
    :raises ValueError: for fewer than two levels, or a noise flow that does not fit.
    """

    levels: int = static()
    noise: Flow | None = None

    def __post_init__(self):
        if self.levels < 2:
            raise ValueError(f"levels must be 2 or more, got {self.levels}")
        if isinstance(self.noise, Flow) and self.noise.context != self.noise.features:
            raise ValueError(
                f"the noise flow must take a context as wide as its events, {self.noise.features}, "
                f"got {self.noise.context}"
            )

    def sample(self, key: ArrayLike, x: ArrayLike, event_ndim: int = 1) -> tuple[Any, Any]:
        """Events in the unit box and the noise's log-density, ``(..., *event) -> (..., *event), (...)``.

        :param event_ndim: how many axes an event has.
        """
        key, x = as_key(key), jnp.asarray(self._levels(x), float)
        batch = x.shape[: x.ndim - event_ndim]
        if self.noise is None:
            noise, log_prob = jax.random.uniform(key, x.shape), jnp.zeros(batch)
        else:
            d = self.noise(x.reshape(*batch, -1) / (self.levels - 1))
            noise, intermediates = d.sample_with_intermediates(key)
            log_prob = d.log_prob(noise, intermediates)
        return (x + noise) / self.levels, log_prob

    def bound(
        self, flow: Flow, key: ArrayLike, x: ArrayLike, context: ArrayLike | None = None, *, samples: int = 1
    ):
        """A lower bound on ``log P(x)``, tighter with more samples: ``(N, *event_shape) -> (N,)``, in nats.

        Burda et al., *Importance Weighted Autoencoders* (2016), eq. 8.
        """
        d = flow(context)

        def one(key):
            y, log_noise = self.sample(key, x, len(flow.event_shape))
            return d.log_prob(y) - flow.features * math.log(self.levels) - log_noise

        bounds = jax.lax.map(one, jax.random.split(as_key(key), samples))
        return jax.nn.logsumexp(bounds, axis=0) - math.log(samples)

    def _levels(self, x):
        """Events, whose numbers are levels where they can be looked at."""
        x = as_numbers("x", x)
        return x if isinstance(x, jax.core.Tracer) else as_labels("x", x, self.levels)

    @property
    def weights(self):
        """Of the noise flow, None for uniform noise."""
        return None if self.noise is None else self.noise.weights

    def with_weights(self, weights: Any) -> Dequantize:
        """The same with other :attr:`weights`."""
        return self if self.noise is None else replace(self, noise=self.noise.with_weights(weights))


def bits_per_dimension(log_prob: Any, features: int) -> Any:
    """``-log_prob / (D log 2)``: bits that a number costs, from nats an event."""
    return as_numbers("log_prob", log_prob) / (-features * math.log(2))
