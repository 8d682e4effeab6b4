# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""The plates of a model as a tree of levels: what is exchangeable, and what is local to what."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers

from numpyro_maf.codec import storable
from numpyro_maf.inference.sites import Sites
from numpyro_maf.sbi.posterior import Setting
from numpyro_maf.sbi.simulations import Simulations
from numpyro_maf.sbi.simulator import parameters
from numpyro_maf.traces import ONE_AT_A_TIME, run_once

__all__ = ["Level", "PlateTree", "joined"]


@storable
@dataclass(frozen=True)
class Level:
    """The sites that are in the same plates.

    :param plates: their names, outermost first; none for the root.
    :param parent: number of the level around it; -1 for the root.
    :param latent: names of the latent sites; ``observed``: of the observed ones.
    """

    plates: tuple[str, ...]
    parent: int
    latent: tuple[str, ...] = ()
    observed: tuple[str, ...] = ()


@storable
@dataclass(frozen=True)
class PlateTree:
    """Levels, the root first and parents before children.

    :param axes: for each site, in the order of the levels, the axes of its value that are plates, outermost
        first, counted from the right.
    """

    levels: tuple[Level, ...]
    axes: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, setting: Setting, latent: Sequence[str], observed: Sequence[str]) -> PlateTree:
        """The tree of a model.

        :raises ValueError: for latent sites of crossed plates, which inform each other; for rows that are not
            exchangeable, as with covariates; and for rows that depend on the latent sites of others.
        """
        trace = run_once(setting.model, setting.args, setting.kwargs)
        inside, places = {}, {}
        for name in (*latent, *observed):
            site = trace[name]
            frames = {frame.name: frame.dim for frame in site["cond_indep_stack"]}
            inside[name] = frozenset(frames)
            event = np.ndim(site["value"]) - len(site["fn"].batch_shape)
            places[name] = {plate: dim - event for plate, dim in frames.items()}
        if not any(inside[name] for name in observed):
            root = Level((), -1, tuple(latent), tuple(observed))
            return cls((root,), tuple((name, ()) for name in inside))
        kinds = {inside[name] for name in latent}
        for name in observed:
            around = [kind for kind in kinds if kind & inside[name]]
            for one in around:
                crossed = next((other for other in around if not (one <= other or other <= one)), None)
                if crossed is not None:
                    raise ValueError(
                        f"latent sites of the plates {sorted(one)} and {sorted(crossed)} meet in {name!r}, "
                        "and depend on each other given the data"
                    )
        often = {
            plate: sum(plate in kind for kind in inside.values())
            for kind in inside.values()
            for plate in kind
        }
        dims = {plate: dim for place in places.values() for plate, dim in place.items()}
        order = sorted(often, key=lambda plate: (-often[plate], dims[plate]))
        levels: list[Level] = []
        for kind in sorted({frozenset(), *inside.values()}, key=lambda kind: (len(kind), sorted(kind))):
            below = [i for i, level in enumerate(levels) if set(level.plates) < kind]
            parent = max(below, key=lambda i: (bool(levels[i].latent), len(levels[i].plates)), default=-1)
            outer = levels[parent].plates if below else ()
            levels.append(
                Level(
                    (*outer, *(plate for plate in order if plate in kind and plate not in outer)),
                    parent,
                    tuple(name for name in latent if inside[name] == kind),
                    tuple(name for name in observed if inside[name] == kind),
                )
            )
        axes = tuple(
            (name, tuple(places[name][plate] for plate in level.plates))
            for level in levels
            for name in (*level.latent, *level.observed)
        )
        tree = cls(tuple(levels), axes)
        tree._check(setting)
        return tree

    def _check(self, setting: Setting) -> None:
        """Refuse models whose rows are not exchangeable, or not independent given what is around them."""

        def run(seed=0, **known):
            seeded = handlers.seed(setting.conditioned(known), jax.random.key(seed))
            with ONE_AT_A_TIME, handlers.block():
                return handlers.trace(seeded).get_trace(*setting.args, **setting.kwargs)

        first = run()
        local = [name for level in self.levels[1:] for name in level.latent]
        if local:
            other = run(1)
            for name in local:
                for place in (0.0, 0.5, 1.0):
                    self._check_apart(name, place, first[name]["value"], other[name]["value"], run)
        trace = run(**{name: jnp.asarray(self._repeated(name, first[name]["value"])) for name in local})
        for level in self.levels[1:]:
            for name in (*level.latent, *level.observed):
                self._check_alike(name, trace[name])

    def _check_alike(self, name: str, site: dict[str, Any]) -> None:
        """Refuse a site with other parameters in some rows, all local values being equal."""
        fn, simulator, axes = site["fn"], parameters(site["fn"]), dict(self.axes)[name]
        ends = [np.asarray(end) for end in jax.tree.leaves(fn.support)]
        alike = all((end == end.ravel()[0]).all() for end in ends if end.size)
        if alike and simulator is not None:
            batch = fn.shape()[: len(fn.shape()) - len(simulator.event_shape)]
            numbers: Any = jnp.broadcast_to(simulator.theta, (*batch, simulator.theta.shape[-1]))
            axes = tuple(axis + len(simulator.event_shape) - 1 for axis in axes)
        elif alike:
            numbers = fn.log_prob(jnp.asarray(self._repeated(name, site["value"])))
            axes = tuple(axis + fn.event_dim for axis in axes)
        if alike:
            numbers = np.moveaxis(np.asarray(numbers), axes, range(len(axes)))
            row = numbers[(0,) * len(axes)]
            alike = np.allclose(numbers, row, rtol=1e-5, atol=0, equal_nan=True)
        if not alike:
            raise ValueError(
                f"the rows of {name!r} are not alike, as if each had a covariate of its own: make the "
                "covariate a site, simulated and observed, to learn from rows as a set"
            )

    def _check_apart(self, name: str, place: float, value: Any, other: Any, run) -> None:
        """Refuse a local site of one row that reaches other rows, or what is around them.

        The row's values are replaced by others. With the same random numbers all else must stay as it was.
        """
        changed, level = np.array(value), self.levels[self.level_of(name)]
        row = self._row(name, changed.shape, level.plates, place)
        if changed[row].size == changed.size:
            return
        changed[row] = np.asarray(other)[row]
        before, after = (run(**{name: jnp.asarray(v)}) for v in (value, changed))
        for site, _ in self.axes:
            one, two = (np.asarray(trace[site]["value"]) for trace in (before, after))
            same = np.array((one == two) | ((one != one) & (two != two)))
            if self.level_of(name) in self.ancestry(site):
                same[self._row(site, same.shape, level.plates, place)] = True
            if site != name and not same.all():
                raise ValueError(
                    f"site {site!r} depends on {name!r} of other rows of the plates {list(level.plates)}, so "
                    "that rows are not independent given the sites outside of them"
                )

    def _row(self, name: str, shape, plates: Sequence[str], place: float) -> tuple[Any, ...]:
        """An index of one row in some plates: the first for place 0, the last for 1."""
        index: list[Any] = [slice(None)] * len(shape)
        for plate, axis in zip(self.levels[self.level_of(name)].plates, dict(self.axes)[name]):
            if plate in plates:
                index[axis] = int(place * (shape[axis] - 1))
        return (..., *index)

    def _repeated(self, name: str, value: Any) -> np.ndarray:
        """A value whose first row stands in all rows."""
        value = np.asarray(value)
        index: list[Any] = [slice(None)] * value.ndim
        for axis in dict(self.axes)[name]:
            index[axis] = slice(0, 1)
        return np.broadcast_to(value[tuple(index)], value.shape)

    def level_of(self, name: str) -> int:
        """The number of a site's level."""
        return next(i for i, v in enumerate(self.levels) if name in (*v.latent, *v.observed))

    def ancestry(self, name_or_level: str | int) -> list[int]:
        """Numbers of a level, or a site's, and of all levels around it, the root last."""
        number = self.level_of(name_or_level) if isinstance(name_or_level, str) else name_or_level
        return [] if number < 0 else [number, *self.ancestry(self.levels[number].parent)]

    def without(self, dropped: Sequence[str]) -> PlateTree:
        """The tree of some of the latent sites, the others being integrated out.

        :raises ValueError: for a dropped site around one that is kept: given it alone rows are independent.
        """
        for number in self.latent_levels:
            kept = [name for name in self.levels[number].latent if name not in dropped]
            around = [n for i in self.latent_around(number) for n in self.levels[i].latent if n in dropped]
            if kept and around:
                raise ValueError(f"rows of {kept} are independent given {around} only, which are left out")
        levels = tuple(
            replace(level, latent=tuple(name for name in level.latent if name not in dropped))
            for level in self.levels
        )
        return PlateTree(levels, tuple((name, axes) for name, axes in self.axes if name not in dropped))

    @property
    def latent_levels(self) -> list[int]:
        """Numbers of the levels with latent sites."""
        return [number for number, level in enumerate(self.levels) if level.latent]

    def latent_around(self, number: int) -> list[int]:
        """Numbers of the levels around one that have latent sites, from the innermost outwards."""
        return [i for i in self.ancestry(self.levels[number].parent) if self.levels[i].latent]

    def inside(self, number: int) -> list[int]:
        """Numbers of the levels whose parent is this one."""
        return [i for i, level in enumerate(self.levels) if level.parent == number]

    @property
    def is_flat(self) -> bool:
        """Whether no observed site is in a plate."""
        return not any(level.observed for level in self.levels[1:])

    def arranged(self, name: str, value: Any) -> Any:
        """A value with its plates' axes before its others, outermost first; leading axes stay."""
        axes = dict(self.axes)[name]
        if not axes:
            return value
        first = np.ndim(value) + min(axes)
        return np.moveaxis(value, axes, range(first, first + len(axes)))

    def sizes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """The size of each plate, from the shapes of sites.

        :raises ValueError: for sites that disagree.
        """
        found: dict[str, tuple[int, str]] = {}
        for name, axes in self.axes:
            for plate, axis in zip(self.levels[self.level_of(name)].plates, axes):
                if name in shapes:
                    size = shapes[name][axis]
                    known, by = found.setdefault(plate, (size, name))
                    if known != size:
                        raise ValueError(
                            f"plate {plate!r} has {known} rows by site {by!r} and {size} by site {name!r}"
                        )
        return {plate: size for plate, (size, _) in found.items()}

    def resized(self, sites: Sites, sizes: Mapping[str, int]) -> Sites:
        """Sites with plates of other sizes."""
        shapes = []
        for name, shape in zip(sites.names, sites.shapes):
            new = list(shape)
            for plate, axis in zip(self.levels[self.level_of(name)].plates, dict(self.axes)[name]):
                new[axis] = sizes[plate]
            shapes.append(tuple(new))
        return Sites(sites.supports, sites.names, tuple(shapes))

    def columns(self, sites: Sites) -> list[np.ndarray]:
        """For each level, where its latent numbers are in the vector of all sites, ``(*sizes, D)``."""
        start, where = 0, {}
        for name, _, shape in sites.parts():
            size = math.prod(shape)
            where[name] = self.arranged(name, np.arange(start, start + size).reshape(shape))
            start += size
        found = []
        for level in self.levels:
            count = len(level.plates)
            parts = [where[n].reshape(*where[n].shape[:count], -1) for n in level.latent]
            found.append(np.concatenate(parts, -1) if parts else np.zeros(0, int))
        return found


def joined(tree: PlateTree, several: Sequence[Simulations]) -> tuple[Simulations, dict[str, np.ndarray]]:
    """Simulations of several plate sizes as one of the largest, and how many rows each plate has, ``(N,)``.

    Rows that are not there repeat the last one that is, and are never looked at.
    """
    shapes = [{name: np.shape(value)[1:] for name, value in sims.items()} for sims in several]
    sizes = [tree.sizes(own) for own in shapes]
    largest = {plate: max(own[plate] for own in sizes) for plate in sizes[0]}
    names = [name for name, _ in tree.axes]
    values: dict[str, list[Any]] = {name: [] for name in names}
    errors: dict[int, str] = {}
    start = 0
    for sims in several:
        for name in names:
            value, level = np.asarray(sims[name]), tree.levels[tree.level_of(name)]
            for plate, axis in zip(level.plates, dict(tree.axes)[name]):
                grown = [(0, 0)] * value.ndim
                grown[axis] = (0, largest[plate] - value.shape[axis])
                value = np.pad(value, grown, mode="edge")
            values[name].append(value)
        errors |= {start + row: what for row, what in sims.errors.items()}
        start += len(sims.failed)
    counts = {
        plate: np.concatenate([np.full(len(s.failed), own[plate]) for s, own in zip(several, sizes)])
        for plate in largest
    }
    whole = next(s for s, own in zip(several, sizes) if own == max(sizes, key=lambda o: tuple(o.values())))
    both = {name: np.concatenate(parts) for name, parts in values.items()}
    return Simulations(both, errors, whole.args, whole.kwargs), counts
