"""Training: known densities are learned, every row counts as it should, failures say where.

Compiled epochs are shared: nearly all fits are of the same two flows, in batches of the same size, to at most
1024 rows; what concerns the loop alone is shown by the loss of a mean.
"""

import os
import signal
import threading
import time
from dataclasses import replace
from functools import lru_cache, partial
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions import constraints

import numpyro_maf as nm
from numpyro_maf.train import data as rows_module
from numpyro_maf.train.interrupts import Interrupted, Interrupts, Pace
from numpyro_maf.train.loop import train, train_best
from numpyro_maf.train.options import FitOptions, TrainOptions, check_options
from numpyro_maf.train.state import TrainState

quick = partial(nm.fit, progress=False, max_epochs=3, batch_size=50)
TRUTH = dist.MultivariateNormal(jnp.array([1.0, -2.0]), covariance_matrix=jnp.array([[1.0, 0.8], [0.8, 1.5]]))
MANY = (
    np.random.default_rng(0).multivariate_normal(TRUTH.loc, TRUTH.covariance_matrix, 1000).astype(np.float32)
)
ROWS = MANY[:300]
SGD, STILL = (
    optax.sgd(0.05),
    optax.sgd(0.0),
)  # equal ones share a compilation only if they are the same object


@lru_cache(None)
def small(**options):
    return nm.maf(jax.random.key(0), 2, **{"transforms": 1, "hidden": (8,), **options})


@jax.jit
def log_prob(flow, x, context=None):
    return flow(context).log_prob(x)


def assert_same(a, b):
    np.testing.assert_array_equal(a.train_loss, b.train_loss)
    np.testing.assert_array_equal(a.validation_loss, b.validation_loss)
    jax.tree.map(np.testing.assert_array_equal, a.flow, b.flow)


def differ(a, b):
    leaves = zip(jax.tree.leaves(a.flow), jax.tree.leaves(b.flow), strict=True)
    return any((x != y).any() for x, y in leaves)


# What is learned -------------------------------------------------------------------------------


@pytest.mark.parametrize("builder", [nm.maf, nm.nsf])
def test_a_correlated_gaussian_is_learned(builder):
    flow = small() if builder is nm.maf else nm.nsf(jax.random.key(0), 2, transforms=1, hidden=(8,))
    result = quick(jax.random.key(2), flow, MANY, max_epochs=60, learning_rate=5e-3, average=0.98)
    test = np.asarray(TRUTH.sample(jax.random.key(3), (20000,)))
    divergence = (TRUTH.log_prob(test) - log_prob(result.flow, test)).mean()
    assert -0.005 < divergence < 0.03
    assert abs(result.validation_loss.min() - TRUTH.entropy()) < 0.2


def test_a_conditional_density_is_learned():
    rng = np.random.default_rng(0)
    c = rng.uniform(-1, 1, (1000, 1))
    x = np.concatenate([3 + 2 * c, -c], 1) + np.exp(0.5 * c) * rng.normal(size=(1000, 2))
    result = quick(jax.random.key(0), small(context=1), x, c, max_epochs=60, learning_rate=5e-3, average=0.98)
    truth = dist.Normal(np.concatenate([3 + 2 * c, -c], 1), np.exp(0.5 * c)).to_event(1)
    gap = truth.log_prob(x) - log_prob(result.flow, x, c)
    assert -0.04 < gap.mean() < 0.02


def test_original_units_are_kept():
    """Losses are in nats of the data as given; the scalings are the training rows' own."""
    x = ROWS * np.array([1e-3, 1e4]) + np.array([5.0, -1e6])
    held_out = np.arange(300) % 3 == 0
    result = quick(jax.random.key(0), small(), x, validation=held_out)
    np.testing.assert_allclose(result.flow.event_scale.loc, x[~held_out].mean(0), rtol=1e-5)
    np.testing.assert_allclose(result.flow.event_scale.scale, x[~held_out].std(0), rtol=1e-4)
    expected = -log_prob(result.flow, np.float32(x))[held_out].mean()
    np.testing.assert_allclose(result.validation_loss[result.best_epoch], expected, rtol=1e-3)


def test_scalings_and_base_are_fixed():
    base = dist.StudentT(5.0).expand([2]).to_event(1)
    flow, context = nm.maf(0, 2, transforms=1, hidden=(8,), base=base, context=1), ROWS[:, :1] * 3
    result = quick(0, flow, ROWS, context, validation=0, standardize=False)
    for name in ("event_scale", "context_scale", "base"):
        pairs = getattr(result.flow, name), getattr(flow, name)
        jax.tree.map(np.testing.assert_array_equal, *pairs)
    scaled = quick(0, flow, ROWS, context, validation=0).flow
    np.testing.assert_allclose(scaled.context_scale.scale, context.std(0), rtol=1e-5)


# Which rows count, and how much ------------------------------------------------------------------


def test_rows_of_no_weight_have_no_influence():
    weights, held_out = np.ones(300), np.arange(300) % 5 == 0
    gone = np.arange(300) % 7 == 0
    weights[gone] = 0
    results = []
    for junk in (0.0, 3e3):
        x, c = ROWS.copy(), ROWS[:, :1].copy()
        x[gone], c[gone] = junk, -junk
        results.append(quick(jax.random.key(0), small(context=1), x, c, weights=weights, validation=held_out))
    assert_same(*results)


def test_only_ratios_of_weights_matter():
    """Importance weights may be as small as exp(-700)."""
    weights = np.random.default_rng(0).uniform(0.5, 1, 300)
    results = [quick(0, small(), ROWS, weights=w) for w in (weights, weights * 2.0**-1000)]
    assert_same(*results)


def test_weights_are_repetitions():
    """In one batch, a row of weight 3 is three rows; in scalings too."""
    x, weights = ROWS[:50, 0], np.arange(50) % 3 + 1
    weighted, other = train_mean(x, weights=weights, max_epochs=5), train_mean(x, max_epochs=5)
    repeated = train_mean(np.repeat(x, weights), max_epochs=5)
    np.testing.assert_allclose(weighted.train_loss, repeated.train_loss, rtol=1e-5)
    np.testing.assert_allclose(weighted.params["mean"], repeated.params["mean"], rtol=1e-5)
    assert abs(other.train_loss - weighted.train_loss).max() > 1e-3
    one = rows_module.scaling(ROWS[:50], np.arange(50), weights, name="x")
    many = np.repeat(ROWS[:50], weights, 0)
    two = rows_module.scaling(many, np.arange(len(many)), np.ones(len(many)), name="x")
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), one, two)


def test_held_out_rows_do_not_train():
    held_out = np.arange(300) < 100
    junk = ROWS.copy()
    junk[:100] += 5
    a, b = (quick(0, small(), x, validation=held_out, max_epochs=1) for x in (ROWS, junk))
    jax.tree.map(np.testing.assert_array_equal, a.flow, b.flow)
    assert (a.validation_loss != b.validation_loss).all()


def test_a_share_of_validation_rows_is_drawn_by_the_key():
    first, again, other = (quick(seed, small(), ROWS, validation=0.3) for seed in (0, 0, 1))
    assert_same(first, again)
    assert (first.flow.event_scale.loc != other.flow.event_scale.loc).all()
    assert quick(0, small(), ROWS, validation=0).validation_loss.shape == (0,)


def mean_loss(params, fixed, key, x):
    """Least squares: the loss of a mean, row by row."""
    return (params["mean"] - x) ** 2


def train_mean(x, held_out=None, weights=None, key=0, **options):
    n = len(x)
    options = {"progress": False, "optimizer": SGD, **options}
    weights = np.ones(n) if weights is None else weights
    held_out = np.zeros(n, bool) if held_out is None else held_out
    params = {"mean": jnp.array(0.0)}
    data = [np.asarray(x, np.float32)]
    return train(key, mean_loss, params, data, weights=weights, held_out=held_out, **options)


def test_the_validation_loss_is_that_of_all_validation_rows_by_weight():
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(2, 2600))  # more than one batch of validation
    weights, held_out = weights**2, np.arange(2600) % 2 == 0
    found = train_mean(x, held_out, weights, max_epochs=1, batch_size=100)
    expected = np.average((float(found.params["mean"]) - x) ** 2, weights=weights * held_out)
    np.testing.assert_allclose(found.validation_loss, [expected], rtol=1e-5)


def test_the_last_partial_batch_is_used():
    """Seven rows by three: another row is alone in the last batch each epoch, and none is lost."""
    x = np.zeros(7)
    x[3] = 1.0
    found = train_mean(x, batch_size=3, max_epochs=5, optimizer=STILL)
    np.testing.assert_allclose(found.train_loss, np.full(5, 1 / 7), rtol=1e-6)
    moved = train_mean(np.arange(7.0), batch_size=3, max_epochs=300, patience=300)
    np.testing.assert_allclose(moved.params["mean"], 3.0, atol=0.5)


def test_a_full_batch_step_is_the_gradient_of_the_weighted_mean():
    x, weights = np.array([1.0, 2.0, 6.0]), np.array([1.0, 2.0, 0.5])
    found = train_mean(x, weights=weights, max_epochs=2)
    expected = [0.0]
    for _ in range(2):
        expected.append(expected[-1] - 0.05 * 2 * (expected[-1] - np.average(x, weights=weights)))
    np.testing.assert_allclose(found.params["mean"], expected[2], rtol=1e-5)
    squares = [np.average((m - x) ** 2, weights=weights) for m in expected[:2]]
    np.testing.assert_allclose(found.train_loss, squares, rtol=1e-5)
    assert found.best_epoch == 1


def test_similar_fits_share_compiled_code():
    """Other numbers of rows, up to the same room, and other learning rates trace nothing again."""
    traced = []

    def loss(params, fixed, key, x):
        traced.append(x.shape)
        return (params["mean"] - x) ** 2

    counts = []
    for n, rate in [(100, 1e-2), (300, 1e-2), (1000, 3e-2), (1100, 3e-2)]:
        held_out, params = np.arange(n) % 10 == 0, {"mean": jnp.array(0.0)}
        options = dict(weights=np.ones(n), held_out=held_out, batch_size=50, max_epochs=2, progress=False)
        train(jax.random.key(0), loss, params, [np.ones(n)], learning_rate=rate, **options)
        counts.append(len(traced))
    assert counts[0] == counts[1] == counts[2] < counts[3]


def test_large_data_pass_by_in_blocks(tmp_path, monkeypatch):
    """Without steps the losses are those of all rows, each of which passes once, though in another order."""
    monkeypatch.setattr(rows_module, "RESIDENT", 0)
    monkeypatch.setattr(rows_module, "BLOCK", 2**12)
    x = np.random.default_rng(0).normal(1, 2, 5000).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    weights, held_out = x**2, np.arange(5000) % 3 == 0
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    found = train_mean(mapped, held_out, weights, batch_size=64, max_epochs=2, optimizer=STILL)
    for losses, rows in [(found.train_loss, ~held_out), (found.validation_loss, held_out)]:
        np.testing.assert_allclose(losses, [np.average(x**2, weights=weights * rows)] * 2, rtol=1e-5)
    moved = train_mean(mapped, held_out, batch_size=64, max_epochs=2)
    np.testing.assert_allclose(moved.params["mean"], 1, atol=0.6)


def test_losses_that_compare_rows_see_no_copies():
    """The last batch is filled up with other rows, as contrasts need them."""

    def loss(params, fixed, key, x):
        return params["a"] ** 2 + (jnp.roll(x, 1) == jnp.roll(x, 2))

    found = train(
        jax.random.key(0), loss, {"a": jnp.zeros(())}, [np.arange(100.0, dtype=np.float32)],
        weights=np.ones(100), held_out=np.arange(100) >= 90, batch_size=64, max_epochs=2, progress=False,
    )  # fmt: skip
    np.testing.assert_array_equal([*found.train_loss, *found.validation_loss], 0)


# When it stops -----------------------------------------------------------------------------------

TWO, SECOND = np.array([10.0, 1.0]), np.array([False, True])


def test_best_weights_are_kept_and_patience_ends():
    """Trained towards 10, validated at 1: the path passes the best and goes on to worse."""
    found = train_mean(TWO, SECOND, patience=4, max_epochs=100)
    losses = found.validation_loss
    assert found.best_epoch == losses.argmin() == 0 and len(losses) == 0 + 4 + 1
    np.testing.assert_allclose(found.params["mean"], 1.0, rtol=1e-6)
    slower = optax.sgd(0.01)
    found = train_mean(TWO, SECOND, patience=4, max_epochs=100, optimizer=slower)
    losses = found.validation_loss
    assert found.best_epoch == losses.argmin() == 4 and len(losses) == 9
    np.testing.assert_allclose((found.params["mean"] - 1) ** 2, losses[4], rtol=1e-4)
    assert len(train_mean(TWO, SECOND, patience=4, max_epochs=6).validation_loss) == 5
    assert len(train_mean(TWO, SECOND, patience=40, max_epochs=6).validation_loss) == 6


def test_annealed_steps_settle_where_long_ones_do_not():
    """Gradient steps of 1.05 overshoot x - m by a tenth each; those of 0.315 close in."""
    options = dict(patience=8, max_epochs=100, optimizer=optax.sgd(1.05))
    astray = train_mean(np.ones(1), **options)
    np.testing.assert_allclose(astray.params["mean"], 2.1, rtol=1e-5)
    assert (np.diff(astray.train_loss) > 0).all()
    settled = train_mean(np.ones(1), anneal=0.3, **options)
    np.testing.assert_allclose(settled.params["mean"], 1.0, atol=1e-4)


def test_small_gains_do_not_prolong_training_but_are_kept():
    """The loss (x - m)^2 halves at each step, 2, 1, ..., 1/8, which is 0.1 above none but 1/64 and less."""
    options = dict(patience=3, max_epochs=50, optimizer=optax.sgd(0.5 * (1 - 0.5**0.5)))
    found = train_mean(np.full(1, 2**0.5), tolerance=0.1, **options)
    losses = found.train_loss
    np.testing.assert_allclose(losses, 2 * 0.5 ** np.arange(len(losses)), rtol=1e-5)
    assert found.best_epoch == len(losses) - 1 == 7 + 3
    assert float(found.params["mean"]) > 1.3
    assert len(train_mean(np.full(1, 2**0.5), **options).train_loss) == 50


def test_fit_returns_the_best_epoch():
    held_out = np.arange(300) >= 50
    options = dict(max_epochs=60, patience=60, learning_rate=3e-2)
    result = quick(0, small(), ROWS, validation=held_out, **options)
    assert result.best_epoch == result.validation_loss.argmin() < 59
    expected = -log_prob(result.flow, ROWS)[held_out].mean()
    np.testing.assert_allclose(result.validation_loss.min(), expected, rtol=1e-5)


def test_averages_forget_the_start():
    """Steps move by -1: the average after t steps holds the last of them, and never the untrained 1e6."""
    down = optax.GradientTransformation(
        lambda params: (), lambda g, s, p=None: (jax.tree.map(lambda a: -jnp.ones_like(a), g), s)
    )

    def loss(params, fixed, key, x):
        return params["a"] + 0 * x

    options = dict(weights=np.ones(4), held_out=np.ones(4) == 0, batch_size=1, optimizer=down, progress=False)
    means = []

    def note(state):
        means.append(float(state.mean["a"]))

    train(
        0, loss, {"a": jnp.array(1e6)}, [np.ones(4, np.float32)], average=0.9, max_epochs=50, callback=note,
        **options,
    )  # fmt: skip
    lags = np.array(means) - (1e6 - 4 * np.arange(1, 51))
    # An average that keeps 0.9 of the one before lags 0.9 / (1 - 0.9) steps behind in the end.
    np.testing.assert_allclose(lags[-5:], 9, atol=0.5)
    assert (lags >= 0).all() and lags[0] < 1 and (np.diff(lags) > -0.1).all()


def test_losses_that_stop_being_finite_name_step_and_leaf():
    def loss(params, fixed, key, x):
        return jnp.sqrt(params["good"] ** 2 + 1) + jnp.sqrt(params["bad"]) + 0 * x

    params = {"bad": jnp.array(0.25), "good": jnp.array(1.0)}
    options = dict(weights=np.ones(6), held_out=np.zeros(6, bool), progress=False, batch_size=2)
    # Each step takes 0.1 from "bad" (and less from "good"): after the third it is below 0.
    step = optax.GradientTransformation(
        lambda params: (),
        lambda g, s, p=None: (jax.tree.map(lambda a: -0.1 * jnp.ones_like(a), g), s),
    )
    with pytest.raises(FloatingPointError, match=r"nan at step 3, .* in \['bad'\] \(1 of 2 leaves\)"):
        train(jax.random.key(0), loss, params, [np.ones(6)], optimizer=step, **options)


def test_a_flow_that_overflows_names_a_leaf_of_its_own():
    x = ROWS.copy()
    x[7] = 1e30
    with pytest.raises(FloatingPointError, match=r"at step \d+, .*net.*outliers.*learning rate"):
        quick(0, small(), x, standardize=False, validation=0)


def test_a_validation_that_is_never_finite_is_no_result():
    with pytest.raises(FloatingPointError, match="validation loss was not finite"):
        train_mean(np.array([1.0, np.inf]), SECOND, patience=2)


# Going on, watching, and being interrupted ----------------------------------------------------------


def test_training_goes_on_as_if_it_had_never_stopped(tmp_path):
    """Annealed, averaged, in mixed batches, by Adam, with a random loss; the state passes through NumPy."""

    def loss(params, fixed, key, x):
        return (params["mean"] - x + jax.random.normal(key, x.shape)) ** 2

    x = np.random.default_rng(0).normal(size=300).astype(np.float32)
    go = partial(
        train, 5, loss, {"mean": jnp.array(2.0)}, [x], weights=np.ones(300), held_out=np.arange(300) < 60,
        batch_size=50, learning_rate=0.1, average=0.9, anneal=0.5, patience=4, progress=False,
    )  # fmt: skip
    states: list[TrainState] = []
    whole = go(max_epochs=30, callback=states.append)
    rates = {state.rate for state in states}
    assert len(rates) > 1 and len(states) == len(whole.train_loss)
    for epochs in (1, 2, len(states) // 2, len(states) - 1):
        leaves, structure = jax.tree.flatten(go(max_epochs=epochs).state)
        np.savez(tmp_path / "state.npz", *map(np.asarray, leaves))
        saved = np.load(tmp_path / "state.npz")
        state = jax.tree.unflatten(structure, [saved[name] for name in saved.files])
        resumed = go(max_epochs=30, state=state)
        jax.tree.map(np.testing.assert_array_equal, resumed.state, whole.state)
    assert "epochs" in repr(whole) and len(repr(whole.state)) < 400


@pytest.mark.parametrize("regression", [False, None])
def test_fit_goes_on_as_if_it_had_never_stopped(regression):
    states: list[TrainState] = []
    go = partial(quick, 3, small(context=1), ROWS, ROWS[:, :1], regression=regression, average=0.9)
    whole = go(max_epochs=23, callback=states.append)
    assert_same(whole, go(max_epochs=23, state=states[0]))
    assert [s.epochs for s in states] == list(range(24 - len(states), 24))


def test_parts_of_an_epoch_are_the_epoch(monkeypatch):
    """How an epoch is cut, which depends on time, changes no bit."""
    x, held_out = MANY[:, 0], np.arange(1000) < 300
    options = dict(batch_size=7, max_epochs=3, average=0.9)
    whole = train_mean(x, held_out, **options)
    monkeypatch.setattr(Pace, "measured", lambda self, steps, seconds: setattr(self, "steps", 1 + steps % 5))
    cut = train_mean(x, held_out, **options)
    jax.tree.map(np.testing.assert_array_equal, whole.state, cut.state)


def test_a_pace_finds_parts_of_half_a_second():
    pace = Pace()
    for _ in range(20):
        pace.measured(pace.steps, pace.steps * 0.01)
    assert 0.25 <= pace.steps * 0.01 <= 1
    for _ in range(20):
        pace.measured(pace.steps, pace.steps * 3.0)
    assert pace.steps == 1


def test_a_callback_sees_every_epoch_and_may_stop():
    seen = []

    def callback(state):
        seen.append((state.epochs, len(state.validation_loss)))
        return state.epochs == 4

    result = quick(0, small(), ROWS, max_epochs=9, callback=callback)
    assert seen == [(n, n) for n in range(1, 5)] and result.stopped == "callback"
    assert_same(result, quick(0, small(), ROWS, max_epochs=4))
    assert quick(0, small(), ROWS, callback=lambda state: None).stopped == ""


def interrupting(epoch, times=1):
    """A callback that presses Ctrl-C after an epoch."""

    def callback(state):
        if state.epochs == epoch:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)

    return callback


def test_an_interrupt_keeps_the_best_so_far(capsys):
    result = quick(0, small(), ROWS, max_epochs=10, callback=interrupting(3), progress=True)
    assert result.stopped == "interrupted" and "interrupted" in repr(result)
    assert "best so far is kept" in "".join(capsys.readouterr())
    assert_same(result, quick(0, small(), ROWS, max_epochs=3))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupts_at_any_moment_give_a_result():
    for moment in np.random.default_rng(0).uniform(0, 0.1, 10):
        timer = threading.Timer(moment, os.kill, (os.getpid(), signal.SIGINT))

        def callback(state, timer=timer):
            if state.epochs == 1:
                timer.start()

        result = quick(0, small(), MANY, max_epochs=10**6, patience=10**6, callback=callback)
        assert result.stopped == "interrupted" and result.best_epoch >= 0
        timer.join()


def test_an_interrupt_before_the_first_epoch_is_raised(monkeypatch):
    def interrupted(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        return check(self)

    check = Interrupts.check
    monkeypatch.setattr(Interrupts, "check", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quick(0, small(), ROWS)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_is_raised_at_once():
    with pytest.raises(KeyboardInterrupt):
        quick(0, small(), ROWS, max_epochs=10, callback=interrupting(2, times=2))
    # Even where other code makes another exception of it.
    with pytest.raises(KeyboardInterrupt), Interrupts():
        try:
            interrupting(0, times=2)(TrainState(0, 0, 0, 0, np.zeros(2)))
        except KeyboardInterrupt as error:
            raise ValueError("setting an array element with a sequence.") from error
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_signals_of_others_are_left_alone():
    """A program's own handler stays, and threads, which may not set one, train too."""
    heard, before = [], signal.signal(signal.SIGINT, lambda *_: heard.append(1))
    try:
        result = quick(0, small(), ROWS, max_epochs=4, callback=interrupting(2))
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [1] and result.stopped == "" and len(result.train_loss) == 4
    results = []
    thread = threading.Thread(target=lambda: results.append(quick(0, small(), ROWS)))
    thread.start()
    thread.join()
    assert len(results[0].train_loss) == 3


STARTS = [({"mean": jnp.array(m)}, None) for m in (50.0, 3.5)]
choose = partial(
    train_best, 0, mean_loss, STARTS, [np.full(40, 3.0, np.float32)], weights=np.ones(40),
    held_out=np.zeros(40, bool), optimizer=SGD, progress=False, max_epochs=25,
)  # fmt: skip


def test_the_better_start_is_trained_on():
    """Starts at 50 and at 3.5 for a mean of 3; the trial's epochs count, and a state knows its key."""
    states: list[TrainState] = []
    found, _ = choose(callback=states.append)
    assert found.train_loss[0] == 0.25 and len(found.train_loss) == 25
    assert [state.epochs for state in states] == list(range(21, 26))
    again, _ = choose(state=states[2])
    jax.tree.map(np.testing.assert_array_equal, found.state, again.state)


@pytest.mark.parametrize("last, best, epochs", [(15, 50, 15), (25, 3.5, 5)])
def test_an_interrupted_trial_gives_the_best_so_far(last, best, epochs, monkeypatch):
    checks = []

    def check(self):
        checks.append(1)
        if len(checks) > last:
            self.count = 1
            raise Interrupted

    monkeypatch.setattr(Interrupts, "check", check)
    found, _ = choose()
    assert found.stopped == "interrupted" and len(checks) == last + 1
    assert len(found.train_loss) == epochs and found.train_loss[0] == (best - 3) ** 2


# Arguments ---------------------------------------------------------------------------------------

NAN = np.where(np.arange(600).reshape(300, 2) == 11, np.nan, ROWS)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=ROWS[:, 0]), r"x must have 2 axes, got shape \(300,\)"),
        (dict(x=ROWS[:, :1]), r"x must be \(300, 2\), got \(300, 1\)"),
        (dict(x=NAN), "x is not finite in 1 rows, the first is 5"),
        (dict(x=np.ma.masked_invalid(NAN)), "x is a masked array in which 1 numbers are missing"),
        (dict(context=ROWS), r"takes a context of width 0, got one of shape \(300, 2\)"),
        (dict(flow="1"), "takes a context of width 1, got none"),
        (dict(flow="1", context=ROWS), r"context must be \(300, 1\), got \(300, 2\)"),
        (dict(flow="1", context=ROWS[:9, :1]), r"must be \(300, 1\), got \(9, 1\)"),
        (dict(flow="2", context=NAN), "context is not finite in 1 rows"),
        (dict(weights=np.ones(3)), r"weights must be \(300,\)"),
        (dict(weights=np.zeros(300)), "weights must be .*not all 0"),
        (dict(weights=-np.ones(300)), "weights must be .*not negative"),
        (dict(weights=np.full(300, np.nan)), "weights is not finite in 300 rows"),
        (dict(validation=1.0), r"validation must be in \[0, 1\), got 1.0"),
        (dict(validation=-0.1), r"validation must be in \[0, 1\), got -0.1"),
        (dict(validation=np.ones(300)), r"validation must be a share or \(300,\) booleans"),
        (dict(validation=np.ones(3, bool)), r"\(300,\) booleans, got bool of shape \(3,\)"),
        (dict(validation=np.ones(300, bool)), "holds out every row"),
        (dict(batch_size=0), "batch_size must be a positive integer, got 0"),
        (dict(batch_size="50"), "batch_size must be a positive integer, got '50'"),
        (dict(max_epochs=1.5), "max_epochs must be a positive integer, got 1.5"),
        (dict(max_epochs=np.inf), "max_epochs must be a positive integer, got inf"),
        (dict(patience=0), "patience must be a positive number, got 0"),
        (dict(learning_rate=-1.0), "learning_rate must be a positive number, got -1.0"),
        (dict(learning_rate=np.nan), "learning_rate must be a positive number, got nan"),
        (dict(average=1.0), r"average must be in \[0, 1\), got 1.0"),
        (dict(anneal=0), r"anneal must be in \(0, 1\], got 0"),
        (dict(tolerance=-1), "tolerance must be a number of at least 0, got -1"),
        (dict(optimizer="adam"), "optimizer must be an optax optimizer or None, got 'adam'"),
        (dict(callback=3), "callback must be a function or None, got 3"),
        (dict(state=3), "state must be a TrainState or None, got 3"),
        (dict(regression=True), "regression=True needs .* context .* width 0"),
    ],
)
def test_arguments_are_checked(change, message):
    flow = change.pop("flow", None)
    with pytest.raises(ValueError, match=message):
        quick(0, small(context=int(flow)) if flow else small(), **{"x": ROWS, **change})


def test_unknown_options_name_the_function_and_the_nearest():
    for options, hint in [
        (dict(epochs=2), "did you mean 'max_epochs'"),
        (dict(lr=2), "its options are anneal, average, batch_size"),
    ]:
        with pytest.raises(TypeError, match=f"^fit got an unknown option '{[*options][0]}'; {hint}"):
            nm.fit(0, small(), ROWS, **options)
    with pytest.raises(TypeError, match="^train got an unknown option 'validation'"):
        check_options("train", dict(validation=0.1), TrainOptions)
    known = set(FitOptions.__annotations__) - {"weights", "validation", "standardize", "regression"}
    assert known == set(TrainOptions.__annotations__) == set(train.__kwdefaults__ or ())
    assert nm.fit.__annotations__["options"] in (Unpack[FitOptions], "Unpack[FitOptions]")
    with pytest.raises(TypeError, match="fit takes a Flow"):
        nm.fit(0, ROWS, small())


def test_training_rows_that_all_weigh_nothing_are_refused():
    """Otherwise the scalings would be averages of nothing."""
    held_out = np.arange(300) < 100
    with pytest.raises(ValueError, match="weight"):
        quick(0, small(), ROWS, weights=held_out.astype(float), validation=held_out)


def test_validation_rows_that_all_weigh_nothing_are_refused():
    """Otherwise no epoch would ever be the best, or all would."""
    held_out = np.arange(300) < 100
    with pytest.raises(ValueError, match="weight"):
        quick(0, small(), ROWS, weights=1.0 - held_out, validation=held_out)


@pytest.mark.filterwarnings("ignore:x. column 1")
@pytest.mark.parametrize("value", [0.0, 3.0, 1e6, 0.1])
def test_a_constant_column_keeps_scale_one(value):
    x = np.column_stack([ROWS[:, 0], np.full(300, value)])
    result = quick(0, small(), x, validation=0)
    assert result.flow.event_scale.scale[1] == 1
    np.testing.assert_allclose(result.flow.event_scale.loc[1], value, rtol=1e-6)
    assert np.isfinite(result.train_loss).all()


# The result ----------------------------------------------------------------------------------------


def test_results_are_shown_in_a_few_lines():
    result = quick(0, small(), ROWS)
    for lines in (repr(result), result._repr_html_()):
        assert len(lines) < 400 and lines.count("\n") < 6
        assert "3 epochs; best epoch 2 with validation loss" in lines and "still improving" in lines
    assert "interrupted" in repr(replace(result, stopped="interrupted"))
    ended = quick(0, small(), ROWS, validation=0, max_epochs=50, patience=1, learning_rate=1.0)
    assert "training loss" in repr(ended) and "still improving" not in repr(ended)


def test_equal_structures_compile_once(monkeypatch):
    traces, forward = [], nm.Affine.forward

    def counted(self, params, x):
        traces.append(x.shape)
        return forward(self, params, x)

    monkeypatch.setattr(nm.Affine, "forward", counted)
    counts = []
    for seed in range(3):
        flow = nm.maf(seed, 2, transforms=1, hidden=(9,))
        quick(seed, flow, ROWS + seed)
        counts.append(len(traces))
    assert 0 < counts[0] == counts[1] == counts[2]


def test_fits_are_reproducible_with_any_kind_of_key():
    first, again = (quick(jax.random.key(1), small(), ROWS, max_epochs=4) for _ in range(2))
    assert_same(first, again)
    assert_same(first, quick(1, small(), ROWS, max_epochs=4))
    assert_same(first, quick(jax.random.PRNGKey(1), small(), ROWS, max_epochs=4))
    assert differ(first, quick(jax.random.key(10), small(), ROWS, max_epochs=4))


def test_progress_is_silent_when_off_and_shown_when_on(capfd):
    quick(0, small(), ROWS)
    assert capfd.readouterr() == ("", "")
    quick(0, small(), ROWS, max_epochs=2, progress=True)
    assert "fit" in capfd.readouterr().err


def test_inputs_are_left_alone():
    x, weights = ROWS.copy(), np.ones(300)
    before = jax.tree.map(np.array, small())
    quick(0, small(), x, weights=weights)
    np.testing.assert_array_equal(x, ROWS)
    jax.tree.map(np.testing.assert_array_equal, small(), before)


def test_double_precision(x64):
    flow = nm.maf(0, 2, transforms=1, hidden=(8,))
    assert flow.bijectors[0].net.weights[0].dtype == np.float64
    result = quick(0, flow, 1e-42 * ROWS.astype(np.float64))
    assert {leaf.dtype for leaf in jax.tree.leaves(result.flow)} == {np.dtype(np.float64)}
    np.testing.assert_allclose(result.flow.event_scale.scale, 1e-42 * ROWS.std(0), rtol=0.1)


def test_regressions_start_from_the_linear_model():
    rng = np.random.default_rng(0)
    c = rng.normal(size=(1000, 1))
    x = c @ rng.normal(size=(1, 2)) + [1.0, 2.0] + rng.normal(size=(1000, 2)) @ [[0.3, 0.1], [0.0, 0.2]]
    options = dict(max_epochs=1, learning_rate=1e-5)
    exact = np.log(2 * np.pi * np.e) + np.log(0.3 * 0.2)
    result = quick(jax.random.key(1), small(context=1), x, c, regression=True, **options)
    np.testing.assert_allclose(result.validation_loss[0], exact, atol=0.25)
    better = quick(jax.random.key(1), small(context=1), x, c, regression=None, **options)
    assert better.validation_loss[0] <= result.validation_loss[0] + 1e-6
    with pytest.raises(ValueError, match="without a regression"):
        result.flow.regressed(x, c)
    # None is without a regression where there can be none.
    plain = quick(0, small(), ROWS, regression=None)
    assert_same(plain, quick(0, small(), ROWS))


def test_regressions_of_more_numbers_than_rows_stay_honest():
    rng = np.random.default_rng(0)
    c, x = rng.normal(size=(60, 100)), rng.normal(size=(60, 2))
    layer = nm.Regression.init(2, 100).initialized(x, c)
    rest, _ = layer.bind(rng.normal(size=(500, 100))).inverse_and_log_det(rng.normal(size=(500, 2)))
    np.testing.assert_allclose(rest.std(0), 1, atol=0.5)  # on rows that were not seen


def test_flows_onto_supports_are_densities_there():
    flow = nm.maf(jax.random.key(0), 1, transforms=1, hidden=(4,)).onto(constraints.positive)
    grid = np.linspace(-1, 60, 30501)[:, None]
    heights = np.exp(log_prob(flow, grid))
    np.testing.assert_allclose(heights.sum() * 0.002, 1, atol=0.01)
    assert (heights[:500] == 0).all()
    assert (jax.jit(lambda f, k: f().sample(k, (100,)))(flow, jax.random.key(0)) > 0).all()
    with pytest.raises(ValueError, match="real vectors"):
        flow.onto(constraints.positive)
