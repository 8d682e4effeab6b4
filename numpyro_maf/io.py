# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Flows in files: one safetensors file, the structure as JSON in its header. Loading runs no code."""

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

from numpyro_maf.flow import Flow, from_spec
from numpyro_maf.made import Made
from numpyro_maf.priors import Joint
from numpyro_maf.sites import Sites

__all__ = ["load", "save"]

_HEADER = "numpyro_maf"
_VERSION = 1


def save(path: str | os.PathLike, flow: Flow | Joint) -> None:
    """Write a flow, or a joint distribution over named sites, to a file, weights by name.

    :raises TypeError: for a base distribution or a support that cannot be described as JSON.
    """
    if not isinstance(flow, (Flow, Joint)):
        raise TypeError(f"save takes a Flow or a Joint, got {type(flow).__name__}")
    content: dict[str, Any] = {"version": _VERSION}
    if isinstance(flow, Joint):
        content["sites"], flow = flow.sites.spec, flow.flow
    header = json.dumps(content | {"spec": flow.spec}, sort_keys=True)
    arrays = {name: np.ascontiguousarray(leaf) for name, leaf in _named(flow)[0].items()}
    save_file(arrays, path, metadata={_HEADER: header})


def load(path: str | os.PathLike) -> Flow | Joint:
    """Read a flow or a joint distribution from a file that :func:`save` wrote; its densities are bit-equal.

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
    template = from_spec(header["spec"])
    expected, structure = _named(template)
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
    flow = _with_bases(jax.tree.unflatten(structure, leaves), template)
    return Joint(flow, Sites.from_spec(header["sites"])) if "sites" in header else flow


def _named(flow: Flow):
    """The leaves by path, without those of distributions, which the spec describes; and their structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(_without_bases(flow))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}, structure


def _without_bases(flow: Flow) -> Flow:
    if isinstance(flow.base, Flow):
        return replace(flow, base=_without_bases(flow.base))
    return flow if isinstance(flow.base, Made) else replace(flow, base=None)


def _with_bases(flow: Flow, template: Flow) -> Flow:
    if isinstance(flow.base, Flow):
        return replace(flow, base=_with_bases(flow.base, template.base))
    return flow if isinstance(flow.base, Made) else replace(flow, base=template.base)
