# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""NumPyro distributions made of bijectors, right inside ``vmap`` and NumPyro's ``scan`` too."""

from __future__ import annotations

import copy
from functools import partial

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.batch_util import promote_batch_shape, vmap_over
from numpyro.distributions.transforms import ComposeTransform, biject_to
from numpyro.distributions.util import sum_rightmost, validate_sample

from numpyro_maf.flows.bijectors import Bijector
from numpyro_maf.flows.supports import is_real

__all__ = ["FlowDistribution", "Stacking"]


class Stacking(dist.Distribution):
    """A distribution whose leaves may gain leading axes after construction (abstract).

    They do on the way out of ``vmap`` and of NumPyro's ``scan``. Those axes are batch axes, and every method
    vectorises over them. Subclasses give ``_log_prob(value, intermediates)``, ``_sample(key, shape)`` and
    ``_array_leaves()``, and call ``_remember()`` at the end of their construction.
    """

    pytree_aux_fields = ("_ranks", "_own_batch_shape")

    def _remember(self):
        self._ranks = tuple(map(jnp.ndim, self._array_leaves()))
        self._own_batch_shape = self.batch_shape

    def log_prob(self, value, intermediates=None):
        """``(..., *event_shape) -> (...)``: one pass; none with ``sample_with_intermediates``'s."""
        return self._stacked_log_prob(value) if self._stacked else self._log_prob(value, intermediates)

    def sample(self, key, sample_shape=()):
        """``sample_shape + batch_shape + event_shape`` draws."""
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
    """

    def __init__(self, base_distribution, transforms, *, validate_args=None):
        dist.TransformedDistribution.__init__(
            self, base_distribution, transforms, validate_args=validate_args
        )
        self._remember()

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self):
        """The last transform's codomain, or the image of the base's support where that is smaller."""
        smaller = is_real(self.transforms[0].domain) and not is_real(self.base_dist.support)
        return _Image(self) if smaller else self._codomain

    @property
    def _codomain(self):
        return dist.TransformedDistribution.support.__get__(self)

    def _log_prob(self, value, intermediates=None):
        if intermediates is not None:
            return dist.TransformedDistribution.log_prob(self, value, intermediates)
        return self._one_pass(value)

    @validate_sample
    def _one_pass(self, value):
        given, log_prob, event_dim = value, 0.0, self.event_dim
        for transform in reversed(self.transforms):
            if isinstance(transform, Bijector):
                value, log_det = transform.inverse_and_log_det(value)
            else:
                y, value = value, transform.inv(value)
                log_det = -transform.log_abs_det_jacobian(value, y)
            extra = event_dim - transform.codomain.event_dim
            log_prob = log_prob + sum_rightmost(log_det, extra)
            event_dim = transform.domain.event_dim + extra
        base = self.base_dist.log_prob(value)
        if not is_real(self.base_dist.support):
            base = jnp.where(self.base_dist.support(value), base, -jnp.inf)
        log_prob = log_prob + sum_rightmost(base, event_dim - self.base_dist.event_dim)
        return log_prob if is_real(self._codomain) else jnp.where(self._codomain(given), log_prob, -jnp.inf)

    def _sample(self, key, sample_shape):
        return dist.TransformedDistribution.sample(self, key, sample_shape)

    def sample_with_intermediates(self, key, sample_shape=()):
        if self._stacked:
            return self._stacked_sample(key, sample_shape), []
        return dist.TransformedDistribution.sample_with_intermediates(self, key, sample_shape)

    def rsample(self, key, sample_shape=()):
        """As :meth:`sample`: differentiable in weights, context and the base's parameters."""
        return self.sample(key, sample_shape)

    def _array_leaves(self):
        return jax.tree.leaves((self.base_dist, self.transforms))


class _Image(constraints.Constraint):
    """What a flow makes of a base whose support is not all of the reals."""

    def __init__(self, flow_distribution):
        self.distribution = flow_distribution
        self.event_dim = flow_distribution.event_dim

    def __call__(self, x):
        for transform in reversed(self.distribution.transforms):
            x = transform.inv(x)
        return self.distribution.base_dist.support(x)

    def feasible_like(self, prototype):
        d = self.distribution
        x = d.base_dist.support.feasible_like(jnp.broadcast_to(prototype, jnp.shape(prototype)))
        for transform in d.transforms:
            x = transform(x)
        return x

    def tree_flatten(self):
        return (self.distribution,), (("distribution",), {"event_dim": self.event_dim})


@biject_to.register(_Image)
def _biject_to_image(constraint):
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
