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

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from numpyro_maf.nn.embeddings import dense, dense_init
from numpyro_maf.pytrees import Described, static
from numpyro_maf.rng import as_key, as_shape, split
from numpyro_maf.sbi.plates import PlateTree
from numpyro_maf.sbi.posterior import Posterior, Setting, not_stored
from numpyro_maf.sbi.preprocessing import Losses, Prepared
from numpyro_maf.sbi.surprises import Surprise, typical_of
from numpyro_maf.sbi.views import View
from numpyro_maf.train.data import scaling

__all__ = ["HierarchicalPosterior", "PlatePosterior", "fit_plates"]

_HIDDEN, _SUMMARY = (64, 64), 32  # widths of the summaries' networks
_ROWS = 16  # of a plate, are scored at a step
_SOME = 8192  # simulations that scale the latent vectors


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
    :param setting: the model.
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
    setting: Setting = not_stored()

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
        return replace(self, setting=setting)

    def __call__(self, observation: Any, *, warn: bool = True) -> PlatePosterior:
        """The posterior given values by observed site, with plates of any size; leading axes are a batch.

        :param observation: by site; the values of an only site may come without its name.
        :param warn: whether to warn of an observation outside the simulated range, and of more or fewer rows
            than were simulated.
        :raises ValueError: for sites that are missing, of other shapes, or whose plates disagree in size.
        """
        values = self.view.by_name(observation)
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
        posterior = PlatePosterior(self, tuple(codes), seen, self.tree.resized(self.sites, sizes))
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

    @property
    def setting(self) -> Setting:  # type: ignore[override]
        return self.neural.setting

    def with_model(self, *args: Any, **kwargs: Any) -> PlatePosterior:
        return replace(self, neural=self.neural.with_model(*args, **kwargs))

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
    encoders = stack([_encoders(tree, arrays, view.missing, k) for k in split(net_key, ensemble)])
    training = np.flatnonzero(~prepared.held_out)[:_SOME]
    flows = {}
    for number, own_key in zip(tree.latent_levels, split(init_key, len(tree.levels))):
        own, around = columns[number], tree.latent_around(number)
        context = _SUMMARY + sum(columns[i].shape[-1] for i in around)
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
        prepared.excluded, prepared.setting,
    ))  # fmt: skip


# Summaries, from the innermost plates outwards --------------------------------------------------------


def _encoders(tree: PlateTree, arrays, missing: bool, key) -> list[Any]:
    """Random weights of the summaries' networks."""
    networks = []
    for number, (level, own_key) in enumerate(zip(tree.levels, split(key, len(tree.levels)))):
        inner = [math.prod(np.shape(arrays[name])[1 + len(level.plates) :]) for name in level.observed]
        width = (1 + missing) * sum(inner) + (_SUMMARY + 1) * len(tree.inside(number))
        networks.append(dense_init(own_key, (width or 1, *_HIDDEN, _SUMMARY)))
    return networks


def _summaries(tree: PlateTree, sizes, weights, seen, counts, rows: int) -> list[Any]:
    """For each level, ``(B, *plates, C)``: of the sites in its rows and of everything inside of them.

    :param seen: by observed site, standardised numbers and which are there or None, ``(B, *plates, ...)``.
    :param counts: by plate, ``(B,)``, how many of its rows are there.
    """
    codes: list[Any] = [None] * len(tree.levels)
    there: list[Any] = [None] * len(tree.levels)
    for number in reversed(range(len(tree.levels))):
        level = tree.levels[number]
        depth = 1 + len(level.plates)
        shape = (rows, *(sizes[plate] for plate in level.plates))
        parts, some = [], []
        for name in level.observed:
            z, present = seen[name]
            parts.append(z.reshape(*shape, -1))
            if present is not None:
                parts.append(present.reshape(*shape, -1).astype(z.dtype))
            some.append(jnp.ones(shape, bool) if present is None else present.reshape(*shape, -1).any(-1))
        for child in tree.inside(number):
            extra = tuple(range(depth, 1 + len(tree.levels[child].plates)))
            count = there[child].sum(extra)
            total = (jax.nn.silu(codes[child]) * there[child][..., None]).sum(extra)
            parts += [total / jnp.maximum(count, 1)[..., None], jnp.log1p(count)[..., None]]
            some.append(count > 0)
        codes[number] = dense(weights[number], jnp.concatenate(parts or [jnp.ones((*shape, 1))], -1))
        known: Any = jnp.stack(some or [jnp.ones(shape, bool)]).any(0)
        for axis, plate in enumerate(level.plates, 1):
            if plate in counts:
                own = counts[plate].reshape(-1, *[1] * (depth - 1))
                places = jnp.arange(sizes[plate]).reshape(-1, *[1] * (depth - 1 - axis))
                known = known & (places < own)
        there[number] = known.astype(codes[number].dtype)
    return codes


@partial(jax.jit, static_argnums=(0, 1))
def _encode(tree, sizes, encoders, view, arrays, counts):
    """Summaries for each level, with a leading member axis."""
    seen = dict(zip(view.names, view(arrays)))
    return each_member(
        lambda weights: _summaries(tree, dict(sizes), weights, seen, counts, len(arrays[0])), encoders
    )


# Flows, from the outermost plates inwards ---------------------------------------------------------------


def _context(tree: PlateTree, flows, codes, vectors, number: int):
    """What a level's flow is given: the vectors of the levels around it, in their units, and the summary."""
    code, depth = codes[number], len(tree.levels[number].plates)
    parts = []
    for around in tree.latent_around(number):
        scale, z = flows[str(around)].event_scale, vectors[around]
        z = (z - scale.loc) / scale.scale
        free = depth - len(tree.levels[around].plates)
        parts.append(z.reshape(*z.shape[:-1], *[1] * free, z.shape[-1]))
    parts.append(code)
    shape = jnp.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return jnp.concatenate([jnp.broadcast_to(part, (*shape, part.shape[-1])) for part in parts], -1)


@dataclass(frozen=True)
class PlateLoss:
    """The negative log-density of latent vectors: of each level the mean over rows, averaged over members.

    The mean over at most 16 rows, drawn anew at each step, has the same least point as the sum over all.
    """

    tree: PlateTree
    sizes: tuple[tuple[str, int], ...]
    counted: tuple[str, ...]

    def __call__(self, params: Any, fixed: Any, key: ArrayLike, vector, *arrays: Any):
        (weights, encoders), (flows, view, sites) = params, fixed
        count = len(arrays) - len(self.counted)
        seen = dict(zip(view.names, view(arrays[:count])))
        counts, columns = dict(zip(self.counted, arrays[count:])), self.tree.columns(sites)
        vectors = {number: vector[:, columns[number]] for number in self.tree.latent_levels}

        def member(flows, weights, encoders, key):
            flows = {n: flow.with_weights(weights[n]).randomized(key) for n, flow in flows.items()}
            codes = _summaries(self.tree, dict(self.sizes), encoders, seen, counts, len(vector))
            total = 0.0
            for number in self.tree.latent_levels:
                context = _context(self.tree, flows, codes, vectors, number)
                own = vectors[number]
                shape = own.shape[1:-1]
                own, context = (a.reshape(len(vector), -1, a.shape[-1]) for a in (own, context))
                mask = self._there(number, shape, counts, len(vector))
                if own.shape[1] > _ROWS:
                    chosen = jax.random.permutation(key, own.shape[1])[:_ROWS]
                    own, context, mask = own[:, chosen], context[:, chosen], mask[:, chosen]
                losses = -flows[str(number)](context).log_prob(own)
                total += (mask * losses).sum(1) / jnp.maximum(mask.sum(1), 1)
            return total

        flows = {number: flow.flows for number, flow in flows.items()}
        members = len(jax.tree.leaves(encoders)[0])
        return each_member(member, flows, weights, encoders, jax.random.split(key, members)).mean(0)

    def _there(self, number, shape, counts, rows):
        """``(B, R)``: 1 for the rows of a level that are there, 0 for those that fill up."""
        mask = jnp.ones((rows, *shape))
        for axis, plate in enumerate(self.tree.levels[number].plates):
            if plate in counts:
                places = jnp.arange(shape[axis]).reshape(-1, *[1] * (len(shape) - axis - 1))
                mask = mask * (places < counts[plate].reshape(-1, *[1] * len(shape)))
        return mask.reshape(rows, -1)


@partial(jax.jit, static_argnums=0)
def _score(tree, flows, codes, sites, vector):
    """Log-density of vectors ``(..., D)`` under the mixture of the members."""
    columns = tree.columns(sites)
    vectors = {number: vector[..., columns[number]] for number in tree.latent_levels}

    def member(flows, codes):
        total = 0.0
        for number in tree.latent_levels:
            context = _context(tree, flows, codes, vectors, number)
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
            context = _context(tree, flows, codes, vectors, number)
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
