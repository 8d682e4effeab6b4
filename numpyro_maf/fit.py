# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""One training loop for everything that trains, and maximum likelihood for flows on top of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from tqdm.auto import tqdm

from numpyro_maf.bijectors import Standardize
from numpyro_maf.dequantize import Dequantize
from numpyro_maf.flow import Flow
from numpyro_maf.made import Made
from numpyro_maf.rng import as_key, generator, split

__all__ = ["FitResult", "fit", "fit_loss", "fit_mixture", "train"]


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


def train(
    key,
    loss: Callable,
    params,
    data,
    fixed=None,
    *,
    weights,
    held_out,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    max_epochs: int = 1000,
    patience: int = 20,
    optimizer: optax.GradientTransformation | None = None,
    average: float = 0.0,
    anneal: float = 1.0,
    tolerance: float = 0.0,
    progress: bool = True,
):
    """Minimise the weighted mean of a loss by rows; keep the parameters that validate best.

    Every validation row counts in every validation; without any, the training loss stops the training. An
    epoch is one compiled call; the same loss and structure compile once in a process, and again when the rows
    outgrow the room of 1024, 2048, …

    :param loss: ``loss(params, fixed, key, *rows) -> (rows,)``; the key is new at every step, and the same at
        every validation, so that random losses compare.
    :param params: pytree of arrays, trained.
    :param data: arrays ``(N, ...)``; those of more than 256 MB together stay where they are, in memory or
        mapped from disk, and pass by in blocks of rows.
    :param fixed: pytree of arrays, passed through.
    :param weights: ``(N,)``.
    :param held_out: ``(N,)`` booleans, the validation rows.
    :param batch_size: rows a step; the last batch of an epoch is smaller, not dropped.
    :param learning_rate: of Adam, after clipping the gradient's norm to 5.
    :param max_epochs: at most so many epochs.
    :param patience: stop after so many epochs without improvement.
    :param optimizer: any optax optimizer instead.
    :param average: what is validated and kept are parameters averaged over steps, each average keeping this
        share of the one before (Polyak & Juditsky 1992, exponentially): 0.99 takes the noise of the last
        hundred steps out. 0 for none.
    :param anneal: what the learning rate is multiplied by, going on from the best parameters, whenever half
        the patience has passed without improvement. 1 for never.
    :param tolerance: by how much a loss must fall to count as an improvement in this; the best parameters are
        kept in any case.
    :param progress: show a progress bar.
    :return: best parameters, training losses, validation losses, best epoch.
    :raises FloatingPointError: when the loss stops being finite.
    """
    for name, value in [("batch_size", batch_size), ("max_epochs", max_epochs)]:
        if int(value) != value or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    rate = learning_rate if optimizer is None else 1.0
    optimizer = optimizer or _ADAM
    dtype = jax.tree.leaves(params)[0].dtype
    rows, valid = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    weights = np.asarray(weights, dtype)
    batch_size = min(batch_size, len(rows))
    resident = sum(a.nbytes for a in data) <= _RESIDENT
    if resident:
        weights, *data = (_with_room(np.asarray(a), _room(len(weights))) for a in (weights, *data))
    key, valid_key = split(key)
    chunk = max(batch_size, 1024 if len(valid) > 1024 else 256)
    state, best, mean = jax.jit(optimizer.init)(params), params, params
    train_loss, validation_loss, best_epoch, best_loss, taken = [], [], -1, np.inf, 0
    mark, marked, turned = np.inf, -1, -1
    order, one_pass = generator(key), partial(_epoch, loss=loss, optimizer=optimizer)
    bar = tqdm(range(max_epochs), disable=not progress, desc="fit", unit="epoch")
    try:
        for epoch in bar:
            key, epoch_key = jax.random.split(key)
            sums = np.zeros(2)
            for part in _feed(epoch_key, data, weights, order.permutation(rows), batch_size, resident):
                run = partial(one_pass, params, state, mean, average, rate, fixed)
                params, state, mean, losses, sum_ = run(*part)
                losses = np.asarray(losses)[: part[-1]]
                if not np.isfinite(losses).all():
                    step = int(np.argmin(np.isfinite(losses)))
                    params, *_ = run(*part[:-1], step)  # as they were when it failed
                    _report(loss, params, fixed, part, step, taken + step)
                sums, taken = sums + np.asarray(sum_), taken + len(losses)
            train_loss.append(float(sums[0] / sums[1]))
            if len(valid):
                sums = np.zeros(2)
                for part in _feed(valid_key, data, weights, valid, chunk, resident):
                    sums = sums + np.asarray(_sums(mean, fixed, *part, loss=loss))
                validation_loss.append(float(sums[0] / sums[1]))
            current = (validation_loss or train_loss)[-1]
            if current < best_loss:
                best, best_loss, best_epoch = mean, current, epoch
            if current < mark - tolerance:
                mark, marked = current, epoch
            bar.set_postfix(loss=f"{train_loss[-1]:.4f}", best=f"{best_loss:.4f}")
            if epoch - marked >= patience:
                break
            if anneal != 1 and epoch - max(marked, turned) >= patience / 2:
                rate, turned, params, mean = anneal * rate, epoch, best, best
    except KeyboardInterrupt:
        bar.write("interrupted: keeping the best so far")
    finally:
        bar.close()
    return best, np.array(train_loss), np.array(validation_loss), best_epoch


def choose(key, loss, starts, data, *, weights, batch_size: int = 256, max_epochs: int = 1000, **options):
    """Of several starts ``(params, fixed)`` the one that validates best after a trial of each.

    A trial is 20 epochs, of many rows fewer: 1000 steps. Arguments as for :func:`train`.
    """
    if len(starts) == 1:
        return starts[0]
    epochs = min(max(1000 * batch_size // len(weights), 1), 20, max_epochs)
    options |= dict(batch_size=batch_size, max_epochs=epochs, average=0.0, progress=False, weights=weights)

    def least(start):
        _, trained, validated, _ = train(key, loss, start[0], data, start[1], **options)
        return min(validated if len(validated) else trained, default=np.inf)

    return min(starts, key=least)


# The learning rate is a number that the compiled epoch is given, so that all rates share it.
_ADAM = optax.chain(optax.clip_by_global_norm(5.0), optax.adam(1.0))


_RESIDENT, _BLOCK = 2**28, 2**26  # bytes


def _feed(key, data, weights, rows, size, resident):
    """Data and weights, whole or block by block, with a key, row numbers in batches, and how many batches."""
    if resident:
        yield data, weights, key, *_batches(rows, size, len(weights))
        return
    each = sum(a.nbytes for a in data) // len(weights)
    block = max(_BLOCK // each // size, 1) * size
    mixed = generator(key)
    for i, start in enumerate(range(0, len(rows), block)):
        chosen = np.sort(rows[start : start + block])  # in the order of the disk, mixed again below
        weight, *part = (_with_room(a[chosen], block) for a in (weights, *data))
        yield part, weight, jax.random.fold_in(key, i), *_batches(mixed.permutation(len(chosen)), size, block)


def _room(count: int) -> int:
    """How many rows an array of so many gets room for: few sizes, so that few are compiled."""
    return count if count > 2**14 else max(2**10, 1 << (count - 1).bit_length())


def _with_room(a, room):
    """An array on the device, with copies of its last row in the room that is left."""
    left = room - len(a)
    return jax.device_put(np.concatenate([a, np.repeat(a[-1:], left, 0)]) if left else a)


def _batches(rows, size, room):
    """Row numbers in batches ``(steps, size)``, and how many of these are used.

    Filled up with rows that do not count, ``~row``: real ones, for losses that compare rows.
    """
    batches = np.empty((-(-room // size), size), int)
    batches.reshape(-1)[: len(rows)] = rows
    batches.reshape(-1)[len(rows) :] = ~np.resize(rows, batches.size - len(rows))
    return batches, -(-len(rows) // size)


def _batch_loss(params, loss, fixed, data, weights, batch):
    """Weighted loss of a batch, a key and row numbers, and its total weight."""
    key, batch = batch
    rows = jnp.where(batch < 0, ~batch, batch)
    weight = jnp.where(batch < 0, 0, weights[rows])
    losses = loss(params, fixed, key, *(a[rows] for a in data))
    total = weight.sum()
    # A row that does not count must not spoil the sum either, whatever its loss.
    counted = jnp.where(weight > 0, weight * losses, 0).sum()
    return counted / jnp.maximum(total, jnp.finfo(total.dtype).tiny), total


@partial(jax.jit, static_argnames=("loss", "optimizer"))
def _epoch(params, state, mean, average, rate, fixed, data, weights, key, batches, steps, *, loss, optimizer):
    """One pass over the training rows. The loss of a step whose gradient is not finite is NaN."""
    keys = _keys(key, batches)

    def step(i, carry):
        params, state, mean, values, totals = carry
        value_and_grad = jax.value_and_grad(_batch_loss, has_aux=True)
        batch = keys[i], batches[i]
        (value, total), gradient = value_and_grad(params, loss, fixed, data, weights, batch)
        value = jnp.where(jnp.isfinite(optax.tree.norm(gradient)), value, jnp.nan)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, jax.tree.map(lambda u: rate * u, updates))
        mean = jax.tree.map(lambda m, p: p + average * (m - p), mean, params)
        return params, state, mean, values.at[i].set(value), totals.at[i].set(total)

    zeros = jnp.zeros(len(batches), weights.dtype)
    carry = lax.fori_loop(0, steps, step, (params, state, mean, zeros, zeros))
    params, state, mean, values, totals = carry
    return params, state, mean, values, (jnp.sum(values * totals), totals.sum())


@partial(jax.jit, static_argnames=("loss",))
def _sums(params, fixed, data, weights, key, batches, steps, *, loss):
    """The weighted loss of all rows in the batches, and their weight."""
    keys = _keys(key, batches)

    def step(i, sums):
        value, total = _batch_loss(params, loss, fixed, data, weights, (keys[i], batches[i]))
        return sums[0] + value * total, sums[1] + total

    zero = jnp.zeros((), weights.dtype)
    return lax.fori_loop(0, steps, step, (zero, zero))


def _keys(key, batches):
    """One for each batch."""
    return jax.random.split(key, len(batches))


def _report(loss, params, fixed, part, at, step):
    """Raise with the first leaf whose gradient is not finite at the batch of the part that failed."""
    data, _, key, batches, _ = part
    key, batch = _keys(key, batches)[at], batches[at][batches[at] >= 0]

    def total(params):
        return loss(params, fixed, key, *(a[batch] for a in data)).sum()

    value, gradient = jax.value_and_grad(total)(params)
    leaves, _ = jax.tree_util.tree_flatten_with_path(gradient)
    bad = [jax.tree_util.keystr(path) for path, leaf in leaves if not np.isfinite(leaf).all()]
    where = f"the gradient is not finite in {bad[0]}" if bad else "all gradients are finite"
    raise FloatingPointError(
        f"the loss is {float(value)} at step {step}, {where} ({len(bad)} of {len(leaves)} leaves); "
        "look for outliers in the data, or lower the learning rate"
    )


def _finite(name, value, ndim):
    value = np.asarray(value)
    if value.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} axes, got shape {value.shape}")
    if not np.isfinite(value).all():
        rows = np.flatnonzero(~np.isfinite(value.reshape(len(value), -1)).all(1))
        raise ValueError(f"{name} is not finite in {len(rows)} rows, the first is {rows[0]}")
    return value


def held_out_rows(key, validation, n) -> np.ndarray:
    """Which rows validate: given, or a random share."""
    if np.ndim(validation):
        mask = np.asarray(validation)
        if mask.shape != (n,) or mask.dtype != bool:
            raise ValueError(f"validation must be a share or ({n},) booleans, got {mask.shape}")
    else:
        if not 0 <= validation < 1:
            raise ValueError(f"validation must be in [0, 1), got {validation}")
        mask = np.zeros(n, bool)
        mask[generator(key).permutation(n)[: round(validation * n)]] = True
    if mask.all():
        raise ValueError("validation holds out every row, none is left to train on")
    return mask


def _discrete(flow) -> np.ndarray:
    """Which columns keep their units."""
    if isinstance(flow.base, Made):
        return np.array([c.is_discrete for c in flow.base.columns])
    return np.zeros(flow.features, bool)


def scaling(x, rows, weights, inner: Callable = lambda part: part) -> Standardize:
    """Weighted mean and standard deviation of some rows of an array, NaN left out, in one pass over it.

    :param inner: what is done to rows first. A column that does not vary keeps scale 1.
    """
    count = mean = square = 0.0
    for start in range(0, len(rows), 2**15):
        chunk = rows[start : start + 2**15]
        part = np.asarray(inner(np.asarray(x[chunk])), np.float64)
        weight = weights[chunk].reshape(-1, *[1] * (part.ndim - 1)) * ~np.isnan(part)
        total = weight.sum(0)
        part = np.nan_to_num(part)
        own = (weight * part).sum(0) / np.maximum(total, 1e-300)
        new = np.maximum(count + total, 1e-300)
        # Chan, Golub & LeVeque (1979): the parts' squares about their own means, and those of the means.
        square = square + (weight * (part - own) ** 2).sum(0) + (own - mean) ** 2 * count * total / new
        mean, count = mean + (own - mean) * total / new, count + total
    sd = np.sqrt(square / np.maximum(count, 1e-300))
    sd = np.where(sd > 1e-10 * np.maximum(np.abs(mean), 1e-30), sd, 1.0)
    return Standardize(*jax.device_put((mean, sd)))
