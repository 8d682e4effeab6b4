"""Files: what is saved comes back bit-equal, files of earlier versions load, and bad ones are refused."""

import hashlib
import json
import pathlib
import pickle
import tracemalloc
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import FLOWS, context_of, each_flow
from numpyro.distributions import constraints
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import numpyro_maf as nm
from numpyro_maf import codec
from numpyro_maf.conditionals import Categorical, Mixture
from numpyro_maf.embeddings import Conv

VERSION_1 = pathlib.Path(__file__).parent / "files" / "v1"
KNOWN = json.loads((VERSION_1 / "densities.json").read_text())


def assert_bit_equal(actual, expected):
    paths = [
        [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_flatten_with_path(t)[0]]
        for t in (actual, expected)
    ]
    assert paths[0] == paths[1] and type(actual) is type(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert jnp.result_type(a) == jnp.result_type(b)
        np.testing.assert_array_equal(a, b)


# Version 1 --------------------------------------------------------------------------------------


def score(name, learned):
    """The log-densities that were written down when the file was."""
    given = KNOWN["inputs"]
    as_arrays = lambda values: {k: jnp.asarray(v, jnp.float32) for k, v in values.items()}  # noqa: E731
    if name == "flow_regressed":
        return learned(np.float32(given["context"])).log_prob(np.float32(given["x"]))
    if name.startswith("flow_"):
        y = np.linspace(0.1, 0.9, 3 * learned.features).reshape(3, *learned.event_shape)
        if name == "flow_made":
            y = np.array([[0, 0.3, 1, -0.4], [2, -0.3, 0, 0.4], [1, 1.3, 1, 0.0]])
        c = np.linspace(-1, 1, 3 * learned.context).reshape(3, -1) if learned.context else None
        return learned(c).log_prob(jnp.asarray(y, jnp.float32))
    if name == "joint":
        return learned.log_prob(as_arrays(given["samples"]))
    if name == "posterior_discrete":
        at = as_arrays(given["discrete"])
        return learned({"x": at["x"]}).log_prob({"k": at["k"].astype(int), "m": at["m"]})
    seen, theta = as_arrays(given["seen"]), as_arrays(given["theta"])
    if name.startswith("posterior_"):
        return learned(seen).log_prob(theta)
    both = jnp.stack([theta["a"], theta["b"]], 1)
    return learned(both, seen) if name == "ratio" else learned(both).log_prob(seen["y"][:, None])


def test_there_is_a_file_of_every_kind_and_every_builder():
    names = {path.stem for path in VERSION_1.glob("*.safetensors")}
    assert names == set(KNOWN["densities"]) and len(names) == 32


@pytest.mark.parametrize("name", KNOWN["densities"])
def test_files_of_version_1_load_for_ever(name, tmp_path):
    path = VERSION_1 / f"{name}.safetensors"
    learned = nm.load(path)
    # One program, not one for each step; posteriors look at the numbers that were seen, as no program may.
    once = (lambda f: f) if name.startswith("posterior_") else jax.jit
    found = once(lambda: score(name, learned))()
    np.testing.assert_allclose(found, KNOWN["densities"][name], rtol=1e-5, atol=1e-5)
    written = load_file(path)
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(learned)]
    assert all(array.tobytes() in leaves for array in written.values())  # bit-equal
    nm.save(tmp_path / "again", learned)
    assert_bit_equal(nm.load(tmp_path / "again"), learned)


# This version ------------------------------------------------------------------------------------


@each_flow
def test_save_and_load_are_bit_equal(case, tmp_path):
    nm.save(tmp_path / "flow", case())
    loaded = nm.load(tmp_path / "flow")
    assert_bit_equal(loaded, case())
    assert jax.tree.structure(loaded) == jax.tree.structure(case())


def test_files_keep_ensembles_supports_and_scalings(tmp_path):
    scaled = replace(FLOWS["maf"](), event_scale=nm.Standardize(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])))
    ensemble = nm.Ensemble.of([scaled.onto(constraints.greater_than(jnp.array(0.5)))] * 2)
    nm.save(tmp_path / "ensemble", ensemble)
    loaded = nm.load(tmp_path / "ensemble")
    assert_bit_equal(loaded, ensemble)
    y = jnp.array([[0.7, 2.0], [0.4, 2.0]])
    densities = [np.asarray(jax.jit(lambda d: d.log_prob(y))(e())) for e in (loaded, ensemble)]
    np.testing.assert_array_equal(*densities)
    assert np.isfinite(densities[0][0]) and densities[0][1] == -np.inf


def test_save_and_load_keep_double_precision(tmp_path):
    case = FLOWS["maf-context"]
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64) / 3, case())
        nm.save(tmp_path / "flow", wide)
        assert_bit_equal(nm.load(str(tmp_path / "flow")), wide)
    with pytest.raises(ValueError, match="float64.*jax_enable_x64"):
        nm.load(tmp_path / "flow")


@each_flow
def test_spec_round_trips_through_json(case):
    original = case()
    rebuilt = nm.from_spec(json.loads(json.dumps(original.spec)), jax.random.key(0))
    assert rebuilt.spec == original.spec
    assert jax.tree.structure(rebuilt) == jax.tree.structure(original)
    jax.tree.map(np.testing.assert_array_equal, rebuilt, case.make(jax.random.key(0)))
    assert (rebuilt.features, rebuilt.context) == (case.features, case.context)


@pytest.mark.parametrize("spec", [{}, {"builder": "unknown"}])
def test_unknown_builders_are_refused(spec):
    with pytest.raises(ValueError, match="unknown builder .*expected one of"):
        nm.from_spec(spec)


def test_what_no_file_can_hold_is_named():
    class Own(dist.Normal):
        pass

    made = nm.maf(jax.random.key(0), 2, base=Own(jnp.zeros(2), 1.0).to_event(1))
    for describe in (lambda: made.spec, lambda: codec.write(made, {})):
        with pytest.raises(TypeError, match="distribution of type Own cannot be written"):
            describe()
    with pytest.raises(TypeError, match=r"\[1\]\['f'\]: a value of type function cannot be written"):
        codec.write((1, {"f": print.__class__.__call__ and (lambda: 0)}))


@pytest.mark.parametrize(
    "value",
    [
        nm.Compose((nm.MixtureCDF(2), nm.Affine(bound=3.0))),
        (Categorical(3), Mixture(2)),
        Conv(axes=2, channels=(3, 4)),
        {"a": [1, 2.5, None, float("inf")], "b": (True, "text")},
        dist.Uniform(-1.0, 1.0).expand([2]).to_event(1),
        constraints.independent(constraints.interval(-1.0, 2.0), 2),
        constraints.simplex,
    ],
    ids=lambda v: type(v).__name__,
)
def test_the_codec_round_trips_through_json(value):
    described = json.loads(json.dumps(codec.write(value)))
    again = codec.read(described)
    assert codec.write(again) == codec.write(value)
    if not isinstance(value, dist.Distribution):
        assert again == value


# Files that do not fit ----------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    nm.save(tmp_path / "flow", FLOWS["maf"]())
    return tmp_path / "flow"


def digest_of(text, arrays):
    found = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        found.update(
            f"{name} {arrays[name].dtype.str} {arrays[name].shape}".encode() + arrays[name].tobytes()
        )
    return found.hexdigest()


def rewrite(path, change, digest=digest_of):
    """The same file with its header and arrays changed, as by somebody who can also write a digest."""
    arrays = load_file(path)
    with safe_open(path, "numpy") as file:
        header = json.loads(file.metadata()["numpyro_maf"])
    change(header, arrays)
    text = json.dumps(header)
    save_file(arrays, path, metadata={"numpyro_maf": text, "sha256": digest(text, arrays)})


def later(header, arrays):
    header["version"] += 1


def drop(header, arrays):
    arrays.pop(".event_scale.loc")


def more(header, arrays):
    arrays["stowaway"] = np.zeros(3)


def widen(header, arrays):
    arrays[".event_scale.loc"] = np.zeros(3, np.float32)


def not_a_number(header, arrays):
    arrays[".bijectors[0].net.weights[0]"][0, 0, 0] = np.nan


def unlike(header, arrays):
    name = ".bijectors[0].net.weights[0]"
    arrays[name] = np.ones((5, 5, 5), np.float32)
    header["structure"]["bijectors"][0]["net"]["weights"][0]["shape"] = [5, 5, 5]


def other_class(header, arrays):
    header["structure"]["event_scale"]["class"] = "os.system"


def other_fields(header, arrays):
    header["structure"]["hook"] = "print()"


def other_root(header, arrays):
    header["structure"] = {"class": "Affine", "bound": 5.0}
    arrays.clear()
    arrays["x"] = np.zeros(1)


def other_base(header, arrays):
    header["structure"]["base"] = {"class": "distribution", "name": "os", "arguments": {}}


@pytest.mark.parametrize(
    "change, message",
    [
        (later, "format version 3, this is 2: please upgrade"),
        (drop, "does not fit its own structure: .event_scale.loc"),
        (more, "does not fit its own structure: stowaway"),
        (widen, r"event_scale.loc has shape \(3,\) and type float32, expected \(2,\)"),
        (not_a_number, r"weights are not finite at .*net.weights\[0\]"),
        (unlike, "flow"),
        (other_class, "event_scale holds an unknown kind 'os.system'"),
        (other_fields, "does not fit a BijectorFlow: hook"),
        (other_root, "does not fit its own structure: x"),
        (other_base, "unknown distribution 'os'"),
    ],
)
def test_files_that_do_not_fit_are_refused(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(ValueError, match=message):
        nm.load(saved)


def test_each_flipped_bit_is_noticed(saved):
    right = saved.read_bytes()
    for where in np.random.default_rng(0).integers(len(right) * 8, size=300):
        wrong = bytearray(right)
        wrong[where // 8] ^= 1 << where % 8
        saved.write_bytes(wrong)
        with pytest.raises(ValueError, match="flow"):
            nm.load(saved)
    saved.write_bytes(right)
    nm.load(saved)
    rewrite(saved, lambda header, arrays: None, digest=lambda text, arrays: "0" * 64)
    with pytest.raises(ValueError, match="damaged: its SHA-256 digest does not fit"):
        nm.load(saved)


@pytest.mark.parametrize("hidden", [[8000, 8000], [10**9], [10**6, 10**6]])
def test_networks_larger_than_the_file_are_not_made(hidden, tmp_path):
    path = tmp_path / "wide"
    path.write_bytes((VERSION_1 / "flow_maf.safetensors").read_bytes())
    rewrite(path, lambda header, arrays: header["spec"].update(hidden=hidden))
    tracemalloc.start()
    with pytest.raises(ValueError, match="too few for hidden"):
        nm.load(path)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_what_is_not_finite_is_not_saved(tmp_path):
    flow = FLOWS["maf"]()
    broken = flow.with_weights(jax.tree.map(lambda a: a.at[0].set(jnp.nan), flow.weights))
    nm.save(tmp_path / "flow", flow)
    before = (tmp_path / "flow").read_bytes()
    with pytest.raises(ValueError, match="weights are not finite"):
        nm.save(tmp_path / "flow", broken)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [before]


def test_foreign_and_damaged_files_are_refused(saved, tmp_path):
    save_file({"a": np.zeros(2)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="foreign: was not written by numpyro_maf.save"):
        nm.load(tmp_path / "foreign")
    (tmp_path / "short").write_bytes(saved.read_bytes()[:-10])
    (tmp_path / "pickle").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "empty").write_bytes(b"")
    for name in ("short", "pickle", "empty"):
        with pytest.raises(ValueError, match=name):
            nm.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        nm.load(tmp_path / "none")


def test_the_file_is_safetensors_with_json(saved):
    data = saved.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    about = json.loads(header["__metadata__"]["numpyro_maf"])
    assert about["structure"] == codec.write(FLOWS["maf"](), {}) and about["spec"] == FLOWS["maf"]().spec
    assert len(data) == 8 + size + 4 * sum(a.size for a in jax.tree.leaves(FLOWS["maf"]()))


def test_what_is_not_learned_is_not_saved(tmp_path):
    flow, context = FLOWS["maf-context"](), context_of(FLOWS["maf-context"])
    for thing in (flow(context), [flow], 3):
        with pytest.raises(TypeError, match="save takes a Flow"):
            nm.save(tmp_path / "unused", thing)


# Rounds, particles and params of guides ------------------------------------------------------------


def normal_model():
    a = numpyro.sample("a", dist.Normal(0, 1))
    numpyro.sample(
        "x", nm.Simulator(lambda key, a: a[None] + 0.5 * jax.random.normal(key, (1,)), a, event_shape=(1,))
    )


def affine(key, features, *, context):
    return nm.elementwise(key, features, context=context, scalar=nm.Affine(), hidden=(8,))


QUICK = dict(rounds=2, simulations=200, max_epochs=2, batch_size=64, progress=False)
ROUNDS = {
    "truncated": lambda x: nm.snpe(0, normal_model, x, builder=affine, **QUICK),
    "a": lambda x: nm.snpe(0, normal_model, x, method="a", components=2, hidden=(8,), **QUICK),
    "nle": lambda x: nm.snle(0, normal_model, x, builder=affine, num_particles=100, **QUICK | {"rounds": 1}),
}


@pytest.mark.parametrize("made", ROUNDS.values(), ids=list(ROUNDS))
def test_rounds_come_back_from_files(made, tmp_path):
    found = made({"x": np.array([0.5])})
    nm.save(tmp_path / "rounds", found)
    loaded = nm.load(tmp_path / "rounds")
    draws = found.sample(1, 5)
    np.testing.assert_array_equal(loaded.sample(1, 5)["a"], draws["a"])
    assert [r.verdict for r in loaded.rounds] == [r.verdict for r in found.rounds]
    np.testing.assert_array_equal(loaded.rounds[-1].sims["x"], found.rounds[-1].sims["x"])
    with pytest.raises(ValueError, match="from a file, which holds no model"):
        loaded.predictive(0, 3)
    whole = loaded.with_model(normal_model)
    np.testing.assert_array_equal(whole.predictive(0, 3)["x"], found.predictive(0, 3)["x"])
    if isinstance(found.last, nm.sbi.FlowPosterior):
        np.testing.assert_array_equal(loaded.log_prob(draws), found.log_prob(draws))
    else:
        np.testing.assert_array_equal(whole.log_prob(draws), found.log_prob(draws))


def test_simulations_come_back_from_files_with_their_errors(tmp_path):
    sims = nm.Simulations({"x": np.array([[1.0], [np.nan], [2.0]])}, {1: "x is not finite"})
    nm.save(tmp_path / "sims", sims)
    loaded = nm.load(tmp_path / "sims")
    assert loaded.errors == sims.errors and list(loaded.failed) == [False, True, False]
    np.testing.assert_array_equal(loaded["x"], sims["x"])


def test_dictionaries_of_arrays_come_back_from_files(tmp_path):
    params = {"a": jnp.ones(3), "b": {"c": (jnp.zeros((2, 2)), np.arange(3))}}
    nm.save(tmp_path / "params", params)
    jax.tree.map(np.testing.assert_array_equal, nm.load(tmp_path / "params"), params)
    with pytest.raises(ValueError, match=r"not finite at \['a'\]"):
        nm.save(tmp_path / "params", {"a": jnp.array([np.nan])})
    with pytest.raises(TypeError, match="cannot be written"):
        nm.save(tmp_path / "params", {"a": print})
