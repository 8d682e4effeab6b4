# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Flows inside NumPyro models: modules, guides and their checks, learned priors, completion."""
