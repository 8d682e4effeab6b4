# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Flows inside NumPyro models.

- Weights as sites: :mod:`modules`. A model's latent variables as one vector: :mod:`sites`, and with supports
  that depend on each other :mod:`unconstrained`.
- Guides: :mod:`guides`, and :mod:`amortized` for local latent variables; :mod:`gaussian`, where they start,
  and :mod:`mixtures`, if there are several modes; :mod:`elbo`, how they are trained; :mod:`checks`, whether
  to trust them, and :mod:`rows`, for each row of a plate.
- Learned priors: :mod:`learned_priors`. Conditionals of a flow: :mod:`completion`. One flow taught by
  another: :mod:`distillation`.
"""
