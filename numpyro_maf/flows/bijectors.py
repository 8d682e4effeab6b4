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
import weakref
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey, register_pytree_with_keys
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform
from numpyro.distributions.util import array_equiv

from numpyro_maf.codec import storable
from numpyro_maf.flows.domains import check_meeting
from numpyro_maf.flows.shapes import check_width, zeros_of
from numpyro_maf.pytrees import static

__all__ = ["Bijector", "Chain", "Inverse", "Part"]


class Bijector(Transform):
    """A bijection of real vectors with its log-determinant (abstract).

    Subclasses give :meth:`forward_and_log_det` and :meth:`inverse_and_log_det`. ``parallel`` says
    which of the two is one network pass; NumPyro's ``log_abs_det_jacobian(x, y)`` uses that one.
    """

    domain: Any = constraints.real_vector
    codomain: Any = constraints.real_vector
    parallel: Any = "forward"

    def __init_subclass__(cls, **kwargs):
        # Transform would register the class as a pytree without names for its leaves; ours have
        # them, for files and for error messages. So its hook is passed over, not repeated.
        super(Transform, cls).__init_subclass__(**kwargs)
        register_pytree_with_keys(
            cls, lambda self: self._flatten_with_keys(), cls.tree_unflatten, cls.tree_flatten
        )
        storable(cls)

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

    def outputs_of(self, known: frozenset[int]) -> frozenset[int] | None:
        """The same for the inverse: a triangular map has a triangular one."""
        return self.inputs_of(known)

    # What NumPyro asks for, from these -------------------------------------------------------
    def __call__(self, x):
        return self.forward_and_log_det(x)[0]

    def _inverse(self, y):
        return self.inverse_and_log_det(y)[0]

    @property
    def inv(self) -> Bijector:
        inverse = None if self._inv is None else self._inv()  # a weak reference
        if inverse is None:
            inverse = Inverse(self)
            object.__setattr__(self, "_inv", weakref.ref(inverse))
        return inverse

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
        if self.bijector._inv is None or self.bijector._inv() is None:
            object.__setattr__(self.bijector, "_inv", weakref.ref(self))
        return self.bijector

    @property
    def batch_shape(self):
        return self.bijector.batch_shape

    def forward_shape(self, shape):
        return self.bijector.inverse_shape(shape)

    def inverse_shape(self, shape):
        return self.bijector.forward_shape(shape)

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
        return self.bijector.outputs_of(known)

    def outputs_of(self, known):
        return self.bijector.inputs_of(known)

    def forward_and_log_det(self, x):
        return self.bijector.inverse_and_log_det(x)

    def inverse_and_log_det(self, y):
        return self.bijector.forward_and_log_det(y)


@dataclass(frozen=True, eq=False)
class Chain(Bijector):
    """Bijectors one after the other.

    :param bijectors: a tuple, in the order in which ``forward_and_log_det`` applies them.
    :raises ValueError: for no bijectors, and where the values of one may leave the domain of the next.
    """

    bijectors: tuple[Bijector, ...]

    def __post_init__(self):
        if not self.bijectors:
            raise ValueError("Chain needs one bijector or more")
        for i, (first, second) in enumerate(zip(self.bijectors, self.bijectors[1:])):
            named = f"{type(first).__name__} {i}", f"{type(second).__name__} {i + 1}"
            check_meeting(first.codomain, second.domain, *named)

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

    def forward_shape(self, shape):
        for bijector in self.bijectors:
            shape = bijector.forward_shape(shape)
        return shape

    def inverse_shape(self, shape):
        for bijector in self.bijectors[::-1]:
            shape = bijector.inverse_shape(shape)
        return shape

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
            known = None if known is None else bijector.inputs_of(known)
        return known

    def outputs_of(self, known):
        for bijector in self.bijectors:
            known = None if known is None else bijector.outputs_of(known)
        return known

    def forward_and_log_det(self, x):
        total = zeros_of(x, self.domain.event_dim)
        for bijector in self.bijectors:
            x, log_det = bijector.forward_and_log_det(x)
            total = total + log_det
        return x, total

    def inverse_and_log_det(self, y):
        total = zeros_of(y, self.codomain.event_dim)
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
        return self._determined(known, self.bijector.inputs_of)

    def outputs_of(self, known):
        return self._determined(known, self.bijector.outputs_of)

    def _determined(self, known, of):
        inner = frozenset(i for i, at in enumerate(self.indices) if at in known)
        if len(inner) not in (0, len(self.indices)):
            mapped = of(inner)
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
