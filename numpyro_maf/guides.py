# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Guides: the public path of what lives in :mod:`numpyro_maf.inference.guides`."""

from numpyro_maf.inference.amortized import AutoAmortized
from numpyro_maf.inference.gaussian import fit_gaussian
from numpyro_maf.inference.guides import AutoFlow, AutoIAF, AutoMAF, FlowGuide

__all__ = ["AutoAmortized", "AutoFlow", "AutoIAF", "AutoMAF", "FlowGuide", "fit_gaussian"]
