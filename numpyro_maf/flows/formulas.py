# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Formulas that several parts of a flow share."""

from __future__ import annotations

import math

import jax.numpy as jnp

__all__ = ["bounded", "normal_log_density"]


def bounded(raw, bound: float):
    """``bound tanh(raw / bound)``: near 0 the number itself, never beyond the bound, smooth everywhere."""
    return bound * jnp.tanh(raw / bound)


def normal_log_density(z):
    """Log-density of the standard normal distribution."""
    return -(z**2) / 2 - math.log(2 * math.pi) / 2
