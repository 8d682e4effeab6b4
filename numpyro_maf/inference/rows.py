# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Weights of a guide's draws for each row of a plate, where the posterior falls apart into rows.

With local variables ``z_i`` of rows ``i``, ``p(z | x)`` is the product of ``p(z_i | x_i)``, and so is an
amortised guide. Their ratio is judged row by row: that of all rows together multiplies the small errors of
each, and of a subsampled plate it is not even defined. What lies outside the plate is held at one draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array, lax
from numpyro.handlers import replay, seed, substitute, trace

from numpyro_maf.diagnostics import PSIS

__all__ = ["Rows", "find_plate", "score_rows"]


@dataclass(frozen=True)
class Rows:
    """What is known of each row that was checked.

    :param plate: the plate's name; ``full``: how many rows it has.
    :param index: ``(B,)``, the places of the rows that were checked.
    :param psis: for each of them, smoothed weights and k-hat.
    :param axes: for each site in the plate, its rows' axis counted from the right.
    :param held: sites outside the plate, held at one draw of the guide.
    """

    plate: str
    full: int
    index: np.ndarray
    psis: tuple[PSIS, ...]
    axes: dict[str, int]
    held: tuple[str, ...]


def _frame(site: dict[str, Any], plate: str) -> Any:
    return next((f for f in site.get("cond_indep_stack", ()) if f.name == plate), None)


def _drawn(site: dict[str, Any]) -> bool:
    """Whether a guide's site is random: Delta sites follow from others."""
    return site["type"] == "sample" and not site["is_observed"] and not isinstance(site["fn"], dist.Delta)


def find_plate(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    params: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> str | None:
    """The plate whose rows are to be judged one by one, or None.

    It is the subsampled plate; or one in which all sites of model and guide are.

    :raises ValueError: for two subsampled plates, and one in which the guide draws nothing.
    """
    found: list[Any] = []

    def look(key: Array) -> None:
        drawn, run = _traces(key, model, guide, params, {}, args, kwargs)
        sizes = {k: s["args"] for t in (drawn, run) for k, s in t.items() if s["type"] == "plate"}
        random = [s for s in drawn.values() if _drawn(s)]
        sites = [s for s in run.values() if s["type"] == "sample"]
        inside = {k: [_frame(s, k) is not None for s in random] for k in sizes}
        whole = [k for k in sizes if random and all(inside[k]) and all(_frame(s, k) for s in sites)]
        small = [k for k, (full, size) in sizes.items() if size not in (None, full)]
        found.extend((small, whole, sizes, inside))

    jax.eval_shape(look, jax.random.key(0))
    small, whole, sizes, inside = found
    if len(small) > 1:
        raise ValueError(f"check_guide judges the rows of one subsampled plate, got {small}")
    if small and not any(inside[small[0]]):
        full, size = sizes[small[0]]
        raise ValueError(
            f"the model draws {size} of the {full} rows of plate {small[0]!r}, in which the guide has no "
            f"variables: weights need all rows; check it with a model whose plate has subsample_size={full}"
        )
    return (small or sorted(whole, key=lambda k: -sizes[k][0]) or [None])[0]


def _traces(key, model, guide, params, held, args, kwargs):
    guide_key, model_key = jax.random.split(key)
    data = {**params, **held}
    drawn = trace(substitute(seed(guide, guide_key), data=data)).get_trace(*args, **kwargs)
    replayed = replay(substitute(seed(model, model_key), data=data), drawn)
    return drawn, trace(replayed).get_trace(*args, **kwargs)


def score_rows(
    key: Array,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    params: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    plate: str,
    num_samples: int,
) -> tuple[dict[str, Array], np.ndarray, Callable[[tuple[PSIS, ...]], Rows], float]:
    """Draws by site for some rows, ``(S, ...)``, their log-weights ``(S, B)``, what makes :class:`Rows` of
    them, and the log-weight of what lies outside the plate, at the draw where it is held.

    :raises ValueError: where something outside the plate depends on what is in it.
    """
    held_key, draws_key = jax.random.split(key)
    first, run = _traces(held_key, model, guide, params, {}, args, kwargs)
    held = {k: s["value"] for t in (run, first) for k, s in t.items() if s["type"] == "plate"}
    outside = [k for k, s in first.items() if _drawn(s) and _frame(s, plate) is None]
    held |= {k: first[k]["value"] for k in outside}
    full, _ = run[plate]["args"]
    count = len(held[plate])
    axes: dict[str, int] = {}

    def one(key):
        drawn, run = _traces(key, model, guide, params, held, args, kwargs)
        inner, outer = jnp.zeros(count), {}
        for who, sign, sites in (("guide", -1, drawn), ("model", 1, run)):
            for name, site in sites.items():
                if site["type"] != "sample":
                    continue
                frame = _frame(site, plate)
                log_prob = site["fn"].log_prob(site["value"])
                scale = 1.0 if site["scale"] is None else site["scale"]
                if frame is None:
                    outer[f"{who}'s site {name!r}"] = sign * jnp.sum(scale * log_prob)
                    continue
                rows = jnp.moveaxis(scale * log_prob * (count / full), frame.dim, 0)
                inner = inner + sign * rows.reshape(count, -1).sum(-1)
                axes[name] = frame.dim - site["fn"].event_dim
        shown = {k: s["value"] for k, s in run.items() if s["type"] == "sample" and not s["is_observed"]}
        return shown, inner, outer

    keys = jax.random.split(draws_key, num_samples)
    samples, weights, outer = jax.jit(lambda keys: lax.map(one, keys, batch_size=256))(keys)
    for name, values in outer.items():
        if np.ptp(np.asarray(values)) > 1e-3 * max(1.0, float(jnp.abs(values).max())):
            raise ValueError(
                f"the {name} is outside plate {plate!r} and depends on variables in it: the rows cannot be "
                "judged one by one"
            )
    names = tuple(k for k in samples if k not in axes)
    axes = {k: axes[k] for k in samples if k in axes}
    index = np.asarray(held[plate])
    return (
        samples,
        np.asarray(weights, np.float64),
        lambda psis: Rows(plate, full, index, psis, axes, names),
        float(sum(v[0] for v in outer.values())),
    )
