# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""A guide in one call: set up, trained, checked, and at hand for draws, ArviZ and NeuTra."""

from __future__ import annotations

import functools
import inspect
import os
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike
from numpyro.infer import ELBO, SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.reparam import NeuTraReparam

from numpyro_maf.fingerprints import Walk
from numpyro_maf.inference.amortized import AutoAmortized
from numpyro_maf.inference.checks import GuideCheck, check_guide
from numpyro_maf.inference.elbo import PathELBO
from numpyro_maf.inference.guides import AutoFlow, FlowGuide
from numpyro_maf.inference_data import to_arviz
from numpyro_maf.pytrees import Described
from numpyro_maf.rng import as_key, as_shape, split
from numpyro_maf.train.loop import train
from numpyro_maf.train.state import Trained, carrying

__all__ = ["GuideRun", "fit_guide"]

_EPOCH, _HELD_OUT = 50, 256  # steps of an epoch, draws that judge it


@dataclass(frozen=True, eq=False, repr=False)
class GuideRun(Described):
    """A trained guide; made by :func:`fit_guide`.

    :param guide: with ``params``, its trained parameters by site, as SVI gives them.
    :param model: with ``args`` and ``kwargs``, what the guide was trained on.
    :param losses: the negative ELBO in nats, every 50 steps, each over the same 256 draws.
    :param check: what the weights of 4000 draws tell; None where they tell nothing.
    :param verdict: whether to use the guide as it is, its weighted draws, or neither.
    :param trained: how the training ended.
    """

    guide: Callable[..., Any]
    params: dict[str, Any]
    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    losses: np.ndarray
    check: GuideCheck | None
    verdict: str
    trained: Trained | None = field(default=None)

    def sample(self, key: ArrayLike, sample_shape: int | Sequence[int] = ()) -> dict[str, Array]:
        """Draws of the guide by site, ``sample_shape + site.shape``, not weighted; see ``check.resample``."""
        key, shape = jnp.asarray(as_key(key)), as_shape(sample_shape)
        if isinstance(self.guide, AutoGuide):
            given: Any = (
                (self.args, self.kwargs) if isinstance(self.guide, FlowGuide | AutoAmortized) else ((), {})
            )
            return self.guide.sample_posterior(key, self.params, *given[0], sample_shape=shape, **given[1])
        drawn = Predictive(self.guide, params=self.params, batch_ndims=0, num_samples=int(np.prod(shape)))
        rows = drawn(key, *self.args, **self.kwargs)
        return {name: jnp.reshape(value, (*shape, *value.shape[1:])) for name, value in rows.items()}

    def to_arviz(self, key: ArrayLike, num_samples: int = 1000, **options: Any) -> Any:
        """Draws as ArviZ's data; see :func:`~numpyro_maf.to_arviz` for ``coords`` and ``dims``."""
        return to_arviz(self.sample(key, num_samples), self.model, self.args, self.kwargs, **options)

    def neutra(self) -> NeuTraReparam:
        """NumPyro's reparametrisation by the guide: ``NUTS(run.neutra().reparam(model))``.

        :raises TypeError: by NumPyro, for a guide that is no ``AutoContinuous``.
        """
        return NeuTraReparam(self.guide, self.params)

    def _describe(self) -> list[str]:
        model = getattr(self.model, "__name__", type(self.model).__name__)
        guide = getattr(self.guide, "__name__", type(self.guide).__name__)
        lines = [f"GuideRun: {guide} of {model}"]
        if self.trained is None:
            lines.append("  not trained: its start is the posterior, or its parameters were given")
        else:
            state, how = self.trained.state, self.trained.stopped
            how = how or ("still improving" if self.trained.improving else "")
            end = f", {how}" if how else ""
            lines.append(f"  {state.steps:,} steps{end}, ELBO {-state.best_loss:.3f}")
        return lines + [f"  {line}" for line in textwrap.wrap(self.verdict, 96)]


def fit_guide(
    key: ArrayLike,
    model: Callable[..., Any],
    *args: Any,
    guide: Any = None,
    steps: int = 5000,
    num_particles: int = 32,
    learning_rate: float = 5e-3,
    optimizer: optax.GradientTransformation | None = None,
    loss: ELBO | None = None,
    init_params: Mapping[str, Any] | None = None,
    check: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> GuideRun:
    """Train a guide on a model, and say whether to believe it.

    The learning rate falls, to three tenths, whenever the ELBO of the same 256 draws has not improved by
    0.002 for 400 steps; training ends when it has not for 800, or after ``steps``. Parameters are averaged
    over the last steps, and those with the best ELBO are kept. Interrupting keeps the best so far. Where the
    Gaussian that a flow guide starts with is the posterior already, by 99% of its draws, nothing is trained.

    :param key: a ``jax.random`` key, or an integer.
    :param model: a NumPyro model, called with ``args`` and all other ``kwargs``.
    :param guide: any of NumPyro's guides for the model, a function too; or the class of an automatic one,
        with options by ``functools.partial``. None for :class:`~numpyro_maf.AutoFlow`.
    :param steps: at most so many, rounded up to full fifties. 0 to check ``init_params`` only.
    :param num_particles: draws of each step.
    :param learning_rate: of Adam, at the start; ``optimizer``: any optax optimizer instead.
    :param loss: one of NumPyro's, for one particle. None for :class:`~numpyro_maf.PathELBO` with this
        package's guides, and ``Trace_ELBO`` with others.
    :param init_params: by site, where to start: of an earlier run, or from a file.
    :param check: whether to call :func:`~numpyro_maf.check_guide` afterwards.
    :param checkpoint: a folder, by which the same call resumes; see :func:`~numpyro_maf.train.train`.
    :param progress: show a progress bar.
    :raises FloatingPointError: when the ELBO stops being finite; the error's ``result`` is the run so far.
    :raises ValueError: for numbers of steps and particles that are not positive.
    """
    if steps < (init_params is None) or num_particles < 1:
        raise ValueError(f"steps and num_particles must be positive, got {steps} and {num_particles}")
    own = set(inspect.signature(fit_guide).parameters) - {"key", "model", "args", "kwargs"}
    taken = own & set(inspect.signature(model).parameters) - set(getattr(model, "keywords", ()))
    if taken:
        warnings.warn(
            f"the model has arguments {sorted(taken)}, whose names fit_guide takes for itself: bind them by "
            "functools.partial",
            stacklevel=2,
        )
    guide = AutoFlow if guide is None else guide
    guide = guide(model) if isinstance(guide, type | functools.partial) else guide
    if loss is None:
        loss = PathELBO() if isinstance(guide, FlowGuide | AutoAmortized) else Trace_ELBO()
    init_key, train_key, check_key = split(as_key(key), 3)
    svi = SVI(model, guide, optax.sgd(1.0), loss)
    state = svi.init(jnp.asarray(init_key), *args, init_params=init_params, **kwargs)
    start = svi.optim.get_params(state.optim_state)

    def finished(trained: Trained | None) -> GuideRun:
        params = svi.constrain_fn(start if trained is None else trained.params)
        losses = np.zeros(0) if trained is None else trained.validation_loss
        found, verdict = None, "not checked"
        if check:
            try:
                found = check_guide(check_key, model, guide, params, *args, **kwargs)
                verdict = found.verdict
            except ValueError as error:
                verdict = f"do not trust it: {error}"
        return GuideRun(guide, params, model, args, kwargs, losses, found, verdict, trained)

    if not steps:
        return finished(None)
    if check and init_params is None and isinstance(guide, FlowGuide):
        ready = finished(None)
        if ready.check is not None and ready.check.psis.ess > 0.99 * len(ready.check.psis.log_weights):
            return ready  # the Gaussian that it starts with is the posterior
    draws = np.arange(_EPOCH * num_particles + _HELD_OUT, dtype=np.int32)
    with carrying(finished):
        return finished(
            train(
                train_key, _Bound(svi, args, kwargs), start, [draws], weights=np.ones(len(draws)),
                held_out=draws < _HELD_OUT, batch_size=num_particles, max_epochs=-(-steps // _EPOCH),
                learning_rate=learning_rate, optimizer=optimizer, average=0.99, anneal=0.3, patience=16,
                tolerance=2e-3, checkpoint=checkpoint, progress=progress,
            )
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Bound:
    """The negative ELBO of single draws, whose numbers are the rows that :func:`train` is given."""

    svi: SVI
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Of the model and its arguments, for checkpoints."""
        return Walk(strict=False).digest([self.svi.model, self.args, self.kwargs], "the model")

    def __call__(self, params: Any, fixed: Any, key: ArrayLike, numbers: Array) -> Array:
        svi, constrained = self.svi, self.svi.constrain_fn(params)

        def one(number: Array) -> Array:
            own = jax.random.fold_in(key, number)
            return svi.loss.loss(own, constrained, svi.model, svi.guide, *self.args, **self.kwargs)

        return jax.vmap(one)(numbers)
