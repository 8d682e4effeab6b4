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
    Regression,
    Reshape,
    Standardize,
)
from numpyro_maf.builders import (
    circular,
    elementwise,
    ffjord,
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
from numpyro_maf.completion import Completer, complete, fit_completer
from numpyro_maf.dequantize import Dequantize, bits_per_dimension
from numpyro_maf.distill import distill
from numpyro_maf.distributions import FlowDistribution
from numpyro_maf.elbo import PathELBO
from numpyro_maf.fit import FitResult, fit, fit_mixture
from numpyro_maf.flow import Flow, from_spec
from numpyro_maf.guides import AutoAmortized, AutoFlow, AutoIAF, AutoMAF
from numpyro_maf.hmm import HMM
from numpyro_maf.importance import GuideCheck, check_guide
from numpyro_maf.inference_data import to_arviz
from numpyro_maf.io import load, save
from numpyro_maf.latent import attribute, decode, encode, interpolate
from numpyro_maf.made import MADE
from numpyro_maf.module import flow_module, random_flow_module
from numpyro_maf.ode import FFJORD
from numpyro_maf.priors import Joint, fit_sites, sample_sites
from numpyro_maf.sbi import (
    Sequential,
    Simulations,
    Simulator,
    learned,
    nle,
    npe,
    nre,
    simulate,
    smc,
    snle,
    snpe,
    snre,
)
from numpyro_maf.scalars import Additive, Affine, Compose, MixtureCDF, Scalar
from numpyro_maf.splines import CircularSpline, PiecewiseLinear, PiecewiseQuadratic, RQSpline

__all__ = [
    "GuideCheck",
    "HMM",
    "MADE",
    "ActNorm",
    "Additive",
    "Affine",
    "AutoAmortized",
    "AutoFlow",
    "AutoIAF",
    "AutoMAF",
    "Autoregressive",
    "Bijector",
    "Chain",
    "Completer",
    "CircularSpline",
    "Compose",
    "Coupling",
    "Dequantize",
    "Elementwise",
    "FFJORD",
    "FitResult",
    "Flow",
    "FlowDistribution",
    "Inverse",
    "InverseAutoregressive",
    "Joint",
    "LULinear",
    "Logit",
    "MaskedAutoregressive",
    "MixtureCDF",
    "Part",
    "PathELBO",
    "Permute",
    "PiecewiseLinear",
    "PiecewiseQuadratic",
    "Probit",
    "RQSpline",
    "Regression",
    "Reshape",
    "Scalar",
    "Sequential",
    "Simulations",
    "Simulator",
    "Standardize",
    "__version__",
    "attribute",
    "bits_per_dimension",
    "check_guide",
    "circular",
    "complete",
    "conditionals",
    "decode",
    "distill",
    "elementwise",
    "encode",
    "ffjord",
    "fit",
    "fit_completer",
    "fit_mixture",
    "fit_sites",
    "flow_module",
    "flowpp",
    "from_spec",
    "glow",
    "iaf",
    "interpolate",
    "load",
    "made",
    "maf",
    "nice",
    "nis",
    "nsf",
    "random_flow_module",
    "realnvp",
    "sample_sites",
    "save",
    "learned",
    "nle",
    "npe",
    "nre",
    "simulate",
    "smc",
    "snle",
    "snpe",
    "snre",
    "to_arviz",
]
