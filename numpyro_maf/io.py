# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""What was learned, in one safetensors file, its structure as JSON in the header. Loading runs no code.

A file is checked before it is believed: its SHA-256 digest, the version, the kinds and fields of its
structure, the shape and type of each array, that all weights are finite, and that the parts fit together.
Whatever does not hold is a ValueError, the only exception that the contents of a file can cause.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_maf import codec, migrations
from numpyro_maf.flows.flow import Flow
from numpyro_maf.inference.learned_priors import Joint
from numpyro_maf.sbi import (
    HierarchicalPosterior,
    NeuralPosterior,
    Posterior,
    Ratio,
    Sequential,
    Simulations,
)
from numpyro_maf.tensors import read_tensors, write_tensors

__all__ = ["load", "save"]

_VERSION = 2
_LEARNED = (Flow, HierarchicalPosterior, Joint, NeuralPosterior, Posterior, Ratio, Simulations, dict)

_ROOMS = {"Home": "numpyro_maf.activities"}  # what is learned in rooms above this one


def save(path: str | os.PathLike[str], learned: Any) -> None:
    """Write what was learned to a file, weights by name.

    The file is replaced at once when it is complete, so that an interrupted call leaves the old one. Of a
    posterior the model, which is code, is not written: see ``with_model``.

    :param learned: a flow, also one from :func:`~numpyro_maf.nle`; a joint distribution over named sites;
        what :func:`~numpyro_maf.npe`, :func:`~numpyro_maf.nre`, :func:`~numpyro_maf.smc` or rounds gave; a
        dictionary of arrays, such as the ``params`` of a guide.
    :raises TypeError: for something else, and for a base distribution, a support or an embedding that cannot
        be described as JSON.
    :raises ValueError: for weights that are not finite.
    """
    if not _is_learned(learned):
        raise TypeError(
            "save takes a Flow, a Joint, a posterior, a Ratio or a dictionary of arrays, got "
            f"{type(learned).__qualname__}; of a distribution save the flow that gave it"
        )
    arrays: dict[str, Any] = {}
    structure = codec.write(learned, arrays)
    _check_finite(learned, arrays)
    about = {"version": _VERSION, "structure": structure}
    if isinstance(learned, Flow) and learned.recipe is not None:
        about["spec"] = learned.spec  # for people: loading reads the structure
    write_tensors(path, about, arrays)


def load(path: str | os.PathLike[str]) -> Any:
    """Read what :func:`save` wrote to a file, of this version or an earlier one; densities are bit-equal.

    :raises ValueError: when the file is damaged, is not such a file, was written by a later version, its
        arrays do not fit its structure, or it holds float64 and JAX is not set to use it.
    :raises OSError: when the file cannot be opened.
    """
    with open(path, "rb"):  # what is wrong with the path is an OSError, what is wrong in the file is not
        pass
    try:
        header, arrays = _opened(path)
        given = dict(arrays)
        if header["version"] == 1:
            learned = migrations.from_version_1(header, arrays)
        else:
            structure = header["structure"]
            if (room := _ROOMS.get(structure.get("class", ""))) is not None:
                import_module(room)
            learned = codec.read(structure, arrays)
        if arrays:
            raise ValueError(f"does not fit its own structure: {', '.join(sorted(arrays))}")
        if not _is_learned(learned):
            raise ValueError(f"holds a {type(learned).__qualname__}, which save does not write")
        _check_finite(learned, given)
        _check_fit(learned)
    except Exception as error:  # a file from a stranger may hold anything: whatever it causes is its fault
        raise ValueError(f"{path}: {error or type(error).__name__}") from error
    return learned


def _is_learned(value) -> bool:
    return isinstance(value, _LEARNED) or type(value).__qualname__ in _ROOMS


def _opened(path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and arrays of a file of a known version."""
    header, arrays, sealed = read_tensors(path)
    version = header["version"]
    if version not in range(1, _VERSION + 1):
        raise ValueError(f"has format version {version}, this is {_VERSION}: please upgrade")
    if version > 1 and not sealed:
        raise ValueError("is damaged: it has no SHA-256 digest")
    return header, arrays


def _check_finite(learned, arrays) -> None:
    """Refuse weights that are not finite. NaN may stand in simulations, and for what was not observed."""
    if isinstance(learned, Flow):
        leaves = jax.tree_util.tree_flatten_with_path(learned.weights)[0]
        arrays = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    for path, array in arrays.items():
        may_lack = isinstance(learned, Simulations) or ".sims." in path or ".observation[" in path
        if not may_lack and jnp.issubdtype(array.dtype, jnp.floating) and not np.isfinite(array).all():
            raise ValueError(f"weights are not finite at {path}")


def _check_fit(learned) -> None:
    """Trace the densities, which costs no memory: weights of the wrong shapes raise."""
    if hasattr(learned, "check_fit"):
        learned.check_fit()
        return
    for part in (r.posterior for r in learned.rounds) if isinstance(learned, Sequential) else ():
        _check_fit(part)
    learned = getattr(learned, "neural", learned)
    flow = getattr(learned, "flow", getattr(learned, "flows", learned))
    if not isinstance(flow, Flow):
        return
    x = jax.ShapeDtypeStruct((2, *flow.event_shape), jnp.result_type(float))
    context = jax.ShapeDtypeStruct((2, flow.context), x.dtype) if flow.context else None

    def score(flow, x, context):
        return flow(context).log_prob(x)

    errors: list[Exception] = []
    for _ in range(3):  # a stack of flows, as vmap makes them, is scored flow by flow
        try:
            jax.eval_shape(score, flow, x, context)
        except (TypeError, ValueError) as error:
            errors.append(error)
            score = jax.vmap(score, (0, None, None))
        else:
            return
    raise ValueError(f"its weights do not fit together: {errors[0]}")
