# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Pictures of results. Each function draws one kind of result and returns matplotlib's axes.

A new figure is one of pyplot's, so notebooks show it and ``plt.show()`` does. ``path=`` saves it instead of
leaving it open. Inks follow matplotlib's style, dark ones too; the colours can be told apart by readers who
see red and green alike.
"""

from numpyro_maf.plots.by_arviz import arviz
from numpyro_maf.plots.draws import pairs, predictive
from numpyro_maf.plots.functions import density, warp
from numpyro_maf.plots.learning import calibration, loss_curves, losses, recovery
from numpyro_maf.plots.style import palette
from numpyro_maf.plots.timeline import activities, activity_timeline

__all__ = [
    "activities", "activity_timeline", "arviz", "calibration", "density", "loss_curves", "losses", "pairs",
    "palette", "predictive", "recovery", "warp",
]  # fmt: skip
