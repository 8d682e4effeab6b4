"""Training: known densities are learned, every row counts as it should, failures say where."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions import constraints

import numpyro_maf as nm
from numpyro_maf.train.loop import train

quick = partial(nm.fit, progress=False, max_epochs=3)
TRUTH = dist.MultivariateNormal(jnp.array([1.0, -2.0]), covariance_matrix=jnp.array([[1.0, 0.8], [0.8, 1.5]]))
ROWS = np.asarray(TRUTH.sample(jax.random.key(0), (300,)))


def small(features=2, seed=0, **options):
    return nm.maf(jax.random.key(seed), features, **{"transforms": 1, "hidden": (8,), **options})


def assert_same(a, b):
    np.testing.assert_array_equal(a.train_loss, b.train_loss)
    np.testing.assert_array_equal(a.validation_loss, b.validation_loss)
    jax.tree.map(np.testing.assert_array_equal, a.flow, b.flow)


def assert_differ(a, b):
    leaves = zip(jax.tree.leaves(a.flow), jax.tree.leaves(b.flow), strict=True)
    assert any((x != y).any() for x, y in leaves)


# What is learned -------------------------------------------------------------------------------


@pytest.mark.parametrize("builder", [nm.maf, nm.nsf])
def test_a_correlated_gaussian_is_learned(builder):
    x = TRUTH.sample(jax.random.key(1), (4000,))
    flow = builder(jax.random.key(0), 2, transforms=2, hidden=(16,))
    options = dict(max_epochs=60, learning_rate=3e-3, progress=False)
    result = nm.fit(jax.random.key(2), flow, x, **options)
    test = TRUTH.sample(jax.random.key(3), (20000,))
    divergence = (TRUTH.log_prob(test) - jax.jit(result.flow().log_prob)(test)).mean()
    assert -0.01 < divergence < 0.02
    assert abs(result.validation_loss.min() - TRUTH.entropy()) < 0.15


def test_a_conditional_density_is_learned():
    rng = np.random.default_rng(0)
    c = rng.uniform(-1, 1, (4000, 1))
    x = 3 + 2 * c + np.exp(0.5 * c) * rng.normal(size=(4000, 1))
    flow = small(1, context=1, hidden=(16,))
    options = dict(max_epochs=60, learning_rate=5e-3, progress=False)
    result = nm.fit(jax.random.key(0), flow, x, c, **options)
    c, x = jnp.asarray(c), jnp.asarray(x)
    truth = dist.Normal(3 + 2 * c, jnp.exp(0.5 * c)).to_event(1)
    gap = truth.log_prob(x) - jax.jit(lambda f: f(c).log_prob(x))(result.flow)
    assert -0.02 < gap.mean() < 0.02


def test_original_units_are_kept():
    """Losses are in nats of the data as given; the scalings are the training rows' own."""
    x = ROWS * np.array([1e-3, 1e4]) + np.array([5.0, -1e6])
    held_out = np.arange(300) % 3 == 0
    result = quick(jax.random.key(0), small(), x, validation=held_out)
    np.testing.assert_allclose(result.flow.event_scale.loc, x[~held_out].mean(0), rtol=1e-5)
    np.testing.assert_allclose(result.flow.event_scale.scale, x[~held_out].std(0), rtol=1e-4)
    expected = -jax.jit(result.flow().log_prob)(x[held_out]).mean()
    np.testing.assert_allclose(result.validation_loss[result.best_epoch], expected, rtol=1e-3)


def test_scalings_and_base_are_fixed():
    base = dist.StudentT(5.0).expand([2]).to_event(1)
    flow = small(base=base, context=1)
    context = ROWS[:, :1] * 3
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
        flow = small(context=1)
        results.append(
            quick(jax.random.key(0), flow, x, c, weights=weights, validation=held_out, batch_size=32)
        )
    assert_same(*results)


def test_weights_are_repetitions():
    """In one batch, a row of weight 3 is three rows."""
    rows = ROWS[:50]
    weights = np.arange(50) % 3 + 1.0
    # Not Adam, which would blow rounding in a gradient of almost 0 up to a whole step.
    options = dict(validation=0, max_epochs=5, optimizer=optax.sgd(0.1))
    weighted = quick(0, small(), rows, weights=weights, **options)
    repeated = quick(0, small(), np.repeat(rows, weights.astype(int), 0), **options)
    np.testing.assert_allclose(weighted.train_loss, repeated.train_loss, rtol=1e-4)
    check = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    jax.tree.map(check, weighted.flow, repeated.flow)
    other = quick(0, small(), rows, **options)
    assert abs(other.train_loss - weighted.train_loss).max() > 1e-3


def test_the_validation_loss_is_that_of_all_validation_rows_by_weight():
    rng = np.random.default_rng(0)
    x = np.asarray(TRUTH.sample(jax.random.key(5), (2600,)))  # more than one batch of validation
    held_out = np.arange(2600) % 2 == 0
    weights = rng.uniform(0, 2, 2600)
    result = quick(0, small(), x, weights=weights, validation=held_out, max_epochs=1, batch_size=100)
    log_prob = np.asarray(jax.jit(result.flow().log_prob)(x[held_out]), float)
    expected = -np.average(log_prob, weights=weights[held_out])
    np.testing.assert_allclose(result.validation_loss, [expected], rtol=1e-5)


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


def train_mean(x, held_out=None, weights=None, **options):
    n = len(x)
    options = {"progress": False, "optimizer": optax.sgd(0.05), **options}
    weights = np.ones(n) if weights is None else weights
    held_out = np.zeros(n, bool) if held_out is None else held_out
    params = {"mean": jnp.array(0.0)}
    return train(jax.random.key(0), mean_loss, params, [x], weights=weights, held_out=held_out, **options)


def test_the_last_partial_batch_is_used():
    """Seven rows by three: another row is alone in the last batch each epoch, and none is lost."""
    x = np.zeros(7)
    x[3] = 1.0
    for epochs in (1, 2, 5):
        best, losses, _, _ = train_mean(x, batch_size=3, max_epochs=epochs, optimizer=optax.sgd(0.0))
        np.testing.assert_allclose(losses, np.full(epochs, 1 / 7), rtol=1e-6)
    moved, *_ = train_mean(np.arange(7.0), batch_size=3, max_epochs=300, patience=300)
    np.testing.assert_allclose(moved["mean"], 3.0, atol=0.5)


def test_a_full_batch_step_is_the_gradient_of_the_weighted_mean():
    x, weights = np.array([1.0, 2.0, 6.0]), np.array([1.0, 2.0, 0.5])
    best, losses, _, epoch = train_mean(x, weights=weights, max_epochs=2)
    expected = [0.0]
    for _ in range(2):
        expected.append(expected[-1] - 0.05 * 2 * (expected[-1] - np.average(x, weights=weights)))
    np.testing.assert_allclose(best["mean"], expected[2], rtol=1e-5)
    squares = [np.average((m - x) ** 2, weights=weights) for m in expected[:2]]
    np.testing.assert_allclose(losses, squares, rtol=1e-5)
    assert epoch == 1


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


# When it stops -----------------------------------------------------------------------------------


def test_best_weights_are_kept_and_patience_ends():
    """Trained towards 10, validated at 1: the path passes the best and goes on to worse."""
    x = np.array([10.0, 1.0])
    held_out = np.array([False, True])
    best, train_loss, validation, epoch = train_mean(x, held_out, patience=4, max_epochs=100)
    assert epoch == validation.argmin() == 0 and len(validation) == epoch + 4 + 1
    np.testing.assert_allclose(best["mean"], 1.0, rtol=1e-6)
    slower = train_mean(x, held_out, patience=4, max_epochs=100, optimizer=optax.sgd(0.01))
    best, _, validation, epoch = slower
    assert epoch == validation.argmin() == 4 and len(validation) == 9
    np.testing.assert_allclose((best["mean"] - 1) ** 2, validation[epoch], rtol=1e-4)
    assert len(train_mean(x, held_out, patience=4, max_epochs=6)[2]) == 5
    assert len(train_mean(x, held_out, patience=40, max_epochs=6)[2]) == 6


def test_annealed_steps_settle_where_long_ones_do_not():
    """Gradient steps of 1.05 overshoot x - m by a tenth each; those of 0.315 close in."""
    options = dict(patience=8, max_epochs=100, optimizer=optax.sgd(1.05))
    astray, losses, *_ = train_mean(np.ones(1), **options)
    np.testing.assert_allclose(astray["mean"], 2.1, rtol=1e-5)
    assert (np.diff(losses) > 0).all()
    settled, *_ = train_mean(np.ones(1), anneal=0.3, **options)
    np.testing.assert_allclose(settled["mean"], 1.0, atol=1e-4)


def test_small_gains_do_not_prolong_training_but_are_kept():
    """The loss (x - m)^2 halves at each step, 2, 1, ..., 1/8, which is 0.1 above none but 1/64 and less."""
    options = dict(patience=3, max_epochs=50, optimizer=optax.sgd(0.5 * (1 - 0.5**0.5)))
    best, losses, _, epoch = train_mean(np.full(1, 2**0.5), tolerance=0.1, **options)
    np.testing.assert_allclose(losses, 2 * 0.5 ** np.arange(len(losses)), rtol=1e-5)
    assert epoch == len(losses) - 1 == 7 + 3
    assert float(best["mean"]) > 1.3
    assert len(train_mean(np.full(1, 2**0.5), **options)[1]) == 50


def test_fit_returns_the_best_epoch():
    held_out = np.arange(300) >= 40
    result = quick(
        0, small(hidden=(32,)), ROWS, validation=held_out, max_epochs=60, patience=60,
        learning_rate=3e-2,
    )  # fmt: skip
    assert result.best_epoch == result.validation_loss.argmin() < 59
    expected = -jax.jit(result.flow().log_prob)(ROWS[held_out]).mean()
    np.testing.assert_allclose(result.validation_loss.min(), expected, rtol=1e-5)


@pytest.mark.parametrize("stop", [0, 3])
def test_interruption_keeps_the_best_so_far(stop, monkeypatch, capsys):
    class Interrupted:
        """A progress bar at which somebody presses control-C."""

        def __init__(self, epochs, **options):
            self.epochs = epochs

        def __iter__(self):
            for epoch in self.epochs:
                if epoch == stop:
                    raise KeyboardInterrupt
                yield epoch

        def set_postfix(self, **values):
            pass

        def write(self, text):
            print(text)

        def close(self):
            print("closed")

    whole = quick(0, small(), ROWS, max_epochs=3)
    monkeypatch.setattr(sys.modules["numpyro_maf.fit"], "tqdm", Interrupted)
    result = quick(0, small(), ROWS, max_epochs=10)
    assert "interrupted" in capsys.readouterr().out
    if stop:
        assert_same(result, whole)
    else:
        assert len(result.train_loss) == 0 and result.best_epoch == -1
        jax.tree.map(np.testing.assert_array_equal, result.flow.bijectors, small().bijectors)


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
    flow = small()
    x = ROWS.copy()
    x[7] = 1e30
    with pytest.raises(FloatingPointError, match=r"at step \d+, .*net.*outliers.*learning rate"):
        quick(0, flow, x, standardize=False, validation=0)


# Arguments ---------------------------------------------------------------------------------------

NAN = np.where(np.arange(600).reshape(300, 2) == 11, np.nan, ROWS)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=ROWS[0]), r"x must have 2 axes, got shape \(2,\)"),
        (dict(x=ROWS[:, :1]), r"x must be \(300, 2\), got \(300, 1\)"),
        (dict(x=NAN), "x is not finite in 1 rows, the first is 5"),
        (dict(context=ROWS), r"takes a context of width 0, got one of shape \(300, 2\)"),
        (dict(flow=small(context=1)), "takes a context of width 1, got none"),
        (dict(flow=small(context=1), context=ROWS), r"context must be \(300, 1\), got \(300, 2\)"),
        (dict(flow=small(context=1), context=ROWS[:9, :1]), r"must be \(300, 1\), got \(9, 1\)"),
        (dict(flow=small(context=2), context=NAN), "context is not finite in 1 rows"),
        (dict(weights=np.ones(3)), r"weights must be \(300,\)"),
        (dict(weights=np.zeros(300)), "weights must be .*not all 0"),
        (dict(weights=-np.ones(300)), "weights must be .*not negative"),
        (dict(weights=np.full(300, np.nan)), "weights is not finite in 300 rows"),
        (dict(validation=1.0), r"validation must be in \[0, 1\), got 1.0"),
        (dict(validation=-0.1), r"validation must be in \[0, 1\), got -0.1"),
        (dict(validation=np.ones(300)), r"validation must be a share or \(300,\) booleans"),
        (dict(validation=np.ones(3, bool)), r"\(300,\) booleans, got \(3,\)"),
        (dict(validation=np.ones(300, bool)), "holds out every row"),
        (dict(batch_size=0), "batch_size must be a positive integer, got 0"),
        (dict(max_epochs=1.5), "max_epochs must be a positive integer, got 1.5"),
    ],
)
def test_arguments_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        quick(**{"key": 0, "flow": small(), "x": ROWS, **change})


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


@pytest.mark.parametrize("value", [0.0, 3.0, 1e6, 0.1])
def test_a_constant_column_keeps_scale_one(value):
    x = np.column_stack([ROWS[:, 0], np.full(300, value)])
    result = quick(0, small(), x, validation=0)
    assert result.flow.event_scale.scale[1] == 1
    np.testing.assert_allclose(result.flow.event_scale.loc[1], value, rtol=1e-6)
    assert np.isfinite(result.train_loss).all()


# The loop --------------------------------------------------------------------------------


def test_equal_structures_compile_once(monkeypatch):
    traces, forward = [], nm.Affine.forward

    def counted(self, params, x):
        traces.append(x.shape)
        return forward(self, params, x)

    monkeypatch.setattr(nm.Affine, "forward", counted)
    counts = []
    for seed in range(3):
        quick(seed, small(hidden=(9,), seed=seed), ROWS + seed)
        counts.append(len(traces))
    assert 0 < counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("seed", [0, 1])
def test_fits_are_reproducible(seed):
    options = dict(max_epochs=4, batch_size=50)
    first, again = (quick(jax.random.key(seed), small(), ROWS, **options) for _ in range(2))
    assert_same(first, again)
    assert_same(first, quick(seed, small(), ROWS, **options))
    assert_differ(first, quick(jax.random.key(seed + 10), small(), ROWS, **options))


def test_progress_is_silent_when_off_and_shown_when_on(capfd):
    quick(0, small(), ROWS)
    assert capfd.readouterr() == ("", "")
    nm.fit(0, small(), ROWS, max_epochs=2)
    assert "fit" in capfd.readouterr().err


def test_inputs_are_left_alone():
    x, weights = ROWS.copy(), np.ones(300)
    flow = small()
    before = jax.tree.map(np.array, flow)
    quick(0, flow, x, weights=weights)
    np.testing.assert_array_equal(x, ROWS)
    jax.tree.map(np.testing.assert_array_equal, flow, before)


def test_double_precision(x64):
    flow = small()
    assert flow.bijectors[0].net.weights[0].dtype == np.float64
    result = quick(0, flow, ROWS.astype(np.float64))
    assert {leaf.dtype for leaf in jax.tree.leaves(result.flow)} == {np.dtype(np.float64)}


def test_large_data_pass_by_in_blocks(tmp_path, monkeypatch):
    module = sys.modules["numpyro_maf.fit"]
    monkeypatch.setattr(module, "_RESIDENT", 0)
    monkeypatch.setattr(module, "_BLOCK", 2**14)
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", rng.normal([3.0, -2.0], [0.5, 2.0], (5000, 2)).astype(np.float32))
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    flow = nm.maf(jax.random.key(0), 2, transforms=1, hidden=(4,))
    result = nm.fit(jax.random.key(1), flow, x, max_epochs=3, progress=False)
    exact = np.log(2 * np.pi * np.e) + np.log(0.5 * 2.0)
    np.testing.assert_allclose(result.validation_loss[-1], exact, atol=0.1)
    np.testing.assert_allclose(result.train_loss[-1], exact, atol=0.05)


def test_regressions_start_from_the_linear_model():
    rng = np.random.default_rng(0)
    c = rng.normal(size=(2000, 3))
    x = c @ rng.normal(size=(3, 2)) + [1.0, 2.0] + rng.normal(size=(2000, 2)) @ [[0.3, 0.1], [0.0, 0.2]]
    flow = nm.maf(jax.random.key(0), 2, context=3, transforms=1, hidden=(4,))
    options = dict(max_epochs=1, learning_rate=1e-5, progress=False)
    exact = np.log(2 * np.pi * np.e) + np.log(0.3 * 0.2)
    result = nm.fit(jax.random.key(1), flow, x, c, regression=True, **options)
    np.testing.assert_allclose(result.validation_loss[0], exact, atol=0.25)
    better = nm.fit(jax.random.key(1), flow, x, c, regression=None, **options)
    assert better.validation_loss[0] <= result.validation_loss[0] + 1e-6
    rebuilt = nm.from_spec(result.flow.spec)
    assert jax.tree.structure(rebuilt) == jax.tree.structure(result.flow)
    with pytest.raises(ValueError, match="without a regression"):
        result.flow.regressed(x, c)


def test_flows_onto_supports_are_densities_there(tmp_path):
    flow = nm.nsf(jax.random.key(0), 1, transforms=1, hidden=(4,)).onto(constraints.positive)
    grid = np.linspace(0, 60, 30001)[1:]
    np.testing.assert_allclose(np.exp(flow().log_prob(grid[:, None])).sum() * 0.002, 1, atol=0.01)
    assert (flow().sample(jax.random.key(0), (100,)) > 0).all()
    assert jax.jit(flow().log_prob)(jnp.array([-1.0])) == -np.inf
    nm.save(tmp_path / "flow", flow)
    loaded = nm.load(tmp_path / "flow")
    np.testing.assert_array_equal(loaded().log_prob(grid[:9, None]), flow().log_prob(grid[:9, None]))
    with pytest.raises(ValueError, match="real vectors"):
        flow.onto(constraints.positive)


def test_regressions_of_more_numbers_than_rows_stay_honest():
    rng = np.random.default_rng(0)
    c, x = rng.normal(size=(60, 100)), rng.normal(size=(60, 2))
    layer = nm.Regression.init(2, 100).initialized(x, c)
    rest, _ = layer.bind(rng.normal(size=(500, 100))).inverse_and_log_det(rng.normal(size=(500, 2)))
    np.testing.assert_allclose(rest.std(0), 1, atol=0.5)  # on rows that were not seen


def test_losses_that_compare_rows_see_no_copies():
    """The last batch is filled up with other rows, as contrasts need them."""

    def loss(params, fixed, key, x):
        return params["a"] ** 2 + (jnp.roll(x, 1) == jnp.roll(x, 2))

    _, trained, validated, _ = train(
        jax.random.key(0), loss, {"a": jnp.zeros(())}, [np.arange(100.0, dtype=np.float32)],
        weights=np.ones(100), held_out=np.arange(100) >= 90, batch_size=64, max_epochs=2, progress=False,
    )  # fmt: skip
    np.testing.assert_array_equal([*trained, *validated], 0)
