# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Simulations made ready to learn from: one preparation for posteriors, likelihoods, ratios and rounds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_maf.codec import storable
from numpyro_maf.flows.domains import check_values
from numpyro_maf.inference.sites import Sites
from numpyro_maf.inputs import as_numbers, rows_by_site
from numpyro_maf.rng import split
from numpyro_maf.sbi.posterior import Setting
from numpyro_maf.sbi.reading import ModelSites
from numpyro_maf.sbi.views import Summary, View, axes_of, embedding_of
from numpyro_maf.train.data import checked_weights, held_out_rows
from numpyro_maf.train.loop import train_best
from numpyro_maf.train.state import Trained

__all__ = ["Losses", "Prepared", "training_options"]


@storable
@dataclass(frozen=True, eq=False)
class Losses:
    """The losses of a training.

    :param train: mean over the training rows, by epoch; ``validation``: the same of the validation rows.
    :param best_epoch: the epoch, from 0, whose parameters were kept.
    :param stopped: what stopped the training, ``"interrupted"`` or ``"callback"``; empty where it ended.
    :param improving: whether the limit of epochs ended it, before the patience did.
    """

    train: np.ndarray
    validation: np.ndarray
    best_epoch: int = -1
    stopped: str = ""
    improving: bool = False

    @classmethod
    def of(cls, trained) -> Losses:
        """The losses in what training gave."""
        shown = trained.train_loss, trained.validation_loss, trained.best_epoch
        return cls(*shown, trained.stopped, trained.improving)

    @property
    def lines(self) -> list[str]:
        """A line about them, for representations."""
        losses, kind = (self.validation, "validation") if len(self.validation) else (self.train, "training")
        if not len(losses):
            return []
        end = f", {self.stopped}" if self.stopped else ", still improving" if self.improving else ""
        return [f"best {kind} loss {np.min(losses):.3f} in {len(losses)} epochs{end}"]


@dataclass(frozen=True, eq=False)
class Prepared:
    """Usable simulations, row by row. All arrays have the same R rows.

    :param setting: the model.
    :param sites: the latent sites; None if ``theta`` are parameters.
    :param theta: ``(R, P)``, unconstrained vectors of the latent sites, or parameters.
    :param supports: of the observed sites, by name.
    :param arrays: values of the observed sites, ``(R, ...)``, in the order of ``supports``.
    :param weights: ``(R,)``.
    :param held_out: ``(R,)`` booleans, the validation rows.
    :param excluded: number of simulations that failed or are not finite.
    :param missing: whether NaN at observed sites stands for numbers that are not there.
    :param rows: ``(R,)``, the number of the simulation that each row comes from.
    """

    setting: Setting
    sites: Sites | None
    theta: np.ndarray
    supports: dict[str, Any]
    arrays: tuple[Any, ...]
    weights: np.ndarray
    held_out: np.ndarray
    excluded: int
    missing: bool
    rows: np.ndarray

    @classmethod
    def of(
        cls,
        key,
        who: str,
        model: Callable[..., Any],
        sims,
        observed,
        *,
        vectors: bool,
        latent=None,
        missing: bool = False,
        failures: str = "exclude",
        weights=None,
        validation: Any = 0.1,
        model_args=(),
        model_kwargs=None,
    ) -> Prepared:
        """Check simulations, and filter them, their weights and the validation mask together.

        :param who: name of the function that asks, for messages.
        :param vectors: True for unconstrained vectors of the latent sites. False for parameters: those of the
            observed site, if it is the only one and a simulator, with one row for each element of its
            plates; else the latent sites side by side.
        :param failures: ``"error"``; ``"exclude"``, with a warning; or ``"keep"`` for failed simulations with
            weight 0 and the data of another one, of which only theta counts.
        """
        if failures not in ("error", "exclude", "keep"):
            raise ValueError(f"failures must be 'error', 'exclude' or 'keep', got {failures!r}")
        args = tuple(model_args) or getattr(sims, "args", ())
        kwargs = model_kwargs or getattr(sims, "kwargs", {})
        sims = rows_by_site("sims", sims)
        setting = Setting(model, args, dict(kwargs))
        observed = (observed,) if isinstance(observed, str) else tuple(observed)
        read_key, split_key = split(key)
        found = ModelSites.of(read_key, setting, sims, observed, own=not vectors)
        names = found.latent(latent)
        for name in (name for name in (*names, *observed) if name in sims):
            check_values(f"sims[{name!r}]", found.support(name), sims[name])
        for name in () if missing else observed:  # where numbers are missing, rows may be padded
            expected, given = found.shown[name][1], sims[name].shape[1:]
            if given != expected:
                raise ValueError(
                    f"sims[{name!r}] has rows of shape {given}, the model makes {expected}: pass the "
                    "model_args they were made with; npe takes a list of simulations of several sizes"
                )
        shown = [sims[name] for name in observed]
        count = len(shown[0])
        sites, each = None, 1
        if vectors:
            sites = found.sites(names)
            values = {name: sims[name] for name in names}
            theta = np.asarray(jax.jit(sites.unconstrain)(values))
            checked = [*values.values(), theta]
        elif found.theta is not None:
            each = math.prod(found.theta.shape[1:-1])
            theta = found.theta.reshape(count * each, -1)
            shown = [np.asarray(shown[0]).reshape(count * each, *found.event_shape)]
            checked = [theta]
        else:
            parts = [sims[name] for name in names]
            theta = np.concatenate([p.reshape(count, -1) for p in parts], -1)
            checked = [theta]
        known = _usable(checked, [False] * len(checked))
        usable = known & _usable(shown, [missing] * len(shown))
        failed = int((~usable.reshape(count, each)).any(1).sum())
        if usable.sum() < 10:
            raise ValueError(f"{who} needs at least 10 usable simulations, got {count - failed} of {count}")
        if failed and failures == "error":
            raise ValueError(
                f"{failed} of {count} simulations failed or are not finite: whether a simulation fails "
                f"depends on its parameters, so without them {who} learns what holds for those that succeed. "
                "If that is wanted, pass failures='exclude'"
            )
        if failed and failures == "exclude":
            warnings.warn(
                f"{who} leaves out {failed} of {count} simulations that failed or are not finite",
                stacklevel=3,
            )
        kept = np.flatnonzero(known if failures == "keep" else usable)
        filled = np.where(usable, np.arange(count * each), np.argmax(usable))[kept]

        def by_row(name, a, is_numbers):
            a = np.asarray(as_numbers(name, a))
            if a.shape not in ((count,), (count * each,)) or is_numbers == (a.dtype == bool):
                raise ValueError(
                    f"{name} must be ({count},), one for each simulation, got {a.dtype} of shape {a.shape}"
                )
            return np.repeat(a, count * each // len(a))[kept]

        validation = as_numbers("validation", validation)
        if np.ndim(validation):
            held_out = held_out_rows(split_key, by_row("validation", validation, False), len(kept))
        else:  # whole simulations, whose rows belong together
            own, place = np.unique(kept // each, return_inverse=True)
            held_out = held_out_rows(split_key, validation, len(own))[place]
        weights = 1.0 if weights is None else by_row("weights", weights, True)
        weights = checked_weights(np.where(usable[kept], weights, 0.0), held_out)
        whole = len(kept) == len(usable)
        return cls(
            setting,
            sites,
            theta if whole else theta[kept],
            {name: found.support(name) for name in observed},
            tuple(a if whole and not failed else a[filled] for a in shown),
            weights,
            held_out,
            failed,
            missing,
            kept // each,
        )

    @property
    def some(self) -> np.ndarray:
        """Numbers of up to 8192 rows that count, by which data are scaled."""
        return np.sort(np.random.default_rng(0).permutation(np.flatnonzero(self.weights))[:8192])

    @property
    def some_arrays(self) -> tuple[Any, ...]:
        """The observed values of :attr:`some` rows."""
        some = self.some
        return tuple(np.asarray(a[some], jnp.result_type(float)) for a in self.arrays)

    def summary(self, embedding) -> tuple[View, Summary, Callable, int]:
        """A view of the observed sites; the networks; how their weights are made of a key; and their width.

        :param embedding: a network for the observed site, or a dictionary of them by site.
        """
        names = list(self.supports)
        parts = zip(names, self.arrays)
        axes = [axes_of(embedding_of(embedding, name, names), a.ndim - 1) for name, a in parts]
        view = View.of(self.supports, dict(zip(names, self.arrays)), self.some, axes, self.missing)
        two = tuple(np.asarray(a[:2], jnp.result_type(float)) for a in self.arrays)
        summary, weights_of = Summary.of(view, embedding, two)

        def width():
            return summary(weights_of(jax.random.key(0)), view(two))

        return view, summary, weights_of, jax.eval_shape(width).shape[-1]

    def train(self, key, loss, starts, data, **options) -> tuple[Trained, Any]:
        """Minimise a loss of ``(params, fixed)`` over rows of data, as :func:`train_best` does.

        :param starts: pairs ``(params, fixed)``, of which the best is taken.
        """
        options = training_options(len(self.theta), options)
        options |= dict(weights=self.weights, held_out=self.held_out)
        dtype = jax.tree.leaves(starts[0][0])[0].dtype
        data = [a.astype(dtype, copy=False) if i == 0 else a for i, a in enumerate(data)]
        return train_best(key, loss, starts, data, **options)


def training_options(rows: int, options: dict[str, Any]) -> dict[str, Any]:
    """Options of training with defaults for simulations: small batches, annealed steps and averaged weights.

    Simulations are few and networks overfit them: noise in the gradient and its average over steps both help.
    """
    batch_size = min(max(2 ** int(math.log2(max(rows // 64, 1))), 64), 256)
    defaults = dict(batch_size=batch_size, learning_rate=5e-3, average=0.995, anneal=0.3, tolerance=0.01)
    return defaults | options


def _usable(arrays, may_be_missing) -> np.ndarray:
    """Which rows are finite; of the arrays in which numbers may be missing, some number must be there."""
    usable, some = np.ones(len(arrays[0]), bool), np.zeros(len(arrays[0]), bool)
    for a, missing in zip(arrays, may_be_missing):
        for start in range(0, len(a), 2**16):
            rows = slice(start, start + 2**16)
            part = np.asarray(a[rows]).reshape(-1, math.prod(a.shape[1:]))
            if missing:
                usable[rows] &= ~np.isinf(part).any(1)
                some[rows] |= np.isfinite(part).any(1)
            else:
                usable[rows] &= np.isfinite(part).all(1)
    return usable & some if any(may_be_missing) else usable
