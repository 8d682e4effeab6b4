# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Likelihood-free inference: a NumPyro model is the prior and the simulator."""

from numpyro_maf.sbi.calibration import Calibration, calibrate
from numpyro_maf.sbi.handlers import learned
from numpyro_maf.sbi.hierarchical import HierarchicalPosterior, PlatePosterior
from numpyro_maf.sbi.likelihoods import nle
from numpyro_maf.sbi.neural_estimation import npe
from numpyro_maf.sbi.neural_posterior import FlowPosterior, NeuralPosterior
from numpyro_maf.sbi.posterior import Posterior, Setting
from numpyro_maf.sbi.ratios import Ratio, RatioDistribution, nre
from numpyro_maf.sbi.rounds import Round, Sequential, next_round, snle, snpe, snre
from numpyro_maf.sbi.simulations import Simulations, simulate
from numpyro_maf.sbi.simulator import Simulator
from numpyro_maf.sbi.surprises import Surprise
from numpyro_maf.sbi.tempering import ParticlePosterior, smc

__all__ = [
    "Calibration", "FlowPosterior", "HierarchicalPosterior", "NeuralPosterior", "ParticlePosterior",
    "PlatePosterior", "Posterior", "Ratio", "RatioDistribution", "Round", "Sequential", "Setting",
    "Simulations", "Simulator", "Surprise", "calibrate", "learned", "next_round", "nle", "npe", "nre",
    "simulate", "smc", "snle", "snpe", "snre",
]  # fmt: skip
