# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""What networks see of observations: scaled arrays, which of their numbers are there, and one summary."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass
from numpyro.distributions import constraints

from numpyro_maf.codec import storable
from numpyro_maf.flows.domains import of_one_number
from numpyro_maf.flows.linear import Standardize
from numpyro_maf.inputs import by_site, nearest
from numpyro_maf.nn.adapters import as_network
from numpyro_maf.nn.embeddings import Embedding
from numpyro_maf.pytrees import static
from numpyro_maf.rng import split
from numpyro_maf.train.data import warn_of_rounding

__all__ = ["Summary", "View", "axes_of", "embedding_of"]

_HEAVY = 5.0  # a normal's kurtosis is 3, a logistic's 4.2, a Laplace's 6


@storable
@register_dataclass
@dataclass(frozen=True)
class View:
    """Observed sites by name as a network takes them: standardised, positive ones after the logarithm.

    :param scales: one for each site; ``heavy``: 1 for numbers with heavy tails, which are compressed by
        arcsinh, and 0 for others; ``floors``: the least number of a positive site, which replaces smaller
        ones, such as 0.
    :param names: of the sites; ``ranks``: number of axes of a value of each.
    :param positive: which of them have positive support.
    :param missing: whether NaN stands for a number that was not observed.
    """

    scales: tuple[Standardize, ...]
    heavy: tuple[Any, ...]
    floors: tuple[Any, ...]
    names: tuple[str, ...] = static()
    ranks: tuple[int, ...] = static()
    positive: tuple[bool, ...] = static()
    missing: bool = static(default=False)

    @classmethod
    def of(cls, supports, sims, rows, axes, missing: bool) -> View:
        """A view of the sites in ``supports``.

        :param rows: numbers of the simulations whose means and standard deviations scale the view.
        :param axes: number of each site's axes that share one scale, beside the rows.
        """
        positive = tuple(of_one_number(s) is constraints.positive for s in supports.values())
        scales, heavy, floors = [], [], []
        for name, is_positive, count in zip(supports, positive, axes):
            part = np.asarray(sims[name][rows], np.float64)
            floor = np.min(part, where=part > 0, initial=np.inf) / 2 if is_positive else 0.0
            floor = floor if np.isfinite(floor) else 1e-30
            part = np.log(np.maximum(part, floor)) if is_positive else part
            floors.append(floor)
            over = tuple(range(count + 1))
            known = ~np.isnan(part)
            total = np.maximum(known.sum(over), 1)
            mean = np.nansum(part, over) / total
            sd = np.sqrt(np.nansum((part - mean) ** 2, over) / total)
            varies = sd > 1e-14 * np.maximum(np.abs(mean), 1e-30)
            sd = np.where(varies, sd, 1.0)
            warn_of_rounding(f"observed site {name!r}", mean, sd, varies)
            scales.append(Standardize(mean, sd))
            kurtosis = np.nansum(((part - mean) / sd) ** 4, over) / total
            heavy.append(np.where(kurtosis > _HEAVY, 1.0, 0.0))
        ranks = tuple(np.ndim(sims[name]) - 1 for name in supports)
        view = cls(tuple(scales), tuple(heavy), tuple(floors), tuple(supports), ranks, positive, missing)
        return jax.device_put(view)

    def by_name(self, values) -> dict[str, Any]:
        """An observation by site, as arrays; that of the only site may be an array.

        :raises TypeError: for an array, where there are several sites, and anything but real numbers.
        :raises ValueError: for a site that is missing.
        """
        if not isinstance(values, Mapping):
            if len(self.names) > 1:
                raise TypeError(
                    f"the observation is a dictionary of the sites {list(self.names)}, got an array"
                )
            values = {self.names[0]: values}
        for name in self.names:
            if name not in values:
                close = nearest(name, values)
                raise ValueError(f"the observation needs the sites {list(self.names)}: no {name!r}{close}")
        own = {name: values[name] for name in self.names}
        return by_site("the observation", own, missing=self.missing)

    def arrays(self, values) -> tuple[Any, ...]:
        """Values by site, with equal leading axes, as arrays in order; and those axes.

        :raises ValueError: for names that are missing, shapes that do not fit, NaN that is not expected, and
            negative numbers at a positive site.
        """
        arrays, batch = self.rows({k: np.asarray(value) for k, value in self.by_name(values).items()})
        for name, a, is_positive in zip(self.names, arrays, self.positive):
            if not self.missing and not np.isfinite(a).all():
                raise ValueError(f"{name!r} is not finite; networks for missing numbers need missing=True")
            if is_positive and (a < 0).any():
                raise ValueError(f"{name!r} must be positive, got {np.nanmin(a)}")
        return arrays, batch

    def rows(self, values) -> tuple[Any, ...]:
        """As :meth:`arrays`, also of tracers, whose numbers cannot be looked at."""
        host = (np.ndarray, np.generic)  # these stay there, where a cast compiles nothing
        given = [a if isinstance(a, host) else jnp.asarray(a) for a in map(values.get, self.names)]
        arrays = tuple(a.astype(jnp.result_type(float)) for a in given)
        batch = arrays[0].shape[: arrays[0].ndim - self.ranks[0]]
        for name, a, rank, scale in zip(self.names, arrays, self.ranks, self.scales):
            if a.ndim < rank or a.shape[: a.ndim - rank] != batch:
                raise ValueError(f"{name!r} must have {rank} axes after batch axes {batch}, got {a.shape}")
            fixed = jnp.shape(scale.loc)  # the last axes, those that no embedding leaves free
            if a.shape[a.ndim - len(fixed) :] != fixed:
                raise ValueError(f"{name!r} must have a shape that ends in {fixed}, got {a.shape}")
        return tuple(a.reshape(math.prod(batch), *a.shape[len(batch) :]) for a in arrays), batch

    def __call__(self, arrays) -> tuple[Any, ...]:
        """Raw arrays ``(B, ...)`` in order as pairs: standardised, and which numbers are there or None."""
        seen = []
        parts = zip(arrays, self.scales, self.heavy, self.floors, self.positive)
        for a, scale, heavy, floor, is_positive in parts:
            present = ~jnp.isnan(a)
            a = jnp.where(present, a, 1.0) if self.missing else a
            z = ((jnp.log(jnp.maximum(a, floor)) if is_positive else a) - scale.loc) / scale.scale
            z = jnp.where(heavy > 0, jnp.arcsinh(z), z)
            seen.append((jnp.where(present, z, 0.0), present) if self.missing else (z, None))
        return tuple(seen)


@storable
@dataclass(frozen=True)
class Summary:
    """One network for each site. Their results side by side are the context of a flow.

    :param embeddings: of each site, None without; ``shapes``: of the rows they were made for.
    :param networks: functions ``(weights, x, present) -> (B, C)``; those of the embeddings by default.
    """

    embeddings: tuple[Any, ...] = field(compare=False)
    shapes: tuple[tuple[int, ...], ...] = field(compare=False)
    networks: tuple[Callable, ...] = field(default=(), metadata={"stored": False})

    def __post_init__(self):
        if not self.networks:
            networks = tuple(map(_network, self.embeddings, self.shapes))
            object.__setattr__(self, "networks", networks)

    @classmethod
    def of(cls, view: View, embedding, example) -> tuple[Summary, Callable]:
        """The networks that an embedding asks for, and a function of a key that makes their weights.

        :param embedding: for the only site, or by site; None for the numbers themselves.
        :param example: raw arrays of a few rows, of which only the shapes count.
        """
        chosen = [embedding_of(embedding, name, view.names) for name in view.names]
        seen = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), jax.eval_shape(view, example))

        def made(key):
            keys = split(key, len(seen))
            return [
                ({}, _flat) if e is None else as_network(e, k, x, present)
                for e, k, (x, present) in zip(chosen, keys, seen)
            ]

        networks = tuple(apply for _, apply in made(jax.random.key(0)))
        shapes = tuple(jnp.shape(a)[1:] for a in example)
        return cls(tuple(chosen), shapes, networks), lambda key: tuple(weights for weights, _ in made(key))

    def unseen(self, view: View, arrays) -> list[str]:
        """Sentences about arrays ``(B, ...)`` of sizes that were not simulated.

        Where numbers may be missing, smaller sizes may have been simulated, padded by NaN.
        """
        found = []
        for name, a, known in zip(view.names, arrays, self.shapes):
            own = jnp.shape(a)[1:]
            padded = view.missing and all(n <= m for n, m in zip(own, known))
            if own != known and not padded:
                found.append(
                    f"{name!r} has shape {own}, and all simulations had {known}: the network has never seen "
                    "this size. Simulate it, or several sizes padded by NaN, with missing=True"
                )
        return found

    @property
    def is_trained(self) -> bool:
        """Whether some site has a network."""
        return any(network is not _flat for network in self.networks)

    def __call__(self, weights, seen):
        parts = [net(w, x, present) for net, w, (x, present) in zip(self.networks, weights, seen)]
        return jnp.concatenate(parts, -1)


def embedding_of(embedding, name, names):
    """The embedding of one site."""
    if isinstance(embedding, dict):
        if set(embedding) - set(names):
            raise ValueError(f"embedding has {sorted(embedding)}, the observed sites are {list(names)}")
        return embedding.get(name)
    if embedding is not None and len(names) > 1:
        raise ValueError(f"with several observed sites embedding is a dict by site, of {list(names)}")
    return embedding


def axes_of(embedding, rank: int) -> int:
    """Number of exchangeable or sequential axes of a site: times, elements of a set, pixels."""
    return min(getattr(embedding, "axes", 1), rank) if isinstance(embedding, Embedding) else 0


def _network(embedding, shape) -> Callable[..., Any]:
    """The function of an embedding, without weights."""
    if embedding is None or isinstance(embedding, Embedding):
        return embedding or _flat
    return as_network(embedding, jax.random.key(0), np.zeros((2, *shape)))[1]


def _flat(weights, x, present=None):
    """The numbers as they are."""
    x = x.reshape(len(x), math.prod(x.shape[1:]))  # for no rows, too
    if present is None:
        return x
    return jnp.concatenate([x, present.reshape(x.shape).astype(x.dtype)], -1)
