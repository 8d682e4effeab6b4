# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""What was learned, in one safetensors file, its structure as JSON in the header. Loading runs no code."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from numpyro_maf.flows.flow import Flow, from_spec
from numpyro_maf.flows.mades import Made
from numpyro_maf.inference.learned_priors import Joint
from numpyro_maf.sbi import NeuralPosterior, Ratio

__all__ = ["load", "save"]

_HEADER = "numpyro_maf"
_VERSION = 1
# What can be written, by the name that files call it, and how its structure is made of its ``spec``.
_KINDS: dict[str, tuple[type, Any]] = {
    "flow": (Flow, from_spec),
    "joint": (Joint, Joint.from_spec),
    "posterior": (NeuralPosterior, NeuralPosterior.from_spec),
    "ratio": (Ratio, Ratio.from_spec),
}


def save(path: str | os.PathLike, learned: Flow | Joint | NeuralPosterior | Ratio) -> None:
    """Write what was learned to a file, weights by name.

    Of a neural posterior the model, which is code, is not written: see ``with_model``.

    :param learned: a flow, also one from :func:`~numpyro_maf.nle`; a joint distribution over named sites;
        what :func:`~numpyro_maf.npe` or :func:`~numpyro_maf.nre` gave.
    :raises TypeError: for something else, and for a base distribution, a support or an embedding that cannot
        be described as JSON.
    """
    kind = next((name for name, (cls, _) in _KINDS.items() if isinstance(learned, cls)), None)
    if kind is None:
        raise TypeError(
            f"save takes a Flow, a Joint, a NeuralPosterior or a Ratio, got {type(learned).__name__}"
        )
    header = json.dumps({"version": _VERSION, "kind": kind, "spec": learned.spec}, sort_keys=True)
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in _named(_numbers(learned))[0].items()}
    save_file(arrays, path, metadata={_HEADER: header})


def load(path: str | os.PathLike) -> Any:
    """Read what :func:`save` wrote to a file; densities are bit-equal.

    :raises ValueError: when the file is not such a file, was written by a later version, its arrays do not
        fit its structure, or it holds float64 and JAX is not set to use it.
    """
    try:
        opened = safe_open(path, "numpy")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
    with opened as file:
        metadata = file.metadata() or {}
        if _HEADER not in metadata:
            raise ValueError(f"{path} was not written by numpyro_maf.save")
        header = json.loads(metadata[_HEADER])
        if header["version"] > _VERSION:
            raise ValueError(
                f"{path} has format version {header['version']}, this is {_VERSION}: please upgrade"
            )
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if header["kind"] not in _KINDS:
        raise ValueError(f"{path} holds an unknown kind {header['kind']!r}, expected one of {list(_KINDS)}")
    template = _KINDS[header["kind"]][1](header["spec"])
    expected, structure = _named(_numbers(template))
    if set(expected) != set(arrays):
        different = sorted(set(expected) ^ set(arrays))
        raise ValueError(f"{path} does not fit its own structure: {', '.join(different)}")
    leaves = []
    for name, leaf in expected.items():
        array = arrays[name]
        if array.shape != leaf.shape:
            raise ValueError(f"{path}: {name} has shape {array.shape}, expected {leaf.shape}")
        if array.dtype == np.float64 and jnp.result_type(float) != np.float64:
            raise ValueError(f"{path} holds float64 weights: enable jax_enable_x64 to load it")
        leaves.append(jnp.asarray(array))
    return _with_numbers(template, jax.tree.unflatten(structure, leaves))


def _named(numbers):
    """The leaves by path, and their structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(numbers)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}, structure


def _numbers(learned) -> Any:
    """The part whose leaves are written: what the spec describes, distributions and supports, is left out."""
    if isinstance(learned, Flow):
        if isinstance(learned.base, Flow):
            return replace(learned, base=_numbers(learned.base))
        return learned if isinstance(learned.base, Made) else replace(learned, base=None)
    if isinstance(learned, Joint):
        return _numbers(learned.flow)
    if isinstance(learned, NeuralPosterior):
        return {name: _numbers(getattr(learned, name)) for name in ("flows", "weights", "view", "typical")}
    return learned


def _with_numbers(template, numbers) -> Any:
    """The way back of :func:`_numbers`."""
    if isinstance(template, Flow):
        if isinstance(template.base, Flow):
            return replace(numbers, base=_with_numbers(template.base, numbers.base))
        return numbers if isinstance(template.base, Made) else replace(numbers, base=template.base)
    if isinstance(template, Joint):
        return replace(template, flow=_with_numbers(template.flow, numbers))
    if isinstance(template, NeuralPosterior):
        return replace(template, **{k: _with_numbers(getattr(template, k), v) for k, v in numbers.items()})
    return numbers
