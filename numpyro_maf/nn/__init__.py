# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Networks: masked ones, perceptrons, convolutions, embeddings of data, and adapters to other libraries."""
