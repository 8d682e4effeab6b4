# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Maximum likelihood for flows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from numpyro_maf.flows.flow import Flow
from numpyro_maf.flows.mades import Made
from numpyro_maf.rng import as_key, split
from numpyro_maf.train.data import _finite, held_out_rows, scaling
from numpyro_maf.train.dequantize import Dequantize
from numpyro_maf.train.loop import choose, train

__all__ = ["FitResult", "fit", "fit_loss", "fit_mixture"]


@dataclass(frozen=True)
class FitResult:
    """What :func:`fit` returns.

    :param flow: with the weights of the best epoch.
    :param train_loss: mean over the rows, by epoch, in nats an event of the original units.
    :param validation_loss: the same of the validation rows; empty without any.
    :param best_epoch: the epoch, from 0, whose weights were kept.
    :param dequantize: the noise of integer events, trained too; None without.
    """

    flow: Flow
    train_loss: np.ndarray
    validation_loss: np.ndarray
    best_epoch: int
    dequantize: Dequantize | None = None


def fit(key, flow: Flow, x, context=None, *, dequantize: Dequantize | None = None, **options) -> FitResult:
    """Fit a flow to data by maximum likelihood.

    Events and context are standardised by the training rows' means and standard deviations, which become
    fixed parts of the flow. Interrupting returns the best so far.

    :param key: a ``jax.random`` key, for the split and the order of the rows.
    :param flow: from a builder; its weights are where training starts.
    :param x: ``(N, D)``, of images ``(N, H, W, C)``.
    :param context: ``(N, C)``, or None for a flow without context.
    :param dequantize: for integer events: their noise, new at every step and trained with the flow if it is
        a flow. The losses are then bounds.
    :param options: ``weights``, ``(N,)``, how much each row counts; ``validation``, the share of rows held
        out at random, 0.1, or ``(N,)`` booleans, True for held out; ``standardize``, False to keep the
        scalings that the flow has; ``regression``, True to start from a linear regression on the context
        (:meth:`Flow.regressed`), None to try both and keep what validates better; and of :func:`train`:
        ``batch_size``, ``learning_rate``, ``max_epochs``, ``patience``, ``optimizer``, ``average``,
        ``anneal``, ``tolerance``, ``progress``.
    :raises ValueError: for shapes that do not fit, and data or weights that are not finite.
    :raises FloatingPointError: when the loss stops being finite; the message names step and leaf.
    """
    if not isinstance(flow, Flow):
        raise TypeError(f"fit takes a Flow from a builder, got {type(flow).__name__}")
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
    key,
    flow: Flow,
    x,
    loss: Callable,
    context=None,
    dequantize: Dequantize | None = None,
    *,
    weights=None,
    validation: Any = 0.1,
    standardize: bool = True,
    regression: bool | None = False,
    **options,
) -> FitResult:
    """Check and standardise data, then :func:`train` a flow by a loss of its own.

    :param loss: ``loss(weights, flow, key, x)``, with ``context`` if there is one; with ``dequantize``, which
        is trained too, weights and flow come as pairs with its own. Other arguments as for :func:`fit`.
    """
    x = _finite("x", x, 1 + len(flow.event_shape))
    n = len(x)
    if x.shape[1:] != flow.event_shape:
        raise ValueError(f"x must be ({n}, {', '.join(map(str, flow.event_shape))}), got {x.shape}")
    if context is not None:
        context = _finite("context", context, 2)
        if context.shape != (n, flow.context):
            raise ValueError(f"context must be ({n}, {flow.context}), got {context.shape}")
    weights = np.ones(n) if weights is None else _finite("weights", weights, 1)
    if weights.shape != (n,) or (weights < 0).any() or not weights.any():
        raise ValueError(f"weights must be ({n},), not negative and not all 0")
    key, split_key = split(as_key(key))
    held_out = held_out_rows(split_key, validation, n)
    for rows, what in [(~held_out, "train on"), (held_out, "validate on")]:
        if rows.any() and not weights[rows].any():
            raise ValueError(f"all rows to {what} have weight 0")
    rows = np.flatnonzero(~held_out)
    if standardize and flow.event_scale is not None:

        def inner(part):
            if dequantize is not None:
                part = dequantize.sample(split_key, part, len(flow.event_shape))[0]
            for transform in flow.outer[::-1]:
                part = np.asarray(transform.inv(part))
            return np.where(_discrete(flow), 0, part)

        flow = replace(flow, event_scale=scaling(x, rows, weights, inner))
    if standardize and context is not None:
        flow = replace(flow, context_scale=scaling(context, rows, weights))
    flows = [flow]
    if regression is not False:
        some = np.random.default_rng(0).permutation(rows)[:8192]
        layer: Any = flow.regressed(x[some], context[some]).regression
        layers = [layer] if regression else [jax.tree.map(jnp.zeros_like, layer), layer]
        flows = [flow.with_regression(layer) for layer in layers]
    dtype = jax.tree.leaves(flow.weights)[0].dtype
    data = [a.astype(dtype, copy=False) for a in (x, context) if a is not None]
    starts: list[Any] = [(flow.weights, flow) for flow in flows]
    if dequantize is not None:
        starts = [((w, dequantize.weights), (flow, dequantize)) for w, flow in starts]
    options |= dict(weights=weights, held_out=held_out)
    params, whole = choose(key, loss, starts, data, **options)
    best, trained, validated, epoch = train(key, loss, params, data, whole, **options)
    if dequantize is None:
        return FitResult(whole.with_weights(best), trained, validated, epoch)
    best, noise = best
    return FitResult(whole[0].with_weights(best), trained, validated, epoch, dequantize.with_weights(noise))


def fit_mixture(flow: Flow, x, context=None, *, steps: int = 1000) -> Flow:
    """Learn the weights of a MADE's ensemble from rows it was not trained on, by expectation-maximisation.

    The log-likelihood is concave in the weights, so there is one maximum.

    :param flow: from :func:`numpyro_maf.made` with ``masks`` above 1.
    :param x: ``(N, D)``; ``context``: ``(N, C)`` or None.
    :param steps: of expectation-maximisation.
    :raises ValueError: for a flow that is no ensemble.
    """
    if not isinstance(flow.base, Made) or flow.base.masks == 1:
        raise ValueError("fit_mixture takes a flow from made(..., masks=M) with M above 1")
    d: Any = flow(context)
    table = d.member_log_probs(jnp.asarray(x))  # (M, N)

    def step(_, log_weights):
        shares = jax.nn.softmax(table + log_weights[:, None], axis=0)
        return jnp.log(jnp.maximum(shares.mean(1), 1e-12))

    log_weights = lax.fori_loop(0, steps, step, jax.nn.log_softmax(flow.base.logits))
    return replace(flow, base=replace(flow.base, logits=log_weights))


def _discrete(flow) -> np.ndarray:
    """Which columns keep their units."""
    if isinstance(flow.base, Made):
        return np.array([c.is_discrete for c in flow.base.columns])
    return np.zeros(flow.features, bool)
