# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Data to learn from: sensors, the tabular density benchmarks, images, and toys whose density is known.

Nothing is downloaded, and no file is trusted: loaders read public files from a folder that the user names,
and none of them runs what it reads.
"""

from numpyro_maf.datasets.homes import load_ordonez
from numpyro_maf.datasets.images import LabelledImages, load_binarized_mnist, load_digits
from numpyro_maf.datasets.sensors import (  # noqa: F401  the physics, for those who look closer
    CO2_EMISSION,
    FLAT_ACTIVITIES,
    LEAKAGE,
    OCCUPANCY_SHA256,
    OUTDOOR_CO2,
    RESOLUTION,
    VOLUME,
    SensorData,
    balance,
    load_occupancy,
    saturation_pressure,
    simulate_flat,
)
from numpyro_maf.datasets.tabular import Splits, load_tabular
from numpyro_maf.datasets.toys import two_moons, two_moons_entropy, two_moons_log_prob

__all__ = [
    "FLAT_ACTIVITIES",
    "LabelledImages",
    "SensorData",
    "Splits",
    "load_binarized_mnist",
    "load_digits",
    "load_occupancy",
    "load_ordonez",
    "load_tabular",
    "simulate_flat",
    "two_moons",
    "two_moons_entropy",
    "two_moons_log_prob",
]
