# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Neural posterior estimation: one call for flat models and for those with plates."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Unpack

import numpy as np
from jax.typing import ArrayLike

from numpyro_maf.flows.builders import nsf
from numpyro_maf.flows.flow import Flow
from numpyro_maf.inputs import by_site
from numpyro_maf.rng import as_key, split
from numpyro_maf.sbi.hierarchical import fit_plates
from numpyro_maf.sbi.neural_posterior import fit_posterior
from numpyro_maf.sbi.options import PosteriorOptions
from numpyro_maf.sbi.plates import PlateTree, joined
from numpyro_maf.sbi.posterior import Setting
from numpyro_maf.sbi.preprocessing import Prepared
from numpyro_maf.sbi.simulations import Simulations
from numpyro_maf.traces import latent_names, run_once
from numpyro_maf.train.options import TrainOptions, check_options

__all__ = ["npe"]


def npe(
    key: ArrayLike,
    model: Callable[..., Any],
    sims: dict[str, Any] | Sequence[dict[str, Any]],
    observed: str | Sequence[str] = ("x",),
    *,
    builder: Callable[..., Flow] = nsf,
    embedding: Any = None,
    ensemble: int = 1,
    latent: Sequence[str] | None = None,
    missing: bool = False,
    regression: bool | None = None,
    model_args: tuple[Any, ...] = (),
    model_kwargs: dict[str, Any] | None = None,
    weights: ArrayLike | None = None,
    validation: Any = 0.1,
    atoms: int = 0,
    plates: bool | None = None,
    **options: Unpack[TrainOptions],
) -> Any:
    """Learn the posterior of a model's latent sites given its observed ones, from simulations of both.

    Each latent site's support gives its bijection to the reals, so no draw leaves it. Discrete sites are
    allowed, booleans, categories and counts: then the flow is a MADE, in the model's order. Interrupting
    keeps the best so far.

    Where observed sites are in plates, the posterior follows them: the rows are a set, in any order, local
    sites are independent given those around them, and the result takes data sets of other sizes.

    :param key: a ``jax.random`` key, or an integer.
    :param model: gives supports and shapes.
    :param sims: of :func:`~numpyro_maf.simulate`, or any values by site, ``(N, ...)``. Rows that failed or
        are not finite are left out, with a warning that says how many. Several of them, with plates of
        several sizes, give a posterior for all sizes in between.
    :param observed: names of the observed sites.
    :param builder: ``(key, features, *, context) -> Flow``; with discrete sites it also gets ``columns``.
    :param embedding: a network for the observed site, or a dictionary of them by site: widths of an MLP, the
        last one of its result; ``DeepSet()``, ``Conv()``, ``GRU()``, ``Attention()`` of
        :mod:`numpyro_maf.embeddings`; a flax or equinox module. None for the numbers themselves.
    :param ensemble: how many flows, trained side by side; the posterior is their mixture.
    :param latent: names of the sites wanted; the others are integrated out. None for all.
    :param missing: whether NaN in observed sites stands for numbers that were not observed, or padding.
    :param regression: whether the flow starts from a linear regression of latent on observed values; None for
        both, of which the one that validates better is kept. Only without embedding and discrete sites.
    :param atoms: for simulations whose parameters are not the prior's: number of parameters among which the
        posterior's density relative to the prior's has to tell x's own (APT). 0 for the plain loss.
    :param plates: whether the posterior follows the model's plates; None where it can, which is without
        embedding, regression, atoms and discrete sites, and where rows are exchangeable, and independent
        given what is around them. False for one vector of all sites.
    :param model_args: of the model, with ``model_kwargs``; those of ``simulate`` by default.
    :param weights: ``(N,)``, how much each simulation counts.
    :param validation: share of the simulations held out at random, or ``(N,)`` booleans.
    :param options: of :func:`~numpyro_maf.train.train`: ``batch_size`` (by default a 64th of the rows, but
        64, 128 or 256), ``learning_rate`` (0.005), ``anneal`` (0.3), ``average`` (0.995), ``tolerance``
        (0.01), ``max_epochs``, ``patience``, ``optimizer``, ``progress``, ``callback``, ``checkpoint``.
    :return: a :class:`~numpyro_maf.sbi.NeuralPosterior`, or a
        :class:`~numpyro_maf.sbi.HierarchicalPosterior`.
    :raises ValueError: for sites that are not there, supports that depend on other sites, and too few rows;
        for plates that cannot be followed, if they have to be, with the reason.
    """
    check_options("npe", options, PosteriorOptions)
    prepare_key, key = split(as_key(key))
    observed = (observed,) if isinstance(observed, str) else tuple(observed)
    several = [sims] if isinstance(sims, dict) else list(sims)
    about = [args_of(own, model_args, model_kwargs) for own in several]
    tree = None
    if plates is not False:
        flat = (
            "an embedding" * (embedding is not None)
            or "a regression" * bool(regression)
            or "atoms" * (atoms > 0)
        )
        tree = _tree(model, about[-1], latent, observed, flat, plates, len(several) > 1)
    if tree is None:
        prepared = Prepared.of(
            prepare_key, "npe", model, several[0], observed, vectors=True, latent=latent, missing=missing,
            failures="keep" if atoms else "exclude", weights=weights, validation=validation,
            model_args=model_args, model_kwargs=model_kwargs,
        )  # fmt: skip
        chosen = dict(embedding=embedding, regression=regression, atoms=atoms)
        return fit_posterior(key, prepared, builder=builder, ensemble=ensemble, **chosen, **options)
    whole, counts = joined(tree, [_simulations(own) for own in several])
    shapes = {name: np.shape(value)[1:] for name, value in whole.items()}
    args, kwargs = about[np.argmax([sum(size for _, size in _sizes(tree, own)) for own in several])]
    prepared = Prepared.of(
        prepare_key, "npe", model, Simulations(whole, whole.errors, args, kwargs), observed, vectors=True,
        latent=latent, missing=missing, weights=weights, validation=validation, model_args=args,
        model_kwargs=kwargs,
    )  # fmt: skip
    arrays = tuple(tree.arranged(name, a) for name, a in zip(prepared.supports, prepared.arrays))
    settings = tuple((_sizes(tree, own), Setting(model, *given)) for own, given in zip(several, about))
    counts = {plate: count for plate, count in counts.items() if len(several) > 1}
    found = fit_plates(
        key, replace(prepared, arrays=arrays), tree, tree.sizes(shapes), counts, builder=builder,
        ensemble=ensemble, **options,
    )  # fmt: skip
    return replace(found, settings=settings)


def args_of(sims, model_args, model_kwargs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The model's arguments: those given, or those of the simulations."""
    return tuple(model_args) or getattr(sims, "args", ()), dict(model_kwargs or getattr(sims, "kwargs", {}))


def _sizes(tree: PlateTree, sims) -> tuple[tuple[str, int], ...]:
    """The size of each plate in simulations."""
    return tuple(tree.sizes({name: np.shape(value)[1:] for name, value in sims.items()}).items())


def _simulations(sims) -> Simulations:
    return sims if isinstance(sims, Simulations) else Simulations(by_site("sims", sims, missing=True))


def _tree(model, about, latent, observed, flat: str, wanted: bool | None, several: bool) -> PlateTree | None:
    """The model's plates if the posterior can follow them.

    :param flat: what asks for one vector of all sites; ``several``: whether sizes differ.
    """
    setting, wanted = Setting(model, *about), wanted or several
    trace = run_once(model, *about)
    names = [name for name in latent_names(model, *about) if name not in observed]
    if any(trace[name]["fn"].support.is_discrete for name in names if latent is None or name in latent):
        flat = flat or "a discrete site"
    try:
        if flat:
            raise ValueError(f"{flat} takes all sites as one vector")
        tree = PlateTree.of(setting, names, observed)
        if not tree.is_flat and latent is not None:
            tree = tree.without([name for name in names if name not in latent])
    except (ValueError, KeyError) as error:
        if wanted:
            raise ValueError(f"the plates cannot be followed: {error}") from error
        if not flat and isinstance(error, ValueError):
            warnings.warn(f"all latent sites are learned jointly: {error}", stacklevel=3)
        return None
    if tree.is_flat and wanted:
        raise ValueError("the plates cannot be followed: no observed site is in a plate")
    return None if tree.is_flat else tree
