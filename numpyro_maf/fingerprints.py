# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Fingerprints of models and arguments, and what a function's code reaches.

One walk serves both. It follows values into their parts and functions into their bytecode, constants,
defaults, closures and the global names that they load, as far as the code is the user's own: installed
packages count by name. Values of global variables are kept apart from the code, because they often change
without a reason to simulate again, such as a path or a number of workers.
"""

from __future__ import annotations

import builtins
import dis
import hashlib
import inspect
import random
import sys
import sysconfig
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Walk", "first_argument_is_read", "is_random"]

GENERATORS = (np.random.Generator, np.random.RandomState, np.random.BitGenerator, random.Random)
PLAIN = (type(None), bool, int, float, complex, str, bytes, bytearray, type(...), range, slice)
PATHS = tuple({sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")})
OURS = __name__.partition(".")[0]


@dataclass
class Walk:
    """A walk through values and the code that they use.

    :param strict: whether a value that has no fingerprint is an error; else its type stands for it.
    """

    strict: bool = True
    globals: dict[str, str] = field(default_factory=dict)  # digests of global values, by name
    reached: dict[str, Any] = field(default_factory=dict)  # installed objects and generators, by name
    names: set[str] = field(default_factory=set)  # all names in the code
    seen: dict[int, tuple[Any, bytes]] = field(default_factory=dict)  # values stay alive, ids stay theirs

    def digest(self, value: Any, name: str) -> str:
        """The fingerprint of a value.

        :raises TypeError: when it holds something that has none, such as an open file, with its place.
        """
        return self._of(value, name).hex()

    def _of(self, value, path) -> bytes:
        known = self.seen.get(id(value))
        if known is not None:
            return known[1]
        self.seen[id(value)] = value, b"within %d" % len(self.seen)  # met again inside itself
        kind, parts = self._parts(value, path)
        found = hashlib.sha256(kind.encode())
        for part in parts:
            found.update(len(part).to_bytes(8, "big"))
            found.update(part)
        self.seen[id(value)] = value, found.digest()
        return found.digest()

    def _all(self, values, path) -> list[bytes]:
        return [self._of(value, f"{path}[{i}]") for i, value in enumerate(values)]

    def _parts(self, value, path) -> tuple[str, Any]:
        kind = type(value).__qualname__
        if isinstance(value, PLAIN) and type(value).__module__ == "builtins":
            return kind, [repr(value).encode()]
        if isinstance(value, jax.core.Tracer):
            if not self.strict:
                return kind, []
            raise TypeError(
                f"{path} is being traced by JAX: a store needs known values, so call outside of jit"
            )
        if isinstance(value, jax.Array):
            if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
                return f"key {jax.random.key_impl(value)}", self._parts(jax.random.key_data(value), path)[1]
            value = np.asarray(value)
        if isinstance(value, (np.ndarray, np.generic)) and not np.dtype(value.dtype).hasobject:
            about = f"{np.dtype(value.dtype).descr} {np.shape(value)}"
            return "array", [about.encode(), np.ascontiguousarray(value).tobytes()]
        if type(value) in (list, tuple):
            return kind, self._all(value, path)
        if type(value) is dict:
            pairs = value.items()
            return kind, sorted(self._of(k, path) + self._of(v, f"{path}[{k!r:.40}]") for k, v in pairs)
        if type(value) in (set, frozenset):
            return kind, sorted(self._all(value, path))
        if isinstance(value, types.CodeType):
            self.names.update(value.co_names)
            names = (*value.co_names, "", *value.co_varnames, "", *value.co_freevars)
            return kind, [value.co_code, " ".join(names).encode(), *self._all(value.co_consts, path)]
        if isinstance(value, types.FunctionType):
            return kind, self._function(value, path)
        if isinstance(value, types.MethodType):
            return kind, self._all((value.__func__, value.__self__), path)
        if isinstance(value, types.ModuleType):
            return kind, [self._note(value.__name__, value)]
        if isinstance(value, type):
            return kind, self._class(value, path)
        if isinstance(value, GENERATORS):
            return kind, [self._note(path, value), *self._refuse(value, path, "its state is not the key's")]
        return kind, self._object(value, path)

    @property
    def _lenient(self) -> Walk:
        """The same walk where a value without a fingerprint is no error."""
        return Walk(False, self.globals, self.reached, self.names, self.seen)

    def _note(self, name, value) -> bytes:
        self.reached[name] = value
        return name.encode()

    def _refuse(self, value, path, why) -> list[bytes]:
        if self.strict:
            raise TypeError(
                f"{path}, a {type(value).__qualname__}, has no fingerprint ({why}), so a store could not "
                "tell this call from another: pass numbers, texts, arrays or dataclasses of them, or leave "
                "out store"
            )
        return []

    def _object(self, value, path):
        """Any other object as copying and pickling see it: nothing of it is run."""
        if isinstance(value, jax.stages.Wrapped):  # what jax.jit made
            return [self._of(inspect.unwrap(value), path)]
        try:
            reduced = value.__reduce_ex__(4)
        except Exception as error:
            self._note(f"{type(value).__module__}.{type(value).__qualname__}", type(value))
            return self._refuse(value, path, str(error)[:100])
        if isinstance(reduced, str):
            return [self._note(f"{getattr(value, '__module__', None)}.{reduced}", value)]
        make, args, *more = reduced
        state = [list(part) if isinstance(part, Iterator) else part for part in more]
        return [self._of(type(value), path), *self._all((make, *args, *state), path)]

    def _class(self, value, path):
        if _installed(value.__module__):
            return [self._note(f"{value.__module__}.{value.__qualname__}", value)]
        own = {k: v for k, v in vars(value).items() if callable(_inside(v)) or not k.startswith("_")}
        parts = [k.encode() + self._lenient._of(_inside(v), f"{path}.{k}") for k, v in own.items()]
        return [*(self._of(base, path) for base in value.__bases__), *parts]

    def _function(self, fn, path):
        home = fn.__globals__.get("__name__", "")
        cells = dict(zip(fn.__code__.co_freevars, (_content(cell) for cell in fn.__closure__ or ())))
        if _installed(home):  # by name, but a wrapper such as jax.vmap's closes over the user's function
            inside = self._lenient._all(cells.values(), path)
            return [self._note(f"{home}.{fn.__code__.co_qualname}", fn), *inside]
        own = [
            self._of(fn.__code__, path),
            self._of(fn.__defaults__, f"the defaults of {path}"),
            self._of(fn.__kwdefaults__, f"the defaults of {path}"),
            *(self._of(v, f"the variable {k!r} that {path} closes over") for k, v in cells.items()),
        ]
        return own + [part for code in _codes(fn.__code__) for part in self._globals(fn, code)]

    def _globals(self, fn, code):
        """What the global names that a function loads stand for: code is among its parts, values are not."""
        home = fn.__globals__.get("__name__", "")
        for name, *attributes in _names(code):
            if name not in fn.__globals__:
                self._note(f"builtins.{name}", getattr(builtins, name, None))
                continue
            value, name = fn.__globals__[name], f"{home}.{name}"
            while attributes and isinstance(value, types.ModuleType) and hasattr(value, attributes[0]):
                name = f"{value.__name__}.{attributes[0]}"
                value = getattr(value, attributes.pop(0))
                if _installed(name):
                    self._note(name, value)
            if isinstance(value, (types.FunctionType, type, types.ModuleType, jax.stages.Wrapped)):
                yield self._of(value, name)
            elif name not in self.globals and not _installed(name):
                self.globals[name] = ""  # met again inside itself
                self.globals[name] = self._lenient._of(value, f"the global {name}").hex()
        for name in _imports(code):
            self._note(name, sys.modules.get(name))


def _installed(module: str) -> bool:
    """Whether a module is of Python, of an installed package or of this library, rather than the user's."""
    root = module.partition(".")[0]
    if root in (OURS, "numpyro", "jax", "builtins") or root in sys.builtin_module_names:
        return True
    file = getattr(sys.modules.get(root), "__file__", None)
    return root in sys.stdlib_module_names if file is None else str(Path(file)).startswith(PATHS)


def _inside(value):
    """The function within a property, a class method or a static method."""
    for name in ("fget", "func", "__func__"):
        value = getattr(value, name, value)
    return value


def _content(cell):
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _codes(code) -> Iterator[types.CodeType]:
    """A code object and those of the functions that it makes."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _names(code) -> Iterator[list[str]]:
    """The global names that code loads, each with the attributes that it reads of them at once."""
    chain: list[str] = []
    for step in dis.get_instructions(code):
        if chain and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            chain.append(step.argval)
            continue
        if chain:
            yield chain
        chain = [step.argval] if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") else []
    if chain:
        yield chain


def _imports(code) -> Iterator[str]:
    module = ""
    for step in dis.get_instructions(code):
        if step.opname == "IMPORT_NAME":
            module = step.argval
            yield module
        elif step.opname == "IMPORT_FROM":
            yield f"{module}.{step.argval}"


def is_random(name: str, value: Any) -> bool:
    """Whether something that a walk reached draws random numbers of NumPy or of Python."""
    if isinstance(value, GENERATORS) or isinstance(getattr(value, "__self__", None), GENERATORS):
        return True
    return name in ("random", "numpy.random") or name.startswith(("random.", "numpy.random."))


def first_argument_is_read(fn: Any) -> bool:
    """Whether the code of a function loads its first argument; True where that cannot be known."""
    fn, skipped = getattr(fn, "__wrapped__", fn), 0
    while isinstance(fn, (partial, types.MethodType)):
        skipped += len(fn.args) if isinstance(fn, partial) else 1
        fn = fn.func if isinstance(fn, partial) else fn.__func__
    code = getattr(fn, "__code__", None)
    if code is None or code.co_argcount <= skipped:
        return True
    name = code.co_varnames[skipped]
    return any(
        step.opname.startswith("LOAD") and name in np.atleast_1d(step.argval)
        for inner in _codes(code)
        for step in dis.get_instructions(inner)
    )
