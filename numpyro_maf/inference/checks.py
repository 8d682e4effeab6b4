# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Whether to believe a guide, and what its draws become when each is weighed by the model."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from numpyro.handlers import replay, seed, substitute
from numpyro.infer.autoguide import AutoContinuous
from numpyro.infer.util import log_density

from numpyro_maf.diagnostics import PSIS, psis
from numpyro_maf.inference.rows import Rows, find_plate, score_rows
from numpyro_maf.inference_data import to_arviz
from numpyro_maf.pytrees import Described
from numpyro_maf.rng import as_key
from numpyro_maf.traces import run_once

__all__ = ["GuideCheck", "check_guide", "draw_and_score"]


# What can be done where the weights do not hold, by what was checked.
_NEURAL = "simulate more, or in rounds near the observation, or run NUTS if the model has a density"
_ROWS = "train longer, with a wider encoder or another flow, or sample these rows by NUTS"
_NEUTRA = "train longer, choose another flow, or use it in NeuTra"
_OTHER = "train longer, choose a guide that fits more, or run NUTS"
_BLIND = "a mode that no draw reached does not show"


@dataclass(frozen=True, repr=False)
class GuideCheck(Described):
    """The result of :func:`check_guide`; printing it gives the verdict.

    Weights are read at draws of the guide. So they cannot tell of a mode of the posterior that no draw
    reached: where there may be several, start from many places (``starts`` of the flow guides), or compare
    with tempered or long MCMC.

    :param samples: the guide's draws by site, ``(S, ...)``, deterministic sites included. By row: of the rows
        that were checked, without deterministic sites.
    :param elbo: their mean log-weight, in nats. By row: that of all rows, reckoned from those checked.
    :param log_evidence: log of their mean weight: the model's evidence, if the weights hold. NaN where
        variables outside the rows were held.
    :param psis: Pareto-smoothed weights and their k-hat; by row, of the row with the greatest k-hat.
    :param advice: what to do where the weights do not hold.
    :param rows: for a guide that is judged row by row, what was found of each; else None.
    :param observation: the observed values by site, in one run of the model.
    """

    samples: dict[str, Array]
    elbo: float
    log_evidence: float
    psis: PSIS
    advice: str = _NEURAL
    rows: Rows | None = None
    observation: dict[str, Any] = field(default_factory=dict)

    @property
    def khat(self) -> float:
        """Shape of the weights' tail: below ``psis.threshold`` the weighted draws can be trusted."""
        return self.psis.khat

    @property
    def log_evidence_error(self) -> float:
        """Standard error of ``log_evidence``, if the weights hold; by row, of all rows from those checked."""
        each = self.rows.psis if self.rows else (self.psis,)
        whole = self.rows.full / len(each) if self.rows else 1
        lost = sum(max(1 / p.ess - 1 / len(p.log_weights), 0) for p in each)
        return whole * math.sqrt(lost)

    @property
    def verdict(self) -> str:
        """One sentence: whether to use the guide as it is, its weighted draws, or neither."""
        each = self.rows.psis if self.rows else (self.psis,)
        count = len(self.psis.log_weights)
        ess = min(p.ess for p in each)
        figures = f"k-hat {self.khat:.2f}, effective {ess:.0f} of {count} draws"
        if self.rows:
            figures = f"{len(each)} of {self.rows.full} rows of {self.rows.plate!r}, worst {figures}"
            figures += f", given one draw of {', '.join(self.rows.held)}" if self.rows.held else ""
        bad = [i for i, p in enumerate(each) if p.khat >= p.threshold]
        if bad:
            which = ""
            if self.rows:
                shown = ", ".join(str(i) for i in self.rows.index[bad[:5]])
                which = f" for {len(bad)} rows ({shown}{', ...' if len(bad) > 5 else ''})"
            return f"do not trust it{which}: {figures}; {self.advice}"
        if ess < 0.9 * count:
            return f"use the weighted draws, not the guide's own: {figures}; {_BLIND}"
        return f"good as it is: {figures}; {_BLIND}"

    def _describe(self) -> list[str]:
        sites = ", ".join(f"{name} {jnp.shape(value)[1:]}" for name, value in self.samples.items())
        figures = f"ELBO {self.elbo:.3f}, log evidence {self.log_evidence:.3f}"
        verdict = textwrap.wrap(f"GuideCheck: {self.verdict}", 100, subsequent_indent="  ")
        return [*verdict, f"  {figures}", f"  sites: {sites}"]

    def __str__(self) -> str:
        return f"ELBO {self.elbo:.3f}, log evidence {self.log_evidence:.3f}; {self.verdict}"

    def resample(self, key: ArrayLike, num_samples: int | None = None) -> dict[str, Array]:
        """Draws by site, each as probable as its weight: importance resampling (with replacement).

        By row, each row is resampled by its own weights.
        """
        key = as_key(key)
        count = len(self.psis.log_weights) if num_samples is None else num_samples
        if self.rows is None:
            log_weights = jnp.asarray(self.psis.log_weights)
            chosen = np.asarray(jax.random.categorical(key, log_weights, shape=(count,)))
            return {name: value[chosen] for name, value in self.samples.items()}
        log_weights = jnp.asarray(np.stack([p.log_weights for p in self.rows.psis]))
        picked = jax.random.categorical(key, log_weights, shape=(count, len(log_weights)))
        columns, drawn = jnp.arange(len(log_weights)), {}
        for name, value in self.samples.items():
            axis = self.rows.axes.get(name)
            if axis is None:
                drawn[name] = jnp.repeat(value[:1], count, 0)
            else:
                drawn[name] = jnp.moveaxis(jnp.moveaxis(value, axis, 1)[picked, columns], 1, axis)
        return drawn

    def mean(self, function: Callable[[dict[str, Array]], Any]) -> Any:
        """The posterior mean of a function of the sites, by the weighted draws; by row, of resampled ones.

        :param function: of one draw, a dictionary by site; gives arrays.
        """
        if self.rows is not None:
            return jax.tree.map(lambda v: v.mean(0), jax.vmap(function)(self.resample(0)))
        weights = jnp.exp(jnp.asarray(self.psis.log_weights))
        return jax.tree.map(lambda v: jnp.tensordot(weights, v, 1), jax.vmap(function)(self.samples))

    def to_arviz(
        self,
        key: ArrayLike,
        model: Callable[..., Any],
        model_args: tuple[Any, ...] = (),
        model_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """The weighted draws, resampled, as ArviZ's data; see :func:`~numpyro_maf.to_arviz`."""
        return to_arviz(self.resample(key), model, model_args, model_kwargs, **options)


def check_guide(
    key: ArrayLike,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    params: Mapping[str, Any],
    *args: Any,
    num_samples: int = 4000,
    **kwargs: Any,
) -> GuideCheck:
    """Draw from a guide, any of NumPyro's, weigh each draw by the model, and say whether to believe it.

    Yao, Vehtari, Simpson & Gelman, *Yes, but Did It Work?* (2018): the weights ``p(x, z) / q(z)`` tell how
    far the guide is from the posterior, and mend it where it is near. Where the posterior falls apart into
    the rows of a plate (all sites are in it, or it is subsampled), each row has weights and a k-hat of its
    own, for the rows of one subsample; variables outside the plate are held at one draw, and not judged.

    :param key: a ``jax.random`` key.
    :param params: of a trained guide, such as ``svi_result.params``.
    :param args: of model and guide, with ``kwargs``.
    :param num_samples: number of draws, S.
    :raises ValueError: where no draw has a finite weight; and for subsampled models that cannot be judged by
        row: two subsampled plates, no variables of the guide in the plate, or rows that depend on each other.
    """
    key = jnp.asarray(as_key(key))
    plate = find_plate(model, guide, params, args, kwargs)
    if plate is not None:
        samples, raw, rows_of, outside = score_rows(
            key, model, guide, params, args, kwargs, plate, num_samples
        )
        rows = rows_of(tuple(_weigh(column) for column in raw.T))
        whole = rows.full / len(rows.index)
        elbo = whole * raw.mean(0).sum() + outside
        log_evidence = whole * _log_mean(raw).sum() + outside if not rows.held else math.nan
        worst = max(rows.psis, key=lambda p: p.khat)
        return GuideCheck(samples, float(elbo), float(log_evidence), worst, _ROWS, rows)
    samples, log_weights = draw_and_score(key, model, guide, params, args, kwargs, num_samples)
    trace = run_once(substitute(model, data=dict(params)), args, dict(kwargs))
    sites = {name: site for name, site in trace.items() if site["type"] == "sample"}
    seen = {name: site["value"] for name, site in sites.items() if site["is_observed"]}
    for name, value in samples.items():
        if name in sites and jnp.issubdtype(value.dtype, jnp.floating) and (value == value[:1]).all():
            raise ValueError(
                f"the guide puts all of {name!r} at one point, which has no density: its weights tell nothing"
            )
    raw = np.asarray(log_weights, np.float64)
    advice = _NEUTRA if isinstance(guide, AutoContinuous) else _OTHER
    figures = float(raw.mean()), float(_log_mean(raw))
    return GuideCheck(samples, *figures, _weigh(raw), advice, observation=seen)


def _finite(raw: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(raw), -np.inf, raw)


def _log_mean(raw: np.ndarray) -> Any:
    """Log of the mean weight, over the first axis."""
    return np.logaddexp.reduce(_finite(raw), 0) - math.log(len(raw))


def _weigh(raw: np.ndarray) -> PSIS:
    if not np.isfinite(raw).any():
        raise ValueError(
            "no draw of the guide has a finite weight: its parameters are not finite, or its draws lie where "
            "the model has no density"
        )
    return psis(_finite(raw))


def draw_and_score(
    key: ArrayLike,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    params: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    num_samples: int,
) -> tuple[dict[str, Array], Array]:
    """Draws of a guide by site, ``(S, ...)``, and ``log p(x, z) - log q(z)``, ``(S,)``."""

    def one(key):
        guide_key, model_key = jax.random.split(key)
        seeded = substitute(seed(guide, guide_key), data=params)
        log_guide, drawn = log_density(seeded, args, kwargs, {})
        replayed = replay(substitute(seed(model, model_key), data=params), drawn)
        log_model, run = log_density(replayed, args, kwargs, {})
        kinds = ("sample", "deterministic")
        shown = {
            name: site["value"]
            for name, site in run.items()
            if site["type"] in kinds and not site.get("is_observed", False)
        }
        return shown, log_model - log_guide

    keys = jax.random.split(as_key(key), num_samples)
    return jax.jit(lambda keys: lax.map(one, keys, batch_size=256))(keys)
