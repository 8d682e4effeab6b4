# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Masked autoregressive flows and their family, as NumPyro distributions."""

from numpyro_maf import conditionals
from numpyro_maf._version import __version__
from numpyro_maf.autoregressive import (
    Autoregressive,
    Coupling,
    Elementwise,
    InverseAutoregressive,
    MaskedAutoregressive,
)
from numpyro_maf.bijectors import (
    ActNorm,
    Bijector,
    Chain,
    Inverse,
    Logit,
    LULinear,
    Part,
    Permute,
    Probit,
    Standardize,
)
from numpyro_maf.builders import (
    circular,
    elementwise,
    flowpp,
    glow,
    iaf,
    made,
    maf,
    nice,
    nis,
    nsf,
    realnvp,
)
from numpyro_maf.distributions import FlowDistribution
from numpyro_maf.fit import FitResult, fit
from numpyro_maf.flow import Flow, from_spec
from numpyro_maf.hmm import HMM
from numpyro_maf.io import load, save
from numpyro_maf.made import MADE
from numpyro_maf.module import flow_module, random_flow_module
from numpyro_maf.scalars import Additive, Affine, Compose, MixtureCDF, Scalar
from numpyro_maf.splines import CircularSpline, PiecewiseLinear, PiecewiseQuadratic, RQSpline

__all__ = [
    "HMM",
    "MADE",
    "ActNorm",
    "Additive",
    "Affine",
    "Autoregressive",
    "Bijector",
    "Chain",
    "CircularSpline",
    "Compose",
    "Coupling",
    "Elementwise",
    "FitResult",
    "Flow",
    "FlowDistribution",
    "Inverse",
    "InverseAutoregressive",
    "LULinear",
    "Logit",
    "MaskedAutoregressive",
    "MixtureCDF",
    "Part",
    "Permute",
    "PiecewiseLinear",
    "PiecewiseQuadratic",
    "Probit",
    "RQSpline",
    "Scalar",
    "Standardize",
    "__version__",
    "circular",
    "conditionals",
    "elementwise",
    "fit",
    "flow_module",
    "flowpp",
    "from_spec",
    "glow",
    "iaf",
    "load",
    "made",
    "maf",
    "nice",
    "nis",
    "nsf",
    "random_flow_module",
    "realnvp",
    "save",
]
