# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Flows: the public path of what lives in :mod:`numpyro_maf.flows.flow`."""

from numpyro_maf.flows.flow import Flow, builder, from_spec

__all__ = ["Flow", "builder", "from_spec"]
