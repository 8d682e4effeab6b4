# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""A model's sites as one vector: the public path of what lives in :mod:`numpyro_maf.inference.sites`."""

from numpyro_maf.inference.sites import Sites

__all__ = ["Sites"]
