# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Learned priors: samples of named variables become one joint distribution, a prior in other models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array
from jax.tree_util import register_dataclass
from jax.typing import ArrayLike
from numpyro.distributions import ImproperUniform

from numpyro_maf.codec import storable
from numpyro_maf.flows.builders import nsf
from numpyro_maf.flows.domains import check_values
from numpyro_maf.flows.flow import Flow
from numpyro_maf.inference.modules import flow_module
from numpyro_maf.inference.prior_checks import JointCheck, compared
from numpyro_maf.inference.sites import Sites
from numpyro_maf.inference_data import to_arviz
from numpyro_maf.inputs import as_numbers, by_site, check_finite, rows_by_site
from numpyro_maf.pytrees import Described
from numpyro_maf.rng import as_key, as_shape, split
from numpyro_maf.train.likelihood import fit
from numpyro_maf.train.options import FitOptions, check_options
from numpyro_maf.train.state import carrying

__all__ = ["Joint", "fit_sites", "sample_sites"]


@storable
@register_dataclass
@dataclass(frozen=True, repr=False)
class Joint(Described):
    """A joint distribution over named sites: a flow of their unconstrained values.

    A pytree, so it can be an argument of a model that is compiled once.

    :param flow: of ``sites.width`` features.
    :param sites: names, shapes, supports.
    """

    flow: Flow
    sites: Sites

    def _describe(self) -> list[str]:
        return [f"Joint of {self.sites._listed()}", *(f"  {line}" for line in repr(self.flow).split("\n"))]

    def sample(self, key: ArrayLike, sample_shape: int | Sequence[int] = ()) -> dict[str, Array]:
        """Values by site, ``sample_shape + site.shape``, each on its support."""
        return self.sites.constrain(self.flow().sample(as_key(key), as_shape(sample_shape)))

    def log_prob(self, values: Mapping[str, ArrayLike]) -> Array:
        """Log-density ``(...)`` of values by site, with equal leading axes; minus infinity off supports."""
        vector = self.sites.unconstrain(values)
        log_prob = self.flow().log_prob(vector) - self.sites.log_det(vector)
        return jnp.where(self.sites.contains(values), log_prob, -jnp.inf)

    def check(
        self, samples: Any, *, key: ArrayLike = 0, weights: ArrayLike | None = None, tolerance: float = 0.05
    ) -> JointCheck:
        """Compare draws of this distribution with samples, number by number and pair by pair.

        :param samples: as for :func:`fit_sites`, best some that it was not fitted to.
        :param key: a ``jax.random`` key, or an integer, for as many draws as there are samples.
        :param weights: ``(N,)``, how much each sample counts.
        :param tolerance: distance between distribution functions that is called small.
        :raises ValueError: for missing sites, unequal numbers of samples, and weights of another shape.
        """
        values = rows_by_site("samples", by_name(samples), self.sites.names, "samples")
        for name, shape in zip(self.sites.names, self.sites.shapes):
            check_finite(f"samples[{name!r}]", values[name])
            if values[name].shape[1:] != shape:
                raise ValueError(f"samples[{name!r}] must be (N, *{shape}), got {values[name].shape}")
        count = len(values[self.sites.names[0]])
        mass = np.ones(count) if weights is None else np.asarray(as_numbers("weights", weights), float)
        if mass.shape != (count,) or (mass < 0).any() or not mass.sum() > 0:
            raise ValueError(f"weights must be {count} numbers of at least 0, some of them positive")
        draws = jax.jit(lambda key: self.sample(key, (count,)))(as_key(key))
        chosen = {name: values[name] for name in self.sites.names}
        return compared(chosen, {k: np.asarray(v) for k, v in draws.items()}, mass, tolerance)

    def to_arviz(self, key: ArrayLike = 0, num_samples: int = 1000, **options: Any) -> Any:
        """Draws by site as ArviZ's data; see :func:`~numpyro_maf.to_arviz` for ``coords`` and ``dims``."""

        def model() -> None:
            for name, shape, support in zip(self.sites.names, self.sites.shapes, self.sites.supports):
                flat = ImproperUniform(support, (), shape[len(shape) - support.event_dim :])
                numpyro.sample(name, flat.expand(shape[: len(shape) - support.event_dim]))

        return to_arviz(self.sample(key, num_samples), model, **options)


def fit_sites(
    key: ArrayLike,
    samples: Any,
    model: Callable[..., Any],
    *,
    model_args: tuple[Any, ...] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    builder: Callable[..., Flow] = partial(nsf, transforms=3),
    **options: Unpack[FitOptions],
) -> Joint:
    """Fit one joint distribution to samples of a model's sites: an earlier posterior, say.

    :param key: a ``jax.random`` key, or an integer.
    :param samples: by site, ``(N, *shape)``: a dictionary, a ``MCMC`` that has run, or ArviZ's InferenceData
        or DataTree with a group ``posterior``. Names that are no latent sites of the model are left out.
    :param model: gives supports and shapes; run with ``model_args`` and ``model_kwargs``.
    :param builder: ``(key, features) -> Flow``.
    :param options: of :func:`~numpyro_maf.fit`, such as ``weights``, ``(N,)``, how much each sample counts.
    :raises TypeError: for an option that does not exist.
    :raises ValueError: when no site is there, for discrete sites, and samples outside their support.
    """
    check_options("fit_sites", options)
    values = by_name(samples)
    sites = Sites.of(model, set(values), model_args, model_kwargs)
    values = by_site("samples", {name: values[name] for name in sites.names})
    for name, support in zip(sites.names, sites.supports):
        check_finite(f"samples[{name!r}]", values[name])
        check_values(f"samples[{name!r}]", support, values[name], edges=False)
    with jax.enable_x64(True):  # seconds since 1970 are more than float32 can hold
        chosen = {name: np.asarray(values[name], np.float64) for name in sites.names}
        vector = np.asarray(sites.unconstrain(chosen))
    init_key, fit_key = split(as_key(key))
    flow = builder(init_key, sites.width)
    with carrying(lambda result: Joint(result.flow, sites)):
        return Joint(fit(fit_key, flow, vector, **options).flow, sites)


def sample_sites(name: str, joint: Joint, *, frozen: bool = True) -> dict[str, Array]:
    """Use a joint distribution as the prior of its sites in a model.

    Its vector is the sample site ``name``; the values follow as deterministic sites of their own names, which
    :func:`~numpyro_maf.to_arviz` shows in place of the vector.

    :param joint: from :func:`fit_sites`.
    :param frozen: False to train its weights too, from where they are, as the param site ``name$params``.
    :return: values by site.
    """
    if not isinstance(joint, Joint):
        raise TypeError(f"sample_sites takes a Joint from fit_sites, got {type(joint).__name__}")
    d = flow_module(name, joint.flow, frozen=frozen)()
    vector = numpyro.sample(name, d, infer={"learned_sites": joint.sites})
    return {k: numpyro.deterministic(k, v) for k, v in joint.sites.constrain(vector).items()}


def by_name(samples: Any) -> dict[str, Any]:
    """Samples by name, ``(N, ...)``, from what holds them."""
    if hasattr(samples, "get_samples"):
        return samples.get_samples()
    if hasattr(samples, "posterior"):
        group = samples.posterior
        flat = {k: np.asarray(group[k]) for k in group.data_vars}
        return {k: v.reshape(-1, *v.shape[2:]) for k, v in flat.items()}
    if isinstance(samples, Mapping):
        return dict(samples)
    raise TypeError(
        f"samples must be a dict, an MCMC, InferenceData or DataTree, got {type(samples).__name__}"
    )
