# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Gaussians near a density, where guides start: one, or one for each mode.

Batch and match takes the scores at draws of a Gaussian to the Gaussian that has such scores. Far away,
densities of recursive models and of exponential links are astronomically small, or not finite. So

- a start first climbs by steps whose length no gradient decides, as far as the density is much greater there;
- each round begins with the width, out of ten, that has the greatest ELBO;
- a draw that is not finite is left out, as long as half of the draws are finite;
- scores are shortened to 1e5 standard deviations, whose squares single precision can still hold;
- a Gaussian is judged by its ELBO with no draw counting less than 1e4 nats below the median.

Near the density nothing of this has an effect.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import logsumexp
from jax.typing import ArrayLike

from numpyro_maf.rng import as_key

__all__ = ["Gaussians", "fit_gaussian", "fit_modes", "search"]


class Gaussians(NamedTuple):
    """Some Gaussians near a density, each from a start of its own.

    :param elbo: ``(N,)``, less two standard errors; minus infinity where nothing finite was found.
    :param gain: by how much the last round raised it.
    :param loc: ``(N, D)`` means; ``scale``: ``(N, D, D)`` Cholesky factors or ``(N, D)`` standard deviations.
    """

    elbo: Array
    gain: Array
    loc: Array
    scale: Array


def fit_gaussian(
    key: ArrayLike,
    log_density: Callable[[Array], Array],
    loc: Array,
    scale: float,
    **options: int,
) -> tuple[Array, Array]:
    """A Gaussian near a density, from its gradients: batch and match, with a trust region.

    Cai et al., *Batch and match: black-box variational inference with a score-based divergence* (2024),
    algorithm 1, in the coordinates in which the present Gaussian is standard. The learning rate grows after
    steps that raise the ELBO of the draws and shrinks after those, not taken, that lower it.

    :param log_density: ``(D,) -> ()``, not necessarily normalised.
    :param loc: ``(D,)``, where to start; or ``(N, D)`` for several starts, of which the best goes on.
    :param scale: standard deviation at the start.
    :param options: ``steps`` of each round, 30; ``rounds``, 10: one from each start, then at most nine more,
        as long as they gain half a nat, each from the best mean so far with ``scale`` or less again, since
        from far away the covariance may collapse before the mean has arrived; ``draws``, 64, gradients for
        each step; ``dense``, 100, the largest D for full covariance, above which it is diagonal.
    :return: mean ``(D,)`` and the Cholesky factor ``(D, D)`` of the covariance, or standard deviations
        ``(D,)``, of the step with the greatest ELBO less two standard errors. They are the start's where no
        density was finite.
    """
    found = search(key, log_density, jnp.atleast_2d(jnp.asarray(loc, float)), scale, **options)
    return found.loc, found.scale


def search(
    key: ArrayLike, log_density: Callable[[Array], Array], starts: Array, scale: float, **options: int
) -> Gaussians:
    """:func:`fit_gaussian` from starts ``(N, D)``, with the ELBO and its last gain; no axis N."""
    return jax.tree.map(lambda a: a[0], _fit(key, log_density, starts[None], scale, **options))


def fit_modes(
    key: ArrayLike,
    log_density: Callable[[Array], Array],
    starts: Array,
    scale: float,
    modes: int,
    **options: int,
) -> tuple[Array, Gaussians]:
    """Gaussians at different modes, from many starts, and the modes' log-weights ``(modes,)``.

    Fits are taken by their ELBO, those within 4 standard deviations of another left out. The weights are
    those of the mixture nearest to the density by Kullback-Leibler divergence, by the iteration of Cappé et
    al., *Adaptive importance sampling in general mixture classes* (2008), on a thousand draws of each
    Gaussian. Where fewer are found than asked for, the rest has weight 0.

    :param starts: ``(N, D)``; ``modes``: how many Gaussians at most.
    """
    found = _fit(key, log_density, starts[:, None], scale, **options)
    alive, chosen, there = jnp.isfinite(found.elbo), [], []
    for _ in range(modes):
        i = jnp.argmax(jnp.where(alive, found.elbo, -jnp.inf))
        chosen.append(i)
        there.append(alive[i])
        gap = found.loc - found.loc[i]
        ours = jax.vmap(_solve, (None, 0))(found.scale[i], gap)
        theirs = jax.vmap(_solve)(found.scale, gap)
        alive &= jnp.minimum(jnp.linalg.norm(ours, axis=-1), jnp.linalg.norm(theirs, axis=-1)) > 4
    picked = jax.tree.map(lambda a: a[jnp.stack(chosen)], found)
    return _weights(as_key(key), log_density, picked, jnp.stack(there)), picked


def _weights(key: Array, log_density: Callable[[Array], Array], at: Gaussians, valid: Array) -> Array:
    """Log-weights of the mixture of some Gaussians, those not valid left out."""
    draws, width = 1000, at.loc.shape[-1]
    eps = jax.random.normal(key, (len(at.loc), draws, width), at.loc.dtype)
    z = (at.loc[:, None] + jax.vmap(_multiply)(at.scale, eps)).reshape(-1, width)
    log_p = lax.map(log_density, z, batch_size=256)
    log_q = jax.vmap(lambda loc, scale: normal_log_prob(loc, scale, z))(at.loc, at.scale)
    uniform = jnp.where(valid, -jnp.log(valid.sum()), -jnp.inf)
    own = jnp.repeat(valid, draws)
    log_weight = log_p - logsumexp(uniform[:, None] + log_q, 0)
    log_weight = jnp.where(own & jnp.isfinite(log_weight), log_weight, -jnp.inf)
    log_weight -= logsumexp(log_weight)

    def improve(log_weights, _):
        joint = log_weights[:, None] + log_q
        share = joint - logsumexp(joint, 0)
        return logsumexp(share + log_weight, 1), None

    return lax.scan(improve, uniform, length=100)[0]


def normal_log_prob(loc: Array, scale: Array, z: Array) -> Array:
    """Log-density of a Gaussian at ``(..., D)``; ``scale`` is a Cholesky factor or standard deviations."""
    size = jnp.diagonal(scale) if scale.ndim == 2 else scale
    square = (_solve(scale, z - loc) ** 2).sum(-1)
    return -0.5 * (square + len(loc) * jnp.log(2 * jnp.pi)) - jnp.log(jnp.abs(size)).sum()


def _multiply(scale: Array, eps: Array) -> Array:
    return eps @ scale.T if scale.ndim == 2 else eps * scale


def _solve(scale: Array, gap: Array) -> Array:
    """``(..., D)`` in units of a scale."""
    if scale.ndim == 1:
        return gap / scale
    flat = gap.reshape(-1, gap.shape[-1])
    return solve_triangular(scale, flat.T, lower=True).T.reshape(gap.shape)


def _fit(
    key: ArrayLike,
    log_density: Callable[[Array], Array],
    starts: Array,
    scale: float,
    *,
    steps: int = 30,
    rounds: int = 10,
    draws: int = 64,
    dense: int = 100,
) -> Gaussians:
    """Batch and match from each of ``(N, M, D)`` starts, the best of each M: ``(N, …)``."""
    key, width = as_key(key), starts.shape[-1]
    full = width <= dense
    at_one = jax.value_and_grad(log_density)
    value_and_grad = jax.vmap(at_one)
    start = jnp.diag(jnp.full(width, scale)) if full else jnp.full(width, scale)

    def climb(loc):
        """Up the density by steps that only the gradient's signs decide, until it is no longer far lower.

        Riedmiller & Braun, *A direct adaptive method for faster backpropagation learning: RPROP*
        (1993). Not to the top, which may be a spike without mass.
        """

        def up(carry, _):
            (value, z, gradient), size = carry
            new_z = z + jnp.sign(gradient) * size
            new_value, new_gradient = at_one(new_z)
            new = new_value, new_z, new_gradient
            fine = jnp.isfinite(new_value) & jnp.isfinite(new_gradient).all()
            turn = jnp.sign(gradient) * jnp.sign(new_gradient)
            factor = jnp.where(turn > 0, 1.2, jnp.where(turn < 0, 0.5, 1.0))
            at = jax.tree.map(partial(jnp.where, fine), new, (value, z, gradient))
            return (at, size * jnp.where(fine, factor, 0.25)), at[:2]

        value, gradient = at_one(loc)
        first = (value, loc, gradient), jnp.full(width, scale)
        values, path = lax.scan(up, first, length=100)[1]
        values, path = jnp.append(value, values), jnp.concatenate([loc[None], path])
        return path[jnp.argmax(values >= jnp.nanmax(values) - 10 * (width + 10))]

    def evaluate(step, mean, root):
        eps = jax.random.normal(jax.random.fold_in(key, step), (draws, width), mean.dtype)
        value, score = value_and_grad(mean + _multiply(root, eps))
        score = score @ root if full else score * root
        largest = jnp.abs(score).max(-1)
        fine = jnp.isfinite(value) & jnp.isfinite(largest)
        log_det = jnp.log(jnp.diagonal(root) if full else root).sum()
        value = value + 0.5 * (eps**2).sum(-1) + log_det
        floor = jnp.nanmedian(jnp.where(fine, value, jnp.nan)) - 1e4
        value = jnp.where(fine, jnp.maximum(value, floor), floor)
        score = jnp.where(fine[:, None], score / jnp.maximum(largest / 1e5, 1)[:, None], 0)
        enough = fine.mean() >= 0.5
        error = jnp.where(enough, value.std() / draws**0.5, 0)
        return jnp.where(enough, value.mean(), -jnp.inf), error, eps, score, fine / jnp.maximum(fine.sum(), 1)

    def propose(mean, root, rate, eps, score, weight):
        """One step of batch and match from the standard normal, put back into place."""
        second = partial(jnp.einsum, "ni,nj->ij" if full else "ni,ni->i")
        part = rate / (1 + rate)
        e, s = weight @ eps, weight @ score

        def moment(x, centre):
            centred = x - centre
            spread = second(weight[:, None] * centred, centred)
            return rate * spread + part * second(centre[None], centre[None])

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

    def step(first, carry, i):
        (mean, root), rate, found, best = carry
        # The second half averages more and more, which counts where no Gaussian fits exactly.
        cap = jnp.where(i < steps // 2, 1e6, draws * width / (1 + i - steps // 2))
        new = propose(mean, root, jnp.minimum(rate, cap), *found[2:])
        there = evaluate(first + i, *new)
        better = there[0] > found[0] - 2 * jnp.hypot(found[1], there[1])
        better &= jnp.isfinite(new[0]).all() & jnp.isfinite(new[1]).all()
        choose = partial(jax.tree.map, partial(jnp.where, better))
        rate = jnp.clip(jnp.where(better, 4 * rate, rate / 16), 1e-3, 1e6)
        sure = there[0] - 2 * there[1]  # or a lucky one among many would win
        best = jax.tree.map(partial(jnp.where, better & (sure > best[0])), (sure, *new), best)
        return (choose(new, (mean, root)), rate, choose(there, found), best), None

    def width_at(first, mean):
        """The start's covariance, or narrower by powers of 4, whichever has the greatest ELBO."""
        shares = 0.25 ** jnp.arange(10.0)
        elbos = lax.map(lambda share: evaluate(first, mean, start * share)[0], shares)
        return start * shares[jnp.argmax(elbos)]

    def run(locs):
        # From no draws and no scores the first step goes nowhere, and looks there.
        nothing = jnp.zeros((draws, width), locs.dtype)
        worst = jnp.array(-jnp.inf, locs.dtype)
        unknown = worst, jnp.zeros_like(worst), nothing, nothing, jnp.zeros(draws, locs.dtype)
        count, climbed = len(locs), jax.vmap(climb)(locs)

        def again(state):
            number, old, _ = state
            mean = jnp.where(number < count, climbed[jnp.minimum(number, count - 1)], old[1])
            carry = (mean, width_at(steps * number, mean)), jnp.array(float(draws * width)), unknown, old
            best = lax.scan(partial(step, steps * number), carry, jnp.arange(steps))[0][-1]
            return number + 1, best, best[0] - old[0]

        def going(state):
            number, _, gain = state
            return (number < rounds + count - 1) & ((number < 1 + count) | (gain > 0.5))

        _, best, gain = lax.while_loop(going, again, (0, (worst, locs[0], start), worst))
        return Gaussians(best[0], gain, best[1], best[2])

    count = len(starts)
    if not steps:
        unseen: Any = jnp.zeros(count, starts.dtype)
        return Gaussians(unseen, unseen, starts[:, 0], jnp.broadcast_to(start, (count, *start.shape)))
    if count == 1:
        return jax.tree.map(lambda a: a[None], jax.jit(run)(starts[0]))
    return jax.jit(jax.vmap(run))(starts)
