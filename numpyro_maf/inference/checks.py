# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Whether to believe a guide, and what its draws become when each is weighed by the model."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from numpyro.handlers import replay, seed, substitute
from numpyro.infer.util import log_density

from numpyro_maf.diagnostics import PSIS, psis
from numpyro_maf.inference_data import to_arviz
from numpyro_maf.pytrees import Described
from numpyro_maf.rng import as_key

__all__ = ["GuideCheck", "check_guide", "draw_and_score"]


@dataclass(frozen=True, repr=False)
class GuideCheck(Described):
    """The result of :func:`check_guide`; printing it gives the verdict.

    :param samples: the guide's draws by site, ``(S, ...)``, deterministic sites included.
    :param elbo: their mean log-weight, in nats.
    :param log_evidence: log of their mean weight: the model's evidence, if the weights hold.
    :param psis: Pareto-smoothed weights and their k-hat.
    """

    samples: dict[str, Array]
    elbo: float
    log_evidence: float
    psis: PSIS

    @property
    def khat(self) -> float:
        """Shape of the weights' tail: below ``psis.threshold`` the weighted draws can be trusted."""
        return self.psis.khat

    @property
    def verdict(self) -> str:
        """One sentence: whether to use the guide as it is, its weighted draws, or neither."""
        count, share = len(self.psis.log_weights), self.psis.ess / len(self.psis.log_weights)
        figures = f"k-hat {self.khat:.2f}, effective {self.psis.ess:.0f} of {count} draws"
        if self.khat >= self.psis.threshold:
            return f"do not trust it: {figures}; train longer, choose another flow, or use it in NeuTra"
        if share < 0.9:
            return f"use the weighted draws, not the guide's own: {figures}"
        return f"good as it is: {figures}"

    def _describe(self) -> list[str]:
        sites = ", ".join(f"{name} {jnp.shape(value)[1:]}" for name, value in self.samples.items())
        figures = f"ELBO {self.elbo:.3f}, log evidence {self.log_evidence:.3f}"
        verdict = textwrap.wrap(f"GuideCheck: {self.verdict}", 100, subsequent_indent="  ")
        return [*verdict, f"  {figures}", f"  sites: {sites}"]

    def __str__(self) -> str:
        return f"ELBO {self.elbo:.3f}, log evidence {self.log_evidence:.3f}; {self.verdict}"

    def resample(self, key: ArrayLike, num_samples: int | None = None) -> dict[str, Array]:
        """Draws by site, each as probable as its weight: importance resampling (with replacement)."""
        log_weights = jnp.asarray(self.psis.log_weights)
        count = len(log_weights) if num_samples is None else num_samples
        rows = np.asarray(jax.random.categorical(as_key(key), log_weights, shape=(count,)))
        return {name: value[rows] for name, value in self.samples.items()}

    def mean(self, function: Callable[[dict[str, Array]], Any]) -> Any:
        """The posterior mean of a function of the sites, by the weighted draws.

        :param function: of one draw, a dictionary by site; gives arrays.
        """
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
    far the guide is from the posterior, and mend it where it is near.

    :param key: a ``jax.random`` key.
    :param params: of a trained guide, such as ``svi_result.params``.
    :param args: of model and guide, with ``kwargs``.
    :param num_samples: S.
    """
    samples, log_weights = draw_and_score(key, model, guide, params, args, kwargs, num_samples)
    raw = np.asarray(log_weights, np.float64)
    finite = np.where(np.isnan(raw), -np.inf, raw)
    found = psis(finite)
    log_evidence = np.logaddexp.reduce(finite) - math.log(num_samples)
    return GuideCheck(samples, float(raw.mean()), float(log_evidence), found)


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
