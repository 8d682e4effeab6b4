# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""What users hand in, as arrays of real numbers. Every entrance for data goes through here."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["as_labels", "as_numbers", "by_site", "check_finite", "checked_rows", "nearest", "rows_by_site"]

# What to do instead, by NumPy's kind of the data.
_REMEDIES = {
    "c": "complex numbers; give real and imaginary parts as numbers of their own: "
    "np.stack([{0}.real, {0}.imag], -1)",
    "U": "text; convert it to numbers first",
    "S": "text; convert it to numbers first",
    "T": "text; convert it to numbers first",
    "M": "dates; subtract an origin and divide by a unit: ({0} - {0}.min()) / np.timedelta64(1, 's')",
    "m": "time differences; divide by a unit: {0} / np.timedelta64(1, 's')",
    "O": "Python objects; convert them to numbers first: np.asarray({0}, float)",
    "V": "records; give an array of numbers, with a column for each field",
}


def as_numbers(name: str, value: Any, *, missing: bool = False) -> Any:
    """Real numbers as an array: JAX's own as they are, tracers too, and anything else as NumPy's.

    Lists, pandas and polars frames, xarray's arrays, tensors and masked arrays become arrays; numbers that
    they mark as missing become NaN, never what lies under the mask.

    :param name: of the argument, for the message.
    :param missing: whether numbers may be missing from a masked array.
    :raises TypeError: for complex numbers, text, dates, objects and anything else that is no array of
        numbers; the message says what to do.
    :raises ValueError: for rows of unequal length, and for masked numbers unless they may be missing.
    """
    if isinstance(value, jax.Array):
        if not _is_real(value.dtype):
            raise _refusal(name, value.dtype, value)
        return value.astype(jnp.float32) if value.dtype.itemsize == 2 and _is_float(value.dtype) else value
    if isinstance(value, np.ma.MaskedArray) and _is_real(value.dtype):
        count = int(np.ma.count_masked(value))
        if count and not missing:
            raise ValueError(
                f"{name} is a masked array in which {count} numbers are missing; leave out those rows"
            )
        if not count:
            return np.asarray(value.data)
        return np.ma.filled(value.astype(np.result_type(value.dtype, np.float32)), np.nan)
    a = _array(name, value)
    if not _is_real(a.dtype):
        raise _refusal(name, a.dtype, value)
    if _is_float(a.dtype) and a.dtype.itemsize not in (
        4,
        8,
    ):  # JAX knows longer ones not at all, half ones in part
        return a.astype(np.float32 if a.dtype.itemsize < 4 else np.float64)
    return a if a.dtype.isnative else a.astype(a.dtype.newbyteorder("="))


def as_labels(name: str, value: Any, count: int, *, least: int = 0, shape: Any = None) -> np.ndarray:
    """Whole numbers ``least, …, count - 1`` as integers.

    :param shape: the one that is expected; None for any.
    :raises ValueError: for other numbers, or another shape.
    """
    a = np.asarray(as_numbers(name, value))
    if shape is not None and a.shape != tuple(shape):
        raise ValueError(f"{name} must be {tuple(shape)}, got {a.shape}")
    wrong = ~((a == np.round(a)) & (least <= a) & (a < count)) if a.size else np.zeros(a.shape, bool)
    if wrong.any():
        raise ValueError(f"{name} must be whole numbers in {least}, ..., {count - 1}, got {a[wrong][0]}")
    return a.astype(int)


def checked_rows(name: str, value, shape: tuple[int, ...], n: int | None = None) -> np.ndarray:
    """An array of rows of this shape.

    :param name: of the argument, for the message.
    :param n: how many rows; None for any number.
    :raises TypeError: for anything but real numbers, see :func:`as_numbers`.
    :raises ValueError: for another shape, masked values, and numbers that are not finite.
    """
    value = np.asarray(as_numbers(name, value))
    if value.ndim != 1 + len(shape):
        raise ValueError(f"{name} must have {1 + len(shape)} axes, got shape {value.shape}")
    n = len(value) if n is None else n
    if value.shape != (n, *shape):
        raise ValueError(f"{name} must be {(n, *shape)}, got {value.shape}")
    if not n:
        raise ValueError(f"{name} has no rows, got shape {value.shape}")
    finite = np.isfinite(value)
    if not finite.all():
        rows = np.flatnonzero(~finite.reshape(n, -1).all(1))
        raise ValueError(f"{name} is not finite in {len(rows)} rows, the first is {rows[0]}")
    return value


def check_finite(name: str, a: Any) -> Any:
    """The same array.

    :raises ValueError: for numbers that are not finite; the message says how many and where the first is.
    """
    if isinstance(a, jax.core.Tracer):  # whose numbers cannot be looked at
        return a
    wrong = ~np.isfinite(np.asarray(a))
    if wrong.any():
        where = f" at {tuple(map(int, np.argwhere(wrong)[0]))}" if wrong.ndim else ""
        raise ValueError(
            f"{name} is not finite: {int(wrong.sum())} of {wrong.size} numbers, the first{where}"
        )
    return a


def by_site(name: str, values: Any, wanted: Collection[str] = (), *, missing: bool = False) -> dict[str, Any]:
    """Arrays by site from a dictionary of anything that :func:`as_numbers` takes.

    :param wanted: names that must be there.
    :raises TypeError: for anything but a mapping of names.
    :raises ValueError: for a name that is not there; the message names the nearest.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"{name} must be a dictionary of arrays by site, got {type(values).__name__}")
    for site in wanted:
        if site not in values:
            raise ValueError(f"{name} lacks the site {site!r}{nearest(site, values)}")
    return {k: as_numbers(f"{name}[{k!r}]", v, missing=missing) for k, v in values.items()}


def rows_by_site(
    name: str, values: Any, wanted: Collection[str] = (), what: str = "rows"
) -> dict[str, np.ndarray]:
    """As :func:`by_site`, of NumPy arrays with equally many rows; numbers that are masked become NaN.

    :param wanted: the only names that count; none for all. ``what``: a word for the rows.
    :raises ValueError: for sites with unequal numbers of rows as well.
    """
    if isinstance(values, Mapping) and set(wanted) <= set(values):
        values = {k: v for k, v in values.items() if not wanted or k in wanted}
    arrays = {k: np.asarray(a) for k, a in by_site(name, values, wanted, missing=True).items()}
    if len({a.shape[:1] for a in arrays.values()}) != 1 or not all(a.ndim for a in arrays.values()):
        shapes = {k: a.shape for k, a in arrays.items()}
        raise ValueError(
            f"{name} must have as many {what} at each site as at the others, got shapes {shapes}"
        )
    return arrays


def nearest(name: str, names: Collection[str]) -> str:
    """``"; did you mean ...?"`` for a name that is none of some, or what there is."""
    close = difflib.get_close_matches(str(name), [str(n) for n in names], 1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {sorted(map(str, names))}"


def _is_float(dtype) -> bool:
    return getattr(dtype, "kind", "V") == "f" or jnp.issubdtype(dtype, jnp.floating)


def _is_real(dtype) -> bool:
    return getattr(dtype, "kind", "V") in "biu" or _is_float(dtype)


def _refusal(name: str, dtype: Any, value: Any) -> TypeError:
    remedy = _REMEDIES.get(getattr(dtype, "kind", "V"), f"{dtype}; give an array of numbers")
    plain = isinstance(value, (list, tuple)) or hasattr(value, "dtype")
    kind = "" if plain else f" is a {type(value).__name__} and"
    return TypeError(f"{name}{kind} holds {remedy.format(name)}")


def _array(name: str, value: Any) -> np.ndarray:
    """A NumPy array, of whatever kind."""
    if hasattr(value, "detach"):  # torch's, which may be part of a graph or on another device
        value = value.detach().cpu()
    if hasattr(value, "isna") and hasattr(value, "to_numpy"):
        return _pandas(name, value)
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} is no array: its rows have unequal lengths ({error})") from error


def _pandas(name: str, value: Any) -> np.ndarray:
    """Of a series, or of a frame column by column, since its types may know missing numbers."""
    if value.ndim == 2:
        types = set(value.dtypes)
        if not types or (len(types) == 1 and isinstance(types.pop(), np.dtype)):
            return np.asarray(value)
        columns = value.columns
        return np.stack(
            [as_numbers(f"{name}[{column!r}]", value.iloc[:, i]) for i, column in enumerate(columns)], -1
        )
    numbers = getattr(value.dtype, "kind", "O") in "biuf" and not isinstance(value.dtype, np.dtype)
    if numbers and value.isna().any():
        return value.to_numpy(dtype=float, na_value=np.nan)
    return value.to_numpy(dtype=getattr(value.dtype, "numpy_dtype", None)) if numbers else np.asarray(value)
