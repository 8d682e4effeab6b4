# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Training: one loop, the data that it is fed, and maximum likelihood."""

from numpyro_maf.train.loop import train
from numpyro_maf.train.options import FitOptions, TrainOptions
from numpyro_maf.train.state import Trained, TrainState

__all__ = ["FitOptions", "TrainOptions", "TrainState", "Trained", "train"]
