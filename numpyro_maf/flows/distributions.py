# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""NumPyro distributions made of bijectors, right inside ``vmap`` and NumPyro's ``scan`` too."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial, wraps
from inspect import signature
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.typing import ArrayLike
from numpyro.distributions import constraints
from numpyro.distributions.batch_util import promote_batch_shape, vmap_over
from numpyro.distributions.transforms import ComposeTransform, biject_to
from numpyro.distributions.util import sum_rightmost, validate_sample

from numpyro_maf.flows.bijectors import Bijector, Inverse
from numpyro_maf.flows.domains import check_meeting, fits, is_real
from numpyro_maf.inputs import as_numbers
from numpyro_maf.pytrees import Described
from numpyro_maf.rng import as_key, as_shape

__all__ = ["FlowDistribution", "Stacking"]


def at_once(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method as one program where it is called outside of any: its steps would be compiled one by one.

    NumPy arrays are left to the method: it standardises them on the host, in double precision, which a
    program would round first.

    :param method: of a distribution and an array, and perhaps a shape.
    """
    program = jax.jit(method, static_argnums=tuple(range(2, len(signature(method).parameters))))

    @wraps(method)
    def call(self, value, *shape):
        leaves, structure = jax.tree.flatten((self, value))
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
        fits = not traced and isinstance(value, jax.Array) and _has_hash(structure)
        return (program if fits else method)(self, value, *shape)

    return call


def _has_hash(structure) -> bool:
    """Not so where another's distribution holds arrays beside its leaves."""
    try:
        hash(structure)
    except TypeError:
        return False
    return True


class Stacking(Described, dist.Distribution):
    """A distribution whose leaves may gain leading axes after construction (abstract).

    They do on the way out of ``vmap`` and of NumPyro's ``scan``. Those axes are batch axes, and every method
    vectorises over them. Subclasses give ``_log_prob(value, intermediates)``, ``_sample(key, shape)`` and
    ``_array_leaves()``, and call ``_remember()`` at the end of their construction.
    """

    pytree_aux_fields = ("_ranks", "_own_batch_shape")

    def _remember(self):
        self._ranks = tuple(map(jnp.ndim, self._array_leaves()))
        self._own_batch_shape = self.batch_shape

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> jax.Array:
        """``(..., *event_shape) -> (...)``: one pass; none with ``sample_with_intermediates``'s."""
        value = as_numbers("value", value)
        if jnp.size(value) == 0 or 0 in self.batch_shape:  # NumPyro's sums over event axes divide by the size
            batch = jnp.shape(value)[: jnp.ndim(value) - self.event_dim]
            return jnp.zeros(jnp.broadcast_shapes(batch, self.batch_shape), jnp.result_type(value, float))
        return self._stacked_log_prob(value) if self._stacked else self._log_prob(value, intermediates)

    def sample(self, key: ArrayLike, sample_shape: int | Sequence[int] = ()):
        """``sample_shape + batch_shape + event_shape`` draws."""
        key, sample_shape = as_key(key), as_shape(sample_shape)
        return self._stacked_sample(key, sample_shape) if self._stacked else self._sample(key, sample_shape)

    @property
    def _stacked(self) -> tuple[int, ...]:
        """The shape of the leading axes that every leaf has gained since construction."""
        shapes = [jnp.shape(leaf) for leaf in self._array_leaves()]
        gained = {len(shape) - rank for shape, rank in zip(shapes, self._ranks)}
        if len(gained) != 1 or min(gained) < 0:
            raise ValueError(
                f"the leaves of a {type(self).__name__} differ in the axes they gained since it was made: "
                f"{sorted(gained)}; map over all of them alike"
            )
        return shapes[0][: gained.pop()]

    def _peel(self):
        """Without the first gained axis, which has length 1."""
        return jax.tree.map(lambda leaf: leaf[0], self)

    def _stacked_sample(self, key, sample_shape):
        axis, count = len(sample_shape), self._stacked[0]
        if count == 1:
            return jnp.expand_dims(self._peel().sample(key, sample_shape), axis)
        keys = jax.random.split(key, count)
        draw = partial(type(self).sample, sample_shape=sample_shape)
        return jax.vmap(draw, out_axes=axis)(self, keys)

    def _stacked_log_prob(self, value):
        batch_ndim = len(self._stacked) + len(self._own_batch_shape)
        missing = batch_ndim + self.event_dim - jnp.ndim(value)
        value = jnp.reshape(value, (1,) * missing + jnp.shape(value))
        axis = value.ndim - self.event_dim - batch_ndim
        if self._stacked[0] == 1:
            return self._peel().log_prob(value)
        if value.shape[axis] == 1:
            value = jnp.repeat(value, self._stacked[0], axis)
        return jax.vmap(type(self).log_prob, in_axes=(0, axis), out_axes=axis)(self, value)


class FlowDistribution(Stacking, dist.TransformedDistribution):
    """A base distribution through bijectors, scored in one pass of each.

    :param base_distribution: a NumPyro distribution.
    :param transforms: one NumPyro transform or a list of them; bijectors are scored in one pass.
    :raises ValueError: where the values of one may leave the domain of the next: that would be no density.
    """

    def __init__(self, base_distribution, transforms, *, validate_args=None):
        dist.TransformedDistribution.__init__(
            self, base_distribution, transforms, validate_args=validate_args
        )
        self._remember()
        ranges = [(self.base_dist.support, "the base")]
        ranges += [(t.codomain, _name(t)) for t in self.transforms]
        for (support, what), transform in zip(ranges, self.transforms):
            check_meeting(support, transform.domain, what, _name(transform))

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self):
        """The last transform's codomain, or what is reached of it where a domain before is not filled."""
        return _Reached(self) if any(self._gaps) else self._codomain

    @property
    def _codomain(self):
        return dist.TransformedDistribution.support.__get__(self)

    @property
    def _gaps(self) -> list[bool]:
        """For each transform, whether what comes before it does not fill its domain."""
        before = [self.base_dist.support, *(t.codomain for t in self.transforms)]
        return [not fits(t.domain, support) for support, t in zip(before, self.transforms)]

    def _log_prob(self, value, intermediates=None):
        if intermediates is not None:
            return dist.TransformedDistribution.log_prob(self, value, intermediates)
        return self._one_pass(value)

    @validate_sample
    def _one_pass(self, value):
        return self._pass(value)

    @at_once
    def _pass(self, value):
        log_prob, event_dim = 0.0, self.event_dim
        value, inside = _kept(self._codomain, value, True)
        for transform, gap in zip(reversed(self.transforms), [False, *reversed(self._gaps)]):
            if gap:
                value, inside = _kept(transform.codomain, value, inside)
            if isinstance(transform, Bijector):
                value, log_det = transform.inverse_and_log_det(value)
            else:
                y, value = value, transform.inv(value)
                log_det = -transform.log_abs_det_jacobian(value, y)
            extra = event_dim - transform.codomain.event_dim
            log_prob = log_prob + sum_rightmost(log_det, extra)
            event_dim = transform.domain.event_dim + extra
        value, inside = _kept(self.base_dist.support, value, inside)
        base = self.base_dist.log_prob(value)
        log_prob = log_prob + sum_rightmost(base, event_dim - self.base_dist.event_dim)
        return log_prob if inside is True else jnp.where(inside, log_prob, -jnp.inf)

    @at_once
    def _sample(self, key, sample_shape):
        return dist.TransformedDistribution.sample(self, key, sample_shape)

    def sample_with_intermediates(self, key: ArrayLike, sample_shape: int | Sequence[int] = ()):
        key, sample_shape = as_key(key), as_shape(sample_shape)
        if self._stacked:
            return self._stacked_sample(key, sample_shape), []
        return dist.TransformedDistribution.sample_with_intermediates(self, key, sample_shape)

    def rsample(self, key: ArrayLike, sample_shape: int | Sequence[int] = ()):
        """As :meth:`sample`: differentiable in weights, context and the base's parameters."""
        return self.sample(key, sample_shape)

    def is_ancestral(self, seen: Any) -> bool:
        """Whether :meth:`sample_given` can draw exactly: the seen numbers are made first by every layer.

        :param seen: ``event_shape`` booleans.
        """
        return self._base_numbers(seen) is not None

    def sample_given(
        self, key: ArrayLike, value: ArrayLike, seen: Any, sample_shape: int | Sequence[int] = ()
    ):
        """Exact draws of the numbers that are not seen, given those that are: ``sample_shape + event_shape``.

        What is seen says where its numbers stand in the base; the others are drawn there anew.

        :param value: ``event_shape``; numbers that are not seen may be anything.
        :param seen: ``event_shape`` booleans.
        :raises ValueError: unless :meth:`is_ancestral`.
        """
        known = self._base_numbers(seen)
        if known is None:
            raise ValueError(
                "the seen numbers are not the first of every layer: their conditional is not known"
            )
        return _given(
            self, as_key(key), value, np.asarray(seen), tuple(sorted(known)), as_shape(sample_shape)
        )

    def _base_numbers(self, seen) -> frozenset[int] | None:
        """The numbers of the base that the seen ones determine, and are determined by."""
        known: frozenset[int] | None = frozenset(np.flatnonzero(seen).tolist())
        if self.batch_shape or not isinstance(self.base_dist, dist.Independent) or known is None:
            return None
        if len(known) in (0, np.size(seen)):
            return known
        for transform in reversed(self.transforms):
            if isinstance(transform, Bijector):
                known = None if known is None else transform.inputs_of(known)
            elif transform.domain.event_dim:  # otherwise it works on each number by itself
                return None
        return known

    def _array_leaves(self):
        return jax.tree.leaves((self.base_dist, self.transforms))

    def _describe(self):
        base, steps = self.base_dist, [_name(t) for t in self.transforms]
        while isinstance(base, (dist.Independent, dist.ExpandedDistribution)):
            base = base.base_dist
        if len(steps) > 4:
            steps = [*steps[:2], f"{len(steps) - 3} more", steps[-1]]
        shapes = f"batch shape {self.batch_shape}, event shape {self.event_shape}"
        return [f"FlowDistribution({shapes})", f"  {type(base).__name__} -> " + " -> ".join(steps)]


def _name(transform) -> str:
    inner = f"({_name(transform.bijector)})" if isinstance(transform, Inverse) else ""
    return type(transform).__name__ + inner


def _kept(support, value, inside):
    """Values, those off a support replaced by one on it: gradients stay finite; and which are on it."""
    if is_real(support):
        return value, inside
    on = support(value)
    keep = on.reshape(*jnp.shape(on), *[1] * support.event_dim)
    return jnp.where(keep, value, support.feasible_like(value)), on if inside is True else inside & on


@partial(jax.jit, static_argnums=(4, 5))
def _given(d, key, value, seen, known, sample_shape):
    fill_key, draw_key = jax.random.split(key)

    def through(z):
        for transform in d.transforms:
            z = transform(z)
        return z

    place = jnp.where(seen, value, through(d.base_dist.sample(fill_key)))
    for transform in reversed(d.transforms):
        place = transform.inv(place)
    fixed = np.isin(np.arange(seen.size), known)
    drawn = through(jnp.where(fixed, place, d.base_dist.sample(draw_key, sample_shape)))
    return jnp.where(seen, value, drawn)


class _Reached(constraints.Constraint):
    """What a flow reaches where a domain on the way is not filled."""

    def __init__(self, flow_distribution):
        self.distribution = flow_distribution
        self.event_dim = flow_distribution.event_dim

    def __call__(self, x):
        inside: Any = True
        for transform in reversed(self.distribution.transforms):
            x, inside = _kept(transform.codomain, x, inside)
            x = transform.inv(x)
        return inside & self.distribution.base_dist.support(x)

    def feasible_like(self, prototype):
        d = self.distribution
        x = d.base_dist.support.feasible_like(jnp.broadcast_to(prototype, jnp.shape(prototype)))
        for transform in d.transforms:
            x = transform(x)
        return x

    def tree_flatten(self):
        return (self.distribution,), (("distribution",), {"event_dim": self.event_dim})


@biject_to.register(_Reached)
def _biject_to_reached(constraint):
    d = constraint.distribution
    return ComposeTransform([biject_to(d.base_dist.support), *d.transforms])


@promote_batch_shape.register
def _promote_stacking(d: Stacking):
    promoted = copy.copy(d)
    promoted._batch_shape = d._stacked + d._own_batch_shape
    return promoted


@vmap_over.register
def _vmap_over_bijector(bijector: Bijector, **axes):
    mapped = copy.copy(bijector)
    for name in bijector.tree_flatten()[1][0]:
        object.__setattr__(mapped, name, axes.get(name))
    return mapped
