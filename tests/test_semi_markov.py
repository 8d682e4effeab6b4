"""HSMM and expectation maximisation against every sequence of visits, written out."""

import itertools

import jax
import numpy as np
import pytest
from scipy.special import logsumexp, softmax

from numpyro_maf import HMM, HSMM, fit_hmm

pytestmark = pytest.mark.usefixtures("x64")
K, D, T = 3, 3, 5


def case(seed=0, by_step=False, begun=False):
    rng = np.random.default_rng(seed)
    initial = rng.dirichlet(np.ones(K))
    remaining = rng.dirichlet(np.ones(D), K) if begun else None
    transition = rng.dirichlet(np.ones(K), (T - 1, K) if by_step else K)
    durations = rng.dirichlet(np.ones(D), K)
    durations[1] = [0, 1, 0]  # always two steps
    return (initial, transition, 2 * rng.normal(size=(T, K)), durations), remaining


CASES = {"plain": case(), "by step": case(1, by_step=True), "begun": case(2, begun=True)}


def visits(initial, transition, table, durations, remaining):
    """Log-joint of every sequence of (state, steps left), by the path of states."""
    moves = np.broadcast_to(transition, (T - 1, K, K))
    begun = initial[:, None] * (durations if remaining is None else remaining)
    logs: dict = {}
    with np.errstate(divide="ignore"):
        for places in itertools.product(itertools.product(range(K), range(D)), repeat=T):
            p = begun[places[0]]
            for t, ((k, left), (j, new)) in enumerate(itertools.pairwise(places)):
                p *= (j == k and new == left - 1) if left else moves[t, k, j] * durations[j, new]
                if p == 0:
                    break
            if p > 0:
                path = tuple(k for k, _ in places)
                score = np.log(p) + table[np.arange(T), path].sum()
                logs.setdefault(path, []).append((score, places))
    return logs


@pytest.mark.parametrize("name", CASES)
def test_hsmm_agrees_with_the_sum_over_all_visits(name):
    args, remaining = CASES[name]
    logs = visits(*args, remaining)
    paths, totals = np.array(list(logs)), np.array([logsumexp([s for s, _ in v]) for v in logs.values()])
    p = softmax(totals)
    hot = paths[..., None] == np.arange(K)
    d = HSMM(*args, remaining=remaining)
    np.testing.assert_allclose(d.log_prob(), logsumexp(totals), rtol=1e-10)
    np.testing.assert_allclose(d.log_prob(paths), totals, rtol=1e-10)
    partly = np.where(np.arange(T) == 2, -1, paths[0])
    expected = logsumexp(totals[(paths[:, [0, 1, 3, 4]] == paths[0, [0, 1, 3, 4]]).all(1)])
    np.testing.assert_allclose(d.log_prob(partly), expected, rtol=1e-10)
    marginals = np.einsum("n,ntk->tk", p, hot)
    np.testing.assert_allclose(d.marginals, marginals, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(d.filtered[-1], marginals[-1], rtol=1e-8)
    best = max((max(v) for v in logs.values()), key=lambda s: s[0])
    np.testing.assert_array_equal(d.mode, [k for k, _ in best[1]])
    draws = np.asarray(d.sample(jax.random.key(0), (20_000,)))
    found = (draws[:, None] == paths).all(-1).mean(0)
    assert found.sum() == pytest.approx(1)
    np.testing.assert_allclose(found, p, atol=5 * np.sqrt(p.max() / 20_000))


def test_geometric_durations_are_the_markov_chain():
    rng = np.random.default_rng(0)
    stay, length = np.array([0.3, 0.5]), 60
    durations = (1 - stay)[:, None] * stay[:, None] ** np.arange(length)
    durations /= durations.sum(-1, keepdims=True)
    switch = np.array([[0.0, 1.0], [1.0, 0.0]])
    table = rng.normal(size=(2, 8, 2))
    chain = np.diag(stay) + np.diag(1 - stay) @ switch
    initial = np.array([0.6, 0.4])
    semi, plain = HSMM(initial, switch, table, durations), HMM(initial, chain, table)
    np.testing.assert_allclose(semi.log_prob(), plain.log_prob(), rtol=1e-10)
    np.testing.assert_allclose(semi.marginals, plain.marginals, rtol=1e-8)
    np.testing.assert_array_equal(semi.mode, plain.mode)
    assert semi.batch_shape == (2,)
    leaves, tree = jax.tree.flatten(semi)
    np.testing.assert_allclose(jax.tree.unflatten(tree, leaves).log_prob(), semi.log_prob())


def test_durations_are_checked():
    initial, transition, table, durations = CASES["plain"][0]
    with pytest.raises(ValueError, match=r"durations must be \(3, D\)"):
        HSMM(initial, transition, table, durations[:2])
    with pytest.raises(ValueError, match="remaining must be"):
        HSMM(initial, transition, table, durations, remaining=durations[:2])
    with pytest.raises(ValueError, match="durations"):
        HSMM(initial, transition, table, 2 * durations, validate_args=True)


def test_expectation_maximisation_never_lowers_the_evidence_and_finds_the_chain():
    rng = np.random.default_rng(0)
    initial, transition = np.array([0.5, 0.5]), np.array([[0.95, 0.05], [0.1, 0.9]])
    path = [0]
    for _ in range(3999):
        path.append(rng.choice(2, p=transition[path[-1]]))
    x = rng.normal(np.where(np.array(path) == 0, -1.0, 2.0), 1.0)

    def normal(responsibilities):
        if responsibilities is None:
            centre = np.array([-0.5, 0.5])
        else:
            w = np.asarray(responsibilities)
            centre = (w * x[:, None]).sum(0) / w.sum(0)
        return -0.5 * (x[:, None] - centre) ** 2 - 0.5 * np.log(2 * np.pi)

    start = np.array([[0.6, 0.4], [0.4, 0.6]])
    evidence = [float(fit_hmm(initial, start, normal, iterations=i).log_prob()) for i in (1, 2, 4, 8)]
    assert (np.diff(evidence) > 0).all()
    found = fit_hmm(initial, start, normal, iterations=60)
    np.testing.assert_allclose(found.transition[0], transition, atol=0.02)
    assert (np.asarray(found.mode) == path).mean() > 0.95
    # With the path known, it is counting.
    counts = np.zeros((2, 2))
    np.add.at(counts, (path[:-1], path[1:]), 1)
    known = fit_hmm(initial, start, normal(None), path=path, iterations=1)
    np.testing.assert_allclose(known.transition[0], counts / counts.sum(1, keepdims=True), rtol=1e-8)
