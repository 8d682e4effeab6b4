# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""What one trace of a model tells about its sites: supports, shapes, and the parameters of a simulator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import constraints

from numpyro_maf.flows.supports import categories
from numpyro_maf.inference.sites import Sites
from numpyro_maf.sbi.passes import traced
from numpyro_maf.sbi.simulator import parameters

__all__ = ["ModelSites"]

_ROWS = 1024  # of simulations, in one compiled pass over the model


@dataclass(frozen=True)
class ModelSites:
    """The sample sites of a model, found in one trace.

    :param shown: by site: the support, the shape of a value, and whether it is observed.
    :param varied: names of the sites whose support depends on other sites.
    :param observed: names of the sites to condition on; ``simulated``: names of those with simulations.
    :param theta: parameters of the only observed site, if it is a simulator, ``(N, *batch, P)``.
    :param event_shape: of that simulator.
    """

    shown: dict[str, tuple[Any, tuple[int, ...], bool]]
    varied: frozenset[str]
    observed: tuple[str, ...]
    simulated: frozenset[str]
    theta: np.ndarray | None
    event_shape: tuple[int, ...]

    @classmethod
    def of(cls, key, setting, sims, observed, own: bool) -> ModelSites:
        """Trace the model once, mapped over simulations.

        :param own: whether to compute the parameters of the only observed site.
        """
        seen: dict[str, Any] = {}

        def row(key, values):
            def given(site):
                value = values.get(site["name"])
                fits = site["type"] == "sample" and np.shape(value) == site["fn"].shape()
                return value if value is not None and fits else None

            trace, _ = traced(setting.model, setting.args, setting.kwargs, key, substitute_fn=given)
            samples = {name: site for name, site in trace.items() if site["type"] == "sample"}
            for name in observed:
                if name not in samples or name not in sims:
                    raise ValueError(
                        f"observed site {name!r} is not among the model's {sorted(samples)} simulated"
                    )
            seen["sites"] = {
                name: (site["fn"].support, jnp.shape(site["value"]), site["is_observed"])
                for name, site in samples.items()
            }
            leaves = {name: jax.tree.leaves(support) for name, (support, *_) in seen["sites"].items()}
            ends = {name: [a for a in ends if _is_traced(a)] for name, ends in leaves.items()}
            fn = samples[observed[0]]["fn"]
            simulator = parameters(fn) if own and len(observed) == 1 else None
            if simulator is None:
                return ends, None
            seen["event"] = simulator.event_shape
            batch = fn.shape()[: len(fn.shape()) - len(simulator.event_shape)]
            return ends, jnp.broadcast_to(simulator.theta, (*batch, simulator.theta.shape[-1]))

        count = len(next(iter(sims.values())))
        size = min(count, _ROWS)
        keys, several = jax.random.split(key, size), jax.jit(jax.vmap(row))
        values = {name: np.asarray(value) for name, value in sims.items() if name not in observed}

        def part(start):  # always of the same size, so that nothing is traced anew
            rows = np.resize(np.arange(start, min(start + size, count)), size)
            return several(keys, {name: value[rows] for name, value in values.items()})

        ends, theta = part(0)
        if theta is not None:
            parts = [theta, *(part(start)[1] for start in range(size, count, size))]
            theta = np.concatenate([np.asarray(p) for p in parts])[:count]
        varied = {n for n, leaves in ends.items() if any((np.asarray(a) != a[:1]).any() for a in leaves)}
        shown = {}
        for name, (support, *rest) in seen["sites"].items():
            rows = iter(ends[name])
            fixed = jax.tree.map(
                lambda a, rows=rows: np.asarray(next(rows))[0] if _is_traced(a) else a, support
            )
            shown[name] = (fixed, *rest)
        return cls(shown, frozenset(varied), observed, frozenset(sims), theta, seen.get("event", ()))

    def latent(self, chosen) -> list[str]:
        """Names of the latent sites, or those chosen, in the model's order."""
        names = [n for n, (*_, known) in self.shown.items() if n not in self.observed and not known]
        if chosen is not None:
            if not chosen or set(chosen) - set(names):
                raise ValueError(f"latent must be some of {names}, got {sorted(chosen)}")
            names = [name for name in names if name in chosen]
        absent = [name for name in names if name not in self.simulated]
        if absent and self.theta is None:
            raise ValueError(f"the simulations lack the latent sites {absent}")
        return names

    def support(self, name: str) -> Any:
        """The support of a site; the reals if it depends on other sites."""
        return constraints.real if name in self.varied else self.shown[name][0]

    def sites(self, names) -> Sites:
        """Some latent sites."""
        if not names:
            raise ValueError("the model has no latent sites")
        for name in names:
            support = self.shown[name][0]
            if support.is_discrete and not categories(support):
                raise ValueError(
                    f"site {name!r} has discrete values without a least one; only integers from one can be "
                    "learned"
                )
            if name in self.varied:
                raise ValueError(f"the support of site {name!r} depends on other sites")
        supports, shapes = zip(*(self.shown[name][:2] for name in names))
        return Sites(supports, tuple(names), shapes)


def _is_traced(a) -> bool:
    return isinstance(a, jax.core.Tracer)
