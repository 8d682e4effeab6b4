# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

r"""Neural posterior estimation: a conditional flow of the latent sites given the observed ones.

The loss is the negative log-density of a model's own latent values given what it made of them, whose mean
is least at the posterior (Papamakarios & Murray 2016, Proposition 1):

.. math:: E_{p(\theta) p(x \mid \theta)} [-\log q(\theta \mid x)]
    = E_{p(x)} KL(p(\theta \mid x) \,\|\, q(\theta \mid x)) + \text{const}.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass
from jax.typing import ArrayLike

from numpyro_maf.codec import storable
from numpyro_maf.flows.builders import made, nsf
from numpyro_maf.flows.ensemble import Ensemble, stack
from numpyro_maf.inference.completion import complete
from numpyro_maf.inference.sites import Sites
from numpyro_maf.pytrees import Described, static
from numpyro_maf.rng import as_key, as_shape, split
from numpyro_maf.sbi.atomic import AtomicLoss
from numpyro_maf.sbi.kinds import latent_columns
from numpyro_maf.sbi.posterior import Posterior, Setting, not_stored
from numpyro_maf.sbi.preprocessing import Losses, Prepared
from numpyro_maf.sbi.simulations import with_shapes
from numpyro_maf.sbi.surprises import Surprise, typical_of
from numpyro_maf.sbi.views import Summary, View
from numpyro_maf.train.data import scaling

__all__ = ["FlowPosterior", "NegativeLogProb", "NeuralPosterior", "fit_posterior"]


@storable
@register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class NeuralPosterior(Described):
    """A posterior for any observation; made by :func:`npe`. Calling it gives a :class:`FlowPosterior`.

    :param flows: the ensemble.
    :param weights: of the summary's networks, by site, every leaf with a leading member axis.
    :param view: of the observed sites; ``summary``: the networks.
    :param typical: mean, whitening matrix and sorted distances of the simulations' summaries.
    :param sites: the latent sites; ``setting``: the model.
    :param losses: by epoch, of training and validation.
    :param excluded: number of simulations that failed and were left out.
    """

    flows: Ensemble
    weights: Any
    view: View
    typical: Any
    sites: Sites
    summary: Summary = static()
    losses: Losses = static()
    excluded: int = static(default=0)
    setting: Setting = not_stored()

    @property
    def members(self) -> int:
        """The number of the ensemble's members."""
        return len(self.flows)

    def with_model(
        self, model: Callable[..., Any], model_args: tuple[Any, ...] = (),
        model_kwargs: dict[str, Any] | None = None,
    ) -> NeuralPosterior:  # fmt: skip
        """The same posterior with its model, which files do not hold: for predictions, importance and NUTS.

        :raises ValueError: for a model with other latent sites.
        """
        return replace(self, setting=Setting.checked(self.sites, model, model_args, model_kwargs))

    def __call__(self, observation: Any, *, warn: bool = True) -> FlowPosterior:
        """The posterior given values by observed site; leading axes are a batch of observations.

        :param observation: by site; the values of an only site may come without its name.
        :param warn: whether to warn of an observation outside the simulated range, or of a new size.
        :raises ValueError: for sites that are missing or of other shapes, and values that are not finite.
        """
        observation = self.view.by_name(observation)
        arrays, batch = self.view.arrays(observation)
        for verdict in self.summary.unseen(self.view, arrays) if warn else []:
            warnings.warn(verdict, stacklevel=2)
        contexts = _contexts(self.summary, self.members, self.weights, self.view, arrays)
        contexts = contexts.reshape(self.members, *batch, contexts.shape[-1])
        posterior = FlowPosterior(self, contexts, {k: jnp.asarray(observation[k]) for k in self.view.names})
        if warn and not batch and posterior.surprise.share < 1e-3:
            warnings.warn(posterior.surprise.verdict, stacklevel=2)
        return posterior

    def _describe(self):
        seen, losses = ", ".join(self.view.names), self.losses
        sites = with_shapes(dict(zip(self.sites.names, self.sites.shapes)))
        own = [e for e in self.summary.embeddings if e is not None]
        networks = ["MLP" if isinstance(e, tuple) else type(e).__name__ for e in own]
        made = "flows made by hand" if self.flows.recipe is None else self.flows.recipe.call
        lines = [
            f"NeuralPosterior of {sites} given {seen}: call it with an observation",
            f"{self.members} x {made}" if self.members > 1 else made,
        ]
        if networks:
            lines.append(f"networks: {', '.join(networks)}")
        lines += losses.lines
        if self.excluded:
            lines.append(f"{self.excluded:,} simulations failed and were left out")
        return lines


@storable
@register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class FlowPosterior(Posterior):
    """The posterior given observations: the mixture of an ensemble's flows, exact in draws and density.

    :param neural: the posterior for any observation.
    :param contexts: ``(members, *batch_shape, C)``.
    :param observation: by site, ``batch_shape + site.shape``.
    """

    neural: NeuralPosterior
    contexts: Any
    observation: dict[str, Any]

    @property
    def sites(self) -> Sites:  # type: ignore[override]
        return self.neural.sites

    @property
    def setting(self) -> Setting:  # type: ignore[override]
        return self.neural.setting

    def with_model(self, *args: Any, **kwargs: Any) -> FlowPosterior:
        return replace(self, neural=self.neural.with_model(*args, **kwargs))

    @property
    def batch_shape(self):
        return self.contexts.shape[1:-1]

    def sample(self, key: ArrayLike, sample_shape: int | Sequence[int] = ()) -> dict[str, Any]:
        flows, shape = self.neural.flows, as_shape(sample_shape)
        return _draw(self.sites, flows, self.contexts, as_key(key), shape)

    def of_vectors(self, vector):
        return _score(self.neural.flows, self.contexts, vector)

    @property
    def missing(self):
        return self.neural.view.names if self.neural.view.missing else ()

    @property
    def surprise(self) -> Surprise:
        """The distance of the observation from the simulations.

        :raises ValueError: for a batch of observations.
        """
        self._one("surprise")
        return Surprise.of(self.contexts[0], self.neural.typical)

    def disagreement(self, key: ArrayLike, num_samples: int = 1000) -> float:
        """The mean divergence of the ensemble's members from their mixture, in nats.

        This is the generalised Jensen-Shannon divergence: 0 if all agree, the logarithm of their number if
        they have nothing in common. Large values say that seeds decide: simulate more, or change the network.

        :raises ValueError: for an ensemble of one, and a batch of observations.
        """
        self._one("disagreement")
        if self.neural.members < 2:
            raise ValueError("disagreement needs an ensemble: npe(..., ensemble=5)")
        d = self.neural.flows(self.contexts, each=True)
        vectors = d.member_samples(key, (num_samples,))  # (M, S, D)
        own = jnp.stack([d.member_log_probs(v)[i] for i, v in enumerate(vectors)])
        return float((own - d.log_prob(vectors)).mean())

    def conditional(
        self, key: ArrayLike, values: dict[str, Any], num_samples: int = 1000, **options: Any
    ) -> dict[str, Any]:
        """Draws of all sites given the values of some, by site, as :func:`~numpyro_maf.complete` makes them.

        :param values: by site, one value each.
        :param options: of ``complete``.
        :raises ValueError: for an ensemble of more than one, and a batch of observations.
        """
        self._one("conditional")
        if self.neural.members > 1:
            raise ValueError("conditional takes an ensemble of one")
        known = self.sites.select(list(values)).unconstrain(values)
        mask = np.concatenate([np.full(self.sites.select([n]).width, n in values) for n in self.sites.names])
        filled = np.zeros(self.sites.width)
        filled[mask] = known
        d, options = self.neural.flows[0](self.contexts[0]), {"progress": False, **options}
        rows = complete(as_key(key), d, filled, mask, num_samples, **options)
        return self.sites.constrain(rows)

    def _describe(self):
        return [f"FlowPosterior {self._about()}", *([] if self.batch_shape else [self.surprise.verdict])]


def fit_posterior(
    key: ArrayLike, prepared: Prepared, *, builder: Callable[..., Any] = nsf, embedding: Any = None,
    ensemble: int = 1, regression: bool | None = None, atoms: int = 0, **options: Any,
) -> NeuralPosterior:  # fmt: skip
    """As :func:`npe`, from prepared simulations."""
    init_key, net_key, fit_key = split(key, 3)
    view, summary, weights_of, width = prepared.summary(embedding)
    sites, vectors, training = cast(Sites, prepared.sites), prepared.theta, ~prepared.held_out
    if any(sites.columns):
        builder = partial(made if builder is nsf else builder, columns=latent_columns(sites, vectors))
    flows = Ensemble.init(init_key, lambda k: builder(k, sites.width, context=width), ensemble)
    networks = stack([weights_of(k) for k in split(net_key, ensemble)])
    if flows.event_scale is not None:
        inner = lambda part: np.where(flows.keeps_units, 0, flows.inner_events(part))  # noqa: E731
        about: Any = dict(name="the latent sites' vector", density=True, keep=flows.keeps_units)
        scale = scaling(vectors, np.flatnonzero(training), prepared.weights, inner, **about)
        flows = Ensemble(replace(flows.flows, event_scale=stack([scale] * ensemble)))
    some, some_arrays, starts = prepared.some, prepared.some_arrays, [flows]
    if flows.is_real and not summary.is_trained and regression is not False:
        own = training[some]
        contexts = np.asarray(_contexts(summary, 1, networks, view, some_arrays))[0]
        layer = flows[0].regressed(vectors[some][own], contexts[own]).regression
        layers = [layer] if regression else [jax.tree.map(np.zeros_like, layer), layer]
        starts = [Ensemble(flows.flows.with_regression(stack([layer] * ensemble))) for layer in layers]
    elif regression:
        raise ValueError("regression takes a flow of real sites, and no embedding")
    loss: Callable = NegativeLogProb(summary)
    data = [vectors, *prepared.arrays]
    if atoms:
        loss, options = AtomicLoss.of(summary, atoms, options)
        data[1:1] = [AtomicLoss.log_prior(prepared)]
    pairs = [((start.weights, networks), (start, view)) for start in starts]
    trained, (flows, _) = prepared.train(fit_key, loss, pairs, data, **options)
    own, networks = trained.params
    typical = typical_of(np.asarray(_contexts(summary, ensemble, networks, view, some_arrays))[0])
    return trained.carried(NeuralPosterior(
        flows.with_weights(own), networks, view, typical, sites, summary, Losses.of(trained),
        prepared.excluded, prepared.setting,
    ))  # fmt: skip


@dataclass(frozen=True)
class NegativeLogProb:
    """The negative log-density of latent vectors given observed arrays, averaged over the ensemble."""

    summary: Summary

    def __call__(self, params: Any, fixed, key: ArrayLike, vector, *arrays: Any):
        flows, view = fixed
        seen = view(arrays)

        def member(flow, weights, networks, key):
            flow = flow.with_weights(weights).randomized(key)
            return -flow(self.summary(networks, seen)).log_prob(vector)

        return flows.map(member, *params, jax.random.split(key, len(flows))).mean(0)


@partial(jax.jit, static_argnums=(0, 1))
def _contexts(summary, members, weights, view, arrays):
    """``(members, B, C)``."""
    seen = view(arrays)
    return jax.vmap(lambda weights: summary(weights, seen), axis_size=members)(weights)


@partial(jax.jit, static_argnames="sample_shape")
def _draw(sites, flows, contexts, key, sample_shape):
    """Draws of the mixture by site, ``sample_shape + batch_shape + site.shape``."""
    return sites.constrain(flows(contexts, each=True).sample(key, sample_shape))


@jax.jit
def _score(flows, contexts, vector):
    return flows(contexts, each=True).log_prob(vector)
