# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""The family of flows: bijectors, scalar maps, who conditions on whom, and the builders that combine them."""
