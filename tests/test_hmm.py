"""HMM against the sum over all paths: small chains, every path written out."""

import itertools
import pickle
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, Predictive
from numpyro.infer.util import log_density
from scipy.special import logsumexp, softmax

from numpyro_maf import HMM


def chain(seed, steps, states, *, initial=(), transition=(), table=(), observed=None):
    """Arguments of an HMM; the keywords are the batch shapes, transition's with the steps."""
    rng = np.random.default_rng(seed)
    made = {
        "initial": rng.dirichlet(np.ones(states), initial),
        "transition": rng.dirichlet(np.ones(states), (*transition, states)),
        "log_density": 2 * rng.normal(size=(*table, steps, states)) - 1,
    }
    if observed is not None:
        made["observed"] = rng.random((*observed, steps)) < 0.6
    return made


def with_zeros(args):
    """Some starts, moves and emissions made impossible, but not all paths."""
    initial = np.array([0.0, 0.5, 0.5])
    transition = np.array([[0.5, 0.5, 0], [0, 0.2, 0.8], [0.9, 0.1, 0]])
    table = args["log_density"].copy()
    table[1, 0] = table[2, 1] = table[3, 2] = -np.inf
    return {"initial": initial, "transition": transition, "log_density": table}


CHAINS = {
    "constant": chain(0, 4, 3),
    "by-step": chain(1, 4, 3, transition=(3,)),
    "missing": chain(2, 5, 2, observed=()),
    "two-steps": chain(3, 2, 3, transition=(1,)),
    "one-step": chain(4, 1, 3),
    "one-state": chain(5, 4, 1),
    "batch": chain(6, 4, 2, initial=(2,), transition=(2, 3), table=(2,), observed=(2,)),
    "batch-table": chain(7, 3, 3, table=(2, 3)),
    "batch-broadcast": chain(8, 3, 2, initial=(3,), transition=(2, 1, 1), observed=(3,)),
    "zeros": with_zeros(chain(11, 4, 3)),
}
each_chain = pytest.mark.parametrize("name", CHAINS, scope="module")  # keeps a chain together
pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture
def x32(x64):
    """Back to single precision."""
    with jax.enable_x64(False):
        yield


def all_paths(args, choices=0):
    """Every path ``(N, T)``; with ``choices=-1`` every labelling, -1 for unknown."""
    steps, states = args["log_density"].shape[-2:]
    return np.array(list(itertools.product(range(choices, states), repeat=steps)))


def joint(initial, transition, log_density, observed=None):
    """Log-density of every path with the observations, ``(..., N)``: nothing clever."""
    paths = all_paths({"log_density": log_density})
    steps = np.arange(paths.shape[1])
    if transition.ndim == 2:
        transition = transition[None]
    moves = np.broadcast_to(transition, (*transition.shape[:-3], len(steps) - 1, *transition.shape[-2:]))
    table = log_density if observed is None else np.where(observed[..., None], log_density, 0)
    with np.errstate(divide="ignore"):
        return (
            np.log(initial)[..., paths[:, 0]]
            + np.log(moves)[..., steps[:-1], paths[:, :-1], paths[:, 1:]].sum(-1)
            + table[..., steps, paths].sum(-1)
        )


def agrees(labels, paths):
    """Which paths ``(N, T)`` agree with labels ``(..., T)`` where these are known: ``(..., N)``."""
    return ((labels[..., None, :] == paths) | (labels[..., None, :] < 0)).all(-1)


def brute_marginals(args):
    """The probability of every state at every step, ``(..., T, K)``."""
    hot = all_paths(args)[..., None] == np.arange(args["log_density"].shape[-1])
    return np.einsum("...n,ntk->...tk", softmax(joint(**args), -1), hot)


LABELS = {1: [1], 2: [1, -1], 3: [-1, 0, -1], 4: [1, -1, -1, 0], 5: [-1, 0, -1, -1, 1]}


def some_labels(name):
    """Nothing known and some states known, ``(2, ..., T)``."""
    args = CHAINS[name]
    *_, steps, states = args["log_density"].shape
    known = np.minimum(LABELS[steps], states - 1)
    return np.stack([np.full_like(known, -1), known]).reshape(2, *(1,) * (joint(**args).ndim - 1), -1)


def brute_gradients(args, labels):
    """Of the log of the sum over the paths that agree, by each argument and for each row of labels.

    The derivative of a log-sum-exp is the weight of each path times the derivative of its term.
    """
    paths = all_paths(args)
    weights = softmax(np.where(agrees(labels, paths), joint(**args), -np.inf), -1)
    hot = (paths[..., None] == np.arange(args["log_density"].shape[-1])).astype(float)
    states = np.einsum("l...n,ntk->l...tk", weights, hot)
    moves = np.einsum("l...n,nti,ntj->l...tij", weights, hot[:, :-1], hot[:, 1:])
    with np.errstate(divide="ignore", invalid="ignore"):
        wide = {
            "initial": states[..., 0, :] / args["initial"],
            "transition": moves / args["transition"],
            "log_density": states * args["observed"][..., None] if "observed" in args else states,
        }
    return {k: summed_to(v, (len(labels), *np.shape(args[k]))) for k, v in wide.items()}


def summed_to(a, shape):
    """The first axis stays, and of the others those that broadcasting made are summed."""
    a = a.sum(tuple(range(1, 1 + a.ndim - len(shape))))
    return a.sum(tuple(i for i, n in enumerate(shape) if n == 1 < a.shape[i]), keepdims=True)


@lru_cache
def facts(name):
    """All that an HMM knows, from one compilation."""
    some = some_labels(name)

    def evidence(floats, rest):
        return HMM(**floats, **rest).log_prob(some).sum(range(1, some.ndim - 1))

    @jax.jit
    def everything(args):
        d = HMM(**args)
        rest = {k: v for k, v in args.items() if k == "observed"}
        floats = {k: v for k, v in args.items() if k != "observed"}
        labels = all_paths(args, choices=-1)
        labels = labels.reshape(len(labels), *(1,) * len(d.batch_shape), -1)
        known = jnp.moveaxis(d.log_prob(labels), 0, -1)
        return {
            "evidence": d.log_prob(),
            "known": known,
            "marginals": d.marginals,
            "filtered": d.filtered,
            "mode": d.mode,
            "draws": d.sample(jax.random.key(0), (2, 10000)),
            "gradients": jax.jacrev(evidence)(floats, rest),
        }

    return jax.tree.map(np.asarray, everything(CHAINS[name]))


@each_chain
def test_evidence(name):
    expected = logsumexp(joint(**CHAINS[name]), -1)
    assert facts(name)["evidence"].shape == expected.shape
    np.testing.assert_allclose(facts(name)["evidence"], expected, rtol=1e-12)


@each_chain
def test_log_prob_of_every_labelling(name):
    args = CHAINS[name]
    consistent = agrees(all_paths(args, choices=-1), all_paths(args))
    scores = np.where(consistent, joint(**args)[..., None, :], -np.inf)
    np.testing.assert_allclose(facts(name)["known"], logsumexp(scores, -1), rtol=1e-12)


@each_chain
def test_marginals(name):
    expected = brute_marginals(CHAINS[name])
    np.testing.assert_allclose(facts(name)["marginals"], expected, rtol=1e-10, atol=1e-15)


@each_chain
def test_filtered_are_the_last_marginals_of_the_shorter_chains(name):
    args, actual = CHAINS[name], facts(name)["filtered"]
    assert actual.shape == facts(name)["marginals"].shape
    for t in range(actual.shape[-2]):
        shorter = {**args, "log_density": args["log_density"][..., : t + 1, :]}
        if "observed" in args:
            shorter["observed"] = args["observed"][..., : t + 1]
        if args["transition"].ndim > 2 and args["transition"].shape[-3] > 1:
            shorter["transition"] = args["transition"][..., :t, :, :]
        expected = brute_marginals(shorter)[..., -1, :]
        np.testing.assert_allclose(actual[..., t, :], expected, rtol=1e-10, atol=1e-15)


@each_chain
def test_mode_is_the_most_probable_path(name):
    args = CHAINS[name]
    np.testing.assert_array_equal(facts(name)["mode"], all_paths(args)[joint(**args).argmax(-1)])


@each_chain
def test_samples_follow_the_posterior(name):
    args, draws = CHAINS[name], facts(name)["draws"]
    p = softmax(joint(**args), -1)
    assert draws.shape == (2, 10000, *facts(name)["mode"].shape)
    counts = agrees(draws, all_paths(args)).sum((0, 1))
    np.testing.assert_array_equal(counts.sum(-1), 20000)
    assert (counts[p == 0] == 0).all()
    assert (abs(counts - 20000 * p) < 5 * np.sqrt(20000 * p * (1 - p)) + 1).all()


def test_batch_rows_are_drawn_independently():
    d = HMM(**CHAINS["constant"]).expand([2])
    first, second = np.moveaxis(np.asarray(d.sample(jax.random.key(0), (2000,))), 1, 0)
    assert 0.01 < (first == second).all(-1).mean() < 0.9


@each_chain
def test_gradients_are_those_of_the_sum_over_paths(name):
    actual, expected = facts(name)["gradients"], brute_gradients(CHAINS[name], some_labels(name))
    for field, derivative in expected.items():
        value = CHAINS[name][field]
        # At an exact 0 the derivative by the probability is defined to be 0.
        possible = value > (-np.inf if field == "log_density" else 0)
        assert np.isfinite(actual[field]).all() and (actual[field][:, ~possible] == 0).all()
        np.testing.assert_allclose(actual[field][:, possible], derivative[:, possible], rtol=1e-9, atol=1e-12)


def test_impossible_observations_have_no_density_and_no_nan():
    table = np.zeros((4, 3))
    table[2] = -np.inf

    def evidence(args):
        return HMM(**args).log_prob()

    args = {**CHAINS["constant"], "log_density": table}
    value, gradient = jax.jit(jax.value_and_grad(evidence))(args)
    assert value == -np.inf
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_softmax_with_impossible_moves_trains_without_nan():
    args = CHAINS["zeros"]

    def loss(logits):
        d = HMM(args["initial"], jax.nn.softmax(logits), args["log_density"], validate_args=False)
        return -d.log_prob(jnp.array([2, -1, 0, -1]))

    gradient = jax.jit(jax.grad(loss))(jnp.log(args["transition"]))
    assert np.isfinite(gradient).all() and (gradient != 0).any()


def test_one_step_needs_no_transition():
    args = {**CHAINS["one-step"], "transition": np.zeros((0, 3, 3))}
    np.testing.assert_allclose(HMM(**args).log_prob(), facts("one-step")["evidence"], rtol=1e-12)


@jax.jit
def outline(d):
    """Something of every kind that an HMM computes."""
    return d.log_prob(), d.mode, d.filtered, d.marginals, d.log_prob(d.mode)


def assert_same(actual, expected, **tolerance):
    check = partial(np.testing.assert_allclose, **tolerance)
    jax.tree.map(check, outline(actual), outline(expected))


@pytest.mark.parametrize("junk", [0.0, 7.0, 1e30, np.nan])
def test_rows_of_missing_steps_do_not_count(junk):
    args = CHAINS["missing"]
    gone = ~args["observed"]
    assert 0 < gone.sum() < gone.size
    filled = np.where(gone[:, None], junk, args["log_density"])
    assert_same(HMM(**{**args, "log_density": filled}), HMM(**args), rtol=0)


def test_nothing_observed_leaves_the_prior():
    args = {**CHAINS["constant"], "observed": np.zeros(4, bool)}
    evidence, _, filtered, marginals, _ = outline(HMM(**args))
    np.testing.assert_allclose(evidence, 0, atol=1e-15)
    expected = [args["initial"]]
    for _ in range(3):
        expected.append(expected[-1] @ args["transition"])
    np.testing.assert_allclose(marginals, expected, rtol=1e-12)
    np.testing.assert_allclose(filtered, expected, rtol=1e-12)


def test_float32_keeps_its_digits_over_thousands_of_steps(x32):
    args = chain(20, 2000, 4)

    @jax.jit
    def evidence(args):
        return HMM(**args, validate_args=False).log_prob()

    narrow = evidence(args)
    with jax.enable_x64(True):
        wide = evidence(args)
    assert narrow.dtype == np.float32 and wide.dtype == np.float64
    assert abs(float(narrow) - float(wide)) < max(1e-3, 1e-6 * abs(float(wide)))


@pytest.mark.parametrize("name", ["constant", "batch", "zeros"])
def test_float32_chains_stay_float32(name, x32):
    narrow = {k: v if v.dtype == bool else v.astype(np.float32) for k, v in CHAINS[name].items()}
    evidence, mode, *others = jax.jit(lambda args: outline(HMM(**args)))(narrow)
    assert all(value.dtype == np.float32 for value in (evidence, *others))
    np.testing.assert_allclose(evidence, logsumexp(joint(**CHAINS[name]), -1), rtol=1e-5)


# As a NumPyro distribution -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["constant", "by-step", "missing", "batch"])
def test_pytree_pickle_and_jit(name):
    d = HMM(**CHAINS[name])
    leaves, structure = jax.tree.flatten(d)
    through = [
        jax.tree.unflatten(structure, leaves),
        jax.jit(lambda d: d)(d),
        jax.jit(lambda args: HMM(**args))(CHAINS[name]),
        pickle.loads(pickle.dumps(d)),
    ]
    for other in through:
        assert (other.batch_shape, other.event_shape) == (d.batch_shape, d.event_shape)
        assert_same(other, d, rtol=0)


def test_vmap_inside_and_across():
    args = CHAINS["constant"]
    tables = args["log_density"] + np.arange(5.0)[:, None, None] * np.array([1, 0, -0.5])

    def make(table):
        return HMM(args["initial"], args["transition"], table)

    expected = jax.tree.map(lambda *parts: np.stack(parts), *(outline(make(t)) for t in tables))
    check = partial(np.testing.assert_allclose, rtol=1e-12)
    jax.tree.map(check, jax.jit(jax.vmap(lambda table: outline(make(table))))(tables), expected)
    jax.tree.map(check, jax.vmap(outline)(jax.jit(jax.vmap(make))(tables)), expected)


def test_support_holds_labels_and_nothing_else():
    support = HMM(**CHAINS["constant"]).support
    labels = jnp.array([[0, 1, 2, -1], [0, 1, 3, 0], [0, -2, 0, 0]])
    np.testing.assert_array_equal(support(labels), [True, False, False])


@pytest.mark.parametrize("wrong", [3, -2])
def test_labels_outside_the_support_are_impossible(wrong):
    d = HMM(**CHAINS["constant"], validate_args=True)
    assert jax.jit(d.log_prob)(jnp.array([0, 1, wrong, 0])) == -np.inf


@pytest.mark.parametrize("labels", [[-1, -1, -1], [0, -1, 1], [1, 1, 0]])
@pytest.mark.parametrize("own_table", [True, False])
def test_plate_of_homes_with_labels(labels, own_table):
    d = HMM(**chain(30, 3, 2, table=(4,) if own_table else ()))
    labels = np.broadcast_to(labels, (4, 3)).copy()
    labels[1] = -1

    def model(labels):
        with numpyro.plate("homes", 4):
            numpyro.sample("activity", d, obs=labels)

    total = log_density(model, (labels,), {}, {})[0]
    np.testing.assert_allclose(total, d.log_prob(labels).sum(), rtol=1e-12)


def test_subsampled_plate_scales():
    args = chain(31, 3, 2, table=(6,))

    def model():
        with numpyro.plate("homes", 6, subsample_size=2) as homes:
            d = HMM(args["initial"], args["transition"], jnp.asarray(args["log_density"])[homes])
            numpyro.sample("activity", d, obs=jnp.full((2, 3), -1))

    trace = handlers.trace(handlers.seed(model, 0)).get_trace()
    homes = trace["homes"]["value"]
    expected = 3 * HMM(**args).log_prob()[homes].sum()
    actual = log_density(handlers.seed(model, 0), (), {}, {"homes": homes})[0]
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_mask_handler_and_expand():
    d = HMM(**chain(9, 3, 2, initial=(2,)))
    assert d.expand([4, 2]).sample(jax.random.key(0), (5,)).shape == (5, 4, 2, 3)
    assert d.to_event(1).event_shape == (2, 3)
    labels = jnp.full((2, 3), -1)
    masked = d.mask(jnp.array([True, False])).log_prob(labels)
    np.testing.assert_allclose(masked, jnp.array([d.log_prob()[0], 0]))


@pytest.mark.slow
def test_nuts_finds_the_means_of_labelled_states(x32):
    """Known answer: with every label given, each state's mean is a conjugate Normal posterior."""
    rng = np.random.default_rng(0)
    states = np.arange(60) // 10 % 2
    y = np.where(states, 2.0, -1.0) + rng.normal(size=60)
    initial, transition = jnp.array([0.5, 0.5]), jnp.array([[0.9, 0.1], [0.1, 0.9]])

    def model(labels):
        mean = numpyro.sample("mean", dist.Normal(0, 10).expand([2]).to_event(1))
        table = dist.Normal(mean, 1).log_prob(y[:, None])
        numpyro.sample("state", HMM(initial, transition, table), obs=labels)

    mcmc = MCMC(NUTS(model), num_warmup=200, num_samples=500, progress_bar=False)
    mcmc.run(jax.random.key(0), states)
    draws = mcmc.get_samples()["mean"]
    precision = 30 + 0.01
    exact = np.array([y[states == k].sum() / precision for k in range(2)])
    np.testing.assert_allclose(draws.mean(0), exact, atol=5 * (precision * 100) ** -0.5)
    np.testing.assert_allclose(draws.std(0), precision**-0.5, rtol=0.25)


def test_predictive_draws_paths(x32):
    args = CHAINS["zeros"]

    def model():
        numpyro.sample("path", HMM(**args))

    draws = Predictive(model, num_samples=200)(jax.random.key(0))["path"]
    assert draws.shape == (200, 4) and np.isfinite(HMM(**args).log_prob(draws)).all()


GOOD = dict(initial=np.ones(2) / 2, transition=np.ones((2, 2)) / 2, log_density=np.zeros((3, 2)))


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(log_density=np.zeros(3)), r"log_density must be \(..., T, K\).*\(3,\)"),
        (dict(log_density=np.zeros((0, 2))), r"log_density must be .*T >= 1.*\(0, 2\)"),
        (dict(initial=np.ones(3) / 3), r"initial must be \(..., 2\), got \(3,\)"),
        (dict(initial=0.5), r"initial must be \(..., 2\), got \(\)"),
        (dict(transition=np.ones((3, 3)) / 3), r"transition must end in \(2, 2\), got \(3, 3\)"),
        (dict(transition=np.ones((3, 2, 2)) / 2), r"S = 2 or 1, got \(3, 2, 2\)"),
        (dict(observed=np.ones(2, bool)), r"observed must be \(..., 3\), got \(2,\)"),
        (dict(initial=np.array([0.5, 0.6])), "initial"),
        (dict(transition=np.array([[0.5, 0.5], [0.5, 0.4]])), "transition"),
        (dict(initial=np.ones((2, 2)) / 2, log_density=np.zeros((3, 3, 2))), "broadcast|shape"),
    ],
)
def test_errors(bad, message):
    with pytest.raises(ValueError, match=message):
        HMM(**{**GOOD, **bad}, validate_args=True)


# What is no observation --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_row_without_a_state_is_named_or_missing(value):
    table = np.log(np.random.default_rng(0).dirichlet(np.ones(2), 6)).astype(np.float32)
    half, rows = np.full(2, 0.5), np.array([[0.9, 0.1], [0.2, 0.8]])
    broken = table.copy()
    broken[3] = value
    with pytest.raises(ValueError, match="at step 3"):
        HMM(half, rows, broken)
    marked = HMM(half, rows, table, np.arange(6) != 3)
    missing = HMM(half, rows, broken, missing=True)
    for name in ("mode", "marginals", "filtered"):
        np.testing.assert_array_equal(getattr(missing, name), getattr(marked, name))
    np.testing.assert_array_equal(missing.log_prob(), marked.log_prob())
    # Under jit nobody looks: what comes cannot be taken for an answer.
    at = jax.jit(lambda t: (lambda h: (h.mode, h.sample(jax.random.key(0)), h.marginals, h.log_prob()))(
        HMM(half, rows, t)))(broken)  # fmt: skip
    assert (at[0] == -1).all() and (at[1] == -1).all() and np.isnan(at[2]).all()
    assert not np.isfinite(at[3])


def test_impossible_paths_give_no_states():
    never = np.array([[1.0, 0.0], [0.0, 1.0]])
    table = np.array([[0.0, -np.inf], [-np.inf, 0.0]], np.float32)
    hmm = HMM(np.full(2, 0.5), never, table)
    assert hmm.log_prob() == -np.inf
    assert (hmm.mode == -1).all() and (hmm.sample(jax.random.key(0), (3,)) == -1).all()
    assert np.isnan(hmm.marginals).all()
    np.testing.assert_array_equal(np.isnan(hmm.filtered).any(-1), [False, True])
