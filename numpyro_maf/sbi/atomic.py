# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

r"""The atomic loss: a posterior from simulations whose parameters come from any proposal (APT).

Among A parameters drawn from a proposal, one of which made x, the probability that it was the i-th is

.. math:: \frac{p(\theta_i \mid x) / p(\theta_i)}{\sum_j p(\theta_j \mid x) / p(\theta_j)},

whatever the proposal (Greenberg, Nonnenmacher & Macke 2019, section 3.2). A simulation that failed has no x
to learn from, but its parameters are atoms like any other: they would not have made x. So what is learned
is the posterior given that a simulation succeeds and gives x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp

from numpyro_maf.sbi.densities import log_prior
from numpyro_maf.sbi.preprocessing import Prepared
from numpyro_maf.sbi.views import Summary

__all__ = ["AtomicLoss"]


@dataclass(frozen=True)
class AtomicLoss:
    """Negative log-probability of the parameters that made x, among atoms: those of a batch's neighbours."""

    summary: Summary
    atoms: int

    @classmethod
    def of(cls, summary, atoms: int, options) -> tuple[AtomicLoss, dict[str, Any]]:
        """The loss, and the options of its training."""
        if options.get("batch_size", atoms) < atoms:
            raise ValueError(f"{atoms} atoms need a batch_size as large, got {options['batch_size']}")
        return cls(summary, atoms), {"tolerance": 1e-3} | options

    @staticmethod
    def log_prior(prepared: Prepared) -> np.ndarray:
        """The log prior of each row's vector, which the loss is given after the vectors."""
        about = {name: jnp.asarray(a[0]) for name, a in zip(prepared.supports, prepared.arrays)}
        return np.asarray(log_prior(prepared.setting, prepared.sites, about, prepared.theta))

    def __call__(self, params, fixed, key, vector, log_prior, *arrays):
        flows, view = fixed
        seen = view(arrays)
        turned = jnp.stack([jnp.roll(vector, i, 0) for i in range(self.atoms)])  # (A, B, D)
        prior = jnp.stack([jnp.roll(log_prior, i, 0) for i in range(self.atoms)])

        def member(flow, weights, networks, key):
            flow = flow.with_weights(weights).randomized(key)
            logits = flow(self.summary(networks, seen)).log_prob(turned) - prior
            return logsumexp(logits, 0) - logits[0]

        return flows.map(member, *params, jax.random.split(key, len(flows))).mean(0)
