# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Diagnostics: arrays in, plain results out."""

from numpyro_maf.diagnostics.calibration import SBC, Coverage, coverage, sbc, tarp
from numpyro_maf.diagnostics.scores import c2st, classification_scores, expected_calibration_error
from numpyro_maf.diagnostics.weights import PSIS, psis

__all__ = [
    "PSIS", "SBC", "Coverage", "c2st", "classification_scores", "coverage", "expected_calibration_error",
    "psis", "sbc", "tarp",
]  # fmt: skip
