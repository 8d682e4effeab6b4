# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""The plates of a model as a tree of levels: what is exchangeable, and what is local to what."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers

from numpyro_maf.codec import storable
from numpyro_maf.inference.sites import Sites
from numpyro_maf.sbi.posterior import Setting
from numpyro_maf.sbi.simulations import Simulations
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

        :raises ValueError: for latent sites of crossed plates, which inform each other, and for sites of one
            row that depend on the latent sites of others.
        """
        trace = run_once(setting.model, setting.args, setting.kwargs)
        inside, places = {}, {}
        for name in (*latent, *observed):
            site = trace[name]
            frames = {frame.name: frame.dim for frame in site["cond_indep_stack"]}
            inside[name] = frozenset(frames)
            event = np.ndim(site["value"]) - len(site["fn"].batch_shape)
            places[name] = {plate: dim - event for plate, dim in frames.items()}
        kinds = {inside[name] for name in latent}
        for name in observed:
            around = [kind for kind in kinds if kind & inside[name]]
            for one in around:
                crossed = next((other for other in around if not (one <= other or other <= one)), None)
                if crossed is not None:
                    raise ValueError(
                        f"latent sites of the plates {sorted(one)} and {sorted(crossed)} meet in {name!r}, "
                        "and depend on each other given the data: plates=False learns all sites jointly"
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
        tree._check_rows(setting)
        return tree

    def _check_rows(self, setting: Setting) -> None:
        """Refuse models in which a row's latent values reach what is outside of the row.

        The first row's values are replaced by those of another run. With the same random numbers everything
        else must stay as it was.
        """
        names = [name for level in self.levels for name in (*level.latent, *level.observed)]
        if not any(level.latent for level in self.levels[1:]):
            return

        def run(seed, **known):
            seeded = handlers.seed(setting.conditioned(known), jax.random.key(seed))
            with ONE_AT_A_TIME, handlers.block():
                return handlers.trace(seeded).get_trace(*setting.args, **setting.kwargs)

        first, other = run(0), run(1)
        for number, level in enumerate(self.levels[1:], 1):
            for name in level.latent:
                row = (..., *self._first_row(name, np.ndim(first[name]["value"])))
                changed = np.array(first[name]["value"])
                if changed[row].size == changed.size:
                    continue
                changed[row] = np.asarray(other[name]["value"])[row]
                both = [run(0, **{name: jnp.asarray(v)}) for v in (first[name]["value"], changed)]
                for site in names:
                    before, after = (np.asarray(trace[site]["value"]) for trace in both)
                    same = (before == after) | (np.isnan(before) & np.isnan(after))
                    if site != name and number in self.ancestry(site):
                        same = same.copy()
                        same[(..., *self._first_row(site, same.ndim, level.plates))] = True
                    if site != name and not same.all():
                        raise ValueError(
                            f"site {site!r} depends on {name!r} of other rows of the plates "
                            f"{list(level.plates)}, so that rows are not independent given the sites outside "
                            "of them: plates=False learns all latent sites jointly"
                        )

    def _first_row(self, name: str, rank: int, plates: Sequence[str] | None = None) -> tuple[Any, ...]:
        """An index of the first row in some plates, of all by default."""
        level = self.levels[self.level_of(name)]
        kept = level.plates if plates is None else plates
        index: list[Any] = [slice(None)] * rank
        for plate, axis in zip(level.plates, dict(self.axes)[name]):
            if plate in kept:
                index[axis] = 0
        return tuple(index)

    def level_of(self, name: str) -> int:
        """The number of a site's level."""
        return next(i for i, v in enumerate(self.levels) if name in (*v.latent, *v.observed))

    def ancestry(self, name_or_level: str | int) -> list[int]:
        """Numbers of a level, or a site's, and of all levels around it, the root last."""
        number = self.level_of(name_or_level) if isinstance(name_or_level, str) else name_or_level
        return [] if number < 0 else [number, *self.ancestry(self.levels[number].parent)]

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
        lead, rank = np.ndim(value), self._rank(name, value)
        return value if not axes else np.moveaxis(value, axes, range(lead - rank, lead - rank + len(axes)))

    def _rank(self, name, value) -> int:
        """How many of a value's last axes are from the outermost of its plates on."""
        return max(-axis for axis in dict(self.axes)[name]) if dict(self.axes)[name] else 0

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
        for name, _, shape in sites._parts():
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
