# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Trainings that end too early: what they leave, and that the same call resumes, bit by bit."""

import signal
import subprocess
import sys

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest

import numpyro_maf as nm
from numpyro_maf.locks import Lock
from numpyro_maf.train import train

ROWS = np.random.default_rng(0).normal(size=(300, 2)).astype(np.float32)
CONTEXT = (ROWS[:, :1] + 0.1 * ROWS[:, 1:]).astype(np.float32)
SMALL = dict(batch_size=64, max_epochs=26, patience=100, progress=False)


def model():
    a = numpyro.sample("a", dist.Normal(0, 1))
    numpyro.sample("x", nm.Simulator(noisy, a, event_shape=(1,)))


def noisy(key, a):
    return a[None] + 0.5 * jax.random.normal(key, (1,))


def learn_flow(**options):
    flow = nm.elementwise(jax.random.key(0), 2, context=1, scalar=nm.Affine(), hidden=(8,))
    return nm.fit(0, flow, ROWS, CONTEXT, **SMALL | options)


def small(key, features, *, context):
    return nm.elementwise(key, features, context=context, scalar=nm.Affine(), hidden=(8,))


def simulations():
    return nm.simulate(0, model, 300, progress=False)


FEW = {"contrasts": 2}
LEARNERS = {
    "fit": learn_flow,
    "fit-two-starts": lambda **options: learn_flow(regression=None, **options),
    "npe": lambda **options: nm.npe(1, model, simulations(), builder=small, ensemble=2, **SMALL | options),
    "nle": lambda **options: nm.nle(1, model, simulations(), builder=small, **SMALL | options),
    "nre": lambda **options: nm.nre(1, model, simulations(), hidden=(8,), **FEW | SMALL | options),
    "snpe": lambda **options: nm.snpe(
        1, model, {"x": np.zeros(1)}, rounds=2, simulations=300, builder=small, **SMALL | options
    ).rounds[-1].learned,
}  # fmt: skip
each = pytest.mark.parametrize("learn", LEARNERS.values(), ids=list(LEARNERS))


class Crash(Exception):
    pass


def crash_after(epochs):
    """A callback that fails at that call."""
    seen = []

    def callback(state):
        seen.append(state.epochs)
        if len(seen) == epochs:
            raise Crash

    return callback


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def leaves(result):
    return jax.tree.leaves(getattr(result, "flow", result))


@each
def test_the_same_call_resumes_bit_by_bit(learn, tmp_path):
    for epochs in (3, 2):
        with pytest.raises(Crash):
            learn(checkpoint=tmp_path, callback=crash_after(epochs))
    seen = []
    resumed = learn(checkpoint=tmp_path, callback=lambda state: seen.append(state.epochs))
    assert seen and seen[0] > 3
    same(leaves(resumed), leaves(learn()))
    same(leaves(learn(checkpoint=tmp_path, callback=crash_after(1))), leaves(resumed))  # read, not repeated


def test_more_epochs_go_on(tmp_path):
    learn_flow(checkpoint=tmp_path)
    longer = learn_flow(checkpoint=tmp_path, max_epochs=30)
    same(leaves(longer), leaves(learn_flow(max_epochs=30)))


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    learn_flow(checkpoint=tmp_path)
    others = [
        ({"learning_rate": 1e-2}, "learning_rate"),
        ({"weights": np.arange(300)}, "start, rows"),
        ({"optimizer": optax.sgd(1.0)}, "learning_rate"),
        ({"batch_size": 32}, "batch_size"),
    ]
    for other, what in others:
        with pytest.raises(ValueError, match=f"another {what}.*give another folder"):
            learn_flow(checkpoint=tmp_path, **other)
    file = tmp_path / "training.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=r"training\.safetensors: is damaged"):
        learn_flow(checkpoint=tmp_path)


def test_one_call_writes_to_a_checkpoint(tmp_path):
    lock = Lock(tmp_path / "lock")
    with pytest.raises(RuntimeError, match="another call in this process is writing"):
        learn_flow(checkpoint=tmp_path)
    lock.release()
    learn_flow(checkpoint=tmp_path)


KILLED = """
import os, sys, time
sys.path[:0] = {path!r}
import conftest  # sets JAX as the tests do
import test_checkpoints as t

def callback(state):
    time.sleep(0.3)
    if state.epochs == 6:
        os.kill(os.getpid(), {number})

t.learn_flow(checkpoint={folder!r}, callback=callback)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_leaves_a_checkpoint(number, tmp_path):
    script = KILLED.format(path=sys.path, number=int(number), folder=str(tmp_path))
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, timeout=120)
    assert ended.returncode == -number, ended.stderr.decode()
    seen = []
    resumed = learn_flow(checkpoint=tmp_path, callback=lambda state: seen.append(state.epochs))
    # After SIGTERM goes on after the last epoch, after SIGKILL from what was there a second before.
    assert seen[0] == 7 if number == signal.SIGTERM else 2 < seen[0] <= 7
    same(leaves(resumed), leaves(learn_flow()))


def failing(params, fixed, key, x):
    """Least at 0, and no number once it is nearer than a tenth."""
    distance = (params["at"] ** 2).sum() + 0 * x.sum(-1)
    return distance / (distance > 0.01)


def test_a_late_failure_carries_the_best():
    params = {"at": np.ones(1, np.float32)}
    rows = dict(weights=np.ones(300), held_out=np.zeros(300, bool), learning_rate=0.05, progress=False)
    with pytest.raises(FloatingPointError, match="is this error's result") as caught:
        train(0, failing, params, [ROWS], **rows)
    best = caught.value.result
    assert best.stopped == "not finite" and best.best_epoch == len(best.train_loss) - 1 >= 0
    assert 0.1 < best.params["at"] < 1


@pytest.mark.parametrize(("learn", "kind"), [("fit", nm.FitResult), ("npe", nm.sbi.NeuralPosterior),
                                             ("nle", nm.Flow), ("nre", nm.sbi.Ratio)])  # fmt: skip
def test_what_failed_late_is_of_the_kind_that_was_asked_for(learn, kind):
    class Late:
        """An optimiser whose steps become too long."""

        @staticmethod
        def init(params):
            return np.zeros((), np.int32)

        @staticmethod
        def update(gradient, count, params=None):
            size = np.float32(1e-3) / (count < 20)
            return jax.tree.map(lambda g: -size * g, gradient), count + 1

    with pytest.raises(FloatingPointError, match="is this error's result") as caught:
        LEARNERS[learn](optimizer=Late)
    assert isinstance(caught.value.result, kind)
    assert all(np.isfinite(leaf).all() for leaf in leaves(caught.value.result))


def test_a_state_goes_on_from_its_own_start():
    states = []
    whole = learn_flow(regression=None, callback=states.append)
    resumed = learn_flow(regression=None, state=states[1])
    assert states[1].start == 1
    same(leaves(resumed), leaves(whole))


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    learn_flow(checkpoint=tmp_path, optimizer=optax.adam(1e-3))
    learn_flow(checkpoint=tmp_path, optimizer=optax.adam(1e-3))
    with pytest.raises(ValueError, match="another optimizer"):
        learn_flow(checkpoint=tmp_path, optimizer=optax.adam(1e-2))


def test_a_checkpoint_of_other_contrasts_is_refused(tmp_path):
    LEARNERS["nre"](checkpoint=tmp_path, max_epochs=1)
    with pytest.raises(ValueError, match="another loss"):
        LEARNERS["nre"](checkpoint=tmp_path, max_epochs=1, contrasts=3)
