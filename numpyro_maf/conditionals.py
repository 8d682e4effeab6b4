# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Distributions of a column of a MADE: the public path of :mod:`numpyro_maf.flows.conditionals`."""

from numpyro_maf.flows.conditionals import (
    Bernoulli,
    Categorical,
    Conditional,
    Count,
    LogMixture,
    Mixture,
    Normal,
)

__all__ = ["Bernoulli", "Categorical", "Conditional", "Count", "LogMixture", "Mixture", "Normal"]
