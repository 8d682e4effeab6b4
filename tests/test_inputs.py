"""What users hand in: the same numbers in any dress, and a clear refusal of what are no numbers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import numpyro_maf as nm
from numpyro_maf import diagnostics
from numpyro_maf.inputs import as_labels, as_numbers, by_site, check_finite

pd = pytest.importorskip("pandas")
X = np.random.default_rng(0).normal(size=(40, 2))
HOLES = np.arange(80).reshape(40, 2) % 7 == 0
ONCE = dict(max_epochs=1, progress=False)
small = partial(nm.maf, transforms=1, hidden=(4,))


class Tensor:
    """As torch has them: only a detached one becomes an array."""

    def __init__(self, a):
        self.a = a

    def detach(self):
        return self

    def cpu(self):
        return self.a


SAME = {
    "list": X.tolist(),
    "not contiguous": np.repeat(X, 2, 1)[:, ::2],
    "big-endian": X.astype(">f8"),
    "longdouble": X.astype(np.longdouble),
    "masked, none": np.ma.array(X, mask=False),
    "frame": pd.DataFrame(X),
    "nullable": pd.DataFrame(X).astype("Float64"),
    "mixed": pd.DataFrame(X).astype({0: "Float64"}),
    "tensor": Tensor(X),
}


@pytest.mark.parametrize("value", SAME.values(), ids=SAME)
def test_the_same_numbers(value):
    found = as_numbers("x", value)
    assert found.dtype == np.float64 and found.dtype.isnative
    np.testing.assert_array_equal(found, X)


def test_types_that_know_missing_numbers_give_nan():
    whole = pd.DataFrame(
        {"a": pd.array([1, None, 3], dtype="Int64"), "b": [0.5, 1.5, 2.5], "c": [True, False, True]}
    )
    np.testing.assert_array_equal(as_numbers("x", whole), [[1, 0.5, 1], [np.nan, 1.5, 0], [3, 2.5, 1]])
    assert as_numbers("x", whole["a"].dropna()).dtype == np.int64
    np.testing.assert_array_equal(as_numbers("x", pd.array([1, None], dtype="Int64")), [1, np.nan])


def test_numbers_under_a_mask_are_never_seen():
    masked = np.ma.array(np.where(HOLES, -999, 3), mask=HOLES)
    np.testing.assert_array_equal(as_numbers("x", masked, missing=True), np.where(HOLES, np.nan, 3))
    with pytest.raises(ValueError, match="x is a masked array in which 12 numbers are missing"):
        as_numbers("x", masked)


REFUSED = {
    "complex": (X + 1j, r"x holds complex numbers; .* np.stack\(\[x.real, x.imag\], -1\)"),
    "complex jax": (jnp.ones(2) + 1j, "x holds complex"),
    "text": (X.astype(str), "x holds text"),
    "a string": ("abc", "x is a str and holds text"),
    "bytes": (np.array([b"1"]), "x holds text"),
    "dates": (np.zeros(2, "datetime64[s]"), r"x holds dates; subtract .* \(x - x.min\(\)\)"),
    "durations": (np.zeros(2, "timedelta64[s]"), "x holds time differences; divide by a unit"),
    "objects": ([1.0, None], r"x holds Python objects; .* np.asarray\(x, float\)"),
    "a dictionary": ({"a": 1.0}, "x is a dict and holds Python objects"),
    "records": (np.zeros(2, [("a", float)]), "x holds records"),
    "a key": (jax.random.key(0), "x holds"),
    "text column": (pd.DataFrame({"a": [1.0], "who": ["b"]}), r"x\['who'\] holds"),
    "date column": (pd.DataFrame({"a": [1.0], "when": [pd.Timestamp(0)]}), r"x\['when'\] holds dates"),
    "category": (pd.Series(["a", "b"], dtype="category"), "x holds"),
}


@pytest.mark.parametrize(("value", "message"), REFUSED.values(), ids=REFUSED)
def test_what_are_no_numbers(value, message):
    with pytest.raises(TypeError, match=message):
        as_numbers("x", value)


def test_shapes_labels_and_sites():
    with pytest.raises(ValueError, match="x is no array: its rows have unequal lengths"):
        as_numbers("x", [[1.0], [1.0, 2.0]])
    with pytest.raises(ValueError, match=r"labels must be whole numbers in 0, ..., 2, got 3"):
        as_labels("labels", [0, 3], 3)
    with pytest.raises(ValueError, match=r"x is not finite: 1 of 4 numbers, the first at \(1, 0\)"):
        check_finite("x", np.array([[0.0, 1.0], [np.inf, 2.0]]))
    with pytest.raises(ValueError, match="sims lacks the site 'theta'; did you mean 'thetas'"):
        by_site("sims", {"thetas": 1.0}, ["theta"])
    with pytest.raises(TypeError, match="sims must be a dictionary of arrays by site, got ndarray"):
        by_site("sims", X)


# Entrances ----------------------------------------------------------------------------------------


def bounded(x=None):
    a = numpyro.sample("a", dist.Uniform(0, 1))
    b = numpyro.sample("b", dist.Dirichlet(np.ones(3)))
    k = numpyro.sample("k", dist.Categorical(np.full(3, 1 / 3)))
    numpyro.sample("x", dist.Gamma(1 + a + b[0] + k), obs=x)


def simulations(**new):
    rng = np.random.default_rng(0)
    sims = dict(a=rng.uniform(size=50), b=rng.dirichlet(np.ones(3), 50), k=rng.integers(0, 3, 50))
    return sims | dict(x=rng.gamma(2, size=50)) | new


def spoilt(value, *new):
    value = np.array(value, copy=True)
    value[: len(new)] = new
    return value


OFF = {
    "interval": (
        "a",
        (-0.5, 7.0),
        r"sims\['a'\] lies outside its support, \[0, 1\], in 2 of 50 rows, for one -0.5",
    ),
    "simplex": ("b", ([0.9, 0.9, -0.8],), r"sims\['b'\] lies outside its support, simplex, in 1 of 50 rows"),
    "classes": ("k", (3,), r"sims\['k'\] lies outside its support, .* in 1 of 50 rows, for one 3"),
    "observed": (
        "x",
        (-1.0,),
        r"sims\['x'\] lies outside its support, \[0, inf\], in 1 of 50 rows, for one -1",
    ),
}


@pytest.mark.parametrize(("site", "new", "message"), OFF.values(), ids=OFF)
def test_simulations_off_the_support(site, new, message):
    sims = simulations()
    sims[site] = spoilt(sims[site], *new)
    for learn in (nm.npe, nm.nre):
        with pytest.raises(ValueError, match=message):
            learn(0, bounded, sims, **ONCE)


def test_simulations_that_are_no_numbers():
    for bad, error in ((simulations()["a"] + 1j, "complex"), (np.full(50, "a"), "text")):
        with pytest.raises(TypeError, match=rf"sims\['a'\] holds {error}"):
            nm.npe(0, bounded, simulations(a=bad), **ONCE)
    with pytest.raises(ValueError, match="sims must have as many rows at each site"):
        nm.npe(0, bounded, simulations(a=np.zeros(49)), **ONCE)
    masked = np.ma.array(spoilt(simulations()["a"], -999.0), mask=np.arange(50) < 1)
    with pytest.raises(ValueError, match="1 of 50 simulations failed or are not finite"):
        nm.nre(0, bounded, simulations(a=masked), **ONCE)


def normal(x=None):
    a = numpyro.sample("a", dist.Normal(0, 1))
    numpyro.sample("x", dist.Normal(a, 1).expand([2]).to_event(1), obs=x)


def test_observations_and_learned_sites():
    rng = np.random.default_rng(0)
    sims = dict(a=rng.normal(size=64), x=rng.normal(size=(64, 2)))
    options = dict(builder=small, missing=True, batch_size=64, **ONCE)
    posterior = nm.npe(0, normal, sims, **options)
    at = {"a": np.float32(0.2)}
    nan, masked = np.array([0.3, np.nan]), np.ma.array([0.3, -999.0], mask=[False, True])
    densities = [posterior({"x": v}, warn=False).log_prob(at) for v in (nan, masked, pd.Series([0.3, None]))]
    np.testing.assert_array_equal(densities, densities[0])
    for bad in (np.array(["a", "b"]), np.ones(2) * 1j, np.zeros(2, "datetime64[s]")):
        with pytest.raises(TypeError, match=r"the observation\['x'\] holds"):
            posterior({"x": bad})
    with pytest.raises(ValueError, match=r"needs the sites \['x'\]: no 'x'; did you mean 'xs'"):
        posterior({"xs": nan})
    likelihood = small(0, 2, context=1)
    with pytest.raises(ValueError, match="the model has no site 'xx' to learn; did you mean 'x'"):
        numpyro.handlers.seed(nm.learned(normal, {"xx": likelihood}), 0)()
    numpyro.handlers.seed(nm.learned(normal, {"x": likelihood}), 0)(np.zeros(2))


def test_densities_and_contexts():
    flow, given = small(0, 2), small(0, 2, context=2)
    right = flow().log_prob(X)
    for value in (pd.DataFrame(X), X.tolist(), np.ma.array(X)):
        np.testing.assert_array_equal(flow().log_prob(value), right)
        np.testing.assert_array_equal(given(value).log_prob(X), given(X).log_prob(X))
    masked = np.ma.array(np.where(HOLES, -999.0, X), mask=HOLES)
    for call in (flow().log_prob, given, lambda x: nm.complete(0, flow(), x[0], [True, False], 3)):
        with pytest.raises(ValueError, match="masked array|seen part of x"):
            call(masked)
    assert given(np.zeros((0, 2))).log_prob(np.zeros(2)).shape == (0,)
    with pytest.raises(TypeError, match="log_density holds text"):
        nm.HMM(np.ones(2) / 2, np.eye(2), np.full((3, 2), "a"))
    with pytest.raises(ValueError, match="context is not finite in 1 rows"):
        nm.distill(0, given, given, spoilt(X, [np.nan, 0.0]), progress=False)
    with pytest.raises(ValueError, match="x must be whole numbers in 0, ..., 15, got 16"):
        nm.Dequantize(16).sample(0, np.array([3, 16]))


def test_diagnostics_name_what_is_wrong():
    draws, truth = np.zeros((5, 30, 1)), np.zeros((30, 1))
    with pytest.raises(ValueError, match="draws holds NaN"):
        diagnostics.sbc(draws * np.nan, truth)
    with pytest.raises(ValueError, match="truth lacks the site 'beta'; did you mean 'betas'"):
        diagnostics.sbc({"beta": draws[..., 0]}, {"betas": truth[:, 0]})
    with pytest.raises(TypeError, match="log_weights holds complex"):
        diagnostics.psis(np.ones(30) * 1j)
    with pytest.raises(ValueError, match="labels must be whole numbers in 0, ..., 1, got -1"):
        diagnostics.classification_scores(np.full((3, 2), 0.5), [0, 1, -1])
    with pytest.raises(ValueError, match="probabilities must not be negative and sum to 1, row 0"):
        diagnostics.classification_scores(np.ones((3, 2)), [0, 1, 1])


# Verdicts -----------------------------------------------------------------------------------------


def test_ties_are_broken_by_the_users_key():
    rng = np.random.default_rng(0)
    truth, draws = rng.integers(0, 3, (400, 1)), rng.integers(0, 3, (99, 400, 1))
    found = [diagnostics.sbc(draws, truth, seed=jax.random.key(i)) for i in range(20)]
    assert len({tuple(f.ranks[:, 0]) for f in found}) == 20
    assert np.array_equal(found[1].ranks, diagnostics.sbc(draws, truth, seed=1).ranks)
    assert min(f.pvalues[0] for f in found) > 1e-4
    flat = np.zeros((99, 400)), np.zeros(400)  # equal densities throughout
    levels = [diagnostics.coverage(*flat, seed=jax.random.key(i)) for i in range(20)]
    assert len({tuple(f.levels) for f in levels}) == 20 and min(f.pvalue for f in levels) > 1e-4


@pytest.mark.parametrize("least", [0.3, 0.0015, 0.0004, 1e-9])
def test_verdicts_say_no_miscalibration_only_of_shown_probabilities(least):
    """Among ten, a least p of 0.0015 is 0.015 when corrected, and 0.0004 is 0.004; the threshold is 0.01."""
    ranks = np.random.default_rng(0).integers(0, 100, (50, 10))
    found = diagnostics.SBC(ranks, 99, np.array([least, *[0.5] * 9]), tuple("abcdefghij")).verdict
    assert found.startswith("no miscalibration" if least > 0.001 else "not calibrated")
    assert "0.00)" not in found and "e-" not in found
    expected = {0.3: "least p = 1, corrected for 10 numbers", 0.0015: "least p = 0.015", 0.0004: "p = 0.004"}
    assert expected.get(least, "p < 0.001") in found


def test_verdicts_of_coverage_agree_with_their_threshold():
    for p, shown in ((0.4, "no miscalibration"), (0.0101, "no miscalibration"), (0.0099, "not calibrated")):
        assert diagnostics.Coverage(np.linspace(0, 1, 50), p).verdict.startswith(shown)
    assert "p < 0.001" in diagnostics.Coverage(np.linspace(0, 1, 50), 1e-12).verdict
