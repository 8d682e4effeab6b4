"""Every bijector against its laws: autodiff's Jacobian, NumPyro's paths, JAX's transformations."""

import pickle
import re
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from conftest import (
    BIJECTORS,
    SCALARS,
    Case,
    apart,
    bound,
    context_of,
    each_autoregressive,
    each_bijector,
    inside,
    normals,
    parametrize,
    shaken,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params
from numpyro.distributions.batch_util import vmap_over
from numpyro.distributions.transforms import AffineTransform, ComposeTransform

import numpyro_maf as nm
from numpyro_maf.nn.masked import MaskedMLP

each_case_of = partial(parametrize, "case")
each_context_bijector = each_case_of(BIJECTORS, lambda case: case.context > 0)
close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
roughly = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def points(case, *shape, scale=1.5):
    return inside(case.kind, scale * normals(11, *shape, case.features))


def base_of(case):
    """A distribution with the support of the case's events."""
    ends = {"unit": (0.0, 1.0), "circle": (-np.pi, np.pi)}.get(case.kind)
    base = dist.Normal(0.0, 1.0) if ends is None else dist.Uniform(*ends)
    return base.expand((case.features,)).to_event(1)


# Facts ------------------------------------------------------------------------------------------

BOTH = "forward", "forward_log_det", "inverse", "inverse_log_det"
BATCHES = [((), (3,)), ((2, 1), (3,)), ((3,), (2, 3))]  # of events and of contexts


def batches_of(case):
    return BATCHES if case.context else [((), ())]


def first(a, *shape):
    """The first entries of an array ``(2, 3, N)`` along its axes: ``(*shape, N)``."""
    if a is None:
        return None
    a = a[:, : shape[-1]] if shape else a[0, 0]
    return a[0] if len(shape) == 1 else a


def bind(bijector, context):
    return bijector if context is None else bijector.bind(context)


def tabled(t, forward, inverse):
    """The same bijector, which knows its values at some arrays, and is asked about no others."""
    kind = type(t)

    def method(table):
        def call(self, x):
            for known, *result in table:
                if jnp.shape(x) == known.shape and np.allclose(x, known, rtol=1e-12, atol=1e-12):
                    return tuple(result)
            raise AssertionError(f"asked about an array of shape {jnp.shape(x)} that is not in the table")

        return call

    methods = {"forward_and_log_det": method(forward), "inverse_and_log_det": method(inverse)}
    children, static = t.tree_flatten()
    return type(kind.__name__, (kind,), methods).tree_unflatten(static, children)


def numpyros(t, x):
    """Pairs that are equal: what NumPyro's methods give, and the fused ones."""
    y, log_det = t.forward_and_log_det(x)
    through, intermediates = t.call_with_intermediates(x)
    scaled = ComposeTransform([t, AffineTransform(1.0, 2.0), t.inv])
    last, parts = scaled.call_with_intermediates(x)
    again, more = t.inverse_and_log_det(1 + 2 * y)
    both = log_det + x.shape[-1] * np.log(2.0) + more
    return {
        "call": (t(x), y),
        "call_with_intermediates": (through, y),
        "inverse": (t.inv(y), x),
        "inverse of inverse": (t.inv.inv.log_abs_det_jacobian(x, y, log_det), log_det),
        "log_det": (t.log_abs_det_jacobian(x, y), log_det),
        "log_det by intermediates": (t.log_abs_det_jacobian(x, y, intermediates), log_det),
        "inverse log_det": (t.inv.log_abs_det_jacobian(y, x), -log_det),
        "inverse intermediates": (t.inv.call_with_intermediates(y)[1], -log_det),
        "compose": (last, again),
        "compose log_det": (scaled.log_abs_det_jacobian(x, last), both),
        "compose intermediates": (scaled.log_abs_det_jacobian(x, last, parts), both),
    }


def distributions(base, t, shape, key):
    """The same of distributions: NumPyro's with this transform, and the fused one."""
    plain, fused = dist.TransformedDistribution(base, t), nm.FlowDistribution(base, t)
    assert plain.batch_shape == fused.batch_shape == shape
    y, intermediates = fused.sample_with_intermediates(key, (4,))
    log_prob = fused.log_prob(y)
    return {
        "sample": (y, plain.sample(key, (4,))),
        "log_prob by hand": (log_prob, base.log_prob(t.inv(y)) + t.inverse_and_log_det(y)[1]),
        "log_prob of plain": (log_prob, plain.log_prob(y)),
        "by intermediates": (log_prob, fused.log_prob(y, intermediates)),
        "plain by intermediates": (log_prob, plain.log_prob(y, intermediates)),
    }


def nothing(tree, u):
    """``g(f(u)) - u`` and the sum of both log-determinants: 0 for all weights, contexts, inputs."""
    x, forward = tree.forward_and_log_det(u)
    back, backward = tree.inverse_and_log_det(x)
    return jnp.concatenate([(back - u).ravel(), (forward + backward).ravel()])


def direction(tree, seed):
    """A random tangent of everything at once: what is 0 along it is 0 along all, almost surely."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: rng.normal(size=jnp.shape(a)), tree)


@lru_cache(None)
def program(case):
    """All facts in one compilation, of which every part stands once: it is run at many places instead.

    Of a bijector, contexts ``(2, 3, C)``, and as many events for each direction; its derivatives forwards
    along a tangent of these, and backwards from a cotangent of the four results. Of those without an order
    only the derivatives by events are asked, forwards of the one direction and backwards of the other.
    """

    def both(b, context, x, z):
        t = bind(b, context)
        return *t.forward_and_log_det(x), *t.inverse_and_log_det(z)

    @jax.jit
    def run(b, others, context, x, z, tangent, cotangent):
        at = {"itself": b, "same": b.eq(others[0])}
        if case.order is not None:
            values, push = jax.linearize(both, b, context, x, z)
            pull = jax.linear_transpose(push, b, context, x, z)
            at["pushed"], at["pulled"] = push(*tangent), pull(tuple(cotangent))
        else:
            t = bind(b, context)
            ahead, push = jax.linearize(t.forward_and_log_det, x)
            back, pull = jax.vjp(t.inverse_and_log_det, z)
            values = *ahead, *back
            at["pushed"], at["pulled"] = push(tangent[2]), (None, None, None, *pull(tuple(cotangent[2:])))
        at.update(zip(BOTH, values))
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *others)
        over = (0, None if context is None else 1, 1, 1)
        at["mapped"] = jax.vmap(both, over, 1)(stacked, context, x, z)
        if case.context or case.features == 4:
            at["batches"] = [
                both(b, first(context, *shape), first(x, *batch), first(z, *batch))
                for batch, shape in batches_of(case)
            ]
        return at

    return run


def cached_in_double(function):
    """Once for the same arguments, in double precision."""

    def call(*args, **options):
        with jax.enable_x64(True):
            return function(*args, **options)

    return lru_cache(None)(call)


@dataclass(frozen=True)
class Member:
    """A case's bijector and contexts, and its program."""

    case: Case
    seed: int = 0
    other: int = 1
    zeros: bool = False
    batches: tuple | None = None  # of events and contexts, repeated to (2, 3)

    def b(self):
        b = self.case(self.seed)
        return jax.tree.map(np.zeros_like, b) if self.zeros else b

    def context(self):
        context = context_of(self.case, 2, 3)
        return context if not self.batches else self.repeated(context, self.batches[1])

    def x(self):
        x = points(self.case, 2, 3)
        return x if not self.batches else self.repeated(x, self.batches[0])

    def repeated(self, a, shape):
        return None if a is None else np.broadcast_to(first(a, *shape), a.shape)

    def zero(self):
        """No tangent, and no cotangent."""
        where = self.b(), self.context(), self.x(), self.x()
        tangent = jax.tree.map(lambda a: np.zeros(np.shape(a)), where)
        return list(tangent), [tangent[2], np.zeros((2, 3)), tangent[2], np.zeros((2, 3))]

    def __call__(self, x, z, tangent=None, cotangent=None):
        others, none = (self.case(self.other), self.case(2), self.case(3)), self.zero()
        along = tuple(none[0] if tangent is None else tangent), none[1] if cotangent is None else cotangent
        return jax.tree.map(np.asarray, program(self.case)(self.b(), others, self.context(), x, z, *along))


@cached_in_double
def values(case, seed=0, other=1, zeros=False, batches=None):
    """Both directions at the same events."""
    member = Member(case, seed, other, zeros, batches)
    return member(member.x(), member.x())


@cached_in_double
def facts(case, zeros=False):
    """The way there and back, and both Jacobians: forwards in mode, and of the inverse in reverse."""
    member, at = Member(case, zeros=zeros), values(case, zeros=zeros)
    x, y = member.x(), at["forward"]
    there = member(x, y)
    columns, rows = [], []
    for i in range(case.features):
        tangent, cotangent = member.zero()
        tangent[2][..., i] = cotangent[2][..., i] = 1
        of = member(x, y, tangent, cotangent)
        columns.append(of["pushed"][0])
        rows.append(of["pulled"][3])
    return {
        **dict(x=x, y=y, back=there["inverse"], log_det=at["forward_log_det"]),
        **dict(inverse_log_det=there["inverse_log_det"]),
        **dict(jacobian=np.stack(columns, -1), inverse_jacobian=np.stack(rows, -2)),
    }


@cached_in_double
def numpyro_facts(case):
    """NumPyro's methods on the values of the program."""
    member, at = Member(case), facts(case)
    x, y = at["x"], at["y"]
    z = member(x, 1 + 2 * y)
    ahead = member(z["inverse"], y)
    forward = [(x, y, at["log_det"]), (z["inverse"], ahead["forward"], ahead["forward_log_det"])]
    inverse = [(y, at["back"], at["inverse_log_det"]), (1 + 2 * y, z["inverse"], z["inverse_log_det"])]
    pairs = numpyros(tabled(bind(member.b(), member.context()), forward, inverse), x)

    # Draws of the base, for one row of contexts or for none.
    base, key = base_of(case), jax.random.key(0)
    shape = (3,) if case.context else ()
    u = np.asarray(base.expand(shape).sample(key, (4,)))
    rows = [np.broadcast_to(a, x.shape) for a in u]
    ahead = [member(a, a) for a in rows]
    back = [member(a, there["forward"]) for a, there in zip(rows, ahead)]

    def of(runs, name):
        return np.stack([run[name][(0, *[0] * (not shape))] for run in runs])

    drawn = of(ahead, "forward")
    forward = [(u, drawn, of(ahead, "forward_log_det"))]
    inverse = [(drawn, of(back, "inverse"), of(back, "inverse_log_det"))]
    row = tabled(bind(member.b(), first(member.context(), 3)), forward, inverse)
    with jax.disable_jit():  # the table takes numbers, which nothing traces
        of_both = distributions(base, row, shape, key)
    return jax.tree.map(np.asarray, (pairs, of_both))


@cached_in_double
def round_trips(case):
    """Derivatives of ``g(f(u)) - u`` and of the sum of both log-determinants, all of them 0; and of ``f``.

    Along a random direction of weights, contexts and events, and back from a random one.
    """
    member, at = Member(case), facts(case)
    x, y, (along, back) = at["x"], at["y"], member.zero()
    along = list(direction(tuple(along), 1))
    back[2:] = direction(tuple(back[2:]), 2)
    along[3], back[1] = np.zeros_like(x), back[3]
    half = member(x, y, along, [np.zeros_like(x), np.zeros((2, 3)), *back[2:]])
    along[3], back[0] = half["pushed"][0], half["pulled"][3]
    whole = member(x, y, along, back)
    (_, log_det, x_again, inverse_log_det), (of_b, of_context, of_x, _) = whole["pushed"], whole["pulled"]
    alone = member(x, y, None, [np.ones_like(x), *member.zero()[1][1:]])["pulled"]
    return {
        "pushed": (x_again - along[2], log_det + inverse_log_det),
        "pulled": (of_b, of_context, of_x - back[2]),
        "alone": alone[:2],
    }


CORNERS = np.array([0.0, 1e-30, -1e-30, 1e4, -1e4, 1.0], np.float32)


@lru_cache(None)
def single(case):
    """Facts in single precision, at six points and at twelve extremes."""
    alike = np.repeat(CORNERS[:, None], case.features, 1)
    x = np.concatenate([points(case, 6), alike, np.resize(CORNERS, (6, case.features))])

    @jax.jit
    def run(b, context, x):
        def total(b, x):
            t = bind(b, context)
            at = dict(zip(BOTH, (*t.forward_and_log_det(x), *t.inverse_and_log_det(x))))
            return sum(jnp.mean(a) for a in at.values()), at

        return jax.grad(total, (0, 1), has_aux=True)(b, x)

    def facts(b, x):
        return jax.tree.map(np.asarray, run(b, context_of(case, 18), x))

    at = facts(case(), x)[1]
    there = facts(case(), at["forward"])[1]
    again = facts(case(), there["inverse"])[1]
    trips = dict(x=x, y=at["forward"], back=there["inverse"], again=again["forward"])
    trips |= dict(log_det=at["forward_log_det"], inverse_log_det=there["inverse_log_det"])
    return {name: value[:6] for name, value in trips.items()}, facts(case.fresh(), x)


# Value, log-determinant and Jacobian ------------------------------------------------------------


@each_bijector
def test_round_trip_and_log_det(case):
    at = facts(case)
    close(apart(case.kind, at["back"], at["x"]), 0)
    close(at["log_det"] + at["inverse_log_det"], 0)
    close(at["log_det"], np.linalg.slogdet(at["jacobian"])[1])
    close(at["inverse_log_det"], np.linalg.slogdet(at["inverse_jacobian"])[1])


@each_autoregressive
def test_no_dimension_sees_a_later_one(case):
    order = np.array(case.order)
    for direction in ("jacobian", "inverse_jacobian"):
        jacobian = facts(case)[direction].reshape(6, case.features, case.features)
        jacobian = jacobian[:, order[:, None], order]
        assert (np.triu(jacobian, 1) == 0).all()
        assert (np.diagonal(jacobian, axis1=1, axis2=2) > 0).all()
        assert case.features == 1 or (jacobian[:, -1, 0] != 0).all()


FIXED = nm.Permute | nm.Standardize | nm.Chain | nm.Logit | nm.Probit


@each_case_of(BIJECTORS, lambda case: not isinstance(jax.eval_shape(case.make, jax.random.key(0)), FIXED))
def test_zero_weights_are_the_identity(case):
    at = facts(case, zeros=True)
    close(apart(case.kind, at["y"], at["x"]), 0)
    close(at["log_det"], 0)


@each_bijector
def test_float32_round_trips_and_stays_float32(case):
    at, _ = single(case)
    assert all(value.dtype == np.float32 for value in at.values())
    # Where the map is flat, rounding y moves x, and where it is steep the reverse: one of them returns.
    errors = [np.abs(apart(case.kind, *pair)) for pair in [(at["back"], at["x"]), (at["again"], at["y"])]]
    np.testing.assert_allclose(np.minimum(*errors), 0, atol=2e-3)
    np.testing.assert_allclose(at["log_det"], -at["inverse_log_det"], rtol=1e-3, atol=1e-3)


def test_permute_and_standardize_known_answers():
    x = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    y, log_det = nm.Permute((2, 0, 1)).forward_and_log_det(x)
    np.testing.assert_array_equal(y, [[3, 1, 2], [6, 4, 5]])
    np.testing.assert_array_equal(log_det, [0, 0])
    scaled = nm.Standardize(jnp.array([1.0, 0.0, -1.0]), jnp.array([2.0, 1.0, 0.5]))
    y, log_det = scaled.forward_and_log_det(x)
    np.testing.assert_allclose(y, [[3, 2, 0.5], [9, 5, 2]])
    np.testing.assert_allclose(log_det, [0, 0], atol=1e-7)


# Shapes ----------------------------------------------------------------------------------------


@each_case_of(BIJECTORS, lambda case: case.context or case.features == 4)
def test_batches_of_events_and_contexts_broadcast(case):
    for actual, batches in zip(values(case)["batches"], batches_of(case), strict=True):
        rows = values(case, batches=batches)
        shape = np.broadcast_shapes(*batches)
        for name, value in zip(BOTH, actual, strict=True):
            expected = rows[name]
            width = expected.shape[2:]
            assert value.shape == shape + width
            close(np.broadcast_to(value, expected.shape), expected)
        x, b = jnp.ones((*batches[0], case.features)), bound(case, case(), *batches[1])
        assert b.forward_shape(x.shape) == b.inverse_shape(x.shape) == (*shape, case.features)


@each_bijector
def test_empty_batches(case):
    b = bound(case, case(), 0) if case.context else case()
    for function in (b.forward_and_log_det, b.inverse_and_log_det):
        y, log_det = jax.eval_shape(function, jnp.zeros((0, case.features)))
        assert (y.shape, log_det.shape) == ((0, case.features), (0,))


# NumPyro's paths --------------------------------------------------------------------------------


@each_bijector
def test_fused_and_numpyro_paths_agree(case):
    for name, (actual, expected) in numpyro_facts(case)[0].items():
        close(actual, expected, err_msg=name)


@each_bijector
def test_distributions_of_both_kinds_agree(case):
    for name, (actual, expected) in numpyro_facts(case)[1].items():
        close(actual, expected, err_msg=name)


# JAX's transformations --------------------------------------------------------------------------


equal = jax.jit(lambda a, b: a.eq(b))


@each_bijector
def test_pytree_pickle_and_equality(case):
    b, other = case(), case(3)
    leaves, structure = jax.tree.flatten(b)
    copies = [jax.tree.unflatten(structure, leaves), pickle.loads(pickle.dumps(b))]
    assert jax.tree.structure(values(case)["itself"]) == structure  # out of jit
    jax.tree.map(np.testing.assert_array_equal, values(case)["itself"], values(case, other=0)["itself"])
    assert values(case, other=0)["same"]
    assert b == copies[0] and b.inv == copies[0].inv
    for copy in copies:
        assert equal(b, copy) and equal(b.inv, copy.inv)
        assert copy.tree_flatten()[1] == b.tree_flatten()[1]
        jax.tree.map(np.testing.assert_array_equal, copy, b)
    assert all(path for path, _ in jax.tree_util.tree_flatten_with_path(b)[0])
    assert b != AffineTransform(0.0, 1.0)
    if leaves and not isinstance(b, nm.Standardize):
        assert b != other and not equal(b, other) and not values(case)["same"]


@each_bijector
def test_the_inverse_is_one_object(case):
    b = bound(case, case())
    assert b.inv is b.inv and b.inv.inv is b


@each_bijector
def test_jit_and_vmap_over_events_and_weights(case):
    for i in range(3):
        alone = values(case, seed=i + 1)
        for name, value in zip(BOTH, values(case)["mapped"], strict=True):
            close(value[:, i], alone[name][:, i])


@each_bijector
def test_members_are_made_under_vmap(case):
    stacked = jax.vmap(case.make)(jax.random.split(jax.random.key(0), 3))
    keys = jax.random.split(jax.random.key(0), 3)
    one = [case.make(key) for key in keys]
    assert jax.tree.structure(stacked) == jax.tree.structure(one[0])
    jax.tree.map(lambda leaf, *rows: roughly(leaf, np.stack(rows)), stacked, *one)


def test_vmap_over_names_fields():
    loc, scale = jnp.arange(6.0).reshape(3, 2), jnp.array([1.0, 2.0])
    b, x = nm.Standardize(loc, scale), jnp.ones(2)
    actual = jax.vmap(lambda b: b(x), in_axes=(vmap_over(b, loc=0),))(b)
    np.testing.assert_allclose(actual, loc + scale * x)


def test_vmap_over_the_context_of_a_bijector():
    case = BIJECTORS["masked-context"]
    x, t = points(case), bound(case, case(), 3)
    axes = (vmap_over(t, context=0),)
    actual = jax.vmap(lambda t: t.inverse_and_log_det(x)[1], in_axes=axes)(t)
    np.testing.assert_allclose(actual, t.inverse_and_log_det(x)[1], rtol=1e-5)


def test_weights_with_extra_axes_are_refused():
    case = BIJECTORS["masked-affine"]
    stacked = jax.vmap(case.make)(jax.random.split(jax.random.key(0), 3))
    with pytest.raises(ValueError, match="weights with extra leading axes.*vmap"):
        stacked(points(case))


# Derivatives of the sweep -----------------------------------------------------------------------


@each_autoregressive
def test_first_derivatives_of_the_round_trip_vanish(case):
    at = round_trips(case)
    for value in at["pushed"]:
        close(value, 0, atol=1e-8)
    for path, leaf in jax.tree_util.tree_flatten_with_path(at["pulled"])[0]:
        close(leaf, 0, atol=1e-8, err_msg=jax.tree_util.keystr(path))
    for path, leaf in jax.tree_util.tree_flatten_with_path(at["alone"])[0]:
        # With one dimension no unit sees an input; without context no output sees a unit either.
        dead = ["weights[0]"] if case.context else ["weights", "biases[0]"]
        if case.features > 1 or not any(d in jax.tree_util.keystr(path) for d in dead):
            assert (leaf != 0).any(), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", ["affine", "additive", "spline"])
def test_second_derivatives_of_the_round_trip_vanish(name, x64):
    make = partial(nm.MaskedAutoregressive.init, features=3, context=2, hidden=(5,))
    b = shaken(make(jax.random.key(0), scalar=SCALARS[name]), 1).bind(jnp.array([0.3, -0.7]))
    at = b, 0.5 * jax.random.normal(jax.random.key(3), (3,))
    v = direction(at, 1)

    @jax.jit
    def derivatives(*at):
        def pulled(*at):
            value, pull = jax.vjp(nothing, *at)
            return pull(direction(value, 2))

        def along(*at):
            return sum(map(jnp.vdot, jax.tree.leaves(pulled(*at)), jax.tree.leaves(v)))

        forward_over_reverse = jax.jvp(pulled, at, v)[1]
        reverse_over_reverse = jax.grad(along, (0, 1))(*at) if name == "affine" else ()
        alone = jax.jacfwd(jax.jacrev(lambda u: at[0](u).sum()))(at[1])
        return (forward_over_reverse, reverse_over_reverse), alone

    vanishing, alone = derivatives(*at)
    for path, leaf in jax.tree_util.tree_flatten_with_path(vanishing)[0]:
        close(leaf, 0, atol=1e-7, err_msg=jax.tree_util.keystr(path))
    assert (alone != 0).any()


@pytest.mark.parametrize("name", ["masked-context", "inverse-spline-context"])
def test_gradients_through_the_sweep_under_vmap(name, x64):
    case = BIJECTORS[name]
    bijector, contexts, x = case(), context_of(case, 4), points(case, 4)

    def loss(bijector, context, x):
        b = bijector.bind(context)
        return sum(jnp.sum(jnp.sin(a)) for f in (b, b.inv) for a in f.forward_and_log_det(x))

    gradient = jax.grad(loss, (0, 1, 2))
    mapped = jax.jit(jax.vmap(gradient, (None, 0, 0)))(bijector, contexts, x)
    whole = jax.jit(gradient)(bijector, contexts, x)
    close(mapped[1], whole[1])
    close(mapped[2], whole[2])
    jax.tree.map(lambda a, b: close(a.sum(0), b), mapped[0], whole[0])


def test_the_gradient_of_sampling_stores_no_trajectory(optimized):
    width, batch = 256, 256

    def loss(b, u):
        return sum(jnp.sum(a**2) for a in b.forward_and_log_det(u))

    def temporary_bytes(features):
        b = nm.MaskedAutoregressive.init(jax.random.key(0), features, hidden=(width, width))
        lowered = jax.jit(jax.grad(loss)).lower(b, jnp.zeros((batch, features)))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    narrow, wide = temporary_bytes(16), temporary_bytes(64)
    assert wide < 2 * narrow
    assert wide < 64 * batch * width * 4 / 2  # one trajectory of one layer would be twice that


# One pass --------------------------------------------------------------------------------------


def products(function, *args):
    """How many matrix products a function's jaxpr has, loops not unrolled."""

    def count(jaxpr):
        total = 0
        for equation in jaxpr.eqns:
            total += equation.primitive.name == "dot_general"
            total += sum(map(count, jaxprs_in_params(equation.params)))
        return total

    return count(jax.make_jaxpr(function)(*args).jaxpr)


@pytest.mark.parametrize("builder, method", [(nm.maf, "score"), (nm.nsf, "score"), (nm.iaf, "sample")])
@pytest.mark.parametrize("context", [0, 2])
def test_the_parallel_direction_is_one_network_pass(builder, method, context):
    hidden, transforms = (9, 8), 3
    flow = builder(jax.random.key(0), 4, context=context, hidden=hidden, transforms=transforms)
    d = flow(jnp.ones((5, context))) if context else flow()
    matrices = transforms * (len(hidden) + 1 + (context > 0))
    key, y = jax.random.key(0), jnp.ones((5, 4))
    if method == "score":
        assert products(d.log_prob, y) == matrices
    else:
        assert products(lambda key: d.sample_with_intermediates(key, (5,)), key) == matrices
        assert products(lambda key: d.sample(key, (5,)), key) == matrices
    y, intermediates = d.sample_with_intermediates(key, () if context else (5,))
    assert products(d.log_prob, y, intermediates) == 0


# Extremes and errors ----------------------------------------------------------------------------


@each_bijector
def test_extreme_inputs_stay_finite(case):
    for leaf in jax.tree.leaves(single(case)[1]):
        assert np.isfinite(leaf).all()


@each_case_of(BIJECTORS, lambda case: case.kind == "real" or case.context or case.order)
@pytest.mark.parametrize("method", ["forward_and_log_det", "inverse_and_log_det"])
def test_wrong_widths_are_errors(case, method):
    b = bound(case, case())
    for shape in [(case.features + 1,), (3, case.features + 1), ()]:
        message = rf"expects events with last axis .*{re.escape(str(shape))}"
        with pytest.raises(ValueError, match=message):
            getattr(b, method)(jnp.ones(shape))


@each_context_bijector
def test_missing_and_wrong_contexts_are_errors(case):
    x = points(case)
    with pytest.raises(ValueError, match=f"context of width {case.context}, got none"):
        case()(x)
    for shape in [(case.context + 1,), (2, case.context + 1)]:
        with pytest.raises(ValueError, match=f"context.*{case.context}.*{re.escape(str(shape))}"):
            case().bind(jnp.ones(shape))(x)


@pytest.mark.parametrize("name", ["masked-affine", "inverse-affine", "elementwise"])
def test_unexpected_context_is_an_error(name):
    case = BIJECTORS[name]
    with pytest.raises(ValueError, match=r"context.*\(2,\)"):
        case().bind(jnp.ones(2))(points(case))


@pytest.mark.parametrize("order", [(0, 1), (0, 1, 1), (1, 2, 3), (0, 1, 2, 3)])
def test_orders_must_be_permutations(order):
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="order must hold each of 0..2 once, got"):
        nm.MaskedAutoregressive.init(key, 3, order=order)
    if order != (0, 1) and order != (0, 1, 2, 3):
        with pytest.raises(ValueError, match="order must hold each of"):
            nm.Permute(order)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(hidden=()), "hidden must name one or more widths"),
        (dict(hidden=(3, 0)), r"hidden .* at least 1, got \(3, 0\)"),
        (dict(hidden=(3,), activation="sine"), "unknown activation 'sine', expected one of"),
    ],
)
def test_networks_check_their_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        MaskedMLP.init(jax.random.key(0), 3, 2, **options)


# The sweep at any width -------------------------------------------------------------------------


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    features=st.integers(1, 40),
    hidden=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    context=st.integers(0, 2),
    seed=st.integers(0, 9),
)
def test_sweep_inverts_networks_of_any_width(features, hidden, context, seed):
    order = tuple(np.random.default_rng(seed).permutation(features).tolist())
    options = dict(context=context, hidden=hidden, order=order)

    @jax.jit
    def round_trip(b, u):
        x, log_det = b.forward_and_log_det(u)
        back, back_log_det = b.inverse_and_log_det(x)
        return back - u, log_det + back_log_det, jnp.abs(x - u).max()

    with jax.enable_x64(True):
        b = nm.MaskedAutoregressive.init(jax.random.key(seed), features, **options)
        b = shaken(b, seed, 0.1)
        b = b.bind(jnp.linspace(-1, 1, 3 * context).reshape(3, context)) if context else b
        case = Case(None, features)
        *vanishing, change = round_trip(b, points(case, 3))
        assert change > 1e-3
        for leaf in jax.tree.leaves(vanishing):
            close(leaf, 0, atol=1e-6)


@pytest.mark.parametrize("features, width", [(40, 1), (40, 13), (9, 9), (3, 60)])
def test_every_hidden_unit_is_of_use(features, width):
    """A unit that sees no input, or that no output sees, would be dead weight."""
    net = MaskedMLP.init(jax.random.key(0), features, 2, hidden=(width, width))
    first, hidden, last, _ = net.masks
    assert first.any((1, 2)).all() and hidden.any(1).all() and last.any(0).all()
    assert hidden.any(0).all()


def test_bijectors_are_frozen():
    b = BIJECTORS["masked-affine"]()
    with pytest.raises(AttributeError):
        b.context = jnp.ones(2)
    assert replace(b, order=(3, 2, 1, 0)).order == (3, 2, 1, 0)
