# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

r"""Neural ratio estimation: a classifier's logit as the ratio of likelihood and evidence.

Miller, Weniger & Forré, *Contrastive Neural Ratio Estimation* (2022), eq. 11: it tells the parameters of x
from K - 1 others, or that none among K is its own, and at its optimum is
:math:`\log p(x \mid \theta) / p(x)` without a constant that depends on x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Unpack

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import logsumexp
from jax.tree_util import register_dataclass
from jax.typing import ArrayLike
from numpyro.distributions import constraints

from numpyro_maf.codec import storable
from numpyro_maf.flows.linear import Standardize
from numpyro_maf.inputs import as_numbers
from numpyro_maf.nn.mlp import MLP
from numpyro_maf.pytrees import Described, static
from numpyro_maf.rng import as_key, split
from numpyro_maf.sbi.options import RatioOptions
from numpyro_maf.sbi.preprocessing import Losses, Prepared, training_options
from numpyro_maf.sbi.views import Summary, View
from numpyro_maf.train.data import scaling
from numpyro_maf.train.options import TrainOptions, check_options
from numpyro_maf.train.state import carrying

__all__ = ["Ratio", "RatioDistribution", "fit_ratio", "nre"]


def nre(
    key: ArrayLike,
    model: Callable[..., Any],
    sims: dict[str, Any],
    observed: str | Sequence[str] = ("x",),
    *,
    embedding: Any = None,
    hidden: tuple[int, ...] = (64, 64, 64),
    contrasts: int = 10,
    failures: str = "error",
    missing: bool = False,
    latent: Sequence[str] | None = None,
    model_args: tuple[Any, ...] = (),
    model_kwargs: dict[str, Any] | None = None,
    validation: Any = 0.1,
    weights: ArrayLike | None = None,
    **options: Unpack[TrainOptions],
) -> Ratio:
    """Learn the ratio of likelihood and evidence: ``ratio(theta, x) = log p(x | theta) / p(x)``.

    theta is as for :func:`nle`: a lone observed simulator's own parameters, else all latent sites. A ratio of
    several observed sites is a function to call, and stands at no site of a model.

    :param key: a ``jax.random`` key, or an integer.
    :param embedding: as for :func:`~numpyro_maf.npe`.
    :param hidden: widths of the classifier's hidden layers.
    :param contrasts: K, how many parameters it chooses among.
    :param failures: as for :func:`nle`, with ``latent``, ``validation`` and ``weights``; ``missing`` as for
        :func:`~numpyro_maf.npe`.
    :param options: of :func:`~numpyro_maf.train.train`.
    :raises ValueError: as for :func:`nle`.
    """
    check_options("nre", options, RatioOptions)
    prepare_key, key = split(as_key(key))
    prepared = Prepared.of(
        prepare_key, "nre", model, sims, observed, vectors=False, latent=latent, missing=missing,
        failures=failures, weights=weights, validation=validation, model_args=model_args,
        model_kwargs=model_kwargs,
    )  # fmt: skip
    chosen = dict(embedding=embedding, hidden=hidden, contrasts=contrasts)
    with carrying(itemgetter(0)):
        return fit_ratio(key, prepared, **chosen, **options)[0]


def fit_ratio(
    key: ArrayLike,
    prepared: Prepared,
    *,
    embedding: Any = None,
    hidden=(64, 64, 64),
    contrasts: int = 10,
    **options: Any,
) -> tuple[Ratio, Losses]:
    """As :func:`nre`, from prepared simulations, with the losses."""
    network_key, net_key, fit_key = split(key, 3)
    theta, held_out = prepared.theta, prepared.held_out
    n = len(theta)
    if min((~held_out).sum(), held_out.sum() or n) < 2 * contrasts:
        raise ValueError(f"nre needs more than {2 * contrasts} rows to train and to validate on, got {n}")
    options = {"tolerance": 1e-3} | options  # a choice among a few saturates
    if training_options(n, options)["batch_size"] < 2 * contrasts:
        raise ValueError(f"{contrasts} contrasts need a batch_size of {2 * contrasts} or more")
    view, summary, weights_of, width = prepared.summary(embedding)
    net = MLP.init(net_key, width + theta.shape[-1], (1, 1), hidden=hidden)
    scale = scaling(theta, np.flatnonzero(~held_out), prepared.weights, name="the parameters")
    start = Ratio(net, weights_of(network_key), view, scale, summary)
    data = [theta.astype(jnp.result_type(float), copy=False), *prepared.arrays]
    pair = (start.net, start.networks), start
    trained, _ = prepared.train(fit_key, Contrast(contrasts), [pair], data, **options)
    net, networks = trained.params
    return trained.carried((Ratio(net, networks, view, scale, summary), Losses.of(trained)))


@storable
@register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class Ratio(Described):
    """A learned ratio of likelihood and evidence; made by :func:`nre`.

    :param net: the classifier; ``networks``: weights of the summary.
    :param view: of the observed sites; ``theta_scale``: of the parameters.
    """

    net: MLP
    networks: Any
    view: View
    theta_scale: Standardize
    summary: Summary = static()

    @property
    def context(self) -> int:
        """The number of parameters, P."""
        return self.theta_scale.loc.shape[-1]

    def __call__(self, theta: ArrayLike, x: ArrayLike):
        """``log p(x | theta) / p(x)`` of ``(..., P)`` and ``(..., *event_shape)``, or values by site."""
        theta = jnp.asarray(as_numbers("theta", theta))
        if theta.shape[-1:] != (self.context,):
            raise ValueError(f"theta must be (..., {self.context}), got {theta.shape}")
        arrays, batch = self.view.rows(self.view.by_name(x))
        seen = self.summary(self.networks, self.view(arrays))
        return self.logit(theta, seen.reshape(*batch, seen.shape[-1]))

    def logit(self, theta: ArrayLike, seen: Any):
        """The classifier's result from parameters and summaries, which broadcast."""
        z = jnp.arcsinh((theta - self.theta_scale.loc) / self.theta_scale.scale)
        return self.net(None, _beside(z, seen))[..., 0, 0]

    def _describe(self):
        names = ", ".join(self.view.names)
        return [
            f"Ratio of likelihood and evidence of {names}: ratio(theta, x) = log p(x | theta) / p(x)",
            f"{self.context} parameters, hidden layers {[len(b) for b in self.net.biases[:-1]]}",
        ]


@dataclass(frozen=True)
class Contrast:
    """NRE-C with gamma = 1: K parameters, of which the first is x's own, or none."""

    contrasts: int

    def __call__(self, params: Any, ratio, key: ArrayLike, theta: ArrayLike, *arrays: Any):
        net, networks = params
        ratio = Ratio(net, networks, ratio.view, ratio.theta_scale, ratio.summary)
        seen, k = ratio.summary(ratio.networks, ratio.view(arrays)), self.contrasts
        turned = jnp.stack([jnp.roll(theta, i, 0) for i in range(2 * k)])
        logits = ratio.logit(turned, seen)  # (2 K, B), row 0 being the pairs that belong together
        own, others = logits[:k] - jnp.log(k), logits[k:] - jnp.log(k)
        told = own[0] + jnp.log(k) - jnp.logaddexp(0.0, logsumexp(own, 0))
        none = -jnp.logaddexp(0.0, logsumexp(others, 0))
        return -(told + none) / 2


class RatioDistribution(dist.Distribution):
    """A ratio as a factor at a site: its log-density is that of the likelihood up to a constant of x.

    :param ratio: from :func:`nre`; ``theta``: ``(..., P)``.
    """

    arg_constraints: dict[str, Any] = {}
    pytree_data_fields = ("ratio", "theta")
    pytree_aux_fields = ("each",)

    def __init__(self, ratio, theta, event_shape, support=constraints.real, *, validate_args=None):
        self.ratio, self.theta, self.each = ratio, theta, support
        super().__init__(jnp.shape(theta)[:-1], event_shape, validate_args=validate_args)

    @property
    def support(self):
        return constraints.independent(self.each, self.event_dim)

    def sample(self, key: ArrayLike, sample_shape: int | Sequence[int] = ()) -> dict[str, Any]:
        raise NotImplementedError("a ratio can be scored, not drawn from: use the model with its simulator")

    def log_prob(self, value: ArrayLike):
        return self.ratio(self.theta, value)


def _beside(a, b):
    batch = jnp.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    return jnp.concatenate([jnp.broadcast_to(v, (*batch, v.shape[-1])) for v in (a, b)], -1)
