"""Loaders of the density benchmark, on small files in its format, against values made by other means."""

import base64
import builtins
import io
import os
import pickle
import sys
import types
import zlib
from unittest.mock import patch

import numpy as np
import pytest

from numpyro_maf.datasets import load_tabular
from numpyro_maf.datasets.frames import read_frame


def save(path, array):
    path.parent.mkdir(exist_ok=True)
    np.save(path, array)


def check(splits, train, validation, test):
    for part, expected in zip((splits.train, splits.validation, splits.test), (train, validation, test)):
        assert part.dtype == np.float32 and part.flags.c_contiguous
        np.testing.assert_allclose(part, expected, rtol=1e-6, atol=1e-6)


# Arrays ------------------------------------------------------------------------------------------


def test_power_shuffles_adds_noise_and_scales_by_all_but_the_test(tmp_path):
    columns = np.random.default_rng(0).normal(size=(8, 57)) + np.arange(8)[:, None]
    save(tmp_path / "power/data.npy", columns.T)
    rng = np.random.RandomState(42)
    order = np.arange(57)
    rng.shuffle(order)
    power, _, voltage, _, kitchen, laundry, heater, time = columns[:, order]
    voltage = voltage + rng.rand(57) / 100
    power = power + rng.rand(57) / 1000
    meters = np.array([kitchen, laundry, heater]) + rng.rand(57, 3).T
    rows = np.array([power, voltage, *meters, time]).T
    # 57 rows: 5 to test, of the other 52 5 to validate
    mean, scale = rows[:52].mean(0), rows[:52].std(0)
    rows = (rows - mean) / scale
    check(load_tabular("power", tmp_path), rows[:47], rows[47:52], rows[52:])


def test_miniboone_by_hand(tmp_path):
    # 20 rows: 2 to test, 1 to validate. The first 18 are 9 times 1 and 9 times 5: mean 3, deviation 2.
    column = np.tile([1.0, 5.0], 9).tolist() + [7.0, -1.0]
    save(tmp_path / "miniboone/data.npy", np.array([column, np.array(column) * 10 - 7]).T)
    splits = load_tabular("miniboone", tmp_path)
    both = np.ones(2)
    check(splits, np.outer([-1, 1] * 8 + [-1], both), [[1, 1]], np.outer([2, -2], both))


@pytest.mark.parametrize(
    ("name", "file", "array"),
    [
        ("power", "power/data.npy", np.zeros((30, 7))),
        ("miniboone", "miniboone/data.npy", np.zeros(30)),
        ("miniboone", "miniboone/data.npy", np.array([[print]], dtype=object)),
    ],
)
def test_other_arrays_are_refused(tmp_path, name, file, array):
    save(tmp_path / file, array)
    with pytest.raises(ValueError, match=r"array|pickle"):
        load_tabular(name, tmp_path)


# Text --------------------------------------------------------------------------------------------


def hepmass(folder, train, test):
    (folder / "hepmass").mkdir()
    for name, rows in [("train", train), ("test", test)]:
        names = ",".join(f"f{i}" for i in range(len(rows[0]) - 1))
        lines = [f"# label,{names}"] + [",".join(f"{value:.18e}" for value in row) for row in rows]
        (folder / f"hepmass/1000_{name}.csv").write_text("\n".join([*lines, ""]))


def test_hepmass_keeps_signal_and_drops_columns_whose_least_value_recurs(tmp_path):
    n = 20
    ramp = np.arange(1.0, n + 1)
    six_lows, five_lows, six_highs = np.maximum(ramp, 6), np.maximum(ramp, 5), np.minimum(ramp, n - 5)
    signal = np.array([np.ones(n), ramp, six_lows, five_lows, six_highs]).T
    noise = np.array([np.zeros(n), 99 * ramp, ramp, ramp, ramp]).T
    test = [[1, 3, 4, 5, 6, 1000], [0, 9, 9, 9, 9, 9], [1, 20, 20, 20, 15, -1000]]
    hepmass(tmp_path, np.stack([noise, signal], 1).reshape(2 * n, 5), test)
    kept = signal[:, [1, 3, 4]]
    scale = np.sqrt(((kept - kept.sum(0) / n) ** 2).sum(0) / (n - 1))
    rows = (kept - kept.sum(0) / n) / scale
    tested = (np.array([[3, 5, 6], [20, 20, 15]]) - kept.sum(0) / n) / scale
    check(load_tabular("hepmass", tmp_path), rows[:18], rows[18:], tested)


def test_hepmass_without_the_extra_column_is_refused(tmp_path):
    hepmass(tmp_path, [[1, 2, 3]] * 20, [[1, 2, 3]] * 3)
    with pytest.raises(ValueError, match="1000_test.csv must have one column more"):
        load_tabular("hepmass", tmp_path)


# HDF5 --------------------------------------------------------------------------------------------


def test_bsds300_is_taken_as_it_is(tmp_path):
    h5py = pytest.importorskip("h5py")
    parts = [np.arange(63 * n, dtype=np.float64).reshape(n, 63) / 7 for n in (5, 3, 4)]
    (tmp_path / "BSDS300").mkdir()
    with h5py.File(tmp_path / "BSDS300/BSDS300.hdf5", "w") as file:
        for name, part in zip(("train", "validation", "test"), parts):
            file[name] = part
    check(load_tabular("bsds300", tmp_path), *parts)
    with h5py.File(tmp_path / "BSDS300/BSDS300.hdf5", "a") as file:
        del file["validation"]
    with pytest.raises(ValueError, match=r"BSDS300.hdf5 lacks the arrays \['validation'\]"):
        load_tabular("bsds300", tmp_path)
    (tmp_path / "BSDS300/BSDS300.hdf5").write_text("no HDF5")
    with pytest.raises(ValueError, match="BSDS300.hdf5 cannot be read"):
        load_tabular("bsds300", tmp_path)
    with patch.dict(sys.modules, {"h5py": None}), pytest.raises(ImportError, match="numpyro_maf.examples"):
        load_tabular("bsds300", tmp_path)


# Pickled frames. Stand-ins take the names of pandas' own classes, so that pickles name the same globals. ----


class Maker:
    """Makes and pickles stand-ins for pandas: ``maker[module, name]`` is the class of one."""

    def __init__(self):
        self.modules = {}

    def __getitem__(self, key):
        module, name = key
        for end in range(1, module.count(".") + 2):
            parent = ".".join(module.split(".")[:end])
            self.modules.setdefault(parent, types.ModuleType(parent))
        namespace = {
            "__module__": module,
            "__qualname__": name,
            "__reduce__": lambda self: self.reduced,
            "__call__": None,
        }
        held = self.modules[module]
        if not hasattr(held, name):
            setattr(held, name, type(name, (), namespace))
        return getattr(held, name)

    def call(self, module, name, *args, state=None):
        """An object that pickles as a call, and maybe a state."""
        thing = self[module, name]()
        thing.reduced = (type(thing), args) if state is None else (type(thing), args, state)
        return thing

    def dumps(self, thing, protocol):
        with patch.dict(sys.modules, self.modules):
            return pickle.dumps(thing, protocol=protocol)


def old_frame(maker, names, blocks, rows):
    """The layout up to pandas 1.2: blocks, values (columns, rows) and places, in the manager's state."""
    base = "pandas.indexes.base"
    columns = maker.call(
        base, "_new_Index", maker[base, "Index"], {"data": np.array(names, object), "name": None}
    )
    numbers = {"data": np.arange(rows)[::-1], "name": None}
    index = maker.call(base, "_new_Index", maker["pandas.indexes.numeric", "Int64Index"], numbers)
    axes = [columns, index]
    state = {"axes": axes, "blocks": [dict(values=values, mgr_locs=places) for values, places in blocks]}
    state = axes, [values for values, _ in blocks], [columns] * len(blocks), {"0.14.1": state}
    manager = maker.call("pandas.core.internals", "BlockManager", state=state)
    state = {"_data": manager, "_typ": "dataframe", "_metadata": []}
    return maker.call("pandas.core.frame", "DataFrame", state=state)


def new_frame(maker, names, blocks, rows):
    """The layout since pandas 1.3: blocks are arguments of the manager; labels as in pandas 3."""
    base, arrays = "pandas.core.indexes.base", "pandas._libs.arrays"
    dtype = maker.call("pandas", "StringDtype", "python", float("nan"))
    label = maker.call(
        arrays, "__pyx_unpickle_NDArrayBacked", maker["pandas.arrays", "StringArray"], 82904607, None,
        state=(dtype, np.array(names, object)),
    )  # fmt: skip
    columns = maker.call(base, "_new_Index", maker["pandas", "Index"], {"data": label, "name": None})
    span = {"name": None, "start": 0, "stop": rows, "step": 1}
    index = maker.call(base, "_new_Index", maker["pandas", "RangeIndex"], span)
    inner = "pandas._libs.internals"
    parts = tuple(maker.call(inner, "_unpickle_block", values, places, 2) for values, places in blocks)
    manager = maker.call("pandas.core.internals.managers", "BlockManager", parts, [columns, index])
    state = {"_mgr": manager, "_typ": "dataframe", "attrs": {}, "_flags": {"allows_duplicate_labels": True}}
    return maker.call("pandas", "DataFrame", state=state)


LAYOUTS = [(old_frame, 2), (old_frame, 4), (new_frame, 4), (new_frame, 5)]
GAS = "gas/ethylene_CO.pickle"


def write(folder, content):
    (folder / "gas").mkdir(exist_ok=True)
    (folder / GAS).write_bytes(content)
    return folder / GAS


@pytest.mark.parametrize(("layout", "protocol"), LAYOUTS)
def test_frames_of_several_blocks_are_read_without_pandas(tmp_path, layout, protocol):
    table = np.random.default_rng(1).normal(size=(9, 6))
    table[:, [1, 4]] = np.round(10 * table[:, [1, 4]])
    blocks = [
        (np.asfortranarray(table[:, [0, 2, 3]].T), np.array([0, 2, 3])),
        (table[:, [1, 4]].T.astype(np.int64), slice(1, 7, 3)),
        (table[:, [5]].T.astype(">f8"), slice(5, 6, 1)),
    ]
    maker = Maker()
    path = write(tmp_path, maker.dumps(layout(maker, list("abcdef"), blocks, 9), protocol))
    with patch.dict(sys.modules, {"pandas": None}):
        names, values = read_frame(path)
    assert names == list("abcdef") and values.dtype == np.float64
    np.testing.assert_array_equal(values, table)


def test_frame_from_python_2(tmp_path):
    # Written by pandas 0.19.2 with Python 2.7: two types, rows out of order.
    content = (
        "eNp1Uttu00AQjRM3JG6hpZQ2QKFQCmy5mAbSCwipCAECrARU2MfIWjvbrkXiZOw1EAlL8JAiPoWvgE9AfAGfAG88IMH4kiAH"
        "2AePd3Zmzjkz8yZv95jbYr5udz2u73qsw7W7TLL78R8oq28hH0KB0LLZ4ZK18AnUJkxQ1ZT9HhRpOXLFeXCATphxQClT1HEl"
        "91zW9rU77a79vM5ctsc9DcpYWyNNmCTDcMdt8Vfc1y3mc810+UvzYeTRYOqfEenjwRAOEarGyNO2G3R6/QS4E7SlwzyP9TXT"
        "43bX9aUX2FKDmSRKw5LxKxw2cgOqWO92YJYYiqEO0oAWasQuHKH5x1tGzlAwYI4YBaq8bjQaj37hiT/GtrTeN+EosnjmYCPm"
        "qVrnUsACLdxDU6H5p1U4xqVFVTdq1PFGsL8DJ8RfshCVe46NyuRGLZW3GMJJIqbFjPjD8lTEsjAQSMwZEluKid3KEsshMVrJ"
        "57JHSa20RELlNG/CGZKBWI4hjMJ+BLI7BDn7X5AHSclv21mor+l99lNif6T30u3ELqb288efH75/qVtPsJUZHisRDyXisYRK"
        "imnZoSJ1pAQVnCNiSuA2nB9v14W0XXM4JELEvFgQ0TRS8atJ1sXxrEsxcpJ1WVTYKOEKD0GnxTW9WtOrcDWENRw8w/lBVUzS"
        "ohVtuQ/XmnCdhFAjtNTZ80x0+rCeAdhIaUXCxkdTGAmjxResHWDxTbEchLBFxLptmlbg4HK7pqn5bcfGHb1h5HFc0Yxuik2x"
        "EvDAl1Zg6b8BUeollg=="
    )
    path = write(tmp_path, zlib.decompress(base64.b64decode(content)))
    names, values = read_frame(path)
    assert names == ["Time", "Meth", "Eth", "S1"]
    np.testing.assert_array_equal(values, [[1, -4.5, 6, 7], [0, 1.5, 2, -0.25], [0.5, 3, 4, 1e-3]])


@pytest.mark.parametrize(("layout", "protocol"), LAYOUTS)
def test_gas_drops_what_a_later_sensor_repeats_and_scales_by_all_rows(tmp_path, layout, protocol):
    # b repeats a and c repeats b, with correlation 0.989 each, but not c a: a goes, then b goes, c stays.
    rng = np.random.default_rng(2)
    basis = np.linalg.qr(np.column_stack([np.ones(60), rng.normal(size=(60, 4))]))[0][:, 1:]
    a, b, c = (np.cos(t) * basis[:, 0] + np.sin(t) * basis[:, 1] for t in (0.0, 0.15, 0.3))
    d = -5 * c  # correlation -1 is no repetition
    e = basis[:, 2]
    sensors = {
        "a": a,
        "Meth": basis[:, 3],
        "b": 3 * b + 1,
        "Time": basis[:, 0],
        "c": c,
        "d": d,
        "e": e,
        "Eth": e,
    }
    table = np.array([*sensors.values()])
    maker = Maker()
    frame = layout(maker, list(sensors), [(table, slice(0, 8, 1))], 60)
    write(tmp_path, maker.dumps(frame, protocol))
    # The columns have mean 0 and norm 1: their deviation is 1 / sqrt(59). 60 rows: 6 to test, 5 to validate.
    rows = np.sqrt(59) * np.array([c, -c, e]).T
    check(load_tabular("gas", tmp_path), rows[:49], rows[49:54], rows[54:])


def test_gas_names_the_columns_it_lacks(tmp_path):
    maker = Maker()
    frame = new_frame(maker, ["Time", "Eth", "x"], [(np.zeros((3, 4)), slice(0, 3, 1))], 4)
    write(tmp_path, maker.dumps(frame, 5))
    with pytest.raises(ValueError, match=r"lacks the columns \['Meth'\]"):
        load_tabular("gas", tmp_path)


class Call:
    def __init__(self, function, *args):
        self.called = function, args

    def __reduce__(self):
        return self.called


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize(
    "name",
    ["os.system", "builtins.eval", "builtins.open", "builtins.getattr", "numpy.save", "subprocess.Popen"],
)
def test_a_malicious_pickle_runs_nothing(tmp_path, name, hidden, protocol):
    victim = tmp_path / "victim"
    module, _, attribute = name.rpartition(".")
    function = getattr(__import__(module), attribute)
    args = {
        "os.system": (f"touch {victim}",),
        "builtins.eval": (f"open({str(victim)!r}, 'w')",),
        "builtins.open": (str(victim), "w"),
        "builtins.getattr": (os.path, "exists"),
        "numpy.save": (str(victim), [1]),
        "subprocess.Popen": (["touch", str(victim)],),
    }[name]
    args = ("", "upper") if name == "builtins.getattr" else args
    thing = Call(function, *args)
    if hidden:
        maker = Maker()
        frame = old_frame(maker, ["x", thing], [(np.zeros((2, 3)), slice(0, 2, 1))], 3)
        content = maker.dumps(frame, max(protocol, 2))
    else:
        content = pickle.dumps(thing, protocol)
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=r"ethylene_CO.pickle is not .* it asks for"):
        read_frame(path)
    assert not victim.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cpandas\nDataFrame\n)R}S'_mgr'\ncnumpy\nndarray\nsb.",  # a class where an object should be
        b"cpandas\nDataFrame\n}b.",  # a state for a class
        b"cnumpy\nndarray.tofile\n.",  # a method
        b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
        b"cpandas\nDataFrame\n(S'x'\ni1\ntR.",
        b"\x82\x01.",  # an extension code
        b"Pname\n.",  # a persistent object
        pickle.dumps([1, 2]),
        pickle.dumps({"_mgr": 1}),
        b"",
        b"no pickle",
    ],
)
def test_malformed_pickles_are_refused(tmp_path, content):
    with pytest.raises(ValueError, match="is not a pickled DataFrame of numbers"):
        read_frame(write(tmp_path, content))


def test_what_a_pickle_names_is_never_imported(tmp_path):
    path = write(tmp_path, b"cthis\ns\n.")
    with patch.object(builtins, "__import__", side_effect=AssertionError), pytest.raises(ValueError):
        read_frame(path)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([(np.array([["a", "b"]], object), slice(0, 1, 1)), (np.zeros((1, 2)), slice(1, 2, 1))], "DataFrame"),
        ([(np.array([["a", "b"], ["c", "d"]]), slice(0, 2, 1))], "values of type U1"),
        ([(np.zeros((1, 2)), slice(0, 1, 1))], "fill columns"),
        ([(np.zeros((2, 2)), slice(0, 2, 1)), (np.ones((1, 2)), slice(1, 2, 1))], "fill columns"),
    ],
)
def test_frames_of_anything_but_numbers_are_refused(tmp_path, blocks, message):
    maker = Maker()
    path = write(tmp_path, maker.dumps(old_frame(maker, ["x", "y"], blocks, 2), 2))
    with pytest.raises(ValueError, match=message):
        read_frame(path)


def test_frames_of_pandas_itself_are_read():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"Time": [0.5, 1.5, 2.5], "n": [1, 2, 3], "x": [-1.0, 2.0, 1e300]})
    for table in frame, frame.iloc[[2, 0]]:
        file = io.BytesIO(pickle.dumps(table))
        with patch("builtins.open", return_value=file):
            names, values = read_frame("frame.pickle")
        assert names == ["Time", "n", "x"]
        np.testing.assert_array_equal(values, table.to_numpy(float))


# Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("power", r"power.data\.npy is missing: an array"),
        ("gas", r"ethylene_CO\.pickle is missing: a pandas DataFrame"),
        ("hepmass", r"1000_train\.csv is missing: a header"),
        ("miniboone", r"miniboone.data\.npy is missing"),
        ("bsds300", r"BSDS300\.hdf5 is missing: arrays train"),
    ],
)
def test_missing_files_are_named_with_what_they_hold(tmp_path, name, file):
    with pytest.raises(FileNotFoundError, match=rf"{file}.*zenodo\.org"):
        load_tabular(name, tmp_path)


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"one of \['power', .*got 'POWER'"):
        load_tabular("POWER", tmp_path)
