"""Distillation: a student of a known teacher, and what the loss means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shaken

import numpyro_maf as nm


def affine(loc, log_scale):
    """Data are ``loc + exp(log_scale) u``, to be told exactly."""
    flow = nm.elementwise(jax.random.key(0), 2, scalar=nm.Affine())
    s = 5 * np.arctanh(-np.array(log_scale) / 5)  # the map goes from data to base
    shift = -np.array(loc) * np.exp(-np.array(log_scale))
    return flow.with_weights(jax.tree.map(lambda _: jnp.array([shift, s], jnp.float32), flow.weights))


def test_the_loss_is_the_divergence_of_two_normals():
    loc, log_scale = [0.5, -1.0], [0.3, -0.4]
    teacher, student = affine(loc, log_scale), affine([0, 0], [0, 0])
    result = nm.distill(
        jax.random.key(0), teacher, student, num_steps=1, batch_size=50_000, learning_rate=0.0, progress=False
    )
    variance = np.exp(2 * np.array(log_scale))
    expected = np.sum(np.array(log_scale) + (1 + np.square(loc)) / (2 * variance) - 0.5)
    np.testing.assert_allclose(result.train_loss[0], expected, rtol=0.02)


@pytest.mark.slow
def test_an_iaf_learns_a_maf():
    teacher = shaken(nm.maf(jax.random.key(0), 2, transforms=2, hidden=(8,)), 1, 0.3)
    student = nm.iaf(jax.random.key(2), 2, transforms=4, hidden=(32,))
    result = nm.distill(3, teacher, student, num_steps=2500, learning_rate=5e-3, progress=False)
    assert result.train_loss.shape == (2500,) and result.best_epoch == 2499
    assert result.train_loss[-100:].mean() < 0.03 < result.train_loss[0]

    @jax.jit
    def gap(teacher, student):  # at the teacher's draws, not the student's
        x = teacher().sample(4, 5000)
        return teacher().log_prob(x) - student().log_prob(x)

    assert np.median(abs(gap(teacher, result.flow))) < 0.1


@pytest.mark.slow
def test_with_context_the_student_follows_it():
    teacher = shaken(nm.maf(jax.random.key(0), 1, context=1, transforms=1, hidden=(8,)), 2, 0.5)
    student = nm.iaf(jax.random.key(2), 1, context=1, transforms=1, hidden=(16,))
    context = np.random.default_rng(0).normal(size=(500, 1)).astype(np.float32)
    result = nm.distill(
        3,
        teacher,
        student,
        context=context,
        num_steps=800,
        learning_rate=5e-3,
        progress=False,
    )
    assert result.train_loss[-100:].mean() < 0.02
    draws, learned = (
        np.asarray(jax.jit(lambda flow: flow(context[:50]).sample(5, 4000))(flow))
        for flow in (teacher, result.flow)
    )
    sd = draws.std(0)
    assert (draws.mean(0) / sd).std() > 0.2  # the context matters
    off = (learned.mean(0) - draws.mean(0)) / sd
    assert (off**2).mean() ** 0.5 < 0.2 and (abs(learned.std(0) / sd - 1)).mean() < 0.1


@pytest.mark.parametrize(
    "teacher, student, context, message",
    [
        (dict(features=2), dict(features=3), None, "must agree"),
        (dict(features=2, context=1), dict(features=2), None, "must agree"),
        (dict(features=2, context=1), dict(features=2, context=1), None, "context of width 1"),
        (dict(features=2), dict(features=2), np.zeros((5, 1)), "context of width 0"),
    ],
)
def test_arguments_are_checked(teacher, student, context, message):
    flows = (nm.maf(jax.random.key(0), **teacher), nm.iaf(jax.random.key(0), **student))
    with pytest.raises(ValueError, match=message):
        nm.distill(jax.random.key(0), *flows, context=context, num_steps=1, progress=False)
