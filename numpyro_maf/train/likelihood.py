# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Maximum likelihood for flows."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Unpack, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from numpyro_maf.flows.flow import Flow
from numpyro_maf.flows.mades import Made
from numpyro_maf.pytrees import Described
from numpyro_maf.rng import as_key, split
from numpyro_maf.train.data import checked_rows, checked_weights, held_out_rows, scaling
from numpyro_maf.train.dequantize import Dequantize
from numpyro_maf.train.loop import train_best
from numpyro_maf.train.options import FitOptions, TrainOptions, check_options
from numpyro_maf.train.state import summary

__all__ = ["FitResult", "fit", "fit_loss", "fit_mixture"]


@dataclass(frozen=True, eq=False, repr=False)
class FitResult(Described):
    """What :func:`fit` returns.

    :param flow: with the weights of the best epoch.
    :param train_loss: mean over the rows, by epoch, in nats an event of the original units.
    :param validation_loss: the same of the validation rows; empty without any.
    :param best_epoch: the epoch, from 0, whose weights were kept.
    :param dequantize: the noise of integer events, trained too; None without.
    :param stopped: ``"interrupted"``, ``"callback"``, ``"not finite"``, or empty where training ended by
        itself.
    :param improving: whether the limit of epochs ended it, and its last quarter brought an improvement.
    """

    flow: Flow
    train_loss: np.ndarray
    validation_loss: np.ndarray
    best_epoch: int
    dequantize: Dequantize | None = None
    stopped: str = ""
    improving: bool = False

    def _describe(self):
        width = f"{self.flow.features} features" + f", {self.flow.context} context" * bool(self.flow.context)
        return [f"FitResult of a flow ({width})", *summary(self)]


def fit(
    key: ArrayLike,
    flow: Flow,
    x: ArrayLike,
    context: ArrayLike | None = None,
    *,
    dequantize: Dequantize | None = None,
    **options: Unpack[FitOptions],
) -> FitResult:
    """Fit a flow to data by maximum likelihood.

    Events and context are standardised by the training rows' means and standard deviations, which become
    fixed parts of the flow. Real columns with very heavy tails are compressed by arcsinh. A warning names
    constant columns, and those whose spread JAX's floating point cannot resolve: of these, densities of
    float64 NumPy arrays are right, and draws are rounded. Ctrl-C ends training with the best so far.

    :param key: a ``jax.random`` key, or an integer, for the split and the order of the rows.
    :param flow: from a builder; its weights are where training starts.
    :param x: ``(N, D)``, of images ``(N, H, W, C)``.
    :param context: ``(N, C)``, or None for a flow without context.
    :param dequantize: for integer events: their noise, new at every step and trained with the flow if it is
        a flow. The losses are then bounds.
    :param options: ``weights``, ``(N,)``, how much each row counts; ``validation``, the share of rows held
        out at random, 0.1, or ``(N,)`` booleans, True for held out; ``standardize``, False to keep the
        scalings that the flow has; ``regression``, True to start from a linear regression on the context
        (:meth:`Flow.regressed`), None to try both, where that is possible, and keep what validates better;
        and of :func:`train`: ``batch_size``, ``learning_rate``, ``max_epochs``, ``patience``, ``optimizer``,
        ``average``, ``anneal``, ``tolerance``, ``progress``, ``callback``, ``state``, ``checkpoint``.
    :raises TypeError: for an option that does not exist; the message names the nearest one.
    :raises ValueError: for shapes that do not fit, and data or weights that are not finite.
    :raises KeyboardInterrupt: when interrupted before the first epoch is finished.
    :raises FloatingPointError: when the loss stops being finite; the message names step and leaf, and the
        error's ``result`` is what this would have returned with the best epoch before.
    """
    if not isinstance(flow, Flow):
        raise TypeError(f"fit takes a Flow from a builder, got {type(flow).__name__}")
    check_options("fit", options)
    if (context is None) != (flow.context == 0):
        raise ValueError(
            f"the flow takes a context of width {flow.context}, got "
            f"{'none' if context is None else f'one of shape {np.shape(context)}'}"
        )
    if dequantize is None:
        return fit_loss(key, flow, x, _negative_log_prob, context, **options)
    return fit_loss(key, flow, x, _negative_bound, context, dequantize, **options)


def _negative_log_prob(weights, flow, key, x, context=None):
    return -flow.with_weights(weights).randomized(key)(context).log_prob(x)


def _negative_bound(weights, parts, key, x, context=None):
    flow, dequantize = parts
    key, flow_key = jax.random.split(key)
    flow = flow.with_weights(weights[0]).randomized(flow_key)
    return -dequantize.with_weights(weights[1]).bound(flow, key, x, context)


def fit_loss(
    key: ArrayLike,
    flow: Flow,
    x: ArrayLike,
    loss: Callable,
    context: ArrayLike | None = None,
    dequantize: Dequantize | None = None,
    *,
    weights: ArrayLike | None = None,
    validation: Any = 0.1,
    standardize: bool = True,
    regression: bool | None = False,
    **options: Unpack[TrainOptions],
) -> FitResult:
    """Check and standardise data, then :func:`train` a flow by a loss of its own.

    :param loss: ``loss(weights, flow, key, x)``, with ``context`` if there is one; with ``dequantize``, which
        is trained too, weights and flow come as pairs with its own. Other arguments as for :func:`fit`.
    """
    split_key, noise_key, train_key = split(as_key(key), 3)
    x = checked_rows("x", x, flow.event_shape)
    if context is not None:
        context = checked_rows("context", context, (flow.context,), len(x))
    held_out = held_out_rows(split_key, validation, len(x))
    weights = checked_weights(weights, held_out)
    rows, start = np.flatnonzero(~held_out), cast(Any, flow)
    if standardize and flow.event_scale is not None:
        inner, keep = _inner(flow, dequantize, noise_key), flow.keeps_units
        tails = flow.is_real and not keep.any()
        scale = scaling(x, rows, weights, inner, name="x", density=True, tails=tails, keep=keep)
        start = replace(start, event_scale=scale)
    if standardize and context is not None:
        start = replace(start, context_scale=scaling(context, rows, weights, name="context"))
    scales = {s: getattr(start, s) for s in ("event_scale", "context_scale")}
    events, start = _about(x, start, "event_scale", flow.is_real)
    given, start = _about(context, start, "context_scale", True)
    flows = [start]
    if regression and not _may_be_regressed(flow):
        raise ValueError(
            "regression=True needs a flow of reals with a context, and without a regression already, got one "
            f"with a context of width {flow.context}"
        )
    if regression or (regression is None and _may_be_regressed(flow)):
        some = np.random.default_rng(0).permutation(rows)[:8192]
        layer = start.regressed(events[some], given[some]).regression
        layers = [layer] if regression else [jax.tree.map(jnp.zeros_like, layer), layer]
        flows = [start.with_regression(layer) for layer in layers]
    dtype = jax.tree.leaves(flow.weights)[0].dtype
    data = [a.astype(dtype, copy=False) for a in (events, given) if a is not None]
    starts: list[Any] = [(f.weights, f) for f in flows]
    if dequantize is not None:
        starts = [((w, dequantize.weights), (flow, dequantize)) for w, flow in starts]
    trained, whole = train_best(train_key, loss, starts, data, weights=weights, held_out=held_out, **options)
    params, noise = trained.params, None
    if dequantize is not None:
        (params, noise), (whole, _) = params, whole
        noise = dequantize.with_weights(noise)
    whole = replace(whole, **{s: scale for s, scale in scales.items() if scale is not None})
    result = FitResult(
        whole.with_weights(params), trained.train_loss, trained.validation_loss, trained.best_epoch, noise,
        trained.stopped, trained.improving,
    )  # fmt: skip
    return trained.carried(result)


def _about(a, flow, name: str, direct: bool) -> tuple[Any, Any]:
    """Data less their location, taken in double precision, and the flow with a scaling about 0.

    For data that lose too much when they become float32. The others are left as they are.
    """
    scale = getattr(flow, name)
    if a is None or scale is None or not isinstance(scale.loc, np.ndarray) or not direct:
        return a, flow
    zeros = replace(scale, loc=np.zeros_like(scale.loc))
    return np.asarray(a, np.float64) - scale.loc, replace(flow, **{name: zeros})


def _inner(flow, dequantize, key) -> Callable[..., Any]:
    """What takes events to where a flow scales them; columns that keep their units become 0."""
    count = itertools.count()

    def inner(part):
        if dequantize is not None:
            new = jax.random.fold_in(key, next(count))
            part = dequantize.sample(new, part, len(flow.event_shape))[0]
        with jax.enable_x64(True):
            return np.where(flow.keeps_units, 0, flow.inner_events(part))

    return inner


def _may_be_regressed(flow) -> bool:
    """Whether a linear regression on the context can stand before its transforms."""
    scaled = flow.context > 0 and flow.event_scale is not None
    return scaled and getattr(flow, "regression", flow) is None


def fit_mixture(flow: Made, x: ArrayLike, context: ArrayLike | None = None, *, steps: int = 1000) -> Made:
    """Learn the weights of a MADE's ensemble from rows it was not trained on, by expectation-maximisation.

    The log-likelihood is concave in the weights, so there is one maximum.

    :param flow: from :func:`numpyro_maf.made` with ``masks`` above 1.
    :param x: ``(N, D)``; ``context``: ``(N, C)`` or None.
    :param steps: of expectation-maximisation.
    :raises ValueError: for a flow that is no ensemble, and shapes and numbers as :func:`fit` refuses.
    """
    if not isinstance(flow, Made) or flow.masks == 1:
        raise ValueError("fit_mixture takes a flow from made(..., masks=M) with M above 1")
    x = checked_rows("x", x, flow.event_shape)
    d: Any = flow(context if context is None else checked_rows("context", context, (flow.context,), len(x)))
    table = d.member_log_probs(jnp.asarray(x))  # (M, N)

    def step(_, log_weights):
        shares = jax.nn.softmax(table + log_weights[:, None], axis=0)
        return jnp.log(jnp.maximum(shares.mean(1), 1e-12))

    log_weights = lax.fori_loop(0, steps, step, jax.nn.log_softmax(flow.logits))
    return replace(flow, logits=log_weights)
