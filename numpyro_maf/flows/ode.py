# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

r"""Continuous flows: the bijection is the solution of an ordinary differential equation.

Grathwohl, Chen, Bettencourt, Sutskever & Duvenaud, *FFJORD* (2019): with :math:`dx/dt = f(x, t)` from base
(t = 0) to data (t = 1), :math:`d \log p / dt = -\mathrm{tr}\, \partial f / \partial x` (eq. 2-4). Solved by
diffrax, which the extra ``ode`` installs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_maf.flows.bijectors import Bijector
from numpyro_maf.flows.shapes import check_context, check_width
from numpyro_maf.nn.mlp import MLP
from numpyro_maf.pytrees import static

__all__ = ["FFJORD"]


ADJOINTS = ("recursive", "backsolve", "direct")


TRACES = ("exact", "hutchinson")


@dataclass(frozen=True, eq=False)
class FFJORD(Bijector):
    """A free-form continuous bijector; both directions cost the same.

    All events of a call are solved together, with steps for which the worst of them is within tolerance.

    :param net: the dynamics, from x, context and t to ``(..., 1, D)``.
    :param context: ``(..., C)``, or None.
    :param key: of Hutchinson's probes, None for fixed ones.
    :param trace: ``"exact"``, in D products, or ``"hutchinson"``: an unbiased estimate by one probe (there,
        eq. 8), which training draws anew at every step.
    :param adjoint: ``"recursive"`` checkpoints, exact gradients of what was computed; or ``"backsolve"``, the
        adjoint equation (there, eq. 7), with memory that does not grow with the number of steps; or
        ``"direct"``, which has derivatives in forward mode too (``jax.jvp``, ``jacfwd``, Hessians), with more
        memory.
    :param rtol: relative tolerance of the solver; ``atol``: absolute tolerance.
    """

    net: MLP
    context: Any = None
    key: Any = None
    context_width: int = static(default=0)
    trace: str = static(default="exact")
    adjoint: str = static(default="recursive")
    rtol: float = static(default=1e-5)
    atol: float = static(default=1e-5)

    def __post_init__(self):
        for name, value, known in [("trace", self.trace, TRACES), ("adjoint", self.adjoint, ADJOINTS)]:
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got {value!r}")
        if self.rtol <= 0 or self.atol <= 0:
            raise ValueError(f"rtol and atol must be positive, got {self.rtol} and {self.atol}")

    @classmethod
    def init(cls, key, features, *, context=0, hidden=(64, 64), activation="tanh", **options) -> FFJORD:
        """Random dynamics near zero; arguments as for :func:`numpyro_maf.ffjord`."""
        _diffrax()
        inputs = features + context + 1
        net = MLP.init(key, inputs, (1, features), hidden=hidden, activation=activation)
        return cls(net, context_width=context, **options)

    @property
    def batch_shape(self):
        return () if self.context is None else jnp.shape(self.context)[:-1]

    def bind(self, context):
        return replace(self, context=context)

    def randomized(self, key):
        return replace(self, key=key) if self.trace == "hutchinson" else self

    def forward_and_log_det(self, x):
        return self._solve(x, 0.0, 1.0)

    def inverse_and_log_det(self, y):
        return self._solve(y, 1.0, 0.0)

    def _solve(self, x, start, end):
        diffrax = _diffrax()
        features = self.net.outputs[-1]
        check_width(x, features, "FFJORD")
        check_context(self.context, self.context_width, "FFJORD")
        batch = jnp.broadcast_shapes(jnp.shape(x)[:-1], self.batch_shape)
        dtype = jnp.result_type(x, *jax.tree.leaves(self.net))
        rows = jnp.broadcast_to(x, (*batch, features)).reshape(-1, features).astype(dtype)
        context = jnp.zeros((len(rows), 0), dtype)
        if self.context is not None:
            context = jnp.broadcast_to(self.context, (*batch, self.context_width)).reshape(len(rows), -1)
        # A row that is no number must not stop the others: it is solved as zeros, and its result is NaN.
        fine = jnp.isfinite(rows).all(-1) & jnp.isfinite(context).all(-1)
        rows, context = (jnp.where(fine[:, None], a, 0) for a in (rows, context))
        probe = jnp.zeros(())
        if self.trace == "hutchinson":
            key = jax.random.key(0) if self.key is None else self.key
            probe = jax.random.rademacher(key, rows.shape, dtype)

        def velocity(net, context, t, x):
            time = jnp.full((len(x), 1), t, dtype)
            return net(None, jnp.concatenate([x, context.astype(dtype), time], -1))[:, 0]

        def dynamics(t, state, args):
            net, context, probe = args

            def along(direction):
                return jax.jvp(lambda x: velocity(net, context, t, x), (state[0],), (direction,))

            if self.trace == "hutchinson":
                speed, change = along(probe)
                return speed, jnp.sum(probe * change, -1)
            units = jnp.broadcast_to(jnp.eye(features, dtype=dtype)[:, None], (features, *state[0].shape))
            speed, changes = jax.vmap(along, out_axes=(None, 0))(units)
            return speed, jnp.einsum("ini->n", changes)

        controller = diffrax.PIDController(rtol=self.rtol, atol=self.atol, norm=_worst)
        adjoint = diffrax.RecursiveCheckpointAdjoint()
        if self.adjoint == "direct":
            adjoint = diffrax.DirectAdjoint()
        if self.adjoint == "backsolve":
            norm = diffrax.adjoint_rms_seminorm
            back = diffrax.PIDController(rtol=self.rtol, atol=self.atol, norm=norm)
            adjoint = diffrax.BacksolveAdjoint(stepsize_controller=back)
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(dynamics),
            diffrax.Tsit5(),
            t0=start,
            t1=end,
            dt0=None,
            y0=(rows, jnp.zeros(len(rows), dtype)),
            args=(self.net, context, probe),
            stepsize_controller=controller,
            adjoint=adjoint,
        )
        y, log_det = (a[-1] for a in solution.ys)
        y, log_det = jnp.where(fine[:, None], y, jnp.nan), jnp.where(fine, log_det, jnp.nan)
        return y.reshape(*batch, features), log_det.reshape(batch)


def _worst(error):
    """The root mean square error of the worst event: every event is within tolerance, not their mean."""
    rows = jnp.concatenate([a.reshape(len(a), -1) for a in jax.tree.leaves(error)], -1)
    return jnp.sqrt(jnp.max(jnp.mean(rows**2, -1), initial=np.finfo(np.float32).tiny))


def _diffrax():
    try:
        import diffrax
    except ImportError as error:
        raise ImportError('FFJORD needs diffrax: pip install "numpyro_maf[ode]"') from error
    return diffrax
