# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Whether tracing a simulator once may stand for calling it for each row.

JAX traces a function and then repeats what it did with arrays. Whatever else the function did, such as
drawing from NumPy's generator, formatting a parameter into a command or counting its calls, happens once, and
all rows share it. A function is fit for tracing if two traces are the same program, no generator moved
meanwhile, no traced number became a text or a Python number, and the key reaches the result through the
program.
"""

from __future__ import annotations

import inspect
import random
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from numpyro_maf.fingerprints import GENERATORS, Walk, is_random

__all__ = ["fit_for_tracing", "name_of"]

# What turns a tracer to a text or a Python number, by the code of the method.
CONVERSIONS = {
    getattr(jax.core.Tracer, name).__code__: what
    for names, what in [
        (("__repr__",), "text"),
        (("__float__", "__int__", "__complex__", "__array__", "tolist"), "Python number"),
    ]
    for name in names
    if hasattr(getattr(jax.core.Tracer, name, None), "__code__")
}
LIBRARIES = (
    "jax",
    "jaxlib",
    "numpy",
    "numpyro",
    "numpyro_maf",
    "equinox",
    "diffrax",
    "jaxtyping",
    "flax",
    "optax",
)
DRAWS = ("random_bits", "rng_bit_generator", "rng_uniform", "random_gamma", "threefry2x32")
KEY, FIXED = "key", "fixed"
_judged: weakref.WeakKeyDictionary[Any, dict[Any, bool]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def name_of(fn: Any) -> str:
    """How messages name a simulator."""
    return repr(getattr(fn, "__name__", fn))


def fit_for_tracing(fn: Callable[..., Any], key: Any, params: Any) -> bool:
    """Whether a simulator may run on the device; if not, it runs on the host, call by call.

    A function that JAX can trace but that is not fit for it raises a warning, once, which says why.

    :raises ValueError: when its random numbers are the same whatever its key is.
    """
    key, *params = (jax.ShapeDtypeStruct(jnp.shape(p), p.dtype) for p in (key, *params))
    shapes = tuple((p.shape, p.dtype) for p in params)
    with _lock:
        try:
            known = _judged.setdefault(fn, {})
        except TypeError:  # cannot be hashed or referred to weakly
            known = {}
    if shapes not in known:
        known[shapes] = _judge(fn, key, params)
    return known[shapes]


def _judge(fn, key, params) -> bool:
    walk = Walk(strict=False)
    walk.digest(fn, name_of(fn))
    draws = sorted(name for name, value in walk.reached.items() if is_random(name, value))
    generators = [value for value in walk.reached.values() if isinstance(value, GENERATORS)]
    seen: set[str] = set()
    before = _states(generators)
    try:
        first = _traced(fn, key, params, seen)
        others = [_traced(fn, key, params) for _ in range(5 if draws else 1)]  # counts agree by chance
    except Exception:  # whatever it is, running it on the host says it better
        return False
    same = all(_same(list(_constants(first)), list(_constants(other))) for other in others)
    reasons = [f"it turned a traced parameter into a {what}" for what in sorted(seen)]
    if draws and _states(generators) != before:
        reasons.append(f"it drew random numbers from elsewhere than its key ({draws[-1]})")
    elif not same:
        reasons.append(
            "two traces of it differ, so its results come from elsewhere than its key and parameters"
        )
    if reasons:
        warnings.warn(
            f"the simulator {name_of(fn)} runs on the host, call by call, because {' and '.join(reasons)}. "
            "Say Simulator(..., host=True) if that is what it needs, or host=False if it is a function of "
            "JAX all the same; its random numbers must come from its key",
            stacklevel=2,
        )
        return False
    labels = _labels(first)
    advice = "Draw from the key that it is given, or say Simulator(..., host=False) if this is meant"
    if KEY not in labels and (FIXED in labels or draws):
        source = "a key fixed in its code" if FIXED in labels else draws[-1]
        raise ValueError(
            f"the simulator {name_of(fn)} does not use its key: its random numbers come from {source}, and "
            f"all rows would have the same. {advice}"
        )
    if KEY not in labels and any(name in DRAWS for name, _ in _constants(first)):
        warnings.warn(
            f"the simulator {name_of(fn)} draws random numbers from its key that do not reach its result: it "
            f"is deterministic. {advice}",
            stacklevel=2,
        )
    elif FIXED in labels:
        warnings.warn(
            f"some random numbers of the simulator {name_of(fn)} come from a key fixed in its code: they are "
            f"the same in all rows. {advice}",
            stacklevel=2,
        )
    return True


def _traced(fn, key, params, seen=None):
    """The program of a function, traced anew; ``seen`` collects what its tracers were turned into."""
    # Of a function under jit JAX keeps the trace: the function itself is traced, so that it runs again.
    inner = inspect.unwrap(fn) if isinstance(fn, jax.stages.Wrapped) else fn

    def watch(frame, event, _):
        what = CONVERSIONS.get(frame.f_code) if event == "call" else None
        if what is not None and frame.f_back is not None:
            caller = str(frame.f_back.f_globals.get("__name__"))
            if caller.partition(".")[0] not in LIBRARIES:
                seen.add(what)

    watching = seen is not None and sys.getprofile() is None  # another profiler keeps its place
    if watching:
        sys.setprofile(watch)
    try:
        return jax.make_jaxpr(lambda *args: inner(*args))(key, *params)
    finally:
        if watching:
            sys.setprofile(None)


def _states(generators) -> list[str]:
    """Where the global generators and others that a function reaches stand."""
    states: list[Any] = [random.getstate(), np.random.get_state()]  # noqa: NPY002
    for generator in generators:
        if isinstance(generator, random.Random):
            states.append(generator.getstate())
        elif isinstance(generator, np.random.RandomState):
            states.append(generator.get_state())
        else:
            states.append(getattr(generator, "bit_generator", generator).state)
    with np.printoptions(threshold=sys.maxsize):
        return [repr(state) for state in states]


def _inner(equation) -> list[Any]:
    """The programs within an operation."""
    found: list[Any] = []
    for value in equation.params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, jax.extend.core.ClosedJaxpr):
                found.append(part)
            elif isinstance(part, jax.extend.core.Jaxpr):
                found.append(jax.extend.core.ClosedJaxpr(part, ()))
    return found


def _constants(program) -> Iterator[tuple[str, Any]]:
    """A program's operations, each with the numbers that are fixed in it."""
    yield "constants", list(program.consts)
    for equation in program.jaxpr.eqns:
        fixed = [v.val for v in equation.invars if isinstance(v, jax.extend.core.Literal)]
        yield equation.primitive.name, fixed
        for inner in _inner(equation):
            yield from _constants(inner)
    yield "results", [v.val for v in program.jaxpr.outvars if isinstance(v, jax.extend.core.Literal)]


def _same(first, second) -> bool:
    if [(name, len(fixed)) for name, fixed in first] != [(name, len(fixed)) for name, fixed in second]:
        return False
    pairs = [(a, b) for (_, x), (_, y) in zip(first, second) for a, b in zip(x, y)]
    return all(a is b or np.array_equal(_bits(a), _bits(b)) for a, b in pairs)


def _bits(value):
    if isinstance(value, jax.core.Tracer):  # of an outer program
        return np.array(id(value))
    typed = isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    value = np.ascontiguousarray(jax.random.key_data(value) if typed else value)
    return np.frombuffer(value.tobytes(), np.uint8)


def _labels(program) -> set[str]:
    """What reaches a program's results: its key, its first argument, and draws from other keys."""
    arguments = [{KEY}, *(set() for _ in program.jaxpr.invars[1:])]
    return set().union(*_flow(program, arguments))


def _flow(program, arguments) -> list[set[str]]:
    """Labels of a program's results, from those of its arguments."""
    known: dict[Any, set[str]] = dict(zip(program.jaxpr.invars, arguments))

    def of(variable):
        return set() if isinstance(variable, jax.extend.core.Literal) else known.get(variable, set())

    for equation in program.jaxpr.eqns:
        inputs = [of(v) for v in equation.invars]
        known.update(zip(equation.outvars, _outputs(equation, inputs)))
    return [of(v) for v in program.jaxpr.outvars]


def _outputs(equation, inputs) -> list[set[str]]:
    """Labels of an operation's results. A loop is followed until nothing new comes."""
    name, params, inner = equation.primitive.name, equation.params, _inner(equation)
    everything: set[str] = set().union(*inputs)
    draws = name in DRAWS or any(op in DRAWS for program in inner for op, _ in _constants(program))
    if draws and KEY not in everything:
        everything = everything | {FIXED}
    if name == "cond":
        branches = [_flow(branch, inputs[1:]) for branch in inner]
        return [set().union(inputs[0], *labels) for labels in zip(*branches)]
    if name == "while":
        tests, bodies = params["cond_nconsts"], params["body_nconsts"]
        outer, fixed, carry = inputs[:tests], inputs[tests : tests + bodies], inputs[tests + bodies :]
        for _ in carry:
            runs = set().union(*_flow(params["cond_jaxpr"], outer + carry))
            step = _flow(params["body_jaxpr"], fixed + carry)
            carry = [old | new | runs for old, new in zip(carry, step)]
        return carry
    if (
        name == "scan" and "num_carry" in params
    ):  # jax 0.12 gives no such number: there each result has all labels
        first, count = params["num_consts"], params["num_carry"]
        for _ in range(count):
            step = _flow(inner[0], inputs)[:count]
            middle = [old | new for old, new in zip(inputs[first : first + count], step)]
            inputs = inputs[:first] + middle + inputs[first + count :]
        found = _flow(inner[0], inputs)
        return [old | new for old, new in zip(inputs[first : first + count], found)] + found[count:]
    if name != "scan" and len(inner) == 1 and len(inner[0].jaxpr.invars) == len(inputs):
        return _flow(inner[0], inputs)
    return [everything for _ in equation.outvars]
