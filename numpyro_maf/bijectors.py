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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey, register_pytree_with_keys
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform
from numpyro.distributions.util import array_equiv

__all__ = ["Bijector", "Inverse", "Permute", "Standardize"]


def static(**kwargs) -> Any:
    """A dataclass field that is configuration: hashable, never traced, never trained."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


class Bijector(Transform):
    """A bijection of real vectors with its log-determinant (abstract).

    Subclasses give :meth:`forward_and_log_det` and :meth:`inverse_and_log_det`. ``parallel`` says
    which of the two is one network pass; NumPyro's ``log_abs_det_jacobian(x, y)`` uses that one.
    """

    # Both constraints are singletons: NumPyro compares them by identity.
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

    # Two directions ------------------------------------------------------------------------

    def forward_and_log_det(self, x):
        """``(..., D) -> (..., D), (...)``: the value and ``log |det dy/dx|``."""
        raise NotImplementedError

    def inverse_and_log_det(self, y):
        """``(..., D) -> (..., D), (...)``: the preimage and ``log |det dx/dy|``."""
        raise NotImplementedError

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

    def forward_and_log_det(self, x):
        return self.bijector.inverse_and_log_det(x)

    def inverse_and_log_det(self, y):
        return self.bijector.forward_and_log_det(y)


@dataclass(frozen=True, eq=False)
class Permute(Bijector):
    """``y[..., i] = x[..., order[i]]``.

    :param order: a tuple that holds each of ``0, …, D-1`` once.
    :raises ValueError: when ``order`` is no permutation, or is of another width than the event.
    """

    order: tuple[int, ...] = static()

    def __post_init__(self):
        object.__setattr__(self, "order", check_order(self.order, len(self.order)))

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

    @property
    def batch_shape(self):
        return jnp.broadcast_shapes(jnp.shape(self.loc), jnp.shape(self.scale))[:-1]

    def forward_and_log_det(self, x):
        check_width(x, jnp.shape(self.loc)[-1], "Standardize")
        y = self.loc + self.scale * x
        return y, jnp.broadcast_to(jnp.log(self.scale).sum(-1), y.shape[:-1])

    def inverse_and_log_det(self, y):
        check_width(y, jnp.shape(self.loc)[-1], "Standardize")
        x = (y - self.loc) / self.scale
        return x, jnp.broadcast_to(-jnp.log(self.scale).sum(-1), x.shape[:-1])


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
