# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

r"""Two interleaved half circles with normal noise, whose density is known to many digits.

The upper moon is :math:`c(a) = (\cos a, \sin a)`, the lower one :math:`(1, 1/2) - c(a)`, with :math:`a`
uniform on :math:`(0, \pi)` and both equally likely. So with noise :math:`\sigma`

.. math::

   p(x) = \frac12 \sum_{y \in \{x,\, (1, 1/2) - x\}}
          \frac1\pi \int_0^\pi N(y;\, c(a), \sigma^2 I)\, da,

and as :math:`|c| = 1` the integrand is :math:`\exp(y \cdot c(a) / \sigma^2)` times a factor of :math:`y`
alone. That is an entire function of :math:`a`: Gauss-Legendre quadrature converges faster than any power of
the number of nodes, once they resolve the width :math:`\sigma / \sqrt{|y|}`.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["two_moons", "two_moons_entropy", "two_moons_log_prob"]

TURN = np.array([1.0, 0.5])  # less the upper moon is the lower one


def two_moons(n: int, noise: float = 0.1, seed: int = 0) -> NDArray[np.float64]:
    """Draw points ``(n, 2)`` from two interleaved half circles, equally likely, with normal noise.

    :param n: how many.
    :param noise: standard deviation of the noise in both coordinates.
    :param seed: the same seed gives the same points.
    :raises ValueError: for a noise that is not positive.
    """
    _check(noise)
    rng = np.random.default_rng(seed)
    angle = rng.uniform(0, np.pi, n)
    upper = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    points = np.where(rng.random((n, 1)) < 0.5, upper, TURN - upper)
    return points + noise * rng.normal(size=(n, 2))


def two_moons_log_prob(x: ArrayLike, noise: float = 0.1) -> NDArray[np.float64]:
    """Log-density of :func:`two_moons`, ``(..., 2) -> (...)``, in nats, to within 1e-8.

    Far out, where it is itself large, to within 1e-10 of itself.

    Takes about 100 quadrature nodes with the noise of 0.1; as 1 / ``noise``, and as the square root of the
    farthest point's distance.

    :raises ValueError: for a noise that is not positive, and points that are not finite or not pairs.
    """
    _check(noise)
    x = np.asarray(x, np.float64)
    if x.shape[-1:] != (2,) or not np.isfinite(x).all():
        raise ValueError(f"x must be finite and of shape (..., 2), got {x.shape}")
    both = np.stack([x, TURN - x])
    radius = np.linalg.norm(both, axis=-1)
    nodes, weights = np.polynomial.legendre.leggauss(24 + int(6 * np.sqrt(radius.max(initial=0)) / noise))
    angles = np.pi / 2 * (nodes + 1)
    total = np.full(radius.shape, -np.inf)
    for angle, weight in zip(angles, weights / 4):
        inner = both[..., 0] * np.cos(angle) + both[..., 1] * np.sin(angle)
        total = np.logaddexp(total, np.log(weight) + inner / noise**2)
    total -= (radius**2 + 1) / (2 * noise**2) + np.log(2 * np.pi * noise**2)
    return np.logaddexp(*total)


def two_moons_entropy(noise: float = 0.1) -> float:
    """Differential entropy of :func:`two_moons` in nats: minus the best mean log-likelihood there is.

    A sum over a grid of a quarter of the noise, up to nine standard deviations around the moons.

    :raises ValueError: for a noise that is not positive.
    """
    _check(noise)
    step = noise / 4
    horizontal = np.arange(-1 - 9 * noise, 2 + 9 * noise, step)
    vertical = np.arange(-0.5 - 9 * noise, 1 + 9 * noise, step)
    log_prob = two_moons_log_prob(np.stack(np.meshgrid(horizontal, vertical), axis=-1), noise)
    return float(-(np.exp(log_prob) * log_prob).sum() * step**2)


def _check(noise: float) -> None:
    if not noise > 0:
        raise ValueError(f"noise must be positive, got {noise}")
