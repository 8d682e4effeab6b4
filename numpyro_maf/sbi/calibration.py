# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Whether an amortised posterior means what it says, over many simulated observations at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from numpyro_maf.diagnostics import SBC, Coverage, coverage, sbc, tarp
from numpyro_maf.sbi.neural import NeuralPosterior

__all__ = ["Calibration", "calibrate"]


@dataclass(frozen=True)
class Calibration:
    """What :func:`calibrate` returns; printing it gives the verdicts.

    :param sbc: by number; ``coverage``: of regions of highest density; ``tarp``: of balls about random
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


def calibrate(key, posterior: NeuralPosterior, sims, *, num_samples: int = 1000) -> Calibration:
    """Draw from the posteriors of many simulated observations, all in one pass, and compare with the truth.

    :param posterior: from :func:`~numpyro_maf.npe`.
    :param sims: some hundreds that it was not trained on, by site, ``(N, ...)``. Those that failed are left
        out.
    :param num_samples: L, of each posterior.
    """
    usable = ~np.asarray(getattr(sims, "failed", np.zeros(len(sims[posterior.view.names[0]]), bool)))
    bound = posterior({name: np.asarray(sims[name])[usable] for name in posterior.view.names})
    truth = {name: np.asarray(sims[name])[usable] for name in posterior.sites.names}
    draws = bound.sample(key, (num_samples,))
    densities = np.concatenate(
        [bound.log_prob({n: v[i : i + 100] for n, v in draws.items()}) for i in range(0, num_samples, 100)]
    )
    return Calibration(sbc(draws, truth), coverage(densities, bound.log_prob(truth)), tarp(draws, truth))
