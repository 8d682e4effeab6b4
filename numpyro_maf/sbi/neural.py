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
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jax.tree_util import register_dataclass

from numpyro_maf.flows.builders import made, nsf
from numpyro_maf.flows.flow import Flow, from_spec
from numpyro_maf.inference.completion import complete
from numpyro_maf.inference.sites import Sites
from numpyro_maf.pytrees import static
from numpyro_maf.rng import as_key, split
from numpyro_maf.sbi.densities import log_prior
from numpyro_maf.sbi.posterior import Posterior, Setting, columns_of
from numpyro_maf.sbi.view import Summary, View, axes_of, embedding_of, training, usable_rows
from numpyro_maf.traces import run_once
from numpyro_maf.train.data import held_out_rows, scaling
from numpyro_maf.train.loop import choose, train

__all__ = ["FlowPosterior", "NeuralPosterior", "Surprise", "npe"]


@dataclass(frozen=True)
class Surprise:
    """How far an observation lies from what was simulated.

    :param distance: Mahalanobis distance of its summary from those of simulations.
    :param share: of simulations that lie at least as far.
    """

    distance: float
    share: float


@register_dataclass
@dataclass(frozen=True, eq=False)
class NeuralPosterior:
    """A posterior for any observation; made by :func:`npe`. Calling it gives a :class:`FlowPosterior`.

    :param flows: the ensemble, every leaf with a leading member axis.
    :param weights: of the summary's networks, by site, with the same axis.
    :param view: of the observed sites; ``summary``: the networks.
    :param typical: mean, whitening matrix and sorted distances of the simulations' summaries.
    :param sites: the latent ones; ``setting``: the model.
    :param losses: by epoch, of training and validation.
    :param excluded: how many simulations failed and were left out.
    """

    flows: Flow
    weights: Any
    view: View
    typical: Any
    sites: Sites
    summary: Summary = static()
    setting: Setting = static()
    losses: Any = static()
    excluded: int = static(default=0)

    @property
    def members(self) -> int:
        """Of the ensemble."""
        return jax.tree.leaves(self.flows)[0].shape[0]

    @property
    def spec(self) -> dict[str, Any]:
        """Itself but for its numbers and the model as JSON-able values; :meth:`from_spec` is the way back.

        :raises TypeError: for networks of other libraries, and supports that are none of NumPyro's own.
        """
        return {
            "flow": _first(self.flows).spec,
            "members": self.members,
            "sites": self.sites.spec,
            "view": self.view.spec,
            "summary": self.summary.spec,
            "typical": [list(a.shape) for a in self.typical],
            "losses": [np.asarray(a).tolist() for a in (self.losses.train, self.losses.validation)],
            "excluded": self.excluded,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> NeuralPosterior:
        """A posterior without model of the structure that :attr:`spec` describes, with fresh weights."""

        def members(tree):
            return _stacked(*[tree] * spec["members"])

        view = View.from_spec(spec["view"])
        summary, weights_of = Summary.from_spec(spec["summary"], view)
        flows, weights = members(from_spec(spec["flow"])), members(weights_of(jax.random.key(0)))
        losses = _Losses(*map(np.array, spec["losses"]))
        typical = tuple(map(jnp.zeros, spec["typical"]))
        sites = Sites.from_spec(spec["sites"])
        return cls(
            flows, weights, view, typical, sites, summary, Setting(_no_model), losses, spec["excluded"]
        )

    def with_model(self, model: Callable, model_args=(), model_kwargs=None) -> NeuralPosterior:
        """The same posterior with its model, which files do not hold: for predictions, importance and NUTS.

        :raises ValueError: for a model with other latent sites.
        """
        found = Sites.of(model, set(self.sites.names), model_args, model_kwargs, discrete=True)
        if found.spec != self.sites.spec:
            raise ValueError(f"the posterior is of other sites than this model's: {self.sites.spec}")
        return replace(self, setting=Setting(model, tuple(model_args), dict(model_kwargs or {})))

    def __call__(self, observation: dict[str, Any], *, warn: bool = True) -> FlowPosterior:
        """The posterior given values by observed site; leading axes are a batch of observations.

        :param warn: whether to warn of an observation unlike all simulations.
        :raises ValueError: for sites that are missing or of other shapes, and values that are not finite.
        """
        arrays, batch = self.view.arrays(observation)
        contexts = _contexts(self.summary, self.members, self.weights, self.view, arrays)
        contexts = contexts.reshape(self.members, *batch, contexts.shape[-1])
        posterior = FlowPosterior(self, contexts, {k: jnp.asarray(observation[k]) for k in self.view.names})
        if warn and not batch:
            found = posterior.surprise
            if found.share < 1e-3:
                warnings.warn(
                    f"the observation lies outside what was simulated: distance {found.distance:.1f}, of the "
                    f"simulations {found.share:.2%} are as far. Either the model is wrong, or simulate more",
                    stacklevel=2,
                )
        return posterior


@register_dataclass
@dataclass(frozen=True, eq=False)
class FlowPosterior(Posterior):
    """The posterior given observations: the mixture of an ensemble's flows, exact in draws and density.

    :param neural: what made it.
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

    @property
    def batch_shape(self):
        return self.contexts.shape[1:-1]

    def sample(self, key, sample_shape=()):
        return _draw(self.sites, self.neural.flows, self.contexts, key, tuple(sample_shape))

    def log_prob(self, values):
        vector = self.sites.unconstrain(values)
        log_prob = _score(self.neural.flows, self.contexts, vector) - self.sites.log_det(vector)
        return jnp.where(self.sites.contains(values), log_prob, -jnp.inf)

    @property
    def missing(self):
        return self.neural.view.names if self.neural.view.missing else ()

    @property
    def surprise(self) -> Surprise:
        """How far the observation lies from what was simulated.

        :raises ValueError: for a batch of observations.
        """
        self._one("surprise")
        mean, whitening, distances = self.neural.typical
        distance = float(jnp.linalg.norm((self.contexts[0] - mean) @ whitening))
        share = 1 - np.searchsorted(np.asarray(distances), distance) / len(distances)
        return Surprise(distance, float(share))

    def disagreement(self, key, num_samples: int = 1000) -> float:
        """How far the ensemble's members are apart, in nats: their mean divergence from the mixture.

        The generalised Jensen-Shannon divergence: 0 if all agree, log of their number if they have nothing
        in common. Large values say that seeds decide, so more simulations or another network would.

        :raises ValueError: for an ensemble of one, and a batch of observations.
        """
        self._one("disagreement")
        if self.neural.members < 2:
            raise ValueError("disagreement needs an ensemble: npe(..., ensemble=5)")
        flows, contexts = self.neural.flows, self.contexts
        vectors = _member_draws(flows, contexts, key, (num_samples,))  # (E, S, D)
        own = jnp.stack([_member_scores(flows, contexts, v)[i] for i, v in enumerate(vectors)])
        mixed = jnp.stack([_score(flows, contexts, v) for v in vectors])
        return float((own - mixed).mean())

    def conditional(self, key, values, num_samples: int = 1000, **options) -> dict[str, Any]:
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
        flow = jax.tree.map(lambda a: a[0], self.neural.flows)
        options = {"progress": False, **options}
        rows = complete(key, flow(self.contexts[0]), filled, mask, num_samples, **options)
        return self.sites.constrain(rows)


def npe(
    key,
    model: Callable,
    sims: dict[str, Any],
    observed=("x",),
    *,
    builder: Callable[..., Flow] = nsf,
    embedding=None,
    ensemble: int = 1,
    latent=None,
    missing: bool = False,
    regression: bool | None = None,
    model_args=(),
    model_kwargs=None,
    weights=None,
    validation: Any = 0.1,
    atoms: int = 0,
    **options,
) -> NeuralPosterior:
    """Learn the posterior of a model's latent sites given its observed ones, from simulations of both.

    Each latent site's support gives its bijection to the reals, so no draw leaves it. Discrete sites with
    finitely many values are allowed: then the flow is a MADE, in the model's order. Interrupting keeps the
    best so far.

    :param key: a ``jax.random`` key.
    :param model: gives supports and shapes.
    :param sims: of :func:`~numpyro_maf.simulate`, or any values by site, ``(N, ...)``. Rows that failed or
        are not finite are left out, with a warning that says how many.
    :param observed: names of the observed sites.
    :param builder: ``(key, features, *, context) -> Flow``; with discrete sites it also gets ``columns``.
    :param embedding: a network for the observed site, or a dictionary of them by site: widths of an MLP, the
        last one of its result; ``DeepSet()``, ``Conv()``, ``GRU()``, ``Attention()`` of
        :mod:`numpyro_maf.embeddings`; a flax or equinox module. None for the numbers themselves.
    :param ensemble: how many flows, trained side by side; the posterior is their mixture.
    :param latent: names of the sites wanted; the others are integrated out. None for all.
    :param missing: whether NaN in observed sites stands for numbers that were not observed, or padding.
    :param regression: whether the flow starts from a linear regression of latent on observed values; None for
        both, of which the one that validates better is kept. Only without embedding and discrete sites.
    :param atoms: for simulations whose parameters are not the prior's: among how many of them the posterior's
        density relative to the prior's has to tell x's own (APT). 0 for the plain loss.
    :param model_args: of the model, with ``model_kwargs``; those of ``simulate`` by default.
    :param options: of :func:`~numpyro_maf.fit`: ``weights``, ``validation``, ``batch_size`` (by
        default a 64th of the rows, but 64, 128 or 256), ``learning_rate`` (0.005), ``anneal`` (0.3),
        ``average`` (0.995), ``tolerance`` (0.01), ``max_epochs``, ``patience``, ``optimizer``, ``progress``.
    :raises ValueError: for sites that are not there, supports that depend on other sites, and too few rows.
    """
    init_key, task_key, fit_key = split(as_key(key), 3)
    task = Task.of(
        task_key, model, sims, observed, embedding=embedding, ensemble=ensemble, latent=latent,
        missing=missing, model_args=model_args, model_kwargs=model_kwargs, weights=weights,
        validation=validation,
    )  # fmt: skip
    sites, real = task.sites, not any(task.sites.columns)
    if not real:
        builder = partial(made if builder is nsf else builder, columns=columns_of(sites))
    flows = _members(lambda k: builder(k, sites.width, context=task.width), init_key, ensemble)
    if flows.event_scale is not None:
        kept = np.array(sites.columns) > 0
        rows = np.flatnonzero(~task.held_out)
        scale = scaling(task.vector, rows, task.weights, lambda part: np.where(kept, 0, part))
        flows = replace(flows, event_scale=_stacked(*[scale] * ensemble))
    starts = [flows]
    if real and not task.summary.is_trained and flows.bijectors and regression is not False:
        some = task.some[~task.held_out[task.some]]
        contexts = np.asarray(task.contexts(1, task.networks))[0, ~task.held_out[task.some]]
        layer = _first(flows).regressed(task.vector[some], contexts).regression
        layers = [layer] if regression else [jax.tree.map(np.zeros_like, layer), layer]
        starts = [flows.with_regression(_stacked(*[layer] * ensemble)) for layer in layers]
    elif regression:
        raise ValueError("regression takes a flow of real sites, and no embedding")
    loss: Callable = _Loss(task.summary)
    data = [task.vector, *task.arrays]
    if atoms:
        if options.get("batch_size", atoms) < atoms:
            raise ValueError(f"{atoms} atoms need a batch_size as large, got {options['batch_size']}")
        loss, options = _AtomicLoss(task.summary, atoms), {"tolerance": 1e-3} | options
        about = {name: jnp.asarray(sims[name][:1])[0] for name in task.view.names}
        data[1:1] = [np.asarray(log_prior(task.setting, sites, about, task.vector))]
    starts = [(start.weights, start) for start in starts]
    trained, networks, flows, losses = task.train(fit_key, loss, starts, data, **options)
    flows = flows.with_weights(trained)
    seen = np.asarray(task.contexts(ensemble, networks))[0]
    return NeuralPosterior(
        flows, networks, task.view, _typical(seen), sites, task.summary, task.setting, losses, task.excluded
    )


@dataclass(frozen=True, eq=False)
class Task:
    """What a conditional density of latent sites is learned from.

    :param sites: the latent ones; ``vector``: their values, ``(N, D)``.
    :param view: of the observed ones; ``arrays``: their values, in order; ``excluded``: how many rows are
        not there.
    :param summary: the networks; ``networks``: their weights, with a leading member axis; ``width``: of
        contexts.
    :param some: numbers of up to 8192 rows; ``some_arrays``: these.
    """

    setting: Setting
    sites: Sites
    vector: np.ndarray
    view: View
    arrays: list[Any]
    summary: Summary
    networks: Any
    width: int
    weights: np.ndarray
    held_out: np.ndarray
    some: np.ndarray
    some_arrays: tuple[Any, ...]
    excluded: int

    @classmethod
    def of(
        cls, key, model, sims, observed, *, embedding=None, ensemble=1, latent=None, missing=False,
        model_args=(), model_kwargs=None, weights=None, validation: Any = 0.1,
    ) -> Task:  # fmt: skip
        """Check simulations, and choose what to learn from."""
        args = tuple(model_args) or getattr(sims, "args", ())
        kwargs = dict(model_kwargs or getattr(sims, "kwargs", {}))
        observed = (observed,) if isinstance(observed, str) else tuple(observed)
        sites, supports = _sites(model, args, kwargs, sims, observed, latent)
        names = [*sites.names, *observed]
        usable = usable_rows([sims[n] for n in names], [missing and n in observed for n in names])
        rows, count = np.flatnonzero(usable), len(usable)
        if len(rows) < 10:
            raise ValueError(f"npe needs at least 10 usable simulations, got {len(rows)} of {count}")
        if len(rows) < count:
            warnings.warn(
                f"npe leaves out {count - len(rows)} of {count} simulations that failed or are not finite",
                stacklevel=3,
            )

        def pick(a):
            return a if len(rows) == count else a[rows]

        vector = np.asarray(jax.jit(sites.unconstrain)({n: pick(np.asarray(sims[n])) for n in sites.names}))
        arrays = [pick(sims[name]) for name in observed]
        if weights is not None and np.shape(weights) != (count,):
            raise ValueError(f"weights must be ({count},), one for each simulation, got {np.shape(weights)}")
        weights = np.ones(len(rows)) if weights is None else pick(np.asarray(weights))
        split_key, net_key = split(key)
        validation = pick(np.asarray(validation)) if np.ndim(validation) else validation
        held_out = held_out_rows(split_key, validation, len(rows))
        some = np.sort(np.random.default_rng(0).permutation(len(rows))[:8192])
        axes = [axes_of(embedding_of(embedding, n, observed), np.ndim(sims[n]) - 1) for n in observed]
        view = View.of(supports, dict(zip(observed, arrays)), some, axes, missing)
        some_arrays = tuple(np.asarray(a[some], jnp.result_type(float)) for a in arrays)
        two = tuple(a[:2] for a in some_arrays)
        summary, weights_of = Summary.of(view, embedding, two)
        networks = _members(weights_of, net_key, ensemble)
        width = jax.eval_shape(lambda a: summary(_first(networks), view(a)), two).shape[-1]
        return cls(
            Setting(model, args, kwargs), sites, vector, view, arrays, summary, networks, width, weights,
            held_out, some, some_arrays, count - len(rows),
        )  # fmt: skip

    def contexts(self, members, networks):
        """Summaries of :attr:`some` rows, ``(members, R, C)``."""
        return _contexts(self.summary, members, networks, self.view, self.some_arrays)

    def train(self, key, loss, starts, data, **options):
        """Minimise a loss of ``(params, networks)`` and ``(fixed, view)``.

        :param starts: pairs ``(params, fixed)``, of which the best is taken.
        :return: params, networks, what was fixed, and the losses.
        """
        options = training(len(self.vector), options) | dict(weights=self.weights, held_out=self.held_out)
        dtype = jax.tree.leaves(starts[0][0])[0].dtype
        data = [a.astype(dtype, copy=False) if i == 0 else a for i, a in enumerate(data)]
        starts = [((params, self.networks), (fixed, self.view)) for params, fixed in starts]
        both, whole = choose(key, loss, starts, data, **options)
        (params, networks), trained, validated, _ = train(key, loss, both, data, whole, **options)
        return params, networks, whole[0], _Losses(trained, validated)


@dataclass(frozen=True, eq=False)
class _Losses:
    """By epoch."""

    train: np.ndarray
    validation: np.ndarray


@dataclass(frozen=True)
class _Loss:
    """Negative log-density of latent vectors given observed arrays, averaged over the ensemble."""

    summary: Summary

    def __call__(self, params, fixed, key, vector, *arrays):
        flows, view = fixed
        seen = view(arrays)

        def member(flow, weights, networks):
            flow = flow.with_weights(weights).randomized(key)
            return -flow(self.summary(networks, seen)).log_prob(vector)

        return each_member(member, flows, *params).mean(0)


@dataclass(frozen=True)
class _AtomicLoss:
    """Which of some parameters x was made from (APT; Greenberg, Nonnenmacher & Macke 2019, section 3.2)."""

    summary: Summary
    atoms: int

    def __call__(self, params, fixed, key, vector, log_prior, *arrays):
        flows, view = fixed
        seen = view(arrays)
        turned = jnp.stack([jnp.roll(vector, i, 0) for i in range(self.atoms)])  # (A, B, D)
        prior = jnp.stack([jnp.roll(log_prior, i, 0) for i in range(self.atoms)])

        def member(flow, weights, networks):
            flow = flow.with_weights(weights).randomized(key)
            logits = flow(self.summary(networks, seen)).log_prob(turned) - prior
            return logsumexp(logits, 0) - logits[0]

        return each_member(member, flows, *params).mean(0)


def _no_model(*args, **kwargs):
    raise ValueError("this posterior came from a file, which holds no model: use posterior.with_model(model)")


def _sites(model, args, kwargs, sims, observed, latent):
    """The latent sites, and the supports of the observed ones."""
    trace = run_once(model, args, kwargs)
    samples = {name: site for name, site in trace.items() if site["type"] == "sample"}
    for name in observed:
        if name not in samples or name not in sims:
            raise ValueError(f"observed site {name!r} is not among the model's {sorted(samples)} simulated")
    wanted = [n for n, s in samples.items() if n not in observed and not s["is_observed"]]
    if latent is not None:
        if set(latent) - set(wanted):
            raise ValueError(f"latent must be some of {wanted}, got {sorted(latent)}")
        wanted = [name for name in wanted if name in latent]
    absent = [name for name in wanted if name not in sims]
    if absent:
        raise ValueError(f"the simulations lack the latent sites {absent}")
    sites = Sites.of(model, set(wanted), args, kwargs, discrete=True)
    return sites, {name: samples[name]["fn"].support for name in observed}


def _typical(seen):
    """Mean, whitening matrix and sorted distances of summaries ``(N, C)``."""
    mean = seen.mean(0)
    values, vectors = np.linalg.eigh(np.atleast_2d(np.cov(seen.T)))
    kept = values > 1e-6 * values.max()
    whitening = vectors[:, kept] / np.sqrt(values[kept])
    distances = np.sort(np.linalg.norm((seen - mean) @ whitening, axis=1))
    return jax.device_put((mean, whitening, distances))


def _members(make, key, count):
    """What a function makes of keys, stacked."""
    return _stacked(*(make(k) for k in split(key, count)))


def _stacked(*trees):
    """Trees of the same structure as one, a leading axis counting them."""
    return jax.device_put(jax.tree.map(lambda *leaves: np.stack(leaves), *trees))


def _first(tree):
    """The first of trees that were stacked."""
    return jax.tree.map(lambda a: np.asarray(a)[0], tree)


def each_member(function, *trees):
    """``vmap`` over the leading axis; without it where there is one member, which is faster on a CPU."""
    if len(jax.tree.leaves(trees[0])[0]) > 1:
        return jax.vmap(function)(*trees)
    return jax.tree.map(lambda a: a[None], function(*jax.tree.map(lambda a: a[0], trees)))


@partial(jax.jit, static_argnums=(0, 1))
def _contexts(summary, members, weights, view, arrays):
    """``(members, B, C)``."""
    seen = view(arrays)
    return jax.vmap(lambda weights: summary(weights, seen), axis_size=members)(weights)


@partial(jax.jit, static_argnames="sample_shape")
def _draw(sites, flows, contexts, key, sample_shape):
    """Draws of the mixture by site, ``sample_shape + batch_shape + site.shape``."""
    draw_key, member_key = jax.random.split(key)
    draws = _member_draws(flows, contexts, draw_key, sample_shape)
    if len(draws) == 1:
        return sites.constrain(draws[0])
    chosen = jax.random.randint(member_key, draws.shape[1:-1], 0, len(draws))
    return sites.constrain(jnp.take_along_axis(draws, chosen[None, ..., None], 0)[0])


def _member_draws(flows, contexts, key, sample_shape):
    keys = jax.random.split(key, len(contexts))
    return each_member(lambda flow, c, key: flow(c).sample(key, sample_shape), flows, contexts, keys)


@jax.jit
def _score(flows, contexts, vector):
    return logsumexp(_member_scores(flows, contexts, vector), 0) - jnp.log(len(contexts))


@jax.jit
def _member_scores(flows, contexts, vector):
    return each_member(lambda flow, c: flow(c).log_prob(vector), flows, contexts)
