# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Bijectors: NumPyro transforms whose value and log-determinant come from one pass.

A :class:`Bijector` maps vectors to vectors, ``features`` wide on the last axis, every leading axis
being batch. Two methods are abstract, one for each direction, and both return the log-determinant
with the value. Everything that NumPyro asks of a ``Transform`` follows from these two, so that a
bijector serves in ``TransformedDistribution``, ``ComposeTransform`` and ``TransformReparam`` as it is.

Subclasses are frozen dataclasses and pytrees: a field is either a leaf (arrays, or pytrees of
them) or :func:`static` (hashable configuration, compared with ``==``). A class is abstract or final.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import ndtr, ndtri
from jax.scipy.stats import norm
from jax.tree_util import GetAttrKey, register_pytree_with_keys
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform
from numpyro.distributions.util import array_equiv

__all__ = [
    "ActNorm", "Bijector", "Chain", "Each", "Inverse", "Logit", "LULinear", "Part", "Permute", "Probit",
    "Regression", "Reshape", "Standardize",
]  # fmt: skip

# Supports of events by the support of their numbers: singletons, as NumPyro compares them by identity.
EVENTS: dict[str, Any] = {
    "real": constraints.real_vector,
    "unit": constraints.independent(constraints.unit_interval, 1),
    "circle": constraints.independent(constraints.circular, 1),
}


@lru_cache(maxsize=64)
def _box(alpha: float):
    """What :class:`Logit` maps to the reals: the unit box, or a little more."""
    return constraints.independent(constraints.interval(*_ends(alpha)), 1) if alpha else EVENTS["unit"]


def _each(support):
    """Vectors of numbers with a support, the same object for the same singleton."""
    return _POSITIVE if support is constraints.positive else constraints.independent(support, 1)


_POSITIVE = constraints.independent(constraints.positive, 1)


def _ends(alpha: float) -> tuple[float, float]:
    margin = alpha / (1 - 2 * alpha)
    return -margin, 1 + margin


@lru_cache(maxsize=64)
def _shaped(kind: str, alpha: float, ndim: int):
    """The support of events with more axes."""
    vectors = _box(alpha) if kind == "box" else EVENTS[kind]
    return constraints.independent(vectors.base_constraint, ndim)


def static(**kwargs) -> Any:
    """A dataclass field that is configuration: hashable, never traced, never trained."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


class Bijector(Transform):
    """A bijection of real vectors with its log-determinant (abstract).

    Subclasses give :meth:`forward_and_log_det` and :meth:`inverse_and_log_det`. ``parallel`` says
    which of the two is one network pass; NumPyro's ``log_abs_det_jacobian(x, y)`` uses that one.
    """

    domain: Any = EVENTS["real"]
    codomain: Any = EVENTS["real"]
    parallel: Any = "forward"

    def __init_subclass__(cls, **kwargs):
        # Transform would register the class as a pytree without names for its leaves; ours have
        # them, for files and for error messages. So its hook is passed over, not repeated.
        super(Transform, cls).__init_subclass__(**kwargs)
        register_pytree_with_keys(
            cls, lambda self: self._flatten_with_keys(), cls.tree_unflatten, cls.tree_flatten
        )

    # Two directions ------------------------------------------------------------------------

    def forward_and_log_det(self, x):
        """``(..., D) -> (..., D), (...)``: the value and ``log |det dy/dx|``."""
        raise NotImplementedError

    def inverse_and_log_det(self, y):
        """``(..., D) -> (..., D), (...)``: the preimage and ``log |det dx/dy|``."""
        raise NotImplementedError

    # What flows ask for ---------------------------------------------------------------------------

    def bind(self, context) -> Bijector:
        """The same bijector given a context ``(..., C)``: itself, unless it has a use for one."""
        return self

    def randomized(self, key) -> Bijector:
        """The same bijector with its random choices, if it makes any in training, made anew."""
        return self

    def initialized(self, y, context=None) -> Bijector:
        """The same bijector with data-dependent parameters set from outputs ``(N, D)``."""
        return self

    def inputs_of(self, known: frozenset[int]) -> frozenset[int] | None:
        """The inputs that these outputs determine, and are determined by, alone; None where others matter."""
        return None

    # What NumPyro asks for, from these -------------------------------------------------------

    def __call__(self, x):
        return self.forward_and_log_det(x)[0]

    def _inverse(self, y):
        return self.inverse_and_log_det(y)[0]

    @property
    def inv(self) -> Bijector:
        return Inverse(self)

    def call_with_intermediates(self, x):
        return self.forward_and_log_det(x)

    def log_abs_det_jacobian(self, x, y, intermediates=None):
        if intermediates is not None:
            return intermediates
        if self.parallel == "forward":
            return self.forward_and_log_det(x)[1]
        return -self.inverse_and_log_det(y)[1]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The batch shape that parameters or context bring along, ``()`` by default."""
        return ()

    def forward_shape(self, shape):
        return jnp.broadcast_shapes(shape[:-1], self.batch_shape) + shape[-1:]

    inverse_shape = forward_shape

    # Pytree -----------------------------------------------------------------------------------

    def tree_flatten(self):
        names, aux = [], {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            if field.metadata.get("static"):
                aux[field.name] = getattr(self, field.name)
            else:
                names.append(field.name)
        return tuple(getattr(self, name) for name in names), (tuple(names), aux)

    def _flatten_with_keys(self):
        children, (names, aux) = self.tree_flatten()
        keyed = tuple((GetAttrKey(name), child) for name, child in zip(names, children))
        return keyed, (names, aux)

    @classmethod
    def tree_unflatten(cls, aux_data, params):
        self = cls.__new__(cls)
        names, aux = aux_data
        for name, value in (*zip(names, params), *aux.items()):
            object.__setattr__(self, name, value)
        return self

    def eq(self, other, static=False):
        if type(self) is not type(other):
            return False
        leaves, structure = jax.tree.flatten(self)
        others, other_structure = jax.tree.flatten(other)
        if structure != other_structure:  # type: ignore[operator]  # the stubs do not know it
            return False
        equal = [array_equiv(a, b, static=static) for a, b in zip(leaves, others)]
        return all(equal) if static else jnp.all(jnp.array([True, *equal]))


@dataclass(frozen=True, eq=False)
class Inverse(Bijector):
    """A bijector run the other way; log-determinants and intermediates are kept."""

    bijector: Bijector

    @property
    def parallel(self):  # type: ignore[override]
        return "inverse" if self.bijector.parallel == "forward" else "forward"

    @property
    def inv(self):
        return self.bijector

    @property
    def batch_shape(self):
        return self.bijector.batch_shape

    @property
    def domain(self):
        return self.bijector.codomain

    @property
    def codomain(self):
        return self.bijector.domain

    def bind(self, context):
        return Inverse(self.bijector.bind(context))

    def randomized(self, key):
        return Inverse(self.bijector.randomized(key))

    def inputs_of(self, known):
        # Triangular maps have triangular inverses; permutations know their own.
        if isinstance(self.bijector, Permute):
            return Permute(tuple(np.argsort(self.bijector.order))).inputs_of(known)
        return self.bijector.inputs_of(known)

    def forward_and_log_det(self, x):
        return self.bijector.inverse_and_log_det(x)

    def inverse_and_log_det(self, y):
        return self.bijector.forward_and_log_det(y)


@dataclass(frozen=True, eq=False)
class Chain(Bijector):
    """Bijectors one after the other.

    :param bijectors: a tuple, in the order in which ``forward_and_log_det`` applies them.
    """

    bijectors: tuple[Bijector, ...]

    @property
    def domain(self):
        return self.bijectors[0].domain

    @property
    def codomain(self):
        return self.bijectors[-1].codomain

    @property
    def parallel(self):  # type: ignore[override]
        return "inverse" if any(b.parallel == "inverse" for b in self.bijectors) else "forward"

    @property
    def batch_shape(self):
        return jnp.broadcast_shapes(*(b.batch_shape for b in self.bijectors))

    def bind(self, context):
        return Chain(tuple(b.bind(context) for b in self.bijectors))

    def randomized(self, key):
        keys = jax.random.split(key, len(self.bijectors))
        return Chain(tuple(b.randomized(k) for b, k in zip(self.bijectors, keys)))

    def initialized(self, y, context=None):
        done = []
        for bijector in self.bijectors[::-1]:
            done.append(bijector.initialized(y, context))
            y = done[-1].bind(context)._inverse(y)
        return Chain(tuple(done[::-1]))

    def inputs_of(self, known):
        for bijector in self.bijectors[::-1]:
            if known is None:
                return None
            known = bijector.inputs_of(known)
        return known

    def forward_and_log_det(self, x):
        total = zeros_of(x)
        for bijector in self.bijectors:
            x, log_det = bijector.forward_and_log_det(x)
            total = total + log_det
        return x, total

    def inverse_and_log_det(self, y):
        total = zeros_of(y)
        for bijector in self.bijectors[::-1]:
            y, log_det = bijector.inverse_and_log_det(y)
            total = total + log_det
        return y, total


@dataclass(frozen=True, eq=False)
class Part(Bijector):
    """A bijector of some of the features; the others pass.

    :param bijector: of events ``len(indices)`` wide.
    :param indices: the features it is given, in this order.
    :param features: D, the width of the event.
    """

    bijector: Bijector
    indices: tuple[int, ...] = static()
    features: int = static()

    @property
    def parallel(self):  # type: ignore[override]
        return self.bijector.parallel

    @property
    def batch_shape(self):
        return self.bijector.batch_shape

    def bind(self, context):
        return Part(self.bijector.bind(context), self.indices, self.features)

    def randomized(self, key):
        return Part(self.bijector.randomized(key), self.indices, self.features)

    def initialized(self, y, context=None):
        part = self.bijector.initialized(y[..., np.array(self.indices)], context)
        return Part(part, self.indices, self.features)

    def inputs_of(self, known):
        inner = frozenset(i for i, at in enumerate(self.indices) if at in known)
        if len(inner) not in (0, len(self.indices)):
            mapped = self.bijector.inputs_of(inner)
            if mapped is None:
                return None
            inner = mapped
        return (known - set(self.indices)) | {self.indices[i] for i in inner}

    def forward_and_log_det(self, x):
        return self._apply(self.bijector.forward_and_log_det, x)

    def inverse_and_log_det(self, y):
        return self._apply(self.bijector.inverse_and_log_det, y)

    def _apply(self, function, x):
        check_width(x, self.features, "Part")
        x = jnp.broadcast_to(x, self.forward_shape(jnp.shape(x)))
        at = np.array(self.indices)
        y, log_det = function(x[..., at])
        return x.astype(y.dtype).at[..., at].set(y), log_det


@dataclass(frozen=True, eq=False)
class Permute(Bijector):
    """``y[..., i] = x[..., order[i]]``.

    :param order: a tuple that holds each of ``0, …, D-1`` once.
    :raises ValueError: when ``order`` is no permutation, or is of another width than the event.
    """

    order: tuple[int, ...] = static()

    def __post_init__(self):
        object.__setattr__(self, "order", check_order(self.order, len(self.order)))

    def inputs_of(self, known):
        return frozenset(self.order[i] for i in known)

    def forward_and_log_det(self, x):
        check_width(x, len(self.order), "Permute")
        return x[..., np.array(self.order)], zeros_of(x)

    def inverse_and_log_det(self, y):
        check_width(y, len(self.order), "Permute")
        return y[..., np.argsort(self.order)], zeros_of(y)


@dataclass(frozen=True, eq=False)
class Standardize(Bijector):
    """``y = loc + scale * x``: from standardised to original units.

    :param loc: ``(D,)``, or with leading batch axes.
    :param scale: like ``loc``, positive.
    :raises ValueError: when the event is of another width.
    """

    loc: Any
    scale: Any

    @classmethod
    def identity(cls, features: int) -> Standardize:
        """The one that changes nothing."""
        return cls(*jax.device_put((np.zeros(features), np.ones(features))))

    @property
    def batch_shape(self):
        return jnp.broadcast_shapes(jnp.shape(self.loc), jnp.shape(self.scale))[:-1]

    def inputs_of(self, known):
        return known

    def forward_and_log_det(self, x):
        check_width(x, jnp.shape(self.loc)[-1], "Standardize")
        y = self.loc + self.scale * x
        return y, jnp.broadcast_to(jnp.log(self.scale).sum(-1), y.shape[:-1])

    def inverse_and_log_det(self, y):
        check_width(y, jnp.shape(self.loc)[-1], "Standardize")
        x = (y - self.loc) / self.scale
        return x, jnp.broadcast_to(-jnp.log(self.scale).sum(-1), x.shape[:-1])


@dataclass(frozen=True, eq=False)
class ActNorm(Bijector):
    """``y = exp(s) x + t`` for each channel; Glow's normalisation (Kingma & Dhariwal 2018, section 3.1).

    :meth:`initialized` sets it so that given outputs come from inputs with mean 0 and variance 1.

    :param loc: ``(C,)``. Events are ``n * C`` wide, the channel being the fastest index.
    :param raw_scale: ``(C,)``; ``s = bound tanh(raw_scale / bound)``.
    :param bound: the largest ``|s|``.
    """

    loc: Any
    raw_scale: Any
    bound: float = static(default=10.0)

    @classmethod
    def init(cls, channels: int) -> ActNorm:
        """The identity on events of ``channels`` features, or a multiple."""
        return cls(jnp.zeros(channels), jnp.zeros(channels))

    def initialized(self, y, context=None):
        rows = y.reshape(-1, self.loc.shape[-1])
        log_scale = jnp.log(jnp.maximum(rows.std(0), 1e-6))
        return ActNorm(rows.mean(0), self.bound * jnp.arctanh(log_scale / self.bound), self.bound)

    def inputs_of(self, known):
        return known

    @property
    def _log_scale(self):
        return self.bound * jnp.tanh(self.raw_scale / self.bound)

    def forward_and_log_det(self, x):
        rows, count = _channels(x, self.loc.shape[-1], "ActNorm")
        y = rows * jnp.exp(self._log_scale) + self.loc
        return y.reshape(jnp.shape(x)), zeros_of(x) + count * self._log_scale.sum()

    def inverse_and_log_det(self, y):
        rows, count = _channels(y, self.loc.shape[-1], "ActNorm")
        x = (rows - self.loc) * jnp.exp(-self._log_scale)
        return x.reshape(jnp.shape(y)), zeros_of(y) - count * self._log_scale.sum()


@dataclass(frozen=True, eq=False)
class LULinear(Bijector):
    """``L U y = x``: an invertible linear map of the channels, Glow's 1x1 convolution in the vector case.

    Kingma & Dhariwal (2018), eq. 10, without the permutation, which is :class:`Permute`'s. Data to base is a
    product, base to data two triangular solves.

    :param lower: ``(C, C)``, of which the part below the diagonal counts; the diagonal is 1.
    :param upper: ``(C, C)``, of which the part above the diagonal counts. Its diagonal ``a`` stands for
        ``exp(bound tanh(a / bound))``.
    :param bound: the largest log of a diagonal element.
    """

    lower: Any
    upper: Any
    bound: float = static(default=5.0)
    parallel = "inverse"

    @classmethod
    def init(cls, key, channels: int) -> LULinear:
        """Near the identity, on events of ``channels`` features, or a multiple."""
        keys = jax.random.split(key)
        scale = 0.1 / channels**0.5
        return cls(*(scale * jax.random.normal(k, (channels, channels)) for k in keys))

    def _factors(self):
        log_diagonal = self.bound * jnp.tanh(jnp.diagonal(self.upper) / self.bound)
        lower = jnp.tril(self.lower, -1) + jnp.eye(len(self.lower), dtype=self.lower.dtype)
        return lower, jnp.triu(self.upper, 1) + jnp.diag(jnp.exp(log_diagonal)), log_diagonal.sum()

    def forward_and_log_det(self, x):
        rows, count = _channels(x, self.lower.shape[-1], "LULinear")
        lower, upper, log_det = self._factors()
        columns = rows.reshape(-1, rows.shape[-1]).T.astype(jnp.result_type(x, lower))
        columns = solve_triangular(lower, columns, lower=True, unit_diagonal=True)
        y = solve_triangular(upper, columns).T
        return y.reshape(jnp.shape(x)), zeros_of(x) - count * log_det

    def inverse_and_log_det(self, y):
        rows, count = _channels(y, self.lower.shape[-1], "LULinear")
        lower, upper, log_det = self._factors()
        return (rows @ (lower @ upper).T).reshape(jnp.shape(y)), zeros_of(y) + count * log_det


@dataclass(frozen=True, eq=False)
class Regression(Bijector):
    """``y = L x + A c + b``: a Gaussian linear model of events given the context, where a flow may start.

    :meth:`initialized` sets it by ridge regression of outputs on contexts.

    :param slope: A, ``(D, C)``; ``loc``: b, ``(D,)``.
    :param factor: ``(D, D)``, of which the part below the diagonal counts; its diagonal is the log of L's.
    :param context: ``(..., C)``, when bound.
    """

    slope: Any
    loc: Any
    factor: Any
    context: Any = None

    @classmethod
    def init(cls, features: int, context: int) -> Regression:
        """The identity."""
        shapes = (features, context), (features,), (features, features)
        return cls(*jax.device_put(tuple(map(np.zeros, shapes))))

    def bind(self, context):
        return dataclasses.replace(self, context=context)

    @property
    def batch_shape(self):
        return jnp.shape(self.context)[:-1]

    def initialized(self, y, context=None):
        y, c = (np.asarray(a, np.float64) for a in (y, context))
        slope, freedom = _ridge(c - c.mean(0), y - y.mean(0))
        loc = y.mean(0) - c.mean(0) @ slope
        # Residuals as large as those of rows left out would be, about.
        rest = (y - c @ slope - loc) / (1 - freedom / len(y))
        spread = rest.T @ rest / len(y)
        factor = np.linalg.cholesky(spread + 1e-9 * (1 + np.trace(spread)) * np.eye(len(spread)))
        factor = np.tril(factor, -1) + np.diag(np.log(np.diag(factor)))
        return Regression(*jax.device_put(tuple(a.astype(self.loc.dtype) for a in (slope.T, loc, factor))))

    def _parts(self, x):
        check_width(x, self.loc.shape[-1], "Regression")
        width = self.slope.shape[-1]
        if self.context is None or jnp.shape(self.context)[-1:] != (width,):
            given = "none" if self.context is None else f"one of shape {jnp.shape(self.context)}"
            raise ValueError(f"Regression expects a context of width {width}, got {given}")
        log_diagonal = jnp.diagonal(self.factor)
        lower = jnp.tril(self.factor, -1) + jnp.diag(jnp.exp(log_diagonal))
        return lower, self.context @ self.slope.T + self.loc, log_diagonal.sum()

    def forward_and_log_det(self, x):
        lower, shift, log_det = self._parts(x)
        y = x @ lower.T + shift
        return y, jnp.broadcast_to(log_det, y.shape[:-1])

    def inverse_and_log_det(self, y):
        lower, shift, log_det = self._parts(y)
        rest = y - shift
        columns = rest.reshape(-1, rest.shape[-1]).T.astype(jnp.result_type(rest, lower))
        x = solve_triangular(lower, columns, lower=True).T.reshape(rest.shape)
        return x, jnp.broadcast_to(-log_det, x.shape[:-1])


def _ridge(c, y) -> tuple[np.ndarray, np.ndarray]:
    """Slopes ``(C, D)`` of centred columns, each with the penalty of least generalised cross-validation.

    Golub, Heath & Wahba (1979), from one singular value decomposition; and the degrees of freedom of each, at
    most half the number of rows.
    """
    u, s, vt = np.linalg.svd(c, full_matrices=False)
    projected, n = u.T @ y, len(y)
    rest = (y**2).sum(0) - (projected**2).sum(0)
    shrink = s**2 / (s**2 + n * np.logspace(-7, 3, 41)[:, None] + 1e-300)  # (penalties, rank)
    errors = rest + ((1 - shrink) ** 2) @ projected**2
    freedom = shrink.sum(1)
    score = errors / (1 - freedom[:, None] / n).clip(0.5) ** 2
    best = np.argmin(np.where(freedom[:, None] <= n / 2, score, np.inf), 0)
    coefficients = shrink[best].T * projected / np.where(s > 0, s, 1)[:, None]
    return vt.T @ coefficients, freedom[best]


@dataclass(frozen=True, eq=False)
class Logit(Bijector):
    """``y = logit(alpha + (1 - 2 alpha) x)``: from the unit box to the reals.

    The preprocessing of pixels in Dinh et al. (2017), section 4.1, and Papamakarios et al. (2017).

    :param alpha: 0, or a little more so that 0 and 1 stay finite.
    """

    alpha: float = static(default=0.0)

    @property
    def domain(self):
        return _box(float(self.alpha))

    def __post_init__(self):
        if not 0 <= self.alpha < 0.5:
            raise ValueError(f"Logit needs 0 <= alpha < 0.5, got {self.alpha!r}")

    def inputs_of(self, known):
        return known

    def forward_and_log_det(self, x):
        p = _open(self.alpha + (1 - 2 * self.alpha) * x)
        y = jnp.log(p) - jnp.log1p(-p)
        return y, -self._log_slope(y).sum(-1)

    def inverse_and_log_det(self, y):
        x = (_open(jax.nn.sigmoid(y)) - self.alpha) / (1 - 2 * self.alpha)
        x = jnp.clip(x, *_ends(self.alpha))  # where rounding may lead out
        return x, self._log_slope(y).sum(-1)

    def _log_slope(self, y):
        """Log dx/dy."""
        return jax.nn.log_sigmoid(y) + jax.nn.log_sigmoid(-y) - np.log1p(-2 * self.alpha)


@dataclass(frozen=True, eq=False)
class Probit(Bijector):
    """The standard normal's quantile function: from the unit box to the reals."""

    domain = EVENTS["unit"]

    def inputs_of(self, known):
        return known

    def forward_and_log_det(self, x):
        y = ndtri(_open(x))
        return y, -norm.logpdf(y).sum(-1)

    def inverse_and_log_det(self, y):
        return _open(ndtr(y)), norm.logpdf(y).sum(-1)


@dataclass(frozen=True, eq=False)
class Each(Bijector):
    """A NumPyro transform of single numbers, applied to each feature: from the reals to another support.

    :param transform: such as ``biject_to(constraints.positive)``.
    """

    transform: Any

    @property
    def codomain(self):
        return _each(self.transform.codomain)

    def inputs_of(self, known):
        return known

    def forward_and_log_det(self, x):
        y = self.transform(x)
        return y, self.transform.log_abs_det_jacobian(x, y).sum(-1)

    def inverse_and_log_det(self, y):
        x = self.transform._inverse(y)
        return x, -self.transform.log_abs_det_jacobian(x, y).sum(-1)


def _open(p):
    """Probabilities off 0 and 1, where rounding may put them, so far that slopes stay finite too."""
    info = jnp.finfo(jnp.result_type(p, float))
    return jnp.clip(p, info.tiny**0.8, 1 - info.eps / 2)


@dataclass(frozen=True, eq=False)
class Reshape(Bijector):
    """From vectors to events of another shape, the last axis fastest.

    :param shape: of the event.
    :param kind: of its numbers: ``"real"``, ``"unit"``, ``"circle"``, or ``"box"`` for what a
        :class:`Logit` of this ``alpha`` maps to the reals.
    """

    shape: tuple[int, ...] = static()
    kind: str = static(default="real")
    alpha: float = static(default=0.0)

    @property
    def domain(self):
        return _box(self.alpha) if self.kind == "box" else EVENTS[self.kind]

    @property
    def codomain(self):
        return _shaped(self.kind, self.alpha, len(self.shape))

    def inputs_of(self, known):
        return known

    def forward_shape(self, shape):
        return (*shape[:-1], *self.shape)

    def inverse_shape(self, shape):
        return (*shape[: len(shape) - len(self.shape)], int(np.prod(self.shape)))

    def forward_and_log_det(self, x):
        check_width(x, int(np.prod(self.shape)), "Reshape")
        return x.reshape(self.forward_shape(x.shape)), zeros_of(x)

    def inverse_and_log_det(self, y):
        if jnp.shape(y)[-len(self.shape) :] != self.shape:
            raise ValueError(f"Reshape expects events of shape {self.shape}, got {jnp.shape(y)}")
        x = y.reshape(self.inverse_shape(y.shape))
        return x, zeros_of(x)


def _channels(x, channels: int, name: str):
    """Events ``(..., n * C)`` as ``(..., n, C)``, and n."""
    shape = jnp.shape(x)
    if not shape or shape[-1] % channels or not shape[-1]:
        raise ValueError(f"{name} expects events with last axis a multiple of {channels}, got {shape}")
    return jnp.reshape(x, (*shape[:-1], -1, channels)), shape[-1] // channels


def zeros_of(x):
    """A zero log-determinant for events ``x``: ``(..., D) -> (...)``."""
    return jnp.zeros(jnp.shape(x)[:-1], jnp.result_type(x, float))


def check_width(x, features: int, name: str) -> None:
    """Raise ValueError unless the last axis of ``x`` is ``features`` wide."""
    shape = jnp.shape(x)
    if not shape or shape[-1] != features:
        raise ValueError(f"{name} expects events with last axis {features}, got an array of shape {shape}")


def check_order(order, features: int) -> tuple[int, ...]:
    """``order`` as a tuple of ints, or ValueError when it does not permute ``range(features)``."""
    order = tuple(int(i) for i in order)
    if sorted(order) != list(range(features)):
        raise ValueError(f"order must hold each of 0..{features - 1} once, got {order}")
    return order
