# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""What is in a file, in words: read from its header, without loading numbers or building anything."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from numpyro_maf.tensors import opened, read_tensors

__all__ = ["described", "run"]


def run(file: str, check: bool = False, arrays: bool = False) -> int:
    """Print what a file or a folder holds."""
    print("\n".join(described(file, check=check, arrays=arrays)))
    return 0


def described(path: str | os.PathLike[str], *, check: bool = False, arrays: bool = False) -> list[str]:
    """Lines about a file of :func:`~numpyro_maf.save`, a training's checkpoint or a store of simulations.

    :param check: whether to read all numbers and compare their digest.
    :param arrays: whether to list the arrays.
    :raises ValueError: for a file that is damaged or of another kind.
    :raises OSError: for a path that cannot be read.
    """
    place = Path(path)
    if place.is_dir():
        if (place / "about.json").exists():
            return _store(place)
        if (place / "training.safetensors").exists():
            return described(place / "training.safetensors", check=check, arrays=arrays)
        raise ValueError(f"{place} is a folder without simulations and without a training")
    with open(place, "rb"):  # what is wrong with the path is an OSError
        pass
    try:
        header, shapes = _header(place)
        lines = _training(header, shapes) if header.get("kind") == "training" else _learned(header, place)
        lines += _numbers(header, shapes, place, check)
        if arrays:
            lines += [f"  {name}: {_shown(shape)} {dtype}" for name, (shape, dtype, _) in shapes.items()]
    except Exception as error:  # a file from a stranger may hold anything: whatever it causes is its fault
        raise ValueError(f"{place}: {error or type(error).__name__}") from error
    return lines


# Numbers of bytes by the file format's name of a type.
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "I16": 2, "U16": 2}


def _header(path: Path) -> tuple[dict[str, Any], dict[str, tuple[list[int], str, int]]]:
    """The header, and by array shape, type and bytes."""
    with opened(path) as (file, text, digest):
        header = json.loads(text)
        shapes = {}
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            shape, dtype = part.get_shape(), part.get_dtype()
            shapes[name] = (shape, dtype, math.prod(shape) * _BYTES.get(dtype, 1))
    return header | {"sealed": digest is not None}, shapes


def _numbers(header, shapes, path: Path, check: bool) -> list[str]:
    count = sum(math.prod(shape) for shape, _, _ in shapes.values())
    size = sum(size for _, _, size in shapes.values())
    types = ", ".join(sorted({dtype for _, dtype, _ in shapes.values()})) or "none"
    lines = [f"  {len(shapes)} arrays of {count:,} numbers ({types}), {_megabytes(size)}"]
    version = f"format version {header['version']}, " if "version" in header else ""
    if check:
        read_tensors(path)
        seal = "digest right" if header["sealed"] else "no digest to compare"
    else:
        seal = "with a digest, not compared (--check)" if header["sealed"] else "without a digest"
    return [*lines, f"  {version}{seal}"]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


# Kinds --------------------------------------------------------------------------------------------


def _learned(header: dict[str, Any], path: Path) -> list[str]:
    """Lines about what ``save`` wrote."""
    name = json.dumps(str(path))
    if header["version"] == 1:
        kind = header.get("kind", "something")
        return [f"{kind}, of format version 1", f"  use it: numpyro_maf.load({name})"]
    tree = header["structure"]
    kind = tree.get("class", "?")
    words, use = _KINDS.get(kind, (_other, ""))
    lines = words(tree)
    if tree.get("context") and use.startswith("; it()"):
        use = use.replace("it()", "it(context)")
    return [lines[0], *(f"  {line}" for line in lines[1:]), f"  use it: it = numpyro_maf.load({name}){use}"]


def _flow(tree) -> list[str]:
    shape, context = tree.get("event_shape"), tree.get("context", 0)
    width = f"{shape[0]} features" if shape and len(shape) == 1 else f"events {_shown(shape or [])}"
    given = f", given a context of width {context}" if context else ""
    return [f"a normalizing flow of {width}{given}", *_recipe(tree)]


def _made(tree) -> list[str]:
    return [
        f"a masked autoregressive network (MADE) of {len(tree.get('columns', ()))} columns",
        *_recipe(tree),
    ]


def _recipe(tree) -> list[str]:
    recipe = tree.get("recipe")
    if not recipe:
        return ["put together by hand, without a builder"]
    options = {k: v for k, v in recipe["options"] if v not in (None, False, [])}
    shown = ", ".join(f"{name}={_value(value)}" for name, value in options.items())
    return [f"built by {recipe['builder']}({shown})"]


def _value(value) -> str:
    if isinstance(value, dict):
        own = ", ".join(f"{k}={_value(v)}" for k, v in value.items() if k != "class")
        return f"{value.get('class', 'dict')}({own})"
    if isinstance(value, list):
        return f"({', '.join(map(_value, value))}{',' if len(value) == 1 else ''})"
    return repr(value)


def _sites(sites) -> str:
    """Names with shapes, and supports other than the reals."""
    parts = []
    for name, shape, support in zip(sites["names"], sites["shapes"], sites["supports"]):
        kind = _support(support)
        parts.append(_named(name, shape) + ("" if kind == "real" else f" ({kind})"))
    return ", ".join(parts)


def _support(support) -> str:
    if support.get("class") == "independent":
        return _support(support["of"])
    return str(support.get("name", support.get("class", "?"))).replace("_", " ")


def _joint(tree) -> list[str]:
    return [f"a learned prior, a joint distribution of {_sites(tree['sites'])}", *_flow(tree["flow"])[1:]]


def _observed(tree) -> str:
    summary, view = tree.get("summary", {}), tree.get("view", {})
    names, shapes = view.get("names", []), summary.get("shapes", [])
    return ", ".join(map(_named, names, shapes)) or "data"


def _amortised(tree) -> list[str]:
    lines = [
        f"a neural posterior of {_sites(tree['sites'])}",
        f"given {_observed(tree)}, for any observation",
    ]
    flows = tree.get("flows", {}).get("flows", {}) if isinstance(tree.get("flows"), dict) else {}
    lines += _recipe(flows) if flows else []
    losses = tree.get("losses") or {}
    epochs = (losses.get("train") or {}).get("shape", [0])[0]
    if epochs:
        end = losses.get("stopped") or ("still improving" if losses.get("improving") else "ended by itself")
        lines.append(f"trained for {epochs} epochs, best epoch {losses.get('best_epoch')}, {end}")
    if tree.get("excluded"):
        lines.append(f"{tree['excluded']} failed simulations were left out")
    return lines


def _posterior(tree) -> list[str]:
    inner = tree.get("neural", tree)
    seen = ", ".join((tree.get("observation") or {}).get("items", {})) or "its data"
    sites = f" of {_sites(inner['sites'])}" if "sites" in inner else ""
    return [f"a posterior{sites}, given one observation of {seen}"]


def _rounds(tree) -> list[str]:
    rounds = tree.get("rounds", [])
    last = _posterior(rounds[-1].get("posterior", {})) if rounds else ["a posterior"]
    return [f"{len(rounds)} rounds of simulations and learning; the last gave", *last]


def _ratio(tree) -> list[str]:
    return [f"a likelihood-to-evidence ratio of {_observed(tree)}"]


def _simulations(tree) -> list[str]:
    values, errors = tree["values"]["items"], tree.get("errors", {}).get("items", {})
    rows = next(iter(values.values()))["shape"][0] if values else 0
    shown = ", ".join(_named(name, value["shape"][1:]) for name, value in values.items())
    lines = [f"{rows:,} simulations of {shown}"]
    return lines + ([f"{len(errors):,} of them failed"] if errors else [])


def _home(tree) -> list[str]:
    activities, sensors = tree.get("activities", []), [s.get("name", "?") for s in tree.get("sensors", [])]
    lines = [f"a home of {len(activities)} activities: {', '.join(activities)}"]
    return [*lines, f"from sensors: {', '.join(sensors)}"]


def _other(tree) -> list[str]:
    fields = ", ".join(name for name in tree if name != "class")
    return [f"a {tree.get('class', '?')} with {fields}"]


def _dictionary(tree) -> list[str]:
    names = [_named(name, value.get("shape")) for name, value in tree["items"].items()]
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return [f"a dictionary of arrays, such as the params of a guide: {shown}"]


_ONE = "; it.sample(key, (1000,))"
# By class: the function of its words, and how to go on after loading.
_KINDS: dict[str, tuple[Any, str]] = {
    "BijectorFlow": (_flow, "; it().sample(key, (1000,))"),
    "Made": (_made, "; it().sample(key, (1000,))"),
    "Ensemble": (lambda tree: ["several flows side by side, and their mixture"], ""),
    "Joint": (_joint, _ONE),
    "NeuralPosterior": (_amortised, "; it(observation).sample(key, (1000,))"),
    "HierarchicalPosterior": (_amortised, "; it(observation).sample(key, (1000,))"),
    "FlowPosterior": (_posterior, _ONE),
    "PlatePosterior": (_posterior, _ONE),
    "ParticlePosterior": (_posterior, _ONE),
    "Sequential": (_rounds, _ONE),
    "Ratio": (_ratio, "; it(theta, x)"),
    "Simulations": (_simulations, ""),
    "Home": (_home, "; it.predict(frame)"),
    "dict": (_dictionary, ""),
}


def _training(header, shapes) -> list[str]:
    about = header.get("about", {})
    epochs = shapes.get("train_loss", ([0], "", 0))[0][0]
    named = ("batch_size", "learning_rate", "patience", "average", "anneal", "tolerance")
    options = ", ".join(f"{name}={about[name]}" for name in named if name in about)
    return [
        f"a training that stands at {epochs} epochs",
        f"  with {options}",
        "  use it: call the same function again with checkpoint= this folder; it resumes",
    ]


def _store(folder: Path) -> list[str]:
    try:
        about = json.loads((folder / "about.json").read_text())
        sites = about["sites"]
        shown = ", ".join(_named(name, shape) for name, shape in sites.items())
        count = int(about["count"])
    except Exception as error:
        raise ValueError(f"{folder}/about.json is damaged: {error or type(error).__name__}") from error
    return [
        f"a store of {count:,} simulations of {shown}",
        f"  use it: numpyro_maf.Simulations.open({json.dumps(str(folder))})",
        "  go on: the same call of simulate, with store= this folder",
    ]


def _named(name: str, shape) -> str:
    return f"{name} {_shown(shape)}" if shape else name


def _shown(shape) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
