# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Networks of any library: the public path of what lives in :mod:`numpyro_maf.nn.adapters`."""

from numpyro_maf.nn.adapters import as_network

__all__ = ["as_network"]
