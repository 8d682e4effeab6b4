# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Flows: the public path of what lives in :mod:`numpyro_maf.flows.flow`."""

from numpyro_maf.flows.assembly import BUILDERS, builder, from_spec
from numpyro_maf.flows.flow import BijectorFlow, Flow, Recipe

__all__ = ["BUILDERS", "BijectorFlow", "Flow", "Recipe", "builder", "from_spec"]
