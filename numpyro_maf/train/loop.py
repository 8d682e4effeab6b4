# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""One training loop for everything that trains."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from numpyro_maf.rng import as_key, split
from numpyro_maf.train.checkpoints import Checkpoint, about
from numpyro_maf.train.data import Rows
from numpyro_maf.train.interrupts import Interrupted, Interrupts, Pace
from numpyro_maf.train.options import TrainOptions, check_options
from numpyro_maf.train.progress import Progress
from numpyro_maf.train.state import NotFiniteError, Trained, TrainState

__all__ = ["train", "train_best"]


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
    patience: float = 20,
    optimizer: optax.GradientTransformation | None = None,
    average: float = 0.0,
    anneal: float = 1.0,
    tolerance: float = 0.0,
    progress: bool = True,
    callback: Callable[[TrainState], Any] | None = None,
    state: TrainState | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Trained:
    """Minimise the weighted mean of a loss by rows; keep the parameters that validate best.

    Every validation row counts in every validation; without any, the training loss stops the training. An
    epoch is one compiled call, or a few if it is long; the same loss and structure compile once in a process,
    and again when the rows outgrow the room of 1024, 2048, …

    The first Ctrl-C ends training soon, with the best of the finished epochs; the second raises at once.

    :param key: a ``jax.random`` key, or an integer.
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
        hundred steps out. The first steps keep less, so that the untrained start does not count (Shamir &
        Zhang 2013, section 4). 0 for none.
    :param anneal: what the learning rate is multiplied by, going on from the best parameters, whenever half
        the patience has passed without improvement. 1 for never.
    :param tolerance: by how much a loss must fall to count as an improvement in this; the best parameters are
        kept in any case.
    :param progress: show a line about the epochs. The logger ``numpyro_maf.train`` has records in any case.
    :param callback: called with the :class:`TrainState` after each epoch; if it returns True, training stops.
    :param state: go on from here, with the other arguments as they were; the result is the same, bit by bit,
        as if training had not stopped.
    :param checkpoint: a folder that keeps the state after an epoch, at least every few seconds. After a
        crash, ``kill -9`` or an interrupt the same call resumes, and its result is the same, bit by bit; a
        training that is finished is read, not repeated. Only ``max_epochs`` may change. SIGTERM writes the
        state before it ends the process.
    :raises KeyboardInterrupt: when interrupted before the first epoch is finished.
    :raises FloatingPointError: when the loss stops being finite. The error's ``result`` is what the call
        would have returned with the best epoch so far, or None before the first.
    :raises ValueError: for a checkpoint of another training, with what differs.
    :raises RuntimeError: for a checkpoint that another call is writing to.
    """
    check_options(
        "train",
        dict(
            batch_size=batch_size, learning_rate=learning_rate, max_epochs=max_epochs, patience=patience,
            optimizer=optimizer, average=average, anneal=anneal, tolerance=tolerance, callback=callback,
            state=state, checkpoint=checkpoint,
        ),
        TrainOptions,
    )  # fmt: skip
    key = as_key(key)
    rate = learning_rate if optimizer is None else 1.0
    optimizer = optimizer or _ADAM
    dtype = jax.tree.leaves(params)[0].dtype
    train_rows, valid_rows = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    size = min(batch_size, len(train_rows))
    chunk = max(size, 1024 if len(valid_rows) > 1024 else 256)
    impl = jax.random.key_impl(key)
    stopped, failure, paces = "", None, (Pace(), Pace())
    bar = Progress("fit", max_epochs, patience, progress)
    place: Any = nullcontext()
    if checkpoint is not None:
        options = dict(batch_size=batch_size, learning_rate=rate, patience=patience, average=average)
        options |= dict(anneal=anneal, tolerance=tolerance)
        parts = dict(key=jax.random.key_data(key), start=(params, fixed), rows=(data, weights, held_out))
        own = None if optimizer is _ADAM else optimizer
        place = Checkpoint(checkpoint, about(loss, own, options, parts))
    with bar, Interrupts(terminate=checkpoint is not None) as interrupts, place:
        rows = Rows.of(data, np.asarray(weights / np.max(weights), dtype))
        if state is None:
            start = jax.jit(optimizer.init)(params)
            state = TrainState(params, params, params, start, np.asarray(jax.random.key_data(key)), rate)
        state = state.restored()
        state = state if checkpoint is None else place.resumed(state)
        bar.started(state)
        epochs_key, valid_key = split(jax.random.wrap_key_data(jnp.asarray(state.key), impl=impl))
        seed = np.asarray(jax.random.key_data(epochs_key))

        def trained(state: TrainState) -> TrainState:
            """The state after one more pass over the training rows."""
            carry, taken, losses = (state.params, state.optimizer, state.mean), state.steps, []
            order = np.random.default_rng([*seed, state.epochs])  # faster than JAX for single numbers
            drawn: Any = order.integers(2**32, size=seed.shape, dtype=np.uint32)
            epoch_key = jax.random.wrap_key_data(drawn, impl=impl)
            for *block, steps in rows.feed(epoch_key, train_rows, size, order):
                run = partial(
                    _steps, average, state.rate, taken, fixed, *block, loss=loss, optimizer=optimizer
                )
                for start, stop in interrupts.parts(steps, paces[0]):
                    before, (carry, *part) = carry, run(carry, start, stop)
                    losses.append(np.stack(part)[:, start:stop])
                    bad = ~np.isfinite(losses[-1][0])
                    if bad.any():
                        step = start + int(np.argmax(bad))
                        failing = run(before, start, step)[0][0]  # as they were when it failed
                        _report(loss, failing, fixed, block, step, taken + step)
                taken += steps
            params, optimum, mean = carry
            history = np.append(state.train_loss, _mean(losses))
            return replace(
                state, params=params, optimizer=optimum, mean=mean, steps=taken, train_loss=history
            )

        def validated(state: TrainState) -> TrainState:
            """The state with the loss of the validation rows."""
            losses = []
            for *block, steps in rows.feed(valid_key, valid_rows, chunk):
                for start, stop in interrupts.parts(steps, paces[1]):
                    part = _losses(state.mean, fixed, *block, start, stop, loss=loss)
                    losses.append(np.stack(part)[:, start:stop])
            return replace(state, validation_loss=np.append(state.validation_loss, _mean(losses)))

        try:
            while state.epochs < max_epochs and state.idle < patience and not stopped:
                new = trained(state)
                new = validated(new) if len(valid_rows) else new
                state = _judged(new, patience, anneal, tolerance)
                if checkpoint is not None:
                    place.keep(state)
                bar.epoch(state)
                if callback is not None and callback(state):
                    stopped = bar.why = "callback"
        except Interrupted:
            if state.best_epoch < 0:
                raise
            bar.why = "interrupted, the best so far is kept"
        except NotFiniteError as error:
            stopped, failure, bar.why = "not finite", error, "the loss is not finite"
    if interrupts.count:
        stopped = "interrupted"
    if failure is None and state.best_epoch < 0:
        failure = NotFiniteError("the validation loss was not finite in any epoch")
    if failure is not None:
        if state.best_epoch >= 0:
            failure.result = Trained(state, stopped, error=failure)
            failure.args = (
                f"{failure}; the best of the {state.epochs} epochs before is this error's result",
            )
        raise failure
    limited = not stopped and state.epochs >= max_epochs and state.idle < patience
    return Trained(state, stopped, improving=limited and 4 * state.idle < state.epochs)


def _judged(state: TrainState, patience: float, anneal: float, tolerance: float) -> TrainState:
    """The state after an epoch: what is best, and whether the learning rate falls."""
    epoch = state.epochs - 1
    current = float((state.validation_loss if len(state.validation_loss) else state.train_loss)[-1])
    if current < state.best_loss:
        state = replace(state, best=state.mean, best_loss=current, best_epoch=epoch)
    if current < state.mark - tolerance:
        state = replace(state, mark=current, marked=epoch)
    waited = epoch - max(state.marked, state.turned)
    if anneal != 1 and state.idle < patience and waited >= patience / 2:
        best = state.best
        state = replace(state, rate=anneal * state.rate, turned=epoch, params=best, mean=best)
    return state


def train_best(
    key, loss: Callable, starts, data, *, max_epochs: int = 1000, **options
) -> tuple[Trained, Any]:
    """Train from several starts ``(params, fixed)`` for a while, then go on with the one that validates best.

    The trial is 20 epochs, of many rows fewer: 1000 steps. Arguments as for :func:`train`; a ``state`` goes
    on without a trial.

    :return: what training gave, with the error of a loss that was not finite in a late epoch, and what was
        fixed in it.
    """
    keys, trials = split(as_key(key), len(starts)), []
    state, checkpoint = options.pop("state", None), options.pop("checkpoint", None)
    chosen = 0 if state is None else state.start
    if state is None and len(starts) > 1:
        steps = max(1000 * options.get("batch_size", 256) // len(options["weights"]), 1)
        silent = options | dict(max_epochs=min(steps, 20, max_epochs), progress=False, callback=None)
        for i, (params, fixed) in enumerate(starts):
            own = checkpoint and Path(checkpoint) / f"start-{i}"
            try:
                trials.append(_tried(keys[i], loss, params, data, fixed, checkpoint=own, **silent))
            except Interrupted:
                if not trials:
                    raise
                trials[-1] = replace(trials[-1], stopped="interrupted")
            if trials[-1].stopped:
                break
        chosen = min(range(len(trials)), key=lambda i: trials[i].state.best_loss)
        state = replace(trials[chosen].state, start=chosen)
    params, fixed = starts[chosen]
    if trials and trials[-1].stopped:
        return replace(trials[chosen], stopped=trials[-1].stopped, error=trials[-1].error), fixed
    options |= dict(max_epochs=max_epochs, state=state, checkpoint=checkpoint)
    return _tried(keys[chosen], loss, params, data, fixed, **options), fixed


def _tried(*args, **options) -> Trained:
    """What :func:`train` gives, with its error if there is a result beside."""
    try:
        return train(*args, **options)
    except NotFiniteError as error:
        if error.result is None:
            raise
        return error.result


# The learning rate is a number that the compiled epoch is given, so that all rates share it.
_ADAM = optax.chain(optax.clip_by_global_norm(5.0), optax.adam(1.0))
# The average over t early steps is mainly one over the last t / 3 of them.
_EARLY = 3


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


def _mean(losses) -> float:
    """Of parts of losses and total weights by step, the weighted mean: the same however they are cut."""
    values, totals = np.concatenate(losses, axis=1, dtype=float)
    return float((values * totals).sum() / totals.sum())


@partial(jax.jit, static_argnames=("loss", "optimizer"))
def _steps(average, rate, taken, fixed, data, weights, key, batches, carry, start, stop, *, loss, optimizer):
    """Some steps of a pass over the training rows: the new carry, and losses and total weights by step.

    The loss of a step whose gradient is not finite is NaN.
    """
    keys = _keys(key, batches)

    def step(i, carry):
        (params, state, mean), values, totals = carry
        value_and_grad = jax.value_and_grad(_batch_loss, has_aux=True)
        batch = keys[i], batches[i]
        (value, total), gradient = value_and_grad(params, loss, fixed, data, weights, batch)
        value = jnp.where(jnp.isfinite(optax.tree.norm(gradient)), value, jnp.nan)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, jax.tree.map(lambda u: rate * u, updates))
        before = taken + i
        keep = jnp.minimum(average, before / (before + _EARLY))
        mean = jax.tree.map(lambda m, p: p + keep.astype(p.dtype) * (m - p), mean, params)
        return (params, state, mean), values.at[i].set(value), totals.at[i].set(total)

    zeros = jnp.zeros(len(batches), weights.dtype)
    return lax.fori_loop(start, stop, step, (carry, zeros, zeros))


@partial(jax.jit, static_argnames=("loss",))
def _losses(params, fixed, data, weights, key, batches, start, stop, *, loss):
    """Losses and total weights of some of the batches."""
    keys = _keys(key, batches)

    def step(i, results):
        new = _batch_loss(params, loss, fixed, data, weights, (keys[i], batches[i]))
        return tuple(a.at[i].set(b) for a, b in zip(results, new))

    zeros = jnp.zeros(len(batches), weights.dtype)
    return lax.fori_loop(start, stop, step, (zeros, zeros))


def _keys(key, batches):
    """One for each batch."""
    return jax.random.split(key, len(batches))


def _report(loss, params, fixed, block, at, step):
    """Raise with the first leaf whose gradient is not finite at the batch of the block that failed."""
    data, _, key, batches = block
    key, batch = _keys(key, batches)[at], batches[at][batches[at] >= 0]

    def total(params):
        return loss(params, fixed, key, *(a[batch] for a in data)).sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(params)
    leaves, _ = jax.tree_util.tree_flatten_with_path(gradient)
    bad = [jax.tree_util.keystr(path) for path, leaf in leaves if not np.isfinite(leaf).all()]
    where = f"the gradient is not finite in {bad[0]}" if bad else "all gradients are finite"
    raise NotFiniteError(
        f"the loss is {float(value)} at step {step}, {where} ({len(bad)} of {len(leaves)} leaves); "
        "look for outliers in the data, or lower the learning rate"
    )
