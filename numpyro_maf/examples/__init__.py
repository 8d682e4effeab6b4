# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Examples that run as they are: ``python -m numpyro_maf.examples.smart_home``."""
