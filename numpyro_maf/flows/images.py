# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Images as vectors: squeezing, masks and multi-scale splits are nothing but lists of features.

An event ``(H, W, C)`` is the vector of its H W C numbers, channels first, then columns. An array of features,
``(h, w, c)``, says which of them a bijector works on and where each stands: squeezing rearranges this array,
splitting halves it, and no pixel moves. A vector is an image of one pixel with D channels.
"""

from __future__ import annotations

import numpy as np

from numpyro_maf.flows.bijectors import Bijector, Chain, Part

__all__ = ["checkerboard", "halves", "layers", "squeeze"]


def squeeze(at: np.ndarray) -> np.ndarray:
    """``(h, w, c) -> (h / 2, w / 2, 4 c)``: four pixels become one (Dinh et al. 2017, section 3.6).

    :raises ValueError: for an odd height or width.
    """
    h, w, c = at.shape
    if h % 2 or w % 2:
        raise ValueError(f"images can be squeezed where height and width are even, got {h} by {w}")
    return at.reshape(h // 2, 2, w // 2, 2, c).transpose(0, 2, 4, 1, 3).reshape(h // 2, w // 2, 4 * c)


def checkerboard(shape, parity: int) -> tuple[int, ...]:
    """The features at which row plus column has this parity, of ``shape`` (h, w, c)."""
    rows, columns, _ = np.indices(shape)
    return tuple(np.flatnonzero((rows + columns) % 2 == parity).tolist())


def halves(shape, number: int, random: bool = False) -> tuple[int, ...]:
    """Half of the channels at every pixel: the upper for even numbers, the lower for odd.

    :param random: a fixed random half for each two consecutive numbers instead.
    """
    c = shape[-1]
    # Masks are static, so they cannot come from a key, which may be traced.
    order = np.random.default_rng(number // 2).permutation(c) if random and number > 1 else np.arange(c)
    chosen = order[c // 2 :] if number % 2 == 0 or c == 1 else order[: c // 2]
    return tuple(np.flatnonzero(np.isin(np.arange(np.prod(shape)) % c, chosen)).tolist())


def layers(shape, plan, step, random: bool = False) -> tuple[Bijector, ...]:
    """The bijectors of a plan, from base to data.

    :param shape: ``(H, W, C)`` of the event.
    :param plan: from data to base, of ``"checkerboard"`` and ``"channels"``, for a step with that mask,
        ``"squeeze"``, and ``"split"``, which gives half of the channels to the base.
    :param step: ``(number, (h, w, c), moved) -> bijectors`` of events h w c wide, from data to base.
    :param random: see :func:`halves`.
    """
    whole = np.arange(np.prod(shape)).reshape(shape)
    at, made, number = whole, [], 0

    def part(steps, at):
        steps = steps[::-1]
        if at is whole:
            return steps
        return [Part(Chain(tuple(steps)), tuple(at.ravel().tolist()), whole.size)]

    steps: list[Bijector] = []
    for word in (*plan, "end"):
        if word in ("squeeze", "split", "end"):
            if steps:
                made.append(part(steps, at))
            steps = []
            if word == "squeeze":
                at = squeeze(at)
            elif word == "split":
                at = at[..., : max(at.shape[-1] // 2, 1)]
        else:
            board = word == "checkerboard"
            moved = checkerboard(at.shape, number % 2) if board else halves(at.shape, number, random)
            if not moved:
                raise ValueError(f"events of shape {tuple(shape)} are too small for so many levels")
            steps += step(number, at.shape, moved)
            number += 1
    return tuple(b for steps in made[::-1] for b in steps)
