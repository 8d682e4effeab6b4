# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""From a model and an observation to an answer that was checked, and from answers to models compared."""
