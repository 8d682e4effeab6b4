# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

r"""Learned likelihoods and ratios, and a handler that puts them in a model in place of its simulators.

A likelihood is a conditional flow of a site's value given its parameters (Papamakarios, Sterratt & Murray
2019). A ratio is a classifier's logit: Miller, Weniger & Forré, *Contrastive Neural Ratio Estimation* (2022),
eq. 11, which tells the parameters of x from K - 1 others, or that none among K is its own, and which at its
optimum is :math:`\log p(x \mid \theta) / p(x)` without a constant that depends on x.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import logsumexp
from jax.tree_util import register_dataclass
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.distributions.transforms import ReshapeTransform
from numpyro.primitives import Messenger

from numpyro_maf.flows.builders import nsf
from numpyro_maf.flows.flow import Flow
from numpyro_maf.flows.linear import Standardize
from numpyro_maf.flows.supports import bijection, is_real, of_one_number
from numpyro_maf.nn.mlp import MLP
from numpyro_maf.pytrees import static
from numpyro_maf.rng import as_key, split
from numpyro_maf.sbi.simulator import parameters, swap
from numpyro_maf.sbi.view import Summary, View, axes_of, embedding_of, training, usable_rows
from numpyro_maf.traces import run_once
from numpyro_maf.train.data import held_out_rows, scaling
from numpyro_maf.train.likelihood import fit
from numpyro_maf.train.loop import train

__all__ = ["Ratio", "RatioDistribution", "learned", "nle", "nre"]


def nle(
    key,
    model: Callable,
    sims: dict[str, Any],
    site: str = "x",
    *,
    builder: Callable[..., Flow] = nsf,
    failures: str = "error",
    latent=None,
    model_args=(),
    model_kwargs=None,
    regression: bool | None = None,
    **options,
) -> Flow:
    """Learn a site's likelihood from simulations: a flow, ``likelihood(theta)`` being a distribution of x.

    Of a :class:`~numpyro_maf.Simulator`, theta is its own parameters side by side, ``(..., P)``, and every
    element of the plates it is in is a row to learn from. Of any other site, theta is all other sites that
    are not observed, or those of ``latent``, side by side in the model's order. x is the site's value as a
    vector. See :func:`learned` for what comes next.

    :param key: a ``jax.random`` key.
    :param sims: of :func:`~numpyro_maf.simulate`, with parameters wherever they should be learned.
    :param builder: ``(key, features, *, context) -> Flow``.
    :param failures: what becomes of rows that failed or are not finite: ``"error"``, or ``"exclude"``, with
        which the likelihood is that of a simulation that succeeds.
    :param latent: names, where the model has more data sites that will be observed. None for all.
    :param model_args: of the model, with ``model_kwargs``; those of ``simulate`` by default.
    :param regression: as for :func:`~numpyro_maf.npe`.
    :param options: of :func:`~numpyro_maf.fit`.
    :raises ValueError: when simulations failed, unless told what to do, and for sites that are not there.
    """
    init_key, fit_key = split(as_key(key))
    args, kwargs = _call(sims, model_args, model_kwargs)
    theta, x, support = _pairs(model, args, kwargs, sims, site, latent)
    theta, x = _without_failures("nle", failures, [theta, x])
    flow = builder(init_key, x.shape[-1], context=theta.shape[-1])
    each = of_one_number(support)
    if not is_real(each) and not each.is_discrete and flow.bijectors and not flow.outer:
        flow = flow.onto(each)
        edge = ~np.isfinite(np.asarray(bijection(each).inv(x))).all(-1)
        if edge.any():
            raise ValueError(
                f"{edge.sum()} of {len(x)} values of {site!r} lie on the edge of its support, or off it, "
                "where it has no density"
            )
    if not flow.bijectors:
        regression = False
    options = training(len(x), options)
    return fit(fit_key, flow, x, theta, regression=regression, **options).flow


def nre(
    key,
    model: Callable,
    sims: dict[str, Any],
    observed=("x",),
    *,
    embedding=None,
    hidden: tuple[int, ...] = (64, 64, 64),
    contrasts: int = 10,
    failures: str = "error",
    missing: bool = False,
    latent=None,
    model_args=(),
    model_kwargs=None,
    validation: Any = 0.1,
    weights=None,
    **options,
) -> Ratio:
    """Learn the ratio of likelihood and evidence: ``ratio(theta, x) = log p(x | theta) / p(x)``.

    theta is as for :func:`nle`: a lone observed simulator's own parameters, else all latent sites. A ratio of
    several observed sites is a function to call, and stands at no site of a model.

    :param embedding: as for :func:`~numpyro_maf.npe`.
    :param hidden: widths of the classifier's hidden layers.
    :param contrasts: K, how many parameters it chooses among.
    :param failures: as for :func:`nle`, with ``latent``; ``missing`` as for :func:`~numpyro_maf.npe`.
    :param options: of :func:`~numpyro_maf.fit`.
    :raises ValueError: as for :func:`nle`.
    """
    init_key, split_key, fit_key = split(as_key(key), 3)
    args, kwargs = _call(sims, model_args, model_kwargs)
    observed = (observed,) if isinstance(observed, str) else tuple(observed)
    trace = run_once(model, args, kwargs)
    supports = {}
    for name in observed:
        if name not in trace or name not in sims:
            raise ValueError(f"observed site {name!r} is not among the model's {sorted(trace)} simulated")
        supports[name] = trace[name]["fn"].support
    if len(observed) == 1:
        theta, flat, _ = _pairs(model, args, kwargs, sims, observed[0], latent)
        simulator = parameters(trace[observed[0]]["fn"])
        shape = np.shape(sims[observed[0]])[1:] if simulator is None else simulator.event_shape
        arrays = [flat.reshape(len(flat), *shape)]
    else:
        theta = _latents(sims, trace, observed, latent)
        arrays = [np.asarray(sims[name]) for name in observed]
    weights = np.ones(len(theta)) if weights is None else np.asarray(weights)
    if weights.shape != (len(theta),) or (weights < 0).any():
        raise ValueError(f"weights must be ({len(theta)},) and not negative, got shape {weights.shape}")
    weights, theta, *arrays = _without_failures("nre", failures, [weights, theta, *arrays], missing)
    n = len(theta)
    held_out = held_out_rows(split_key, validation, n)
    if min((~held_out).sum(), held_out.sum() or n) < 2 * contrasts:
        raise ValueError(f"nre needs more than {2 * contrasts} rows to train and to validate on, got {n}")
    some = np.sort(np.random.default_rng(0).permutation(n)[:8192])
    axes = [axes_of(embedding_of(embedding, m, observed), a.ndim - 1) for m, a in zip(observed, arrays)]
    view = View.of(supports, dict(zip(observed, arrays)), some, axes, missing)
    example = tuple(jnp.asarray(a[:2], float) for a in arrays)
    summary, weights_of = Summary.of(view, embedding, example)
    networks = weights_of(init_key)
    width = jax.eval_shape(lambda a: summary(networks, view(a)), example).shape[-1] + theta.shape[-1]
    net = MLP.init(init_key, width, (1, 1), hidden=hidden)
    scale = scaling(theta, np.flatnonzero(~held_out), weights)
    ratio = Ratio(net, networks, view, scale, summary)
    options = training(n, {"tolerance": 1e-3} | options)  # a choice among a few saturates
    if options["batch_size"] < 2 * contrasts:
        raise ValueError(f"{contrasts} contrasts need a batch_size of {2 * contrasts} or more")
    params = net, networks
    data = (theta.astype(jnp.result_type(float), copy=False), *arrays)
    found = train(
        fit_key, _Contrast(contrasts), params, data, ratio, weights=weights, held_out=held_out, **options
    )
    net, networks = found[0]
    return Ratio(net, networks, view, scale, summary)


@register_dataclass
@dataclass(frozen=True, eq=False)
class Ratio:
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
        """P."""
        return self.theta_scale.loc.shape[-1]

    @property
    def spec(self) -> dict[str, Any]:
        """Itself but for its numbers as JSON-able values; :meth:`from_spec` is the way back.

        :raises TypeError: for networks of other libraries.
        """
        widths = [weight.shape[0] for weight in self.net.weights]
        return {
            "context": self.context, "widths": widths, "view": self.view.spec, "summary": self.summary.spec
        }  # fmt: skip

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Ratio:
        """A ratio of the structure that :attr:`spec` describes, with fresh weights."""
        view = View.from_spec(spec["view"])
        summary, weights_of = Summary.from_spec(spec["summary"], view)
        key, one = jax.random.key(0), jnp.ones(spec["context"])
        inputs, *hidden = spec["widths"]
        net = MLP.init(key, inputs, (1, 1), hidden=tuple(hidden))
        return cls(net, weights_of(key), view, Standardize(one, one), summary)

    def __call__(self, theta, x):
        """``log p(x | theta) / p(x)`` of ``(..., P)`` and ``(..., *event_shape)``, or values by site."""
        theta = jnp.asarray(theta)
        values = x if isinstance(x, dict) else {self.view.names[0]: x}
        arrays, batch = self.view.rows(values)
        seen = self.summary(self.networks, self.view(arrays))
        return self.logit(theta, seen.reshape(*batch, seen.shape[-1]))

    def logit(self, theta, seen):
        """The classifier's result from parameters and summaries, which broadcast."""
        z = jnp.arcsinh((theta - self.theta_scale.loc) / self.theta_scale.scale)
        return self.net(None, _beside(z, seen))[..., 0, 0]


@dataclass(frozen=True)
class _Contrast:
    """NRE-C with gamma = 1: K parameters, of which the first is x's own, or none."""

    contrasts: int

    def __call__(self, params, ratio, key, theta, *arrays):
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

    def sample(self, key, sample_shape=()):
        raise NotImplementedError("a ratio can be scored, not drawn from: use the model with its simulator")

    def log_prob(self, value):
        return self.ratio(self.theta, value)


class learned(Messenger):
    """A model with learned likelihoods or ratios at some of its sites, as NUTS and SVI take it.

    Whatever plates and ``to_event`` did to a :class:`~numpyro_maf.Simulator` is done to what replaces it.
    ``learned(model, {"x": likelihood})`` is called as the model is.

    :param fn: the model.
    :param likelihoods: by site, of :func:`nle` or :func:`nre`.
    """

    def __init__(self, fn=None, likelihoods: dict[str, Any] | None = None):
        self.likelihoods = dict(likelihoods or {})
        self.latent: list[Any] = []
        for name, value in self.likelihoods.items():
            if not isinstance(value, (Flow, Ratio)):
                raise TypeError(f"{name!r} must be what nle or nre gave, got {type(value).__name__}")
            if isinstance(value, Ratio) and len(value.view.names) > 1:
                raise ValueError(
                    f"a ratio of several sites, {list(value.view.names)}, stands at none of them: add "
                    "ratio(theta, values) by numpyro.factor"
                )
        super().__init__(fn)

    def __enter__(self):
        self.latent = []
        return super().__enter__()

    def process_message(self, msg):
        if msg["type"] != "sample" or msg["name"] not in self.likelihoods:
            return
        likelihood, fn = self.likelihoods[msg["name"]], msg["fn"]
        if parameters(fn) is not None:
            msg["fn"] = swap(fn, lambda s: _at(likelihood, s.theta, s.event_shape, s.each))
        else:
            theta = jnp.concatenate([jnp.ravel(value) for value in self.latent])
            msg["fn"] = _at(likelihood, theta, fn.shape(), of_one_number(fn.support))

    def postprocess_message(self, msg):
        if msg["type"] == "sample" and not msg["is_observed"] and msg["name"] not in self.likelihoods:
            self.latent.append(msg["value"])


def _at(likelihood, theta, event_shape, support):
    """The distribution of a site given its parameters."""
    if theta.shape[-1] != likelihood.context:
        raise ValueError(
            f"the likelihood takes {likelihood.context} parameters, the site has {theta.shape[-1]}; which "
            "sites it takes is for nle(latent=...) to say"
        )
    if isinstance(likelihood, Ratio):
        return RatioDistribution(likelihood, theta, event_shape, support)
    d: Any = likelihood(theta)
    if event_shape == d.event_shape:
        return d
    return dist.TransformedDistribution(d, ReshapeTransform(event_shape, d.event_shape))


# Rows to learn from -------------------------------------------------------------------------------


def _call(sims, model_args, model_kwargs):
    args = tuple(model_args) or getattr(sims, "args", ())
    return args, dict(model_kwargs or getattr(sims, "kwargs", {}))


def _pairs(model, args, kwargs, sims, site, chosen=None):
    """Parameters and values of a site, ``(R, P)`` and ``(R, D)``, and its support."""
    trace = run_once(model, args, kwargs)
    if site not in trace or site not in sims:
        raise ValueError(f"site {site!r} is not among the model's {sorted(trace)} simulated")
    fn, x = trace[site]["fn"], np.asarray(sims[site])
    simulator = parameters(fn)
    if simulator is None:
        return _latents(sims, trace, (site,), chosen), x.reshape(len(x), -1), fn.support
    names = [n for n, s in trace.items() if s["type"] == "sample" and not s["is_observed"] and n in sims]

    def theta(values):
        run = handlers.trace(handlers.substitute(handlers.seed(model, jax.random.key(0)), data=values))
        with handlers.block():
            found = run.get_trace(*args, **kwargs)[site]["fn"]
        inner: Any = parameters(found)
        batch = found.shape()[: len(found.shape()) - len(inner.event_shape)]
        return jnp.broadcast_to(inner.theta, (*batch, inner.theta.shape[-1]))

    one = jax.jit(jax.vmap(theta))
    given = {n: np.asarray(sims[n]) for n in names}
    starts = range(0, len(x), 10_000)
    rows = np.concatenate([one({n: v[i : i + 10_000] for n, v in given.items()}) for i in starts])
    width = int(np.prod(simulator.event_shape, initial=1))
    return rows.reshape(-1, rows.shape[-1]), x.reshape(-1, width), fn.support


def _latents(sims, trace, observed, chosen=None):
    """All latent sites, or those chosen, side by side, in the model's order."""
    latent = [
        n for n, s in trace.items() if s["type"] == "sample" and not s["is_observed"] and n not in observed
    ]
    if chosen is not None:
        if not chosen or set(chosen) - set(latent):
            raise ValueError(f"latent must be some of {latent}, got {sorted(chosen)}")
        latent = [n for n in latent if n in chosen]
    absent = [n for n in latent if n not in sims]
    if absent:
        raise ValueError(f"the simulations lack the latent sites {absent}")
    parts = [np.asarray(sims[n]) for n in latent]
    return np.concatenate([p.reshape(len(p), -1) for p in parts], -1)


def _without_failures(who, failures, arrays, missing=False):
    if failures not in ("error", "exclude"):
        raise ValueError(f"failures must be 'error' or 'exclude', got {failures!r}")
    usable = usable_rows(arrays, [missing and i > 1 for i in range(len(arrays))])  # weights, theta, data
    if usable.all():
        return arrays
    what = f"{(~usable).sum()} of {len(usable)} simulations failed or are not finite"
    if failures == "error":
        raise ValueError(
            f"{what}: whether a simulation fails depends on its parameters, so without them {who} learns "
            "what holds for those that succeed. If that is wanted, pass failures='exclude'"
        )
    warnings.warn(f"{who} leaves out {what.split(' failed')[0]} that failed", stacklevel=3)
    return [a[usable] for a in arrays]


def _beside(a, b):
    batch = jnp.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    return jnp.concatenate([jnp.broadcast_to(v, (*batch, v.shape[-1])) for v in (a, b)], -1)
