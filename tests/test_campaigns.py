"""Campaigns: noise that does not come from the key, calls that go wrong, stores that are damaged."""

import ctypes
import dataclasses
import json
import os
import random
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing import get_context

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer.util import log_density

import numpyro_maf as nm
from numpyro_maf import locks
from numpyro_maf.fingerprints import Walk
from numpyro_maf.sbi import Simulations, Simulator
from numpyro_maf.sbi import simulations as module
from numpyro_maf.sbi.purity import fit_for_tracing

pytestmark = pytest.mark.xdist_group("campaigns")

KEY = jax.random.key(0)
QUIET = dict(progress=False)


def of(fn, shape=(), **options):
    """A model with one parameter and a simulator; functions made inside of a test travel by value."""

    def model(x=None):
        a = numpyro.sample("a", dist.Normal(0, 1))
        numpyro.sample("x", Simulator(fn, a, event_shape=shape, **options), obs=x)

    return model


# Noise ----------------------------------------------------------------------------------------------

FIXED, OWN = jax.random.key(1), np.random.default_rng(1)
CALLS = [0]


def noisy(key, a):
    return a + jax.random.normal(key)


def in_a_loop(key, a):
    step = lambda carry, key: (carry + jax.random.normal(key), carry)  # noqa: E731
    return jax.lax.scan(step, a, jax.random.split(key, 3))[0]


def in_a_branch(key, a):
    return jax.lax.cond(a > 0, jax.random.normal, lambda key: 0.0, key)


def in_a_while(key, a):
    body = lambda c: (jax.random.split(c[0])[0], c[1] + jax.random.uniform(c[0]))  # noqa: E731
    return jax.lax.while_loop(lambda c: c[1] < 3, body, (key, a))[1]


def deterministic(key, a):
    return jax.lax.fori_loop(0, 5, lambda _, y: 0.9 * y, a)


@pytest.mark.parametrize(
    "fn", [noisy, in_a_loop, in_a_branch, in_a_while, deterministic, jax.jit(noisy), partial(noisy)]
)
def test_functions_of_jax_run_on_the_device(fn):
    assert fit_for_tracing(fn, KEY, [jnp.array(1.0)])


def numpys(key, a):
    return a + np.random.normal()  # noqa: NPY002


def pythons(key, a):
    return a + random.gauss(0, 1)


def a_generator(key, a):
    return a + OWN.poisson(3) + jax.random.normal(key)


def made_inside(key, a):
    return a + np.random.default_rng().normal()


def counts(key, a):
    CALLS[0] += 1
    return a + CALLS[0]


def writes(key, a):
    return a + len(f"{a}") + jax.random.normal(key)


def swallows(key, a):
    try:
        return float(a) + jax.random.normal(key)
    except TypeError:
        return 0.0 + jax.random.normal(key)


@pytest.mark.parametrize(
    "fn", [numpys, pythons, a_generator, made_inside, counts, writes, swallows, jax.jit(numpys)]
)
def test_what_one_trace_cannot_stand_for_runs_on_the_host(fn):
    with pytest.warns(UserWarning, match=r"runs on the host, call by call, because .* key"):
        assert not fit_for_tracing(fn, KEY, [jnp.array(1.0)])
    Simulator(fn, 1.0, host=False).on_device(KEY, [jnp.array(1.0)])  # said outright: silent


def a_fixed_key(key, a):
    return a + jax.random.normal(jax.random.key(0))


def a_global_key(key, a):
    return jax.lax.cond(a > 0, lambda: jax.random.normal(FIXED), lambda: 0.0)


def seeded_inside(key, a):
    return a + np.random.default_rng(0).normal()


@pytest.mark.parametrize("fn", [a_fixed_key, a_global_key, seeded_inside])
def test_noise_that_all_rows_share_is_refused(fn):
    with pytest.raises(ValueError, match="does not use its key"):
        fit_for_tracing(fn, KEY, [jnp.array(1.0)])
    with pytest.raises(ValueError, match="does not use its key"):
        nm.simulate(0, of(fn), 10, **QUIET)
    assert len(nm.simulate(0, of(fn, host=False), 10, **QUIET)["x"]) == 10


def test_noise_that_does_not_reach_the_result_and_some_that_is_shared_is_said():
    def dead(key, a):
        jax.random.normal(key)
        return a

    def partly(key, a):
        return noisy(key, a) + jax.random.normal(FIXED)

    with pytest.warns(UserWarning, match="do not reach its result"):
        assert fit_for_tracing(dead, KEY, [jnp.array(1.0)])
    with pytest.warns(UserWarning, match="same in all rows"):
        assert fit_for_tracing(partly, KEY, [jnp.array(1.0)])


def test_simulators_on_the_host_are_asked_twice():
    def own(key, a):
        return float(a) + OWN.normal()

    def seeded(key, a):
        return float(a) + np.random.default_rng(0).normal()

    with pytest.warns(UserWarning, match="different results for the same key"):
        sims = nm.simulate(0, of(own), 20, **QUIET)
    assert len(np.unique(sims["x"] - sims["a"])) == 20  # the noise of each row is its own all the same
    with pytest.raises(ValueError, match="does not use its key"):
        nm.simulate(0, of(seeded), 20, **QUIET)


def test_functions_that_must_not_be_traced_are_not():
    def program(key, a):
        assert type(a) is np.ndarray
        return float(str(a))

    sims = nm.simulate(0, of(program, host=True), 5, **QUIET)
    np.testing.assert_allclose(sims["x"], sims["a"], rtol=1e-6)
    with pytest.raises(TypeError, match=r"no function of JAX.*simulate"):
        jax.jit(Simulator(program, 1.0, host=True).sample)(KEY)


# Calls on the host ----------------------------------------------------------------------------------


def quick(key, a):
    return float(a) + np.random.default_rng(key).normal() + os.getpid() * 0


def test_quick_calls_run_here_and_results_do_not_depend_on_where():
    pids = set()

    def here(key, a):
        pids.add(os.getpid())
        return quick(key, a)

    def napping(key, a):
        time.sleep(0.03)
        return float(a) + np.random.default_rng(key).normal()

    sims = nm.simulate(3, of(here), 60, **QUIET)
    assert pids == {os.getpid()} and not sims.errors
    for executor in (None, ThreadPoolExecutor(3)):
        again = nm.simulate(3, of(napping), 60, executor=executor, **QUIET)
        np.testing.assert_array_equal(again["x"], sims["x"])


def test_one_call_that_goes_wrong_is_one_row():
    """In processes of the library's own, whatever a call does."""

    def goes_wrong(key, a):
        row = round(float(a))
        if row == 1:
            raise ArithmeticError("too large")
        if row == 2:
            sys.exit(0)
        if row == 3:
            os._exit(3)
        if row == 4:
            ctypes.string_at(0)
        if row == 5:
            time.sleep(60)
        if row == 6:
            return np.ones(10**14)
        if row == 7:
            return "text"
        return 2.0 * row

    a = np.arange(12.0, dtype=np.float32)
    start = time.monotonic()
    sims = nm.simulate(0, of(goes_wrong), 12, given={"a": a}, timeout=1.0, **QUIET)
    assert time.monotonic() - start < 15
    assert sims.errors.keys() == set(range(1, 8)), sims.errors
    for row, what in enumerate(
        [
            "ArithmeticError: too large",
            "SystemExit: 0",
            "status 3",
            "SIGSEGV",
            "timeout",
            "Memory",
            "real num",
        ],
        1,
    ):
        assert what in sims.errors[row]
    np.testing.assert_array_equal(sims["x"][~sims.failed], 2 * a[~sims.failed])


def test_threads_keep_what_exits_to_its_row():
    def leaves(key, a):
        return sys.exit("no licence") if float(a) == 3 else float(a)

    given = {"a": np.arange(6.0)}
    sims = nm.simulate(0, of(leaves), 6, given=given, executor=ThreadPoolExecutor(2), **QUIET)
    assert sims.errors == {3: "x: SystemExit: no licence"}


KILLS = "import os\ndef kills(key, a):\n    return os._exit(1) if float(a) == 3 else float(a)\n"


def test_an_executor_that_breaks_is_replaced(tmp_path, monkeypatch):
    (tmp_path / "a_simulator_that_kills.py").write_text(KILLS)
    monkeypatch.syspath_prepend(tmp_path)
    import a_simulator_that_kills as own

    given = {"a": np.arange(6.0)}
    with ProcessPoolExecutor(1, get_context("fork")) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forks
        sims = nm.simulate(0, of(own.kills), 6, given=given, executor=pool, **QUIET)
    assert sims.errors == {3: "x: the process that ran it ended with status 1"}


def test_dask_runs_simulators():
    distributed = pytest.importorskip("distributed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the cluster, not of ours
        options = dict(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None)
        with distributed.Client(**options) as client:
            sims = nm.simulate(3, of(quick), 6, executor=client.get_executor(), **QUIET)
    assert sims.errors == {}
    np.testing.assert_array_equal(sims["x"], nm.simulate(3, of(quick), 6, **QUIET)["x"])


SCRIPT = """
import time, numpyro, numpyro_maf as nm, numpyro.distributions as dist, numpy as np
print("once")
def slow(key, a):
    time.sleep(0.3)
    return float(a)
def model(x=None):
    numpyro.sample("x", nm.Simulator(slow, numpyro.sample("a", dist.Normal(0, 1))), obs=x)
sims = nm.simulate(0, model, 6, progress=False)
print(np.allclose(sims["x"], sims["a"]), sims.errors)
"""


def test_scripts_need_no_main_guard(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["once", "True {}"], done.stderr


def test_threads_simulate_at_once():
    def one(_):
        return nm.simulate(3, of(noisy), 20, **QUIET)["x"]

    right = one(0)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(one, range(8)):
            np.testing.assert_array_equal(found, right)


def test_threads_that_meet_in_a_learned_model_are_told():
    model = of(noisy)
    likelihood = nm.maf(KEY, 1, context=1, transforms=1, hidden=(4,))
    meet = threading.Barrier(2, timeout=5)

    def one(_):
        def both_inside(x=None):
            with suppress(threading.BrokenBarrierError):
                meet.wait()
            model(x)

        try:
            log_density(nm.learned(both_inside, {"x": likelihood}), (), {"x": 1.0}, {"a": jnp.array(0.5)})
        except RuntimeError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        assert any("another thread" in said for said in pool.map(one, range(2)) if said)
    meet.abort()
    assert one(0) is None  # alone it runs


# Stores ---------------------------------------------------------------------------------------------


def on_host(key, a):
    return float(a) + np.random.default_rng(key).normal(size=2)


def chain(x=None):
    """Two simulators on the host, one of them in a plate, and a site after them."""
    a = numpyro.sample("a", dist.Normal(0, 1))
    y = numpyro.sample("y", Simulator(on_host, a, event_shape=(2,)))
    with numpyro.plate("repeats", 3):
        z = numpyro.sample("z", Simulator(on_host, y[0], event_shape=(2,), batch_ndim=0))
    numpyro.sample("x", dist.Normal(z.sum(), 1), obs=x)


def assert_equal(first, second):
    assert first.keys() == second.keys() and first.errors == second.errors
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], strict=True)


class Impatient(ThreadPoolExecutor):
    """Do some tasks, as if the user then lost patience."""

    def __init__(self, tasks):
        super().__init__(1)
        self.left = tasks

    def submit(self, fn, *args):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return super().submit(fn, *args)


@pytest.mark.parametrize("model", [chain, of(noisy)])
def test_campaigns_resume_bit_equal_from_wherever_they_stopped(model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCKS", (16, 10))
    run = partial(nm.simulate, 5, model, 40, store=tmp_path / "s", **QUIET)
    whole = nm.simulate(5, model, 40, **QUIET)
    real, calls = module._simulate, []

    def stopping(*args):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "_simulate", stopping)
    with pytest.warns(UserWarning, match="interrupted after 16 of 40"):
        part = run()
    assert len(part["x"]) == 16 and part.stopped
    monkeypatch.setattr(module, "_simulate", real)
    assert_equal(run(), whole)
    assert_equal(Simulations.open(tmp_path / "s"), whole)
    assert isinstance(Simulations.open(tmp_path / "s")["x"], np.memmap)
    np.testing.assert_array_equal(np.load(tmp_path / "s" / "0.npy"), whole[min(whole)])


def test_interrupted_calls_on_the_host_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("numpyro_maf.sbi.executors.WINDOW", 1)
    run = partial(nm.simulate, 0, of(on_host, (2,)), 400, store=tmp_path / "s", **QUIET)
    with pytest.warns(UserWarning, match="interrupted after"):
        part = run(executor=Impatient(12))
    assert 8 < len(part["x"]) < 400
    made = []

    class Counting(ThreadPoolExecutor):
        def submit(self, fn, *args):
            made.extend(args[-2])
            return super().submit(fn, *args)

    assert_equal(run(executor=Counting(1)), nm.simulate(0, of(on_host, (2,)), 400, **QUIET))
    assert len(made) == 400 - len(part["x"])


def test_damage_is_named_and_simulated_again(tmp_path, monkeypatch):
    monkeypatch.setattr("numpyro_maf.sbi.store.LINE_BYTES", 160)  # 10 rows of two numbers
    store = tmp_path / "s"
    run = partial(nm.simulate, 0, of(on_host, (2,)), 100, store=store, **QUIET)
    whole = nm.simulate(0, of(on_host, (2,)), 100, **QUIET)
    assert_equal(run(), whole)

    def again(what):
        with pytest.raises(ValueError, match=rf"damaged.*{what}.*Repeat the call"):
            Simulations.open(store)
        with pytest.warns(UserWarning, match=rf"simulated again in part: .*{what}"):
            assert_equal(run(), whole)
        assert_equal(Simulations.open(store), whole)

    path, journal = store / "1.npy", store / "journal"
    data = bytearray(path.read_bytes())
    data[128 + 16 * 25] ^= 1
    path.write_bytes(data)
    again("rows 20 to 29 of site 'x'")
    path.write_bytes(path.read_bytes()[:-40])
    again("site 'x'")
    path.unlink()
    again("site 'x'")
    lines = journal.read_bytes().split(b"\n")
    lines[1] = lines[1].replace(b"units", b"Units")
    journal.write_bytes(b"\n".join(lines))
    again("line 2 of journal")
    with open(journal, "ab") as file:  # killed while it wrote
        file.write(b"12345678 {")
    assert_equal(run(), whole)


def test_stores_name_no_files_elsewhere_and_say_what_they_are(tmp_path):
    run = partial(nm.simulate, 0, of(noisy), 12, **QUIET)
    run(store=tmp_path / "s")
    about = tmp_path / "s" / "about.json"
    right = about.read_text()
    for wrong in (right.replace("12", "13", 1), "{}", "[]", '{"format": 2}', "x"):
        about.write_text(wrong)
        with pytest.raises(ValueError, match="about.json is damaged"):
            Simulations.open(tmp_path / "s")
    about.write_text(right)
    np.save(tmp_path / "elsewhere.npy", np.zeros(12))
    (tmp_path / "s" / "1.npy").unlink()
    (tmp_path / "s" / "1.npy").symlink_to(tmp_path / "elsewhere.npy")
    with pytest.raises(ValueError, match="link"):
        Simulations.open(tmp_path / "s")
    with pytest.raises(ValueError, match="holds no simulations but elsewhere.npy"):
        run(store=tmp_path)
    # A folder of an earlier version can be read, and names no files elsewhere either.
    old = tmp_path / "old"
    old.mkdir()
    np.save(old / "0.npy", np.arange(4.0))
    text = {"key": [0, 0], "count": 4, "called": "", "done": 3, "errors": {"1": "x: timeout"}}
    (old / "about.json").write_text(json.dumps(text | {"files": {"x": "0.npy"}}))
    found = Simulations.open(old)
    assert found["x"].tolist() == [0, 1, 2] and found.errors == {1: "x: timeout"}
    with pytest.raises(ValueError, match=r"earlier version.*Simulations.open"):
        run(store=old)
    (old / "about.json").write_text(json.dumps(text | {"files": {"x": "../elsewhere.npy"}}))
    with pytest.raises(ValueError, match="no file of this folder"):
        Simulations.open(old)


def test_one_writer_at_a_time(tmp_path):
    started, go = tmp_path / "started", tmp_path / "go"

    def waits(key, a):
        started.touch()
        for _ in range(1000):
            if not go.exists():
                time.sleep(0.02)
        return float(a)

    run = partial(nm.simulate, 0, of(waits, host=True), 4, store=tmp_path / "s", **QUIET)
    with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(1) as calls:
        first = pool.submit(run, executor=calls)
        while not started.exists():
            time.sleep(0.02)
        with pytest.raises(RuntimeError, match="another call in this process is writing to"):
            run()
        code = "import pathlib, runpy, sys; runpy.run_path(sys.argv[1])['Lock'](pathlib.Path(sys.argv[2]))"
        other = subprocess.run(
            [sys.executable, "-c", code, locks.__file__, tmp_path / "s" / "lock"], capture_output=True
        )
        go.touch()
    assert f"is being written to by process {os.getpid()} on" in other.stderr.decode()
    np.testing.assert_allclose(first.result()["x"], first.result()["a"])
    assert not run().errors  # and it is free again


# Fingerprints ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Settings:
    gain: float

    def scaled(self, a):
        return self.gain * a


GAIN = 1.0


def with_settings(settings, x=None):
    a = numpyro.sample("a", dist.Normal(0, 1))
    numpyro.sample("x", dist.Normal(settings.scaled(a), GAIN), obs=x)


def test_stores_know_arguments_models_and_simulators(tmp_path, monkeypatch):
    run = lambda *args, key=0, **options: nm.simulate(key, *args, store=tmp_path / "s", **QUIET, **options)  # noqa: E731
    first = run(with_settings, 20, Settings(1.0))
    assert_equal(run(with_settings, 20, Settings(1.0)), first)
    other = numpyro.handlers.scale(with_settings, 1.0)
    for call, what in [
        (partial(run, with_settings, 20, Settings(2.0)), "another argument"),
        (partial(run, with_settings, 20, Settings(1.0), key=1), "another key"),
        (partial(run, with_settings, 21, Settings(1.0)), "another number of simulations"),
        (partial(run, other, 20, Settings(1.0)), "another model or simulator"),
        (partial(run, with_settings, 20, Settings(1.0), given={"a": np.zeros(20)}), "another given"),
    ]:
        with pytest.raises(ValueError, match=what):
            call()
    with pytest.raises(TypeError, match=r"the arguments\[0\]\[0\], a lock, has no fingerprint"):
        run(with_settings, 20, threading.Lock())
    monkeypatch.setitem(globals(), "GAIN", 2.0)
    with pytest.warns(UserWarning, match=r"global variables .* other values: .*GAIN"):
        assert_equal(run(with_settings, 20, Settings(1.0)), first)


def test_fingerprints_follow_code_constants_defaults_and_closures():
    def make(gain, code):
        space = {}
        exec(code, space)
        return space["make"](gain)

    source = (
        "def make(gain):\n    def helper(a): return gain * a\n"
        "    def fn(key, a, b=2): return helper(a) + b\n    return fn"
    )
    found = {
        Walk().digest(make(gain, code), "fn")
        for gain in (1, 2)
        for code in (
            source,
            source.replace("gain *", "gain +"),
            source.replace("b=2", "b=3"),
            source.replace("+ b", "+ 2 * b"),
        )
    }
    assert len(found) == 8
    commented = source.replace("return fn", "# as before\n    return fn")
    assert Walk().digest(make(1, commented), "fn") == Walk().digest(make(1, source), "fn")
    values = [
        1,
        1.0,
        True,
        "1",
        b"1",
        (1,),
        [1],
        {1},
        {1: 1},
        None,
        np.ones(1),
        np.ones(1, "f4"),
        np.ones((1, 1)),
        KEY,
        Settings(1.0),
    ]
    assert len({Walk().digest(value, "it") for value in values}) == len(values)
    loop = [1]
    loop.append(loop)
    assert Walk().digest(loop, "it") != Walk().digest([1, [1]], "it")
