# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""The options of what learns from simulations, beside those of training: what rounds hand on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict

from numpyro_maf.train.options import TrainOptions

__all__ = [
    "AtomicOptions", "GaussianOptions", "LikelihoodOptions", "PosteriorOptions", "RatioOptions",
    "SnleOptions", "SnpeOptions", "SnreOptions",
]  # fmt: skip


class PosteriorOptions(TrainOptions, total=False):
    """Keywords of :func:`~numpyro_maf.npe` that rounds take too."""

    builder: Callable[..., Any]
    embedding: Any
    ensemble: int
    regression: bool | None
    missing: bool
    weights: Any
    validation: Any


class AtomicOptions(PosteriorOptions, total=False):
    """Keywords of APT."""

    failures: str


class LikelihoodOptions(TrainOptions, total=False):
    """Keywords of :func:`~numpyro_maf.nle` that rounds take too."""

    builder: Callable[..., Any] | None
    regression: bool | None
    failures: str
    weights: Any
    validation: Any


class RatioOptions(TrainOptions, total=False):
    """Keywords of :func:`~numpyro_maf.nre` that rounds take too."""

    embedding: Any
    hidden: tuple[int, ...]
    contrasts: int
    failures: str
    missing: bool
    weights: Any
    validation: Any


class GaussianOptions(TrainOptions, total=False):
    """Keywords of SNPE-A."""

    components: int
    hidden: tuple[int, ...]
    embedding: Any
    missing: bool
    validation: Any


class _RoundOptions(TypedDict, total=False):
    """Keywords of :func:`next_round` itself."""

    executor: Any
    timeout: float | None
    model_args: tuple[Any, ...]
    model_kwargs: dict[str, Any] | None
    epsilon: float
    num_particles: int


class SnpeOptions(AtomicOptions, GaussianOptions, _RoundOptions, total=False):
    """Keywords of :func:`~numpyro_maf.snpe`; each method takes some of them."""


class SnleOptions(LikelihoodOptions, _RoundOptions, total=False):
    """Keywords of :func:`~numpyro_maf.snle`."""


class SnreOptions(RatioOptions, _RoundOptions, total=False):
    """Keywords of :func:`~numpyro_maf.snre`."""
