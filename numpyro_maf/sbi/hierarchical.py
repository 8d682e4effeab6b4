# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

r"""Neural posteriors that follow a model's plates.

Rows of a plate are exchangeable, and independent given what is outside of it. So the posterior of the sites
outside of all plates and of those in one plate is

.. math:: q(\theta \mid s(x)) \prod_i q(z_i \mid \theta, s_i(x_i)),

where :math:`s_i` is a summary of the row's own data, and s a summary of the mean of the rows' and of their
number, which is a function of the set (Zaheer et al. 2017, Theorem 2). Nested plates are sets of sets. One
network serves all rows, so the number of rows may change from one data set to the next.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jax.tree_util import register_dataclass
from jax.typing import ArrayLike

from numpyro_maf.codec import storable
from numpyro_maf.flows.builders import nsf
from numpyro_maf.flows.ensemble import Ensemble, each_member, stack
from numpyro_maf.inference.sites import Sites
from numpyro_maf.pytrees import Described, static
from numpyro_maf.rng import as_key, as_shape, split
from numpyro_maf.sbi.plate_networks import SUMMARY, PlateLoss, context_of, encoders_of, summaries
from numpyro_maf.sbi.plates import PlateTree
from numpyro_maf.sbi.posterior import Posterior, Setting, not_stored
from numpyro_maf.sbi.preprocessing import Losses, Prepared
from numpyro_maf.sbi.surprises import Surprise, typical_of
from numpyro_maf.sbi.views import View
from numpyro_maf.train.data import scaling

__all__ = ["HierarchicalPosterior", "PlatePosterior", "fit_plates"]

_SOME = 8192  # simulations that scale the latent vectors


@dataclass(frozen=True)
class _OtherSize:
    """Stands for a model whose arguments are not known; running it says so."""

    sizes: tuple[tuple[str, int], ...]

    def __call__(self, *args, **kwargs):
        sizes = ", ".join(f"{size} rows in plate {plate!r}" for plate, size in self.sizes)
        raise ValueError(
            f"this data set has {sizes}, and the model's arguments for that are not known: use "
            "post.with_model(model, model_args)"
        )


@storable
@register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class HierarchicalPosterior(Described):
    """A posterior for data sets of any size; made by :func:`npe`. Calling it gives a :class:`PlatePosterior`.

    :param flows: one ensemble for each level with latent sites; ``encoders``: the weights of the summaries,
        one network for each level; every leaf has a leading member axis.
    :param view: of the observed sites; ``typical``: of the simulations' summaries.
    :param sites: the latent sites, with plates of the largest size that was simulated.
    :param tree: the plates; ``sizes``: of each, the least and the greatest number of rows simulated.
    :param losses: by epoch; ``excluded``: number of simulations that failed and were left out.
    :param settings: the model as it was simulated, by the sizes of its plates.
    """

    flows: dict[str, Ensemble]
    encoders: Any
    view: View
    typical: Any
    sites: Sites
    tree: PlateTree = static()
    sizes: tuple[tuple[str, int, int], ...] = static()
    losses: Losses = static()
    excluded: int = static(default=0)
    settings: tuple[tuple[tuple[tuple[str, int], ...], Setting], ...] = field(
        default=(), metadata={"static": True, "stored": False}
    )

    @property
    def members(self) -> int:
        """The number of the ensemble's members."""
        return len(next(iter(self.flows.values())))

    def with_model(
        self, model: Callable[..., Any], model_args: tuple[Any, ...] = (),
        model_kwargs: dict[str, Any] | None = None,
    ) -> HierarchicalPosterior:  # fmt: skip
        """The same posterior with its model, whose arguments give the plates' sizes.

        :raises ValueError: for a model with other latent sites.
        """
        setting = Setting(model, tuple(model_args), dict(model_kwargs or {}))
        found = Sites.of(model, set(self.sites.names), model_args, model_kwargs)
        sizes = self.tree.sizes(dict(zip(found.names, found.shapes)))
        own = {plate: most for plate, _, most in self.sizes} | sizes
        if found != self.tree.resized(self.sites, own):
            raise ValueError(f"the posterior is of other sites than this model's: {self.sites}")
        return replace(self, settings=((tuple(own.items()), setting), *self.settings))

    def setting_for(self, sizes: dict[str, int]) -> Setting:
        """The model with plates of these sizes; one that says what is missing, if there is none."""
        for known, setting in self.settings:
            if all(sizes[plate] == size for plate, size in known):
                return setting
        return Setting(_OtherSize(tuple(sizes.items())))

    def __call__(self, observation: Any, *, warn: bool = True) -> PlatePosterior:
        """The posterior given values by observed site, with plates of any size; leading axes are a batch.

        :param observation: by site; the values of an only site may come without its name.
        :param warn: whether to warn of an observation outside the simulated range, and of more or fewer rows
            than were simulated.
        :raises ValueError: for sites that are missing, of other shapes, or whose plates disagree in size.
        """
        values = self.view.by_name(observation)
        for name, rank in zip(self.view.names, self.view.ranks):
            if np.ndim(values[name]) < rank:
                shape = np.shape(values[name])
                raise ValueError(f"{name!r} must have {rank} axes, its plates' rows among them, got {shape}")
        ordered = {name: self.tree.arranged(name, np.asarray(value)) for name, value in values.items()}
        arrays, batch = self.view.arrays(ordered)
        shapes = {name: np.shape(value) for name, value in values.items()}
        sizes = {plate: most for plate, _, most in self.sizes} | self.tree.sizes(shapes)
        if min(sizes.values()) < 1:
            raise ValueError(f"a plate without rows tells nothing: {sizes}")
        for plate, least, most in self.sizes if warn else ():
            if not least <= sizes[plate] <= most:
                warnings.warn(
                    f"plate {plate!r} has {sizes[plate]} rows, where simulations had {least} to {most}: the "
                    "networks have never seen this; simulate such a size too",
                    stacklevel=2,
                )
        codes = _encode(self.tree, tuple(sizes.items()), self.encoders, self.view, arrays, {})
        codes = [code.reshape(self.members, *batch, *code.shape[2:]) for code in codes]
        seen = {name: jnp.asarray(values[name]) for name in self.view.names}
        sites, setting = self.tree.resized(self.sites, sizes), self.setting_for(sizes)
        posterior = PlatePosterior(self, tuple(codes), seen, sites, setting)
        if warn and not batch and posterior.surprise.share < 1e-3:
            warnings.warn(posterior.surprise.verdict, stacklevel=2)
        return posterior

    def _describe(self):
        given = ", ".join(self.view.names)
        sizes = ", ".join(f"{n} {a}" if a == b else f"{n} {a} to {b}" for n, a, b in self.sizes)
        lines = [f"HierarchicalPosterior given {given}: call it with an observation", f"plates: {sizes}"]
        for number in self.tree.latent_levels[:2]:
            level = self.tree.levels[number]
            lines.append(f"{', '.join(level.latent)} in {' > '.join(level.plates) or 'no plate'}")
        lines += self.losses.lines
        if self.excluded:
            lines.append(f"{self.excluded:,} simulations failed and were left out")
        return lines


@storable
@register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class PlatePosterior(Posterior):
    """The joint posterior of all sites, global and local, given one data set or a batch of them.

    :param neural: the posterior for any data set.
    :param codes: summaries for each level, ``(members, *batch_shape, *plates, C)``.
    :param observation: by site, ``batch_shape + site.shape``; ``sites``: with its plates.
    """

    neural: HierarchicalPosterior
    codes: tuple[Any, ...]
    observation: dict[str, Any]
    sites: Sites
    setting: Setting = not_stored()

    @property
    def batch_shape(self):
        return self.codes[0].shape[1:-1]

    @property
    def missing(self):
        return self.neural.view.names if self.neural.view.missing else ()

    @property
    def surprise(self) -> Surprise:
        """The distance of the data set from the simulations.

        :raises ValueError: for a batch of data sets.
        """
        self._one("surprise")
        return Surprise.of(self.codes[0][0], self.neural.typical)

    def sample(self, key: ArrayLike, sample_shape: int | Sequence[int] = ()) -> dict[str, Any]:
        neural, shape = self.neural, as_shape(sample_shape)
        return _draw(neural.tree, neural.flows, self.codes, self.sites, as_key(key), shape)

    def of_vectors(self, vector):
        return _score(self.neural.tree, self.neural.flows, self.codes, self.sites, vector)

    def _describe(self):
        return [f"PlatePosterior {self._about()}", *([] if self.batch_shape else [self.surprise.verdict])]


def fit_plates(
    key: ArrayLike, prepared: Prepared, tree: PlateTree, sizes: dict[str, int], counts: dict[str, np.ndarray],
    *, builder: Callable[..., Any] = nsf, ensemble: int = 1, **options: Any,
) -> HierarchicalPosterior:  # fmt: skip
    """As :func:`npe`, from prepared simulations, whose observed arrays are arranged by the tree.

    :param sizes: of each plate, in the arrays; ``counts``: how many of its rows are there, ``(R,)``, where
        that differs.
    """
    init_key, net_key, fit_key = split(key, 3)
    sites, names = cast(Sites, prepared.sites), list(prepared.supports)
    columns = tree.columns(sites)
    depths = [len(tree.levels[tree.level_of(name)].plates) for name in names]
    arrays = dict(zip(names, prepared.arrays))
    view = View.of(prepared.supports, arrays, prepared.some, depths, prepared.missing)
    encoders = stack([encoders_of(tree, arrays, view.missing, k) for k in split(net_key, ensemble)])
    training = np.flatnonzero(~prepared.held_out)[:_SOME]
    flows = {}
    for number, own_key in zip(tree.latent_levels, split(init_key, len(tree.levels))):
        own, around = columns[number], tree.latent_around(number)
        context = SUMMARY + sum(columns[i].shape[-1] for i in around)
        make = partial(builder, features=own.shape[-1], context=context)
        flow = Ensemble.init(own_key, make, ensemble)
        rows = prepared.theta[training][:, own].reshape(-1, own.shape[-1])
        about: Any = dict(name=f"the vector of {', '.join(tree.levels[number].latent)}", density=True)
        scale = scaling(rows, np.arange(len(rows)), np.ones(len(rows)), flow.inner_events, **about)
        flows[str(number)] = Ensemble(replace(flow.flows, event_scale=stack([scale] * ensemble)))
    counts = {plate: count[prepared.rows].astype(np.float32) for plate, count in counts.items()}
    data = [prepared.theta, *prepared.arrays, *counts.values()]
    starts = [(({n: flow.weights for n, flow in flows.items()}, encoders), (flows, view, sites))]
    loss = PlateLoss(tree, tuple(sizes.items()), tuple(counts))
    trained, _ = prepared.train(fit_key, loss, starts, data, **options)
    weights, encoders = trained.params
    flows = {number: flow.with_weights(weights[number]) for number, flow in flows.items()}
    known = {plate: jnp.asarray(count[prepared.some]) for plate, count in counts.items()}
    codes = _encode(tree, tuple(sizes.items()), encoders, view, prepared.some_arrays, known)
    least = {plate: int(count.min()) for plate, count in counts.items()}
    ranges = tuple((plate, least.get(plate, size), size) for plate, size in sizes.items())
    return trained.carried(HierarchicalPosterior(
        flows, encoders, view, typical_of(np.asarray(codes[0])[0]), sites, tree, ranges, Losses.of(trained),
        prepared.excluded,
    ))  # fmt: skip


@partial(jax.jit, static_argnums=(0, 1))
def _encode(tree, sizes, encoders, view, arrays, counts):
    """Summaries for each level, with a leading member axis."""
    seen = dict(zip(view.names, view(arrays)))
    return each_member(
        lambda weights: summaries(tree, dict(sizes), weights, seen, counts, len(arrays[0])), encoders
    )


@partial(jax.jit, static_argnums=0)
def _score(tree, flows, codes, sites, vector):
    """Log-density of vectors ``(..., D)`` under the mixture of the members."""
    columns = tree.columns(sites)
    vectors = {number: vector[..., columns[number]] for number in tree.latent_levels}

    def member(flows, codes):
        total = 0.0
        for number in tree.latent_levels:
            context = context_of(tree, flows, codes, vectors, number)
            scores = flows[str(number)](context).log_prob(vectors[number])
            depth = len(tree.levels[number].plates)
            total += scores.sum(tuple(range(scores.ndim - depth, scores.ndim)))
        return total

    scores = each_member(member, {n: flow.flows for n, flow in flows.items()}, list(codes))
    return logsumexp(scores, 0) - jnp.log(len(scores))


@partial(jax.jit, static_argnames=("tree", "sample_shape"))
def _draw(tree, flows, codes, sites, key, sample_shape):
    """Draws by site, ``sample_shape + batch_shape + site.shape``."""
    columns = tree.columns(sites)
    key, member_key = jax.random.split(key)

    def member(flows, codes, key):
        vectors: dict[int, Any] = {}
        shape = (*sample_shape, *codes[0].shape[:-1])
        vector = jnp.zeros((*shape, sites.width))
        for number in tree.latent_levels:
            key, own_key = jax.random.split(key)
            context = context_of(tree, flows, codes, vectors, number)
            plates = columns[number].shape[:-1]
            context = jnp.broadcast_to(context, (*shape, *plates, context.shape[-1]))
            vectors[number] = flows[str(number)](context).sample(own_key)
            vector = vector.at[..., columns[number]].set(vectors[number])
        return vector

    members = len(codes[0])
    keys = jax.random.split(key, members)
    vectors = each_member(member, {n: flow.flows for n, flow in flows.items()}, list(codes), keys)
    chosen = jax.random.randint(member_key, (1, *vectors.shape[1:-1], 1), 0, members)
    return sites.constrain(jnp.take_along_axis(vectors, chosen, 0)[0])
