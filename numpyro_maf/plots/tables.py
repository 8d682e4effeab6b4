# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Draws by site as columns with names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from numpyro_maf.inputs import nearest, rows_by_site

__all__ = ["columns", "named_draws"]


def named_draws(what: str, draws: Any) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Draws by site, and their weights if they have any, of whatever holds them."""
    weights = None
    if hasattr(draws, "get_samples"):
        draws = draws.get_samples()
    elif hasattr(draws, "posterior") and hasattr(draws.posterior, "data_vars"):
        group = draws.posterior
        draws = {name: np.asarray(group[name]) for name in group.data_vars}
        draws = {name: value.reshape(-1, *value.shape[2:]) for name, value in draws.items()}
    elif hasattr(draws, "psis") and hasattr(draws, "samples"):
        weights = None if getattr(draws, "rows", None) else np.exp(np.asarray(draws.psis.log_weights, float))
        draws = draws.samples
    elif hasattr(draws, "draws"):
        draws = draws.draws
    if not isinstance(draws, Mapping):
        hint = "; draw first: .sample(key, (1000,))" if hasattr(draws, "sample") else ""
        raise TypeError(f"{what} must be draws by site, got a {type(draws).__name__}{hint}")
    if not draws:
        raise ValueError(f"{what} holds no site")
    return rows_by_site(what, draws, (), "draws"), weights


def columns(
    draws: Mapping[str, Any], names: Sequence[str] | None, optional: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Each number of some sites, ``(N,)`` by name: ``"mu"``, ``"theta[1]"``, ``"w[0,2]"``.

    :param names: of sites or numbers; None for all.
    :param optional: names of numbers that count, each of which may lack; None for all, none of which may.
    """
    table: dict[str, np.ndarray] = {}
    for name, value in draws.items():
        for index in np.ndindex(value.shape[1:]):
            label = f"{name}[{','.join(map(str, index))}]" if index else name
            table[label] = value[(slice(None), *index)]
    if optional is not None:
        return {label: table[label] for label in optional if label in table}
    if names is None:
        return table
    chosen: dict[str, np.ndarray] = {}
    for name in names:
        fits = {k: v for k, v in table.items() if name in (k, k.split("[")[0])}
        if not fits:
            raise ValueError(f"there is no {name!r}{nearest(name, {**draws, **table})}")
        chosen |= fits
    return chosen
