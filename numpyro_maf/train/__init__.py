# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Training: one loop, the data that it is fed, and maximum likelihood."""

from numpyro_maf.train.loop import train

__all__ = ["train"]
