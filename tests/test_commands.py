"""The command line: help, exit codes, errors in words, and what it says of files."""

import ast
import json
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from safetensors.numpy import save_file

import numpyro_maf as nm
from numpyro_maf.__main__ import main
from numpyro_maf.commands import demonstration, files, speeds
from numpyro_maf.inference.sites import Sites

small = partial(nm.maf, features=2, transforms=1, hidden=(8,))
SITES = Sites((dist.constraints.real, dist.constraints.positive), ("mu", "tau"), ((), ()))


def output(capsys, *argv):
    """Exit code and what was printed on both streams."""
    code = main(argv)
    return code, *capsys.readouterr()


# Help and exit codes ------------------------------------------------------------------------------


def test_without_arguments_it_teaches(capsys):
    code, out, _ = output(capsys)
    assert code == 0
    for word in ("demo", "activities", "info", "bench", "examples:", "exit codes:"):
        assert word in out
    assert max(map(len, out.splitlines())) < 120


@pytest.mark.parametrize("command", ["demo", "info", "bench"])
def test_each_command_has_help(capsys, command):
    code, out, _ = output(capsys, command, "--help")
    assert code == 0 and f"numpyro-maf {command}" in out and "options:" in out
    assert len(out.split("options:")[0]) > 150  # what it does, in words


def test_exit_codes_and_messages(capsys, tmp_path):
    assert output(capsys, "--version")[:2] == (0, f"numpyro_maf {nm.__version__}\n")
    code, _, err = output(capsys, "inform", "file")
    assert code == 2 and "invalid choice: 'inform'" in err
    code, out, err = output(capsys, "info", str(tmp_path / "none"))
    assert (code, out) == (1, "") and err == f"numpyro-maf: {tmp_path / 'none'}: No such file or directory\n"
    code, _, err = output(capsys, "info", str(tmp_path))
    assert code == 1 and "a folder without simulations and without a training" in err
    code, _, err = output(capsys, "bench", "--builders", "mfa")
    assert code == 1 and "there is no builder 'mfa'; did you mean 'maf'?" in err
    code, _, err = output(capsys, "bench", "--batch", "0")
    assert code == 1 and "--batch must be positive" in err
    with pytest.raises(ValueError):
        main(["--traceback", "bench", "--batch", "0"])


def test_an_interrupt_is_an_exit_code(capsys, monkeypatch):
    def interrupted(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr(speeds, "run", interrupted)
    code, _, err = output(capsys, "bench")
    assert code == 130 and err == "numpyro-maf: interrupted\n"


# Files --------------------------------------------------------------------------------------------


def saved(path, it):
    nm.save(path, it)
    return path


def test_info_says_what_files_hold(capsys, tmp_path):
    path = tmp_path / "it.safetensors"

    def lines(it, *options):
        nm.save(path, it)
        code, out, _ = output(capsys, "info", str(path), *options)
        assert code == 0
        return out.splitlines()

    flow = small(0, context=3)
    found = lines(flow)
    assert found[0] == "a normalizing flow of 2 features, given a context of width 3"
    assert found[1].startswith("  built by maf(") and "hidden=(8,)" in found[1]
    assert found[2].endswith("; it(context).sample(key, (1000,))")
    count = sum(np.size(leaf) for leaf in jax.tree.leaves(flow))
    assert f"{count:,} numbers (F32)" in found[3] and "not compared (--check)" in found[4]
    assert lines(flow, "--check")[-1] == "  format version 2, digest right"
    assert sum("bijectors[0].net" in line for line in lines(flow, "--arrays")) == 5
    found = lines(nm.Joint(small(0), SITES))
    assert found[0] == "a learned prior, a joint distribution of mu, tau (positive)"
    found = lines(nm.Simulations({"mu": np.zeros(5), "y": np.zeros((5, 3))}, {2: "timeout"}))
    assert found[:2] == ["5 simulations of mu, y (3,)", "  1 of them failed"]
    found = lines({"auto_loc": np.zeros(3)})
    assert found[0] == "a dictionary of arrays, such as the params of a guide: auto_loc (3,)"


def test_info_of_a_home_and_of_kinds_that_it_does_not_know(tmp_path):
    path = tmp_path / "it.safetensors"
    home = {"class": "Home", "activities": ["eat", "sleep"], "sensors": [{"class": "Sensor", "name": "co2"}]}
    for structure, words in (
        (home, ["a home of 2 activities: eat, sleep", "  from sensors: co2"]),
        ({"class": "Novelty", "size": 3, "flow": {}}, ["a Novelty with size, flow"]),
    ):
        header = {"numpyro_maf": json.dumps({"version": 2, "structure": structure})}
        save_file({"a": np.zeros(3, np.float32)}, path, metadata=header)
        assert files.described(path)[: len(words)] == words


def test_info_of_a_training_and_of_stored_simulations(capsys, tmp_path):
    def model():
        numpyro.sample("a", dist.Normal(0, 1).expand([2]).to_event(1))

    nm.simulate(0, model, 20, store=tmp_path / "store", progress=False)
    code, out, _ = output(capsys, "info", str(tmp_path / "store"))
    assert code == 0 and out.startswith("a store of 20 simulations of a (2,)\n")
    (tmp_path / "store" / "about.json").write_text("[")
    assert output(capsys, "info", str(tmp_path / "store"))[0] == 1
    x = np.random.default_rng(0).normal(size=(100, 2))
    nm.fit(0, small(0), x, max_epochs=2, progress=False, checkpoint=tmp_path / "run")
    code, out, _ = output(capsys, "info", str(tmp_path / "run"))
    assert code == 0 and out.startswith("a training that stands at 2 epochs\n  with batch_size=256")


def test_every_file_of_the_first_version_is_described():
    paths = sorted((Path(__file__).parent / "files" / "v1").glob("*.safetensors"))
    assert len(paths) > 20
    for path in paths:
        assert files.described(path)[0].endswith("of format version 1")


def test_info_reads_no_numbers_and_runs_nothing(tmp_path, monkeypatch):
    """A header that promises far more than the file's own arrays, and kinds that nobody knows."""
    monkeypatch.setattr(files, "read_tensors", lambda path: pytest.fail("read the numbers"))
    monkeypatch.setattr("numpyro_maf.io.load", lambda path: pytest.fail("loaded the file"))
    monkeypatch.setattr(jnp, "asarray", lambda *args: pytest.fail("made an array"))
    path = tmp_path / "odd.safetensors"
    for structure in (
        {"class": "os.system", "command": "touch here"},
        {"class": "BijectorFlow", "event_shape": [10**12], "recipe": None},
        {"class": "Joint"},
        {"class": "Simulations", "values": 3},
        "text",
    ):
        header = {"numpyro_maf": json.dumps({"version": 2, "structure": structure})}
        save_file({"a": np.zeros(3, np.float32)}, path, metadata=header)
        try:
            assert files.described(path)
        except ValueError as error:
            assert str(error).startswith(str(path))
    save_file({"a": np.zeros(3, np.float32)}, path)
    with pytest.raises(ValueError, match="was not written by numpyro_maf.save"):
        files.described(path)
    path.write_bytes(b"\xff" * 40)
    with pytest.raises(ValueError, match="is damaged or not a safetensors file"):
        files.described(path)


def test_a_damaged_number_is_found_by_check(capsys, tmp_path):
    path = saved(tmp_path / "it.safetensors", {"a": np.ones(3, np.float32)})
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert output(capsys, "info", str(path))[0] == 0
    code, _, err = output(capsys, "info", str(path), "--check")
    assert code == 1 and "its SHA-256 digest does not fit" in err


# Speed and the demonstration ----------------------------------------------------------------------


def test_bench_prints_a_table_of_times(capsys):
    code, out, _ = output(
        capsys, "bench", "--features", "2", "--batch", "10", "--hidden", "4", "--rounds", "1", "--builders",
        "elementwise",
    )  # fmt: skip
    row = out.splitlines()[-1].strip("| ").split(" | ")
    assert code == 0 and row[0] == "elementwise"
    assert all(float(figure) > 0 for figure in row[1:])


def test_the_code_that_the_demonstration_shows_is_its_own(capsys, monkeypatch):
    """Every block parses, and names only what the package and NumPyro have."""

    class Stub:
        """Stands in for results; counts as a flow, a posterior and draws."""

        def __init__(self, *args, **kwargs):
            self.flow = self

        def __call__(self, *args, **kwargs):
            return self

        def log_prob(self, x):
            return jnp.zeros(len(x))

        def sample(self, *args):
            return {"speed": np.linspace(1, 2, 9), "angle": np.linspace(0.2, 1, 9) ** 2}

        def run(self, *args):
            return None

        def get_samples(self):
            return {"z": np.zeros((5, 2))}

    for name in ("fit", "nsf", "npe", "simulate", "MCMC", "NUTS"):
        monkeypatch.setattr(demonstration, name, Stub())
    code, out, _ = output(capsys, "demo")
    assert code == 0 and out.count("-> ") == 3
    shown = "\n".join(line for line in out.splitlines()[:-1] if not line.startswith("-> "))
    ast.parse(shown)
    for name in re.findall(r"nm\.([a-z_.]+)\(", shown):
        assert callable(eval(f"nm.{name}", {"nm": nm})), name
    code, out, _ = output(capsys, "demo", "--only", "posterior")
    assert code == 0 and out.count("-> ") == 1


@pytest.mark.slow
def test_the_demonstration_runs_and_draws(capsys, tmp_path):
    pytest.importorskip("matplotlib").use("agg")
    code, out, _ = output(capsys, "demo", "--quick", "--out", str(tmp_path))
    assert code == 0 and out.count("-> ") == 3
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["density.png", "posterior.png", "prior.png", "warp.png"]
