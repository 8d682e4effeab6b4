# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Masked autoregressive flows and their family, as NumPyro distributions."""

from numpyro_maf._version import __version__
from numpyro_maf.autoregressive import (
    Autoregressive,
    Elementwise,
    InverseAutoregressive,
    MaskedAutoregressive,
)
from numpyro_maf.bijectors import Bijector, Inverse, Permute, Standardize
from numpyro_maf.fit import FitResult, fit
from numpyro_maf.flow import Flow, FlowDistribution, elementwise, from_spec, iaf, maf, nsf
from numpyro_maf.hmm import HMM
from numpyro_maf.io import load, save
from numpyro_maf.module import flow_module, random_flow_module
from numpyro_maf.scalars import Additive, Affine, RQSpline, Scalar

__all__ = [
    "HMM",
    "Additive",
    "Affine",
    "Autoregressive",
    "Bijector",
    "Elementwise",
    "FitResult",
    "Flow",
    "FlowDistribution",
    "Inverse",
    "InverseAutoregressive",
    "MaskedAutoregressive",
    "Permute",
    "RQSpline",
    "Scalar",
    "Standardize",
    "__version__",
    "elementwise",
    "fit",
    "flow_module",
    "from_spec",
    "iaf",
    "load",
    "maf",
    "nsf",
    "random_flow_module",
    "save",
]
