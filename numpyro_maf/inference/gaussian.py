# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""A Gaussian near a density, where guides start."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from numpyro_maf.rng import as_key

__all__ = ["fit_gaussian"]


def fit_gaussian(
    key: ArrayLike,
    log_density: Callable[[Array], Array],
    loc: Array,
    scale: float,
    *,
    steps: int = 30,
    rounds: int = 10,
    draws: int = 64,
    dense: int = 100,
) -> tuple[Array, Array]:
    """A Gaussian near a density, from its gradients: batch and match, with a trust region.

    Cai et al., *Batch and match: black-box variational inference with a score-based divergence* (2024),
    algorithm 1, in the coordinates in which the present Gaussian is standard. The learning rate grows after
    steps that raise the ELBO of the draws and shrinks after those, not taken, that lower it.

    :param log_density: ``(D,) -> ()``, not necessarily normalised.
    :param loc: ``(D,)``, where to start; ``scale``: standard deviation there.
    :param steps: of each round. A round starts at the best mean so far, with ``scale`` again, since from far
        away the covariance may collapse before the mean has arrived.
    :param rounds: at most; from the second on as long as they gain half a nat.
    :param draws: gradients for each step.
    :param dense: largest D for full covariance; above it is diagonal.
    :return: mean ``(D,)`` and the Cholesky factor ``(D, D)`` of the covariance, or standard deviations
        ``(D,)``, of the step with the greatest ELBO.
    """
    key, width = as_key(key), len(loc)
    full = width <= dense
    value_and_grad = jax.vmap(jax.value_and_grad(log_density))

    def evaluate(step, mean, root):
        eps = jax.random.normal(jax.random.fold_in(key, step), (draws, width), mean.dtype)
        value, score = value_and_grad(mean + (eps @ root.T if full else eps * root))
        score = score @ root if full else score * root
        log_det = jnp.log(jnp.diagonal(root) if full else root).sum()
        value = value + 0.5 * (eps**2).sum(-1) + log_det
        finite = jnp.isfinite(value).all() & jnp.isfinite(score).all()
        return jnp.where(finite, value.mean(), -jnp.inf), value.std() / draws**0.5, eps, score

    def propose(mean, root, rate, eps, score):
        """One step of batch and match from the standard normal, put back into place."""
        second = partial(jnp.einsum, "ni,nj->ij" if full else "ni,ni->i")
        part = rate / (1 + rate)
        e, s = eps.mean(0), score.mean(0)

        def moment(x, centre):
            centred = x - centre
            return rate * second(centred, centred) / draws + part * second(centre[None], centre[None])

        u, v = moment(score, s), moment(eps, e)
        if not full:
            v = 1 + v
            variance = 2 * v / (1 + jnp.sqrt(1 + 4 * u * v))
            return mean + root * part * (variance * s + e), root * jnp.sqrt(variance)
        factor = jnp.linalg.cholesky(jnp.eye(width, dtype=v.dtype) + v)
        values, vectors = jnp.linalg.eigh(factor.T @ u @ factor)
        vectors = factor @ vectors
        covariance = (vectors * (2 / (1 + jnp.sqrt(1 + 4 * jnp.maximum(values, 0))))) @ vectors.T
        return mean + root @ (part * (covariance @ s + e)), root @ jnp.linalg.cholesky(covariance)

    def step(start, carry, i):
        (mean, root), rate, found, best = carry
        # The second half averages more and more, which counts where no Gaussian fits exactly.
        cap = jnp.where(i < steps // 2, 1e6, draws * width / (1 + i - steps // 2))
        new = propose(mean, root, jnp.minimum(rate, cap), found[2], found[3])
        there = evaluate(start + i, *new)
        better = there[0] > found[0] - 2 * jnp.hypot(found[1], there[1])
        better &= jnp.isfinite(new[0]).all() & jnp.isfinite(new[1]).all()
        choose = partial(jax.tree.map, partial(jnp.where, better))
        rate = jnp.clip(jnp.where(better, 4 * rate, rate / 16), 1e-3, 1e6)
        best = jax.tree.map(partial(jnp.where, better & (there[0] > best[0])), (there[0], *new), best)
        return (choose(new, (mean, root)), rate, choose(there, found), best), None

    start = jnp.diag(jnp.full(width, scale)) if full else jnp.full(width, scale)
    if not steps:
        return loc, start

    @jax.jit
    def run():
        # From no draws and no scores the first step goes nowhere, and looks there.
        nothing = jnp.zeros((draws, width), loc.dtype)
        worst = jnp.array(-jnp.inf, loc.dtype)
        unknown = worst, jnp.zeros_like(worst), nothing, nothing

        def again(state):
            number, old, _ = state
            carry = (old[1], start), jnp.array(float(draws * width)), unknown, old
            best = lax.scan(partial(step, steps * number), carry, jnp.arange(steps))[0][-1]
            return number + 1, best, best[0] - old[0]

        def going(state):
            number, _, gain = state
            return (number < rounds) & ((number < 2) | (gain > 0.5))

        _, best, _ = lax.while_loop(going, again, (0, (worst, loc, start), worst))
        return best[1], best[2]

    return run()
