"""Registries: register a thing once, and every law of its kind runs on it.

Compilation is what tests cost. So one compiled program gives all facts of a member, and a law is an assertion
about them; arrays come from NumPy, and members are made once.
"""

import gc
import itertools
import math
import os
import pathlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jaxlib
import numpy as np
import pytest

if jaxlib.__version__.startswith("0.10."):  # later ones know no such option, and die of it
    os.environ.setdefault(
        "XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    )  # a third of the time to compile

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpyro.distributions as dist  # noqa: E402

import numpyro_maf as nm  # noqa: E402
from numpyro_maf.flows.conditionals import Mixture  # noqa: E402
from numpyro_maf.flows.linear import HeavyTails  # noqa: E402
from numpyro_maf.nn.masked import MaskedMLP  # noqa: E402

jax.config.update(
    "jax_compilation_cache_dir",
    os.environ.get("JAX_COMPILATION_CACHE_DIR")
    or str(pathlib.Path(__file__).parent.parent / ".cache" / "jax"),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
# The heap of JAX is large and lives long: a tenth of the time.
gc.freeze()
gc.set_threshold(50_000, 20, 20)
# Tests compile much and compute little: half the time. The fixture `optimized` turns it off.
jax.config.update("jax_disable_most_optimizations", True)


# Sessions ----------------------------------------------------------------------------------------

FINISHED = itertools.count(1)
MAPS = pathlib.Path("/proc/self/maps")


def pytest_runtest_teardown():
    """Each compiled function holds memory maps, of which a process may have 65,530 (vm.max_map_count)."""
    if next(FINISHED) % 20 == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > 40_000:
        jax.clear_caches()


def pytest_addoption(parser):
    parser.addoption(
        "--brief",
        action="store_true",
        help="one member of each kind, the first case of each test, and all of the files that touch versions",
    )


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--brief"):
        return
    seen, kept, left = set(), [], []
    for item in items:
        function = item.nodeid.split("[")[0]
        members = [mark.args[0] for mark in item.iter_markers("xdist_group")]
        first = function not in seen or bool(BRIEF & set(members))
        seen.add(function)
        whole = item.path.stem in ("test_files", "test_diagnostics") or "arviz" in item.name
        slow = item.get_closest_marker("slow") is not None
        (kept if whole or (first and not slow) else left).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left)


# One of each kind, and quick to compile.
BRIEF = {
    *("affine", "spline", "mixture-1", "quadratic"),
    *("masked-context", "inverse-affine", "elementwise", "coupling", "lu", "actnorm", "logit"),
    *("maf-context", "iaf-1d", "realnvp", "nis", "glow"),
}


# Members -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A constructor ``key -> object`` with the widths of its events and context."""

    make: Any
    features: int
    context: int = 0
    order: tuple[int, ...] | None = None  # of autoregressive bijectors
    kind: str = "real"  # of the numbers in an event: "real", "unit" or "circle"
    event_shape: tuple[int, ...] = ()  # of flows of images
    builder: Any = None  # of flows

    def __post_init__(self):
        if not self.event_shape:
            object.__setattr__(self, "event_shape", (self.features,))

    def __call__(self, seed=0):
        """With weights far enough from the identity for a law to bite, in the precision of the moment."""
        return made(self, seed, bool(jax.config.jax_enable_x64))

    def fresh(self, seed=0):
        """As its constructor makes it."""
        return fresh(self, seed)


@lru_cache(None)
def fresh(case, seed):
    with jax.enable_x64(False):
        return case.make(jax.random.key(seed))


@lru_cache(None)
def made(case, seed, wide):
    narrow = shaken(fresh(case, seed), seed + 1)
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a, float)), narrow) if wide else narrow


def shaken(tree, seed, size=0.3):
    """Every weight plus noise, but positive scales and fixed parts stay as they are."""
    if hasattr(tree, "with_weights"):
        return tree.with_weights(noisy(tree.weights, seed, size))
    return tree if isinstance(tree, nm.Standardize) else noisy(tree, seed, size)


def noisy(tree, seed, size):
    rng, dtype = np.random.default_rng(seed), jnp.result_type(float)
    return jax.tree.map(lambda a: jnp.asarray(a + size * rng.normal(size=np.shape(a)).astype(dtype)), tree)


def normals(seed, *shape):
    """Standard normal numbers, in the precision of the moment."""
    return np.random.default_rng(seed).normal(size=shape).astype(jnp.result_type(float))


SCALARS = {
    "affine": nm.Affine(),
    "affine-tight": nm.Affine(bound=0.5),
    "additive": nm.Additive(),
    "spline": nm.RQSpline(bins=4, bound=3.0),
    "spline-2": nm.RQSpline(bins=2, bound=1.5),
    "mixture": nm.MixtureCDF(3),
    "mixture-1": nm.MixtureCDF(1),
    "mixture-gaussian": nm.MixtureCDF(3, "gaussian"),
    "compose": nm.Compose((nm.MixtureCDF(2), nm.Affine())),
    "linear": nm.PiecewiseLinear(4),
    "quadratic": nm.PiecewiseQuadratic(4),
    "circular": nm.CircularSpline(4),
}


def inside(kind, x):
    """Any real numbers, as numbers of a kind, and off the knots of equal bins."""
    if kind == "unit":
        return 0.0123 + 0.97 / (1 + np.exp(-x))
    return np.pi * np.sin(x) * 0.999 if kind == "circle" else x


def apart(kind, a, b):
    """How far numbers are from each other, on the circle the short way."""
    difference = np.asarray(a) - np.asarray(b)
    return (difference + np.pi) % (2 * np.pi) - np.pi if kind == "circle" else difference


def autoregressive(kind, features, **options):
    return Case(
        lambda key: kind.init(key, features, **options),
        features,
        options.get("context", 0),
        options.get("order") or tuple(range(features)),
        options.get("scalar", nm.Affine()).support,
    )


def coupling(features, **options):
    kind = options.get("scalar", nm.Affine()).support
    make = lambda key: nm.Coupling.init(key, features, hidden=(6,), **options)  # noqa: E731
    return Case(make, features, options.get("context", 0), kind=kind)


def chain(key):
    masked = MAF.init(key, 3, hidden=(5,), context=2)
    return nm.Chain((masked, nm.Permute((2, 0, 1)), nm.LULinear.init(key, 3), nm.ActNorm.init(3)))


MAF, IAF = nm.MaskedAutoregressive, nm.InverseAutoregressive
BIJECTORS = {
    "masked-affine": autoregressive(MAF, 4, hidden=(7,)),
    "masked-additive": autoregressive(MAF, 3, hidden=(5, 6), scalar=nm.Additive(), order=(2, 0, 1)),
    "masked-spline": autoregressive(MAF, 3, hidden=(8,), scalar=SCALARS["spline"]),
    "masked-context": autoregressive(MAF, 3, hidden=(6, 5), context=2, order=(1, 2, 0)),
    "masked-narrow": autoregressive(MAF, 6, hidden=(3, 2), context=1),
    "masked-wide": autoregressive(MAF, 17, hidden=(24, 20), activation="tanh"),
    "masked-1d": autoregressive(MAF, 1, hidden=(3,)),
    "masked-1d-context": autoregressive(MAF, 1, hidden=(3,), context=2),
    "inverse-affine": autoregressive(IAF, 4, hidden=(7,)),
    "inverse-spline-context": autoregressive(IAF, 3, hidden=(6,), context=2, scalar=SCALARS["spline"]),
    "inverse-of-masked": Case(lambda key: nm.Inverse(MAF.init(key, 4, hidden=(7,))), 4, order=(0, 1, 2, 3)),
    "elementwise": Case(lambda key: nm.Elementwise.init(key, 3), 3),
    "elementwise-context": Case(
        lambda key: nm.Elementwise.init(key, 3, context=2, hidden=(4,), scalar=SCALARS["spline"]),
        3,
        2,
    ),
    "regression": Case(lambda key: nm.Regression.init(3, 2), 3, 2),
    "masked-direct": Case(
        lambda key: MAF(MaskedMLP.init(key, 4, 2, hidden=(5,), direct=True)), 4, order=(0, 1, 2, 3)
    ),
    "masked-mixture": autoregressive(MAF, 3, hidden=(6,), scalar=SCALARS["mixture"]),
    "masked-circular": autoregressive(MAF, 3, hidden=(6,), context=1, scalar=SCALARS["circular"]),
    "inverse-compose": autoregressive(IAF, 3, hidden=(6,), scalar=SCALARS["compose"]),
    "elementwise-mixture": Case(lambda key: nm.Elementwise.init(key, 2, scalar=SCALARS["mixture"]), 2),
    "coupling": coupling(4),
    "coupling-1d": coupling(1, context=2),
    "coupling-spline": coupling(3, context=2, moved=(0, 2), scalar=SCALARS["spline"]),
    "coupling-unit": coupling(3, scalar=SCALARS["quadratic"]),
    "coupling-circular": coupling(3, scalar=SCALARS["circular"]),
    "attention": Case(
        lambda key: nm.Chain(nm.flowpp(key, 4, context=2, transforms=1, hidden=(4,), heads=2).bijectors), 4, 2
    ),
    "image": Case(
        lambda key: nm.Chain(nm.glow(key, (2, 2, 2), transforms=1, hidden=(4,), levels=1).bijectors), 8
    ),
    "split": Case(lambda key: nm.Chain(nm.realnvp(key, (4, 4, 1), transforms=1, hidden=(3,)).bijectors), 16),
    "lu": Case(lambda key: nm.LULinear.init(key, 3), 3),
    "lu-channels": Case(lambda key: nm.LULinear.init(key, 2), 4),
    "actnorm": Case(lambda key: nm.ActNorm.init(2), 4),
    "chain": Case(chain, 3, 2),
    "part": Case(lambda key: nm.Part(nm.Coupling.init(key, 2, hidden=(4,)), (3, 1), 4), 4),
    "logit": Case(lambda key: nm.Logit(0.05), 3, kind="unit"),
    "probit": Case(lambda key: nm.Probit(), 3, kind="unit"),
    "permute": Case(lambda key: nm.Permute((2, 0, 3, 1)), 4),
    "heavy-tails": Case(
        lambda key: HeavyTails(
            jnp.array([1.0, -2.0, 0.0]), jnp.array([0.5, 3.0, 1.0]), jnp.array([1.7, 0, 0.4])
        ),
        3,
    ),
    "standardize": Case(lambda key: nm.Standardize(jnp.array([1.0, -2.0]), jnp.array([0.5, 3.0])), 2),
}


def flow(builder, features, **options):
    options = {"transforms": 2, "hidden": (8,), **options}
    shape = features if isinstance(features, tuple) else (features,)
    kind = "unit" if "logit" in options else getattr(options.get("scalar"), "support", "real")
    return Case(
        lambda key: builder(key, features, **options),
        math.prod(shape),
        options.get("context", 0),
        kind={nm.nis: "unit", nm.circular: "circle"}.get(builder, kind),
        event_shape=shape,
        builder=builder,
    )


def mog(key):
    return nm.maf(key, 2, transforms=1, hidden=(6,), base=nm.made(key, 2, columns=Mixture(3), hidden=(6,)))


unit = dist.Uniform(0.0, 1.0).expand([2]).to_event(1)
bounded = dist.Uniform(-1.0, 1.0).expand([2]).to_event(1)
# Where a member without context, or in two dimensions, has two transforms, its like has one.
FLOWS = {
    "maf": flow(nm.maf, 2),
    "maf-1d": flow(nm.maf, 1),
    "maf-context": flow(nm.maf, 2, context=2),
    "maf-relu": flow(nm.maf, 2, activation="relu", mixing="random"),
    "maf-bounded": flow(nm.maf, 2, base=bounded),
    "maf-heavy": flow(nm.maf, 2, transforms=1, base=dist.StudentT(5.0).expand([2]).to_event(1)),
    "maf-1d-context": flow(nm.maf, 1, context=1),
    "iaf": flow(nm.iaf, 2),
    "iaf-1d": flow(nm.iaf, 1),
    "iaf-context": flow(nm.iaf, 2, context=1),
    "nsf": flow(nm.nsf, 2, scalar=SCALARS["spline"]),
    "nsf-1d": flow(nm.nsf, 1, transforms=1, scalar=SCALARS["spline"]),
    "nsf-context": flow(nm.nsf, 2, transforms=1, context=2, scalar=SCALARS["spline"]),
    "nice": flow(nm.maf, 2, scalar=nm.Additive()),
    "maf-linear": flow(nm.maf, 2, mixing="linear"),
    "maf-mixture": flow(nm.maf, 2, transforms=1, scalar=SCALARS["mixture"]),
    "maf-cdf": flow(nm.maf, 2, transforms=1, scalar=SCALARS["mixture-gaussian"], base=unit),
    "maf-mog": Case(mog, 2),
    "maf-logit": flow(nm.maf, 2, transforms=1, logit=0.05),
    "nsf-coupling": flow(nm.nsf, 2, transforms=1, scalar=SCALARS["spline"], coupling=True, context=1),
    "realnvp": flow(nm.realnvp, 2),
    "realnvp-1d": flow(nm.realnvp, 1),
    "realnvp-image": flow(nm.realnvp, (2, 2, 1), hidden=(4,), context=1, logit=0.05, levels=1),
    "nice-coupling": flow(nm.nice, 2),
    "nis": flow(nm.nis, 2, scalar=SCALARS["quadratic"]),
    "nis-context": flow(nm.nis, 2, transforms=1, scalar=SCALARS["linear"], context=1),
    "glow": flow(nm.glow, 2),
    "glow-context": flow(nm.glow, 2, transforms=1, context=1),
    "flowpp": flow(nm.flowpp, 2, transforms=1, hidden=(4,), heads=2),
    "circular": flow(nm.circular, 2, scalar=SCALARS["circular"]),
    "circular-1d": flow(nm.circular, 1, transforms=1, scalar=SCALARS["circular"], context=1),
    "elementwise": flow(nm.elementwise, 2, scalar=SCALARS["spline"]),
    "elementwise-context": flow(nm.elementwise, 2, context=1, scalar=nm.Affine()),
}


def context_of(case, *shape):
    """A context for a case, or None."""
    if not case.context:
        return None
    return jnp.asarray(normals(7, *shape, case.context))


def bound(case, bijector, *shape):
    """The case's bijector with a context of that batch shape."""
    context = context_of(case, *shape)
    return bijector if context is None else bijector.bind(context)


def parametrize(name, registry, only=lambda case: True):
    """The laws of one member run together, on one worker, so that its facts are compiled once."""
    group = pytest.mark.xdist_group
    chosen = [pytest.param(case, id=key, marks=group(key)) for key, case in registry.items() if only(case)]
    return pytest.mark.parametrize(name, chosen, scope="module")


each_scalar = parametrize("scalar", SCALARS)
each_bijector = parametrize("case", BIJECTORS)
each_flow = parametrize("case", FLOWS)
each_context_flow = parametrize("case", FLOWS, lambda case: case.context > 0)
each_autoregressive = parametrize("case", BIJECTORS, lambda case: case.order is not None)


@pytest.fixture(scope="session")
def data_dir():
    """The folder of real data that NUMPYRO_MAF_DATA names; tests that need it skip without."""
    folder = os.environ.get("NUMPYRO_MAF_DATA")
    if not folder or not pathlib.Path(folder).is_dir():
        pytest.skip("set NUMPYRO_MAF_DATA to the folder of real data to run this test")
    return pathlib.Path(folder)


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def optimized():
    """XLA's optimisations, for one test."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
