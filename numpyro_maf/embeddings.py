# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Networks that summarise data: the public path of what lives in :mod:`numpyro_maf.nn.embeddings`."""

from numpyro_maf.nn.embeddings import GRU, Attention, Conv, DeepSet, Embedding

__all__ = ["Attention", "Conv", "DeepSet", "Embedding", "GRU"]
