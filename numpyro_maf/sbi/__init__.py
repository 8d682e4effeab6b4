# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Likelihood-free inference: a NumPyro model is the prior and the simulator."""

from numpyro_maf.sbi.calibration import Calibration, calibrate
from numpyro_maf.sbi.likelihood import Ratio, RatioDistribution, learned, nle, nre
from numpyro_maf.sbi.neural import FlowPosterior, NeuralPosterior, Surprise, npe
from numpyro_maf.sbi.posterior import Posterior, Setting
from numpyro_maf.sbi.sequential import Round, Sequential, next_round, snle, snpe, snre
from numpyro_maf.sbi.simulations import Simulations, simulate
from numpyro_maf.sbi.simulator import Simulator
from numpyro_maf.sbi.tempering import ParticlePosterior, smc

__all__ = [
    "Calibration", "FlowPosterior", "NeuralPosterior", "ParticlePosterior", "Posterior", "Ratio",
    "RatioDistribution", "Round", "Sequential", "Setting", "Simulations", "Simulator", "Surprise",
    "calibrate", "learned", "next_round", "nle", "npe", "nre", "simulate", "smc", "snle", "snpe", "snre",
]  # fmt: skip
