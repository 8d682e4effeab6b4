# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""One codec for everything that files hold: frozen dataclasses as JSON, their arrays by path.

:func:`write` turns a value into JSON-able parts and collects its arrays under the path of each, such as
``.bijectors[0].net.weights[1]``. :func:`read` is the way back. What can be read is what is registered here by
:func:`storable`, and NumPyro's own constraints and distributions; reading runs no code from the file.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import constraints

__all__ = ["KINDS", "read", "storable", "write"]

T = TypeVar("T")
KINDS: dict[str, type] = {}  # classes by the name that files call them


def storable(cls: type[T]) -> type[T]:
    """Register a dataclass by its name. Fields with the metadata ``stored=False`` keep their defaults, and
    so do those with ``added=True`` when a file was written before there was such a field.

    A class that is no dataclass has a method ``stored``: the arguments, by name, of the constructor.
    """
    KINDS.setdefault(cls.__qualname__, cls)
    return cls


def _fields(cls) -> list[str]:
    return [f.name for f in dataclasses.fields(cls) if f.metadata.get("stored", True)]


def _different(cls, names: set[str]) -> set[str]:
    """Names of fields that a file has too many or too few."""
    added = {f.name for f in dataclasses.fields(cls) if f.metadata.get("added")}
    return (names | added) ^ set(_fields(cls))


def _parts(value) -> dict[str, Any]:
    if not dataclasses.is_dataclass(value):
        return value.stored()
    return {name: getattr(value, name) for name in _fields(type(value))}


# Writing ------------------------------------------------------------------------------------------


def write(value, arrays: dict[str, np.ndarray] | None = None, path: str = "") -> Any:
    """A value as JSON-able parts.

    :param arrays: where arrays go, by path; None to write their numbers into the JSON itself.
    :raises TypeError: for what is not storable, such as a function; the message names its path.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else {"class": "float", "value": str(value)}
    if KINDS.get(type(value).__qualname__) is type(value):
        own = {name: write(part, arrays, f"{path}.{name}") for name, part in _parts(value).items()}
        return {"class": type(value).__qualname__, **own}
    if isinstance(value, tuple):
        return [write(v, arrays, f"{path}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, list):
        return {"class": "list", "items": [write(v, arrays, f"{path}[{i}]") for i, v in enumerate(value)]}
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {"class": "dict", "items": {k: write(v, arrays, f"{path}[{k!r}]") for k, v in value.items()}}
    if isinstance(value, (np.ndarray, np.generic, jax.Array)) and not _is_key(value):
        return _write_array(value, arrays, path)
    if isinstance(value, constraints.Constraint):
        return _write_constraint(value, arrays, path)
    if isinstance(value, dist.Distribution):
        return _write_distribution(value, arrays, path)
    raise TypeError(f"{path or 'it'}: a value of type {type(value).__name__} cannot be written to a file")


def _is_key(value) -> bool:
    return jnp.issubdtype(value.dtype, jax.dtypes.extended)


def _write_array(value, arrays, path):
    about: dict[str, Any] = {"class": "array" if isinstance(value, jax.Array) else "host_array"}
    value = np.array(value, order="C")
    about |= {"dtype": str(value.dtype), "shape": list(value.shape)}
    if arrays is None:
        return {**about, "values": value.tolist()}
    arrays[path] = value
    return about


def _write_constraint(value, arrays, path):
    kind = type(value)
    if kind is constraints.independent:
        of = write(value.base_constraint, arrays, f"{path}.base_constraint")
        return {"class": "independent", "of": of, "event_dims": value.reinterpreted_batch_ndims}
    for name in constraints.__all__:
        known = getattr(constraints, name)
        if type(known) is kind:
            return {"class": "constraint", "name": name}
        if known is kind:
            given, (names, _) = value.tree_flatten()
            own = {k: write(v, arrays, f"{path}.{k}") for k, v in zip(names, given)}
            return {"class": "constraint", "name": name, "arguments": own}
    raise TypeError(f"{path or 'it'}: a support of type {kind.__name__} is none of NumPyro's own")


def _write_distribution(value, arrays, path):
    if isinstance(value, dist.Independent):
        of = write(value.base_dist, arrays, f"{path}.base_dist")
        return {"class": "to_event", "of": of, "event_dims": value.reinterpreted_batch_ndims}
    if isinstance(value, dist.ExpandedDistribution):
        of = write(value.base_dist, arrays, f"{path}.base_dist")
        return {"class": "expand", "of": of, "shape": list(value.batch_shape)}
    name = type(value).__name__
    if getattr(dist, name, None) is not type(value):
        raise TypeError(
            f"a distribution of type {name} cannot be written to a file; use NumPyro's own, with .expand and "
            ".to_event"
        )
    given = {k: jnp.asarray(v) for k, v in value.get_args().items()}
    own = {k: write(v, arrays, f"{path}.{k}") for k, v in given.items()}
    return {"class": "distribution", "name": name, "arguments": own}


# Reading ------------------------------------------------------------------------------------------


def read(value, arrays: dict[str, np.ndarray] | None = None, path: str = "") -> Any:
    """The value that :func:`write` describes. Arrays that are used are taken out of ``arrays``.

    :raises ValueError: for an unknown kind, and fields or arrays that do not fit; the message names the path.
    """
    if isinstance(value, list):
        return tuple(read(v, arrays, f"{path}[{i}]") for i, v in enumerate(value))
    if not isinstance(value, dict):
        return value
    parts = dict(value)
    kind = parts.pop("class", None)
    try:
        if kind in _READERS:
            return _READERS[kind](parts, arrays, path)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path or 'the file'} does not describe a {kind}: {error}") from error
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{path or 'the file'} holds an unknown kind {kind!r}")
    cls = KINDS[kind]
    if dataclasses.is_dataclass(cls) and (different := _different(cls, set(parts))):
        raise ValueError(f"{path or 'the file'} does not fit a {kind}: {', '.join(sorted(different))}")
    fields = {name: read(v, arrays, f"{path}.{name}") for name, v in parts.items()}
    try:
        return cls(**fields)
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path or 'the file'} does not describe a {kind}: {error}") from error


def _read_array(parts, arrays, path):
    found = _read_host_array(parts, arrays, path)
    if found.dtype == np.float64 and jnp.result_type(float) != np.float64:
        raise ValueError(f"{path} is float64: enable jax_enable_x64 to load it")
    return jnp.asarray(found)


def _read_host_array(parts, arrays, path):
    shape, dtype = tuple(parts["shape"]), np.dtype(parts["dtype"])
    if arrays is None:
        found = np.asarray(parts["values"], dtype)
    elif path not in arrays:
        raise ValueError(f"does not fit its own structure: {path}")
    else:
        found = arrays.pop(path)
    if found.shape != shape or found.dtype != dtype:
        raise ValueError(
            f"{path} has shape {found.shape} and type {found.dtype}, expected {shape} and {dtype}"
        )
    return found


def _read_constraint(parts, arrays, path):
    name = parts["name"]
    if name not in constraints.__all__:
        raise ValueError(f"unknown support {name!r}")
    known = getattr(constraints, name)
    if "arguments" not in parts:
        return known
    return known(**{k: read(v, arrays, f"{path}.{k}") for k, v in parts["arguments"].items()})


def _read_distribution(parts, arrays, path):
    kind = getattr(dist, parts["name"], None)
    if not (isinstance(kind, type) and issubclass(kind, dist.Distribution)):
        raise ValueError(f"unknown distribution {parts['name']!r}")
    return kind(**{k: read(v, arrays, f"{path}.{k}") for k, v in parts["arguments"].items()})


_READERS: dict[str, Any] = {
    "float": lambda parts, arrays, path: float(parts["value"]),
    "list": lambda parts, arrays, path: list(read(parts["items"], arrays, path)),
    "dict": lambda parts, arrays, path: {
        k: read(v, arrays, f"{path}[{k!r}]") for k, v in parts["items"].items()
    },
    "array": _read_array,
    "host_array": _read_host_array,
    "constraint": _read_constraint,
    "independent": lambda parts, arrays, path: constraints.independent(
        read(parts["of"], arrays, f"{path}.base_constraint"), parts["event_dims"]
    ),
    "distribution": _read_distribution,
    "to_event": lambda parts, arrays, path: read(parts["of"], arrays, f"{path}.base_dist").to_event(
        parts["event_dims"]
    ),
    "expand": lambda parts, arrays, path: read(parts["of"], arrays, f"{path}.base_dist").expand(
        parts["shape"]
    ),
}
