# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Posteriors by name: what can be done with draws and a density of a model's latent sites."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike
from numpyro import handlers
from numpyro.distributions.transforms import biject_to
from numpyro.infer import MCMC, NUTS
from numpyro.infer.util import log_density

from numpyro_maf.diagnostics import psis
from numpyro_maf.flows.builders import made, nsf
from numpyro_maf.inference.checks import GuideCheck
from numpyro_maf.inference.learned_priors import Joint
from numpyro_maf.inference.sites import Sites
from numpyro_maf.inference_data import to_arviz
from numpyro_maf.inputs import by_site
from numpyro_maf.pytrees import Described
from numpyro_maf.rng import as_key, split
from numpyro_maf.sbi.kinds import latent_columns
from numpyro_maf.sbi.simulations import Simulations, simulate, with_shapes
from numpyro_maf.traces import latent_names
from numpyro_maf.train.likelihood import fit
from numpyro_maf.train.state import carrying

__all__ = ["Posterior", "Setting", "from_vectors", "not_stored", "to_vectors"]


@dataclass(frozen=True, eq=False)
class Setting:
    """A model and what it is called with; hashable, so that what was compiled for one serves an equal one."""

    model: Callable
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __eq__(self, other):
        plain = isinstance(other, Setting) and not (self.args or self.kwargs or other.args or other.kwargs)
        return self is other or (plain and self.model == other.model)

    def __hash__(self):
        return hash(self.model)

    def conditioned(self, values: dict[str, Any]) -> Callable[..., Any]:
        """The model with some sites observed."""
        return handlers.condition(self.model, data=values)

    @classmethod
    def checked(cls, sites: Sites, model, model_args=(), model_kwargs=None) -> Setting:
        """The setting of a model that has these latent sites.

        :raises ValueError: for a model with others.
        """
        found = Sites.of(model, set(sites.names), model_args, model_kwargs, discrete=True)
        if found != sites:
            raise ValueError(f"the posterior is of other sites than this model's: {sites}")
        return cls(model, tuple(model_args), dict(model_kwargs or {}))


def _no_model(*args, **kwargs):
    raise ValueError("this posterior came from a file, which holds no model: use posterior.with_model(model)")


def not_stored() -> Any:
    """A field for the setting, which files do not hold."""
    return field(default=Setting(_no_model), metadata={"static": True, "stored": False})


class Posterior(Described):
    """A distribution over a model's latent sites, by name and on their supports (abstract).

    Subclasses give ``sample`` and ``of_vectors``, and the fields ``sites``, ``setting`` and ``observation``,
    values by site. Keys may be integers, and so may sample shapes.
    """

    sites: Sites
    setting: Setting
    observation: dict[str, Any]

    def with_model(
        self, model: Callable[..., Any], model_args: tuple[Any, ...] = (),
        model_kwargs: dict[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        """The same posterior with its model, which files do not hold: for predictions, importance and NUTS.

        :raises ValueError: for a model with other latent sites.
        """
        setting = Setting.checked(self.sites, model, model_args, model_kwargs)
        return replace(self, setting=setting)  # type: ignore[type-var]  # all posteriors are dataclasses

    def sample(self, key: ArrayLike, sample_shape: int | Sequence[int] = ()) -> dict[str, Any]:
        """Draws by site, ``sample_shape + batch_shape + site.shape``."""
        raise NotImplementedError

    def of_vectors(self, vector) -> Any:
        """Log-density of unconstrained vectors ``(..., D)``, in their own measure."""
        raise NotImplementedError

    def log_prob(self, values: dict[str, Any]) -> Any:
        """Log-density of values by site, with equal leading axes; minus infinity off the supports."""
        vector, log_det, inside = to_vectors(self.sites, values)
        return jnp.where(inside, self.of_vectors(vector) - log_det, -jnp.inf)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading axes of the observations."""
        return ()

    @property
    def missing(self) -> tuple[str, ...]:
        """The observed sites at which NaN stands for numbers that are not there."""
        return ()

    def _about(self) -> str:
        """The sites, for a line of the representation."""
        sites = with_shapes(dict(zip(self.sites.names, self.sites.shapes)))
        batch = f", a batch of {self.batch_shape}" if self.batch_shape else ""
        return f"of {sites} given {', '.join(self.observation)}{batch}"

    def _one(self, what: str):
        if self.batch_shape:
            raise ValueError(f"{what} takes one observation, got a batch of shape {self.batch_shape}")

    def _whole(self, what: str):
        setting = self.setting
        known = {*self.sites.names, *self.observation}
        others = latent_names(setting.model, setting.args, setting.kwargs, known)
        if others:
            raise ValueError(
                f"{what} scores the model at all its sites, and the posterior is not of {others}, which it "
                "integrates out: learn one of all latent sites"
            )

    # Points and parts ---------------------------------------------------------------------------

    def map(self, key: ArrayLike, *, num_samples: int = 1000, steps: int = 300) -> dict[str, Any]:
        """The most probable values by site: from the best draws uphill, among values as far out as draws.

        :param num_samples: draws, the best 8 of which are starts.
        :param steps: of Adam.
        """
        self._one("map")
        draws = self.sample(as_key(key), (num_samples,))
        vectors, density = np.asarray(to_vectors(self.sites, draws)[0]), np.asarray(self.log_prob(draws))
        starts = vectors[np.argsort(-density)[:8]]
        real = np.array(self.sites.columns) == 0
        low, high = np.where(real, np.quantile(vectors, [0.002, 0.998], 0), [[-np.inf], [np.inf]])
        scale = np.where(real, np.maximum(high - low, 1e-12), 1.0)

        def at(points):
            return self.log_prob(self.sites.constrain(points))

        optimizer = optax.adam(optax.cosine_decay_schedule(0.03, steps))

        def step(carry, _):
            points, state = carry
            slopes = jax.grad(lambda p: at(p).sum())(points)
            updates, state = optimizer.update(-jnp.nan_to_num(slopes) * scale, state)
            points = jnp.where(real, jnp.clip(points + updates * scale, low, high), points)
            return (points, state), None

        @jax.jit
        def climb(starts):
            points = jnp.clip(starts, low, high)
            (points, _), _ = lax.scan(step, (points, optimizer.init(points)), length=steps)
            points = jnp.concatenate([points, starts])
            return self.sites.constrain(points[jnp.nanargmax(at(points))])

        return climb(starts)

    def marginal(
        self,
        key: ArrayLike,
        *names: str,
        num_samples: int = 10_000,
        builder: Callable[..., Any] = nsf,
        **options: Any,
    ) -> Joint:
        """The joint density of some sites alone: a flow of draws, with ``sample`` and ``log_prob`` by name.

        :param builder: ``(key, features) -> Flow``; with discrete sites it also gets ``columns``.
        :param options: of :func:`~numpyro_maf.fit`.
        """
        self._one("marginal")
        draw_key, init_key, fit_key = split(as_key(key), 3)
        kept = self.sites.select(names)
        vector = np.asarray(to_vectors(kept, self.sample(draw_key, (num_samples,)))[0])
        if any(kept.columns):
            builder = partial(made if builder is nsf else builder, columns=latent_columns(kept, vector))
        options = {"progress": False, "learning_rate": 2e-3, **options}
        with carrying(lambda result: Joint(result.flow, kept)):
            return Joint(fit(fit_key, builder(init_key, kept.width), vector, **options).flow, kept)

    # The model ------------------------------------------------------------------------------------

    def predictive(self, key: ArrayLike, num_samples: int = 1000, **options: Any) -> Simulations:
        """Draws, and what the model makes of each: latent and observed sites, ``(S, ...)``.

        :param options: of :func:`~numpyro_maf.simulate`, such as ``executor``.
        """
        self._one("predictive")
        return self._runs(key, num_samples, options)

    def _runs(self, key, num_samples, options):
        """What the model makes of draws, draws by observations in a row."""
        draw_key, run_key = split(as_key(key))
        draws, setting = self.sample(draw_key, (num_samples,)), self.setting
        axes = 1 + len(self.batch_shape)
        given = {name: value.reshape(-1, *value.shape[axes:]) for name, value in draws.items()}
        count = num_samples * math.prod(self.batch_shape)
        options = {"progress": False, "missing": self.missing, **options, **setting.kwargs}
        return simulate(run_key, setting.model, count, *setting.args, given=given, **options)

    def check_predictive(self, key: ArrayLike, statistic: Callable, num_samples: int = 1000, **options: Any):
        """Posterior predictive p-values (Gelman, Meng & Stern 1996): how often replicates have more.

        Of a batch of observations all are checked in one call.

        :param statistic: of observed sites by name; gives arrays.
        :param options: of :func:`~numpyro_maf.simulate`.
        :return: p-values, ``batch_shape`` and the shape of the statistic, ties counting half; near 0 or 1 the
            model misses it.
        """
        runs = self._runs(key, num_samples, options)
        replicates = {name: jnp.asarray(runs[name]) for name in self.observation}
        seen = {k: jnp.reshape(v, (-1, *replicates[k].shape[1:])) for k, v in self.observation.items()}
        fine = ~runs.failed.reshape(num_samples, -1)

        def share(replicated, actual):
            replicated = replicated.reshape(num_samples, *actual.shape)
            more = (replicated > actual) + 0.5 * (replicated == actual)
            counts = fine.reshape(*fine.shape, *[1] * (actual.ndim - 1))
            shares = (more * counts).sum(0) / counts.sum(0)
            return shares.reshape(*self.batch_shape, *actual.shape[1:])

        check = jax.vmap(statistic)
        return jax.tree.map(share, check(replicates), check(seen))

    def to_arviz(self, key: ArrayLike, num_samples: int = 1000, **options: Any):
        """Draws with prior and posterior predictive groups as ArviZ's data.

        :param options: ``coords`` and ``dims`` of :func:`~numpyro_maf.to_arviz`.
        """
        self._one("to_arviz")
        prior_key, key = split(as_key(key))
        setting, observed = self.setting, list(self.observation)
        runs = self.predictive(key, num_samples)
        options_of = {"progress": False, "missing": self.missing, **setting.kwargs}
        prior = simulate(prior_key, setting.model, num_samples, *setting.args, **options_of)
        latent = list(self.sites.names)
        return to_arviz(
            {name: runs[name] for name in latent},
            setting.conditioned(self.observation),
            setting.args,
            setting.kwargs,
            prior={name: prior[name] for name in latent},
            posterior_predictive={name: runs[name] for name in observed},
            **options,
        )

    def importance(self, key: ArrayLike, num_samples: int = 4000) -> GuideCheck:
        """Draws weighed by a model whose densities are known: the correction, its evidence and a verdict.

        :raises NotImplementedError: for a model with a simulator at an observed site.
        :raises ValueError: for a posterior of some latent sites only.
        """
        self._one("importance")
        self._whole("importance")
        draws = self.sample(as_key(key), (num_samples,))
        setting, conditioned = self.setting, self.setting.conditioned(self.observation)

        def joint(values):
            seeded = handlers.seed(conditioned, jax.random.key(0))
            return log_density(seeded, setting.args, setting.kwargs, values)[0]

        target = jax.jit(lambda values: lax.map(joint, values, batch_size=256))(draws)
        weights = np.asarray(target - self.log_prob(draws), np.float64)
        finite = np.where(np.isnan(weights), -np.inf, weights)
        evidence = float(np.logaddexp.reduce(finite) - math.log(num_samples))
        seen = dict(self.observation)
        return GuideCheck(draws, float(weights.mean()), evidence, psis(finite), observation=seen)

    def nuts(
        self, key: ArrayLike, *, num_warmup=300, num_samples=1000, num_chains=4, progress=True, **options: Any
    ) -> MCMC:
        """NUTS over a model whose densities are known, from draws and with their covariance.

        :param options: of NumPyro's NUTS.
        :return: NumPyro's MCMC, run.
        :raises ValueError: for a posterior of some latent sites only.
        """
        self._one("nuts")
        self._whole("nuts")
        draw_key, run_key = split(as_key(key))
        draws = self.sample(draw_key, (1000,))
        transforms = {name: biject_to(s) for name, s in zip(self.sites.names, self.sites.supports)}
        free = {name: transforms[name].inv(value) for name, value in draws.items()}
        flat = np.concatenate([np.asarray(free[k]).reshape(1000, -1) for k in sorted(free)], 1)
        spread = np.atleast_2d(np.cov(flat.T)) + 1e-9 * np.eye(flat.shape[1])
        given = {"dense_mass": True, "inverse_mass_matrix": jnp.asarray(spread), **options}
        mcmc = MCMC(
            NUTS(self.setting.conditioned(self.observation), **given),
            num_warmup=num_warmup,
            num_samples=num_samples,
            num_chains=num_chains,
            chain_method="vectorized",
            progress_bar=progress,
        )
        starts = {k: v[:num_chains] if num_chains > 1 else v[0] for k, v in free.items()}
        mcmc.run(run_key, *self.setting.args, init_params=starts, **self.setting.kwargs)
        return mcmc


def to_vectors(sites: Sites, values: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Values by site as unconstrained vectors; the log-determinant of way back; which are on support."""
    return _to_vectors(sites, by_site("values", {n: values[n] for n in sites.names if n in values}))


@jax.jit
def _to_vectors(sites, values):
    vector = sites.unconstrain(values)
    return vector, sites.log_det(vector), sites.contains(values)


@jax.jit
def from_vectors(sites: Sites, vectors) -> dict[str, Any]:
    """Unconstrained vectors ``(..., D)`` as values by site."""
    return sites.constrain(vectors)
