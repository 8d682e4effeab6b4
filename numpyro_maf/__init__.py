# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Masked autoregressive flows and their family, as NumPyro distributions."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from numpyro_maf._version import __version__
from numpyro_maf.flows.assembly import from_spec
from numpyro_maf.flows.autoregressive import Autoregressive, InverseAutoregressive, MaskedAutoregressive
from numpyro_maf.flows.bijectors import Bijector, Chain, Inverse, Part
from numpyro_maf.flows.builders import circular, elementwise, ffjord, iaf, made, maf, nsf
from numpyro_maf.flows.columns import MADE
from numpyro_maf.flows.coupling import Coupling, Elementwise
from numpyro_maf.flows.coupling_builders import flowpp, glow, nice, nis, realnvp
from numpyro_maf.flows.distributions import FlowDistribution
from numpyro_maf.flows.ensemble import Ensemble
from numpyro_maf.flows.flow import Flow
from numpyro_maf.flows.latent import attribute, decode, encode, interpolate
from numpyro_maf.flows.linear import ActNorm, LULinear, Permute, Regression, Standardize
from numpyro_maf.flows.ode import FFJORD
from numpyro_maf.flows.scalars import Additive, Affine, Compose, MixtureCDF, Scalar
from numpyro_maf.flows.splines import CircularSpline, PiecewiseLinear, PiecewiseQuadratic, RQSpline
from numpyro_maf.flows.supports import Logit, Probit, Reshape
from numpyro_maf.hmm import HMM
from numpyro_maf.semi_markov import HSMM

if TYPE_CHECKING:
    from numpyro_maf import activities as activities
    from numpyro_maf import conditionals as conditionals
    from numpyro_maf import datasets as datasets
    from numpyro_maf import diagnostics as diagnostics
    from numpyro_maf import embeddings as embeddings
    from numpyro_maf import plots as plots
    from numpyro_maf import sbi as sbi
    from numpyro_maf.answers.comparison import Comparison, compare
    from numpyro_maf.answers.inferring import Answer, infer
    from numpyro_maf.baum_welch import fit_hmm
    from numpyro_maf.inference.amortized import AutoAmortized
    from numpyro_maf.inference.checks import GuideCheck, check_guide
    from numpyro_maf.inference.completion import Completer, complete, fit_completer
    from numpyro_maf.inference.distillation import distill
    from numpyro_maf.inference.elbo import PathELBO
    from numpyro_maf.inference.guide_runs import GuideRun, fit_guide
    from numpyro_maf.inference.guides import AutoFlow, AutoIAF, AutoMAF
    from numpyro_maf.inference.learned_priors import Joint, fit_sites, sample_sites
    from numpyro_maf.inference.modules import flow_module, random_flow_module
    from numpyro_maf.inference_data import to_arviz
    from numpyro_maf.io import load, save
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
    from numpyro_maf.train.dequantize import Dequantize, bits_per_dimension
    from numpyro_maf.train.likelihood import FitResult, fit, fit_mixture

# Names that are imported on first use, by module: whoever wants a flow need not wait for them.
_LATER = {
    "answers.comparison": "Comparison compare",
    "answers.inferring": "Answer infer",
    "baum_welch": "fit_hmm",
    "inference.amortized": "AutoAmortized",
    "inference.checks": "GuideCheck check_guide",
    "inference.completion": "Completer complete fit_completer",
    "inference.distillation": "distill",
    "inference.elbo": "PathELBO",
    "inference.guide_runs": "GuideRun fit_guide",
    "inference.guides": "AutoFlow AutoIAF AutoMAF",
    "inference.learned_priors": "Joint fit_sites sample_sites",
    "inference.modules": "flow_module random_flow_module",
    "inference_data": "to_arviz",
    "train.dequantize": "Dequantize bits_per_dimension",
    "train.likelihood": "FitResult fit fit_mixture",
    "io": "load save",
    "sbi": "Sequential Simulations Simulator learned nle npe nre simulate smc snle snpe snre",
}
_PLACES = {name: module for module, names in _LATER.items() for name in names.split()}
# Rooms that resolve on first use: plots bring matplotlib, data sets are for examples.
_ROOMS = {
    "activities",
    "conditionals",
    "datasets",
    "diagnostics",
    "embeddings",
    "encoders",
    "examples",
    "guides",
    "plots",
    "sbi",
    "sites",
}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"numpyro_maf.{name}")
    if name in _PLACES:
        return globals().setdefault(name, getattr(import_module(f"numpyro_maf.{_PLACES[name]}"), name))
    raise AttributeError(f"module 'numpyro_maf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS, *_PLACES})


__all__ = [
    "ActNorm",
    "Additive",
    "Affine",
    "Answer",
    "AutoAmortized",
    "AutoFlow",
    "AutoIAF",
    "AutoMAF",
    "Autoregressive",
    "Bijector",
    "Chain",
    "CircularSpline",
    "Completer",
    "Comparison",
    "Compose",
    "Coupling",
    "Dequantize",
    "Elementwise",
    "Ensemble",
    "FFJORD",
    "FitResult",
    "Flow",
    "FlowDistribution",
    "GuideCheck",
    "GuideRun",
    "HMM",
    "HSMM",
    "Inverse",
    "InverseAutoregressive",
    "Joint",
    "LULinear",
    "Logit",
    "MADE",
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
    "compare",
    "complete",
    "conditionals",
    "decode",
    "distill",
    "elementwise",
    "encode",
    "ffjord",
    "fit",
    "fit_completer",
    "fit_guide",
    "fit_hmm",
    "fit_mixture",
    "fit_sites",
    "flow_module",
    "flowpp",
    "from_spec",
    "glow",
    "iaf",
    "infer",
    "interpolate",
    "learned",
    "load",
    "made",
    "maf",
    "nice",
    "nis",
    "nle",
    "npe",
    "nre",
    "nsf",
    "random_flow_module",
    "realnvp",
    "sample_sites",
    "save",
    "simulate",
    "smc",
    "snle",
    "snpe",
    "snre",
    "to_arviz",
]
