"""MADE against tables of all states, closed forms, and the laws of distributions."""

import itertools
import json
import pickle
from dataclasses import replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import normals, parametrize, shaken
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints

import numpyro_maf as nm
from numpyro_maf import codec
from numpyro_maf.flows.conditionals import Bernoulli, Categorical, Count, LogMixture, Mixture, Normal

DISCRETE = (Categorical(3), Bernoulli(), Categorical(2), Bernoulli())
STATES = np.array(list(itertools.product(range(3), range(2), range(2), range(2))))
CASES = {
    "plain": dict(),
    "order": dict(order=(2, 0, 3, 1)),
    "deep": dict(hidden=(7, 5), direct=False),
    "order-agnostic": dict(masks=3, agnostic="order"),
    "connectivity-agnostic": dict(masks=3, agnostic="connectivity"),
    "both": dict(masks=3, agnostic="both", hidden=(6, 5)),
}
each_case = parametrize("name", {name: name for name in CASES})


@lru_cache(None)
def flow(name="plain", columns=DISCRETE, seed=0, size=0.7, **options):
    options = {"columns": columns, "hidden": (6,), **CASES[name], **options}
    return shaken(nm.made(jax.random.key(seed), len(columns), **options), seed + 1, size)


@jax.jit
def score(d, x):
    return d.log_prob(x)


@jax.jit
def program(made, keys, firsts, value, known):
    """All facts about the states, and 20,000 draws, free and given what is known."""
    d = made()
    return {
        "log_prob": d.log_prob(STATES),
        "members": d.member_log_probs(STATES),
        "prefixes": jax.vmap(lambda first: d.member_log_probs(STATES, first))(firsts),
        "draws": d.sample(keys[0], (20000,)),
        "supported": d.support(STATES),
        "given": d.sample_given(keys[1], value, known, (20000,)),
    }


@lru_cache(None)
def facts(name):
    made = flow(name)
    firsts = np.array([np.isin(np.arange(4), order[:2]) for order in made.orders])
    keys = jax.random.split(jax.random.key(1))
    return jax.tree.map(np.asarray, program(made, keys, firsts, STATES[17], firsts[0]))


def table(name):
    return np.exp(facts(name)["log_prob"].astype(float))


def frequencies(x):
    return np.array([(x == state).all(-1).mean() for state in STATES])


@each_case
def test_probabilities_sum_to_one(name):
    np.testing.assert_allclose(table(name).sum(), 1, rtol=1e-5)
    assert table(name).max() / table(name).min() > 10


@each_case
def test_draws_follow_the_table(name):
    x, p = facts(name)["draws"], table(name)
    assert x.dtype == np.int32 and facts(name)["supported"].all()
    assert (x >= 0).all() and (x <= STATES.max(0)).all()
    assert (abs(frequencies(x) - p) < 5 * np.sqrt(p / 20000)).all()


@each_case
def test_each_member_factorises_in_its_own_order(name):
    """log p(x) = sum of log p(x_d | earlier): so p of a prefix does not depend on what comes later."""
    for number, order in enumerate(flow(name).orders):
        first = order[:2]
        p = np.exp(facts(name)["members"][number].astype(float))
        prefix = np.exp(facts(name)["prefixes"][number, number].astype(float))
        for state, value in zip(STATES, prefix, strict=True):
            same = (STATES[:, first] == state[first]).all(1)
            np.testing.assert_allclose(value, p[same].sum(), rtol=1e-4)


@pytest.mark.parametrize("name", ["order-agnostic", "connectivity-agnostic", "both"])
def test_an_ensemble_is_the_mixture_of_different_members(name):
    made = flow(name)
    members = np.exp(facts(name)["members"].astype(float))
    weights = np.asarray(jax.nn.softmax(made.logits), float)
    np.testing.assert_allclose(weights @ members, table(name), rtol=1e-4)
    np.testing.assert_allclose(members.sum(1), 1, rtol=1e-4)
    assert (abs(members[:, None] - members).max(-1) + np.eye(3) > 1e-3).all()
    orders = {tuple(order) for order in made.orders.tolist()}
    assert (len(orders) > 1) == (name != "connectivity-agnostic")
    picked = made.randomized(jax.random.key(0))
    alone = score(picked(), STATES)
    np.testing.assert_allclose(alone, np.log(members[int(picked.member)]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "order", "connectivity-agnostic"])
def test_conditional_draws_are_exact(name):
    d, first = flow(name)(), flow(name).order[:2]
    known, p, x = np.isin(np.arange(4), first), table(name), facts(name)["given"]
    assert d.is_ancestral(known) and not d.is_ancestral(~known)
    value = STATES[17]
    assert (x[:, known] == value[known]).all()
    same = (STATES[:, known] == value[known]).all(1)
    expected = np.where(same, p, 0) / p[same].sum()
    assert (abs(frequencies(x) - expected) < 5 * np.sqrt(expected / 20000) + 1e-9).all()


def test_forbidden_dependencies_are_exactly_zero():
    """The gradient of each conditional in the columns: none in itself's later ones."""
    made, x = flow("both", columns=(Normal(),) * 4), normals(3, 4)
    earlier = [[np.isin(np.arange(4), order[:count]) for count in range(1, 5)] for order in made.orders]

    @jax.jit
    def gradients(made, known):
        return jax.vmap(lambda known: jax.jacrev(lambda x: made().member_log_probs(x, known))(x))(known)

    found = np.asarray(gradients(made, np.concatenate(earlier))).reshape(3, 4, 3, 4)
    for number in range(3):
        for count in range(4):
            gradient, known = found[number, count, number], earlier[number][count]
            assert (gradient[~known] == 0).all() and (gradient[known] != 0).all()


# Continuous and mixed columns -------------------------------------------------------------------


@jax.jit
def scored_and_drawn(d, y, key):
    x = d.sample(key, (20000,))
    return d.log_prob(y), x, d.support(x)


@pytest.mark.parametrize(
    "columns",
    [
        (Normal(), Mixture(3)),
        (Normal(), Bernoulli()),
        (Categorical(3), Mixture(2)),
        (Categorical(3, low=-1), LogMixture(2, scale=0.5)),
        (Count(2, most=12, loc=1.0, scale=0.5), Normal()),
    ],
)
@pytest.mark.parametrize("name", ["plain", "both"])
def test_mixed_columns_integrate_to_one_and_draw_alike(columns, name):
    made = flow(name, columns=columns, seed=3, size=0.2, order=None)
    d = replace(made, event_scale=nm.Standardize(*SCALES[columns]))()
    t = np.linspace(-6, 6, 201 if all(not c.is_discrete for c in columns) else 1001)
    axes = [(np.sinh(t), (t[1] - t[0]) * np.cosh(t))] * 2
    for i, column in enumerate(columns):
        if isinstance(column, LogMixture):
            axes[i] = np.exp(t), (t[1] - t[0]) * np.exp(t)
        elif column.is_discrete:
            low = getattr(column, "low", 0)
            count = getattr(column, "categories", 13 if isinstance(column, Count) else 2)
            axes[i] = low + np.arange(count, dtype=float), np.ones(count)
    y = np.stack(np.meshgrid(*[a for a, _ in axes], indexing="ij"), -1).reshape(-1, 2)
    cell = np.stack(np.meshgrid(*[w for _, w in axes], indexing="ij"), -1).reshape(-1, 2).prod(1)
    log_prob, x, supported = scored_and_drawn(d, y.astype(np.float32), jax.random.key(1))
    mass = np.exp(np.asarray(log_prob, float)) * cell
    np.testing.assert_allclose(mass.sum(), 1, atol=2e-3)
    assert supported.all() and x.dtype == np.float32
    x = np.asarray(x, float)
    for power in (1, 2):
        bounded = np.tanh(x / 3) ** power
        expected = mass @ np.tanh(y / 3) ** power
        assert (abs(bounded.mean(0) - expected) < 5 * bounded.std(0) / len(x) ** 0.5 + 2e-3).all()


SCALES = {
    (Normal(), Mixture(3)): (jnp.array([1.0, -1.0]), jnp.array([0.5, 2.0])),
    (Normal(), Bernoulli()): (jnp.array([1.0, 0.0]), jnp.array([0.5, 1.0])),
    (Categorical(3), Mixture(2)): (jnp.array([0.0, 2.0]), jnp.array([1.0, 3.0])),
    (Categorical(3, low=-1), LogMixture(2, scale=0.5)): (jnp.zeros(2), jnp.ones(2)),
    (Count(2, most=12, loc=1.0, scale=0.5), Normal()): (jnp.array([0.0, 2.0]), jnp.array([1.0, 3.0])),
}


@pytest.mark.parametrize("most", [None, 7])
def test_counts_have_probabilities_at_any_size(most):
    """They sum to 1, draws follow them, and float32 is right where both ends of a cell round alike."""
    column = Count(3, most=most, loc=1.0, scale=1.0)
    params = jnp.asarray(column.initial, jnp.float32)
    n = np.arange(20000 if most is None else 8, dtype=np.float32)
    large = np.array([1e3, 1e6, 4e6, -1, 0.5, 8])

    @jax.jit
    def facts(params, uniform, normal):
        def score(p, n):
            return column.log_prob(p[:, None] * jnp.ones(len(n)), n)

        gradient = jax.grad(lambda p: score(p, large.astype(np.float32)).sum())(params)
        drawn = column.sample(params[:, None] * jnp.ones(20000), uniform, normal)
        return score(params, n), score(params, large.astype(np.float32)), gradient, drawn

    rng = np.random.default_rng(0)
    numbers = np.float32([rng.uniform(size=20000), rng.normal(size=20000)])
    table, one, gradient, drawn = map(np.asarray, facts(params, *numbers))
    table = np.exp(table.astype(float))
    np.testing.assert_allclose(table.sum(), 1, atol=1e-3)
    shares = np.array([(drawn == k).mean() for k in range(8)])
    assert (abs(shares - table[:8]) < 5 * np.sqrt(table[:8] / 20000)).all() and drawn.max() <= (most or 1e9)
    with jax.enable_x64(True):
        other = column.log_prob(np.array(column.initial)[:, None] * np.ones(6), large)
    np.testing.assert_allclose(one, other, rtol=1e-5)
    assert np.isneginf(one[3:5]).all() and np.isneginf(one[5]) == (most == 7)
    assert np.isfinite(gradient).all()


def test_a_logarithm_with_a_mixture():
    column = LogMixture(1, loc=0.5, scale=0.3)
    x = jnp.array([0.5, 1.0, 4.0])
    expected = dist.LogNormal(0.5, 0.3).log_prob(x)
    np.testing.assert_allclose(column.log_prob(jnp.zeros((3, 1)), x), expected, rtol=1e-5)
    assert np.isneginf(column.log_prob(jnp.zeros((3, 1)), jnp.array([0.0, -1.0]))).all()


def test_one_normal_column_is_a_normal():
    made = nm.made(jax.random.key(0), 1, hidden=(3,))
    made = made.with_weights(jax.tree.map(jnp.zeros_like, made.weights))
    y = jnp.linspace(-3, 3, 7)[:, None]
    np.testing.assert_allclose(score(made(), y), dist.Normal(0, 1).log_prob(y[:, 0]), rtol=1e-5)


def test_supports():
    columns = {Normal(): constraints.real_vector, Mixture(2): constraints.real_vector}
    for column, support in columns.items():
        assert flow(columns=(column,) * 2)().support is support
    binary, mixed = flow(columns=(Bernoulli(),) * 2)(), flow(columns=(Normal(), Categorical(3)))()
    np.testing.assert_array_equal(binary.support(jnp.array([[0, 1], [1, 2]])), [True, False])
    np.testing.assert_array_equal(
        mixed.support(jnp.array([[0.3, 2.0], [0.3, 1.5], [5.0, 3.0]])), [True, False, False]
    )
    assert binary.is_discrete and mixed.is_discrete and not flow(columns=(Normal(),))().is_discrete
    counts, both = flow(columns=(Count(),) * 2)(), flow(columns=(Normal(), LogMixture()))()
    np.testing.assert_array_equal(counts.support(jnp.array([[0, 900], [-1, 2]])), [True, False])
    np.testing.assert_array_equal(both.support(jnp.array([[-1.0, 1.0], [1.0, -1.0]])), [True, False])
    assert counts.is_discrete and not both.is_discrete


# NumPyro and JAX ---------------------------------------------------------------------------------


def test_observed_in_a_plate_and_trained_as_a_site():
    made, x = flow(), STATES[:7]

    def model(x):
        f = nm.flow_module("made", made)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", f(), obs=x)

    trace = numpyro.handlers.trace(numpyro.handlers.seed(model, 0)).get_trace(x)
    assert trace["x"]["fn"].batch_shape == (7,)
    np.testing.assert_allclose(trace["x"]["fn"].log_prob(x), score(made(), x), rtol=1e-5)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_context_becomes_batch_shape(shape):
    made, context = flow("both", context=2), normals(5, *shape, 2)

    @jax.jit
    def run(made, context, key):
        d = made(context)
        assert (d.batch_shape, d.event_shape) == (shape, (4,))
        x = d.sample(key, (5,))
        gradient = jax.grad(lambda c: made(c).log_prob(x).sum())(context)
        rows = x.reshape(5, -1, 4).swapaxes(0, 1)
        one = jax.vmap(lambda c, x: made(c).log_prob(x))(context.reshape(-1, 2), rows)
        return x, d.log_prob(x), one.T, gradient

    x, log_prob, one, gradient = run(made, context, jax.random.key(0))
    assert x.shape == (5, *shape, 4)
    np.testing.assert_allclose(log_prob.reshape(5, -1), one, rtol=1e-4, atol=1e-5)
    assert (gradient != 0).all()


def test_inside_a_scan_and_out_of_vmap():
    made, xs = flow("both"), jnp.asarray(STATES[:5])

    def model(xs):
        def step(carry, x):
            numpyro.sample("x", made(), obs=x)
            return carry, None

        scan(step, 0.0, xs)

    total, _ = numpyro.infer.util.log_density(model, (xs,), {}, {})
    np.testing.assert_allclose(total, score(made(), xs).sum(), rtol=1e-5)
    stacked = jax.vmap(lambda key: nm.made(key, 4, columns=DISCRETE, hidden=(6,))())(
        jax.random.split(jax.random.key(0), 3)
    )
    assert jax.eval_shape(stacked.log_prob, xs[:3]).shape == (3,)
    assert jax.eval_shape(lambda: stacked.sample(jax.random.key(0), (2,))).shape == (2, 3, 4)
    alone = nm.made(jax.random.split(jax.random.key(0), 3)[1], 4, columns=DISCRETE, hidden=(6,))
    np.testing.assert_allclose(score(stacked, xs[:3])[1], score(alone(), xs[1]), rtol=1e-5)


@each_case
def test_files_specs_and_pickles(name, tmp_path):
    made = flow(name)
    nm.save(tmp_path / "made", made)
    for other in (nm.load(tmp_path / "made"), pickle.loads(pickle.dumps(made))):
        np.testing.assert_array_equal(score(other(), STATES), score(made(), STATES))
    rebuilt = nm.from_spec(json.loads(json.dumps(made.spec)))
    assert jax.tree.structure(rebuilt) == jax.tree.structure(made)


def test_equal_structures_share_one_trace():
    traces = []

    @jax.jit
    def run(made, x):
        traces.append(1)
        return made().log_prob(x)

    for seed in range(3):
        run(flow("both", seed=seed), STATES)
    assert len(traces) == 1


# Fitting -----------------------------------------------------------------------------------------


def test_fit_finds_a_table_and_keeps_discrete_units():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(24))
    x = STATES[rng.choice(24, 6000, p=p)]
    made = nm.made(jax.random.key(0), 4, columns=DISCRETE, hidden=(32,))
    result = nm.fit(0, made, x, max_epochs=30, learning_rate=1e-2, progress=False)
    assert result.flow.event_scale is None
    divergence = p @ (np.log(p) - np.asarray(score(result.flow(), STATES), float))
    assert divergence < 0.02
    mixed = nm.made(jax.random.key(0), 2, columns=(Bernoulli(), Normal()), hidden=(8,))
    rows = np.stack([rng.integers(0, 2, 200), 5 + 3 * rng.normal(size=200)], 1)
    scale = nm.fit(0, mixed, rows, max_epochs=1, progress=False).flow.event_scale
    np.testing.assert_array_equal([scale.loc[0], scale.scale[0]], [0, 1])
    np.testing.assert_allclose([scale.loc[1], scale.scale[1]], [5, 3], atol=0.6)


@pytest.mark.slow
def test_mixture_weights_reach_the_best_there_is():
    made = flow("both")
    x = np.asarray(made.randomized(jax.random.key(1))().sample(jax.random.key(2), (300,)))
    learned = nm.fit_mixture(made, x)
    table = np.exp(np.asarray(jax.jit(lambda d: d.member_log_probs(x))(made()), float))
    grid = np.array([(a, b, 1 - a - b) for a in np.linspace(0, 1, 101) for b in np.linspace(0, 1 - a, 101)])
    best = np.log(np.maximum(grid @ table, 1e-300)).mean(1).max()
    reached = float(score(learned(), x).mean())
    assert reached > best - 1e-4 and reached > float(score(made(), x).mean())
    with pytest.raises(ValueError, match="masks=M"):
        nm.fit_mixture(flow(), x)


# Arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(columns="normal"), TypeError, "columns must be a Conditional"),
        (dict(columns=(Normal(),)), ValueError, "columns must hold 2 conditionals, got 1"),
        (dict(agnostic="none"), ValueError, "agnostic must be one of"),
        (dict(masks=0), ValueError, "masks must be an integer of at least 1"),
        (dict(order=(0, 0)), ValueError, "order must hold each of 0..1 once"),
        (dict(features=(2, 2, 1)), ValueError, "made takes vectors"),
    ],
)
def test_arguments_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        nm.made(jax.random.key(0), **{"features": 2, **options})


@pytest.mark.parametrize(
    "column", [Normal(3.0), Mixture(4), Bernoulli(), Categorical(5, 1), Count(4, 9), LogMixture(3, 0.5)]
)
def test_conditionals_round_trip_through_json(column):
    assert codec.read(json.loads(json.dumps(codec.write(column)))) == column
    with pytest.raises(ValueError, match="unknown kind"):
        codec.read({"class": "Poisson"})
