# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Whether an amortised posterior means what it says, over many simulated observations at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from numpyro_maf.diagnostics import SBC, Coverage, coverage, sbc, tarp
from numpyro_maf.inputs import rows_by_site
from numpyro_maf.pytrees import Described
from numpyro_maf.rng import as_key, split
from numpyro_maf.sbi.neural_posterior import NeuralPosterior

__all__ = ["Calibration", "calibrate"]


@dataclass(frozen=True, repr=False)
class Calibration(Described):
    """The result of :func:`calibrate`; printing it gives the verdicts.

    :param sbc: ranks by number; ``coverage``: of regions of highest density; ``tarp``: of balls about random
        points.
    """

    sbc: SBC
    coverage: Coverage
    tarp: Coverage

    @property
    def verdict(self) -> str:
        """Ranks, regions, and balls about random points, a line each."""
        return f"ranks: {self.sbc}\nregions: {self.coverage}\nrandom points: {self.tarp}"

    def __str__(self):
        return self.verdict

    def _describe(self):
        return ["Calibration", *self.verdict.splitlines()]


def calibrate(
    key: ArrayLike, posterior: NeuralPosterior, sims: dict[str, Any], *, num_samples: int = 1000
) -> Calibration:
    """Draw from the posteriors of many simulated observations, all in one pass, and compare with the truth.

    :param key: a ``jax.random`` key, or an integer.
    :param posterior: from :func:`~numpyro_maf.npe`.
    :param sims: some hundreds that it was not trained on, by site, ``(N, ...)``. Those that failed are left
        out.
    :param num_samples: L, of each posterior.
    :raises ValueError: for sites that are missing or of unequal lengths, and fewer than 20 simulations.
    """
    seen, latent = posterior.view.names, posterior.sites.names
    values = rows_by_site("sims", sims, (*seen, *latent))
    usable = ~np.asarray(getattr(sims, "failed", np.zeros(len(values[seen[0]]), bool)))
    if usable.sum() < 20:
        raise ValueError(f"calibration needs 20 posteriors or more, sims has {usable.sum()} usable rows")
    bound = posterior({name: values[name][usable] for name in seen})
    truth = {name: values[name][usable] for name in latent}
    draw_key, tie_key = split(as_key(key))
    draws = bound.sample(draw_key, (num_samples,))
    densities = np.concatenate(
        [bound.log_prob({n: v[i : i + 100] for n, v in draws.items()}) for i in range(0, num_samples, 100)]
    )
    ranks, balls = sbc(draws, truth, seed=tie_key), tarp(draws, truth, seed=tie_key)
    return Calibration(ranks, coverage(densities, bound.log_prob(truth), seed=tie_key), balls)
