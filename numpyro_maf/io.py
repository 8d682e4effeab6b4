# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""What was learned, in one safetensors file, its structure as JSON in the header. Loading runs no code."""

from __future__ import annotations

import json
import os
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from numpyro_maf import codec, migrations
from numpyro_maf.flows.flow import Flow
from numpyro_maf.inference.learned_priors import Joint
from numpyro_maf.sbi import NeuralPosterior, Ratio

__all__ = ["load", "save"]

_HEADER = "numpyro_maf"
_VERSION = 2
_LEARNED = (Flow, Joint, NeuralPosterior, Ratio)


def save(path: str | os.PathLike[str], learned: Flow | Joint | NeuralPosterior | Ratio) -> None:
    """Write what was learned to a file, weights by name.

    Of a neural posterior the model, which is code, is not written: see ``with_model``.

    :param learned: a flow, also one from :func:`~numpyro_maf.nle`; a joint distribution over named sites;
        what :func:`~numpyro_maf.npe` or :func:`~numpyro_maf.nre` gave.
    :raises TypeError: for something else, and for a base distribution, a support or an embedding that cannot
        be described as JSON.
    """
    if not isinstance(learned, _LEARNED):
        raise TypeError(
            "save takes a Flow, a Joint, a NeuralPosterior or a Ratio, got "
            f"{type(learned).__qualname__}; of a distribution save the flow that gave it"
        )
    arrays: dict[str, Any] = {}
    structure = codec.write(learned, arrays)
    header = json.dumps({"version": _VERSION, "structure": structure}, sort_keys=True)
    save_file(arrays, path, metadata={_HEADER: header})


def load(path: str | os.PathLike[str]) -> Any:
    """Read what :func:`save` wrote to a file, of this version or an earlier one; densities are bit-equal.

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
    try:
        if header["version"] == 1:
            return migrations.from_version_1(header, arrays)
        learned = codec.read(header["structure"], arrays)
        if arrays:
            raise ValueError(f"does not fit its own structure: {', '.join(sorted(arrays))}")
        if not isinstance(learned, _LEARNED):
            raise ValueError(f"holds a {type(learned).__qualname__}, which save does not write")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return learned
