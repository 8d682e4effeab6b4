# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""One training loop for everything that trains."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from tqdm.auto import tqdm

from numpyro_maf.rng import generator, split
from numpyro_maf.train.data import _RESIDENT, _feed, _room, _with_room

__all__ = ["train"]


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
