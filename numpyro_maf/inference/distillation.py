# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Distillation: a flow that scores fast teaches one that samples fast, without data."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import numpyro
import optax
from jax.typing import ArrayLike
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO

from numpyro_maf.flows.flow import Flow
from numpyro_maf.inference.modules import flow_module
from numpyro_maf.rng import as_key
from numpyro_maf.train.data import checked_rows
from numpyro_maf.train.likelihood import FitResult

__all__ = ["distill"]


def distill(
    key: ArrayLike,
    teacher: Flow,
    student: Flow,
    context: ArrayLike | None = None,
    *,
    num_steps: int = 2000,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    optimizer: optax.GradientTransformation | None = None,
    progress: bool = True,
) -> FitResult:
    """Fit a student, an IAF say, to a teacher, a MAF say, by stochastic variational inference.

    Van den Oord et al., *Parallel WaveNet* (2018), section 3: the student's own draws, parallel to make and
    to score, are scored by the teacher, and the loss is the mean of ``log student - log teacher``, the
    Kullback-Leibler divergence, 0 for a perfect student. The student takes over the teacher's scalings.

    :param key: a ``jax.random`` key.
    :param context: ``(N, C)`` of which each step takes ``batch_size`` rows, for flows with context.
    :param num_steps: how many steps; ``batch_size``: draws for each.
    :param learning_rate: at the start, of Adam with cosine decay; ``optimizer``: any optax optimizer instead.
    :return: a :class:`~numpyro_maf.FitResult` whose ``train_loss`` is the divergence by step, in nats.
    :raises ValueError: for flows of unlike events or context, a base bounded otherwise, and a context of
        another shape or not finite.
    """
    if (teacher.event_shape, teacher.context) != (student.event_shape, student.context):
        raise ValueError(
            f"teacher and student must agree, got events {teacher.event_shape} and {student.event_shape}, "
            f"contexts {teacher.context} and {student.context}"
        )
    if (context is None) != (teacher.context == 0):
        raise ValueError(
            f"the flows take a context of width {teacher.context}: give rows of it, or none for 0"
        )
    scales = {"event_scale": teacher.event_scale, "context_scale": teacher.context_scale}
    student = replace(student, **scales)  # type: ignore[type-var]  # all flows are dataclasses
    rows = None
    if context is not None:
        rows = jnp.asarray(checked_rows("context", context, (teacher.context,)))
    size = batch_size if rows is None else len(rows)

    def draw(flow):
        # The guide's rows are the model's too; divided by the size, the loss is a mean.
        with handlers.scale(scale=1 / size), numpyro.plate("rows", size, min(batch_size, size)) as chosen:
            numpyro.sample("x", flow(None if rows is None else rows[chosen]))

    def model():
        draw(teacher)

    def guide():
        draw(flow_module("student", student))

    if optimizer is None:
        schedule = optax.cosine_decay_schedule(learning_rate, num_steps)
        optimizer = optax.chain(optax.clip_by_global_norm(5.0), optax.adam(schedule))
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    result = svi.run(as_key(key), num_steps, progress_bar=progress, stable_update=True)
    losses = np.asarray(result.losses)
    trained = student.with_weights(result.params["student$params"])
    return FitResult(trained, losses, np.array([]), len(losses) - 1)
