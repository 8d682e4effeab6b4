# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Whether an observation is like the simulations."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_maf.pytrees import Described

__all__ = ["Surprise", "typical_of"]


@dataclass(frozen=True, repr=False)
class Surprise(Described):
    """The distance of an observation from the simulations.

    :param distance: Mahalanobis distance of its summary from those of simulations.
    :param share: of simulations that lie at least as far.
    """

    distance: float
    share: float

    @classmethod
    def of(cls, context, typical) -> Surprise:
        """The surprise of a summary ``(C,)``.

        :param typical: of the simulations' summaries, see :func:`typical_of`.
        """
        mean, whitening, distances = typical
        distance = float(jnp.linalg.norm((context - mean) @ whitening))
        share = 1 - np.searchsorted(np.asarray(distances), distance) / len(distances)
        return cls(distance, float(share))

    @property
    def verdict(self) -> str:
        """One sentence: whether the observation lies within what was simulated."""
        figures = f"distance {self.distance:.1f}, of the simulations {self.share:.2%} are as far"
        if self.share < 1e-3:
            advice = "Either the model is wrong, or simulate more"
            return f"the observation lies outside what was simulated: {figures}. {advice}"
        return f"the observation lies within what was simulated: {figures}"

    def _describe(self):
        return [f"Surprise: {self.verdict}"]


def typical_of(seen):
    """Mean, whitening matrix and sorted distances of summaries ``(N, C)``.

    The distances are those of one half of the summaries from mean and covariance of the other half: in many
    dimensions a new one lies farther out than those that the covariance was made of.
    """
    known, new = seen[::2], seen[1::2]
    mean = known.mean(0)
    values, vectors = np.linalg.eigh(np.atleast_2d(np.cov(known.T)))
    kept = values > 1e-6 * values.max()
    whitening = vectors[:, kept] / np.sqrt(values[kept])
    distances = np.sort(np.linalg.norm((new - mean) @ whitening, axis=1))
    return jax.device_put((mean, whitening, distances))
