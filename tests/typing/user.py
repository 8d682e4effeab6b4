"""What a user writes, checked by mypy and pyright in their strictest modes against the installed wheel.

NumPyro's own types are not known whole, which pyright says of every use of them: those lines are left out.
"""

from typing import cast

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import SVI

import numpyro_maf as nm
from numpyro_maf import plots


def model(x: jax.Array | None = None) -> None:
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))  # pyright: ignore
    numpyro.sample("x", dist.Normal(a, 1.0), obs=x)  # pyright: ignore


key, x = jax.random.key(0), np.random.default_rng(0).normal(size=(200, 2))
result = nm.fit(key, nm.maf(key, 2, transforms=2, scalar=nm.RQSpline()), x, max_epochs=2, progress=False)
density: jax.Array = result.flow().log_prob(x)
nm.save("flow", result.flow)
again: nm.Flow = nm.load("flow")
prior = nm.fit_sites(key, {"a": x[:, 0]}, model, max_epochs=2, progress=False)
guide = nm.AutoFlow(model)
svi = SVI(model, guide, optax.adam(1e-3), nm.PathELBO(8))
result_of_svi = svi.run(key, 10, x[0, 0], progress_bar=False)  # pyright: ignore
params = cast(dict[str, jax.Array], result_of_svi.params)  # pyright: ignore
verdict: str = nm.check_guide(key, model, guide, params, x[0, 0], num_samples=100).verdict
sims = nm.simulate(key, model, 100, progress=False)
posterior = nm.npe(key, model, sims, builder=nm.nsf, max_epochs=2, progress=False)
draws: dict[str, jax.Array] = posterior({"x": np.float32(0.3)}).sample(key, (10,))
chain = nm.HMM(np.full(2, 0.5), np.full((2, 2), 0.5), np.zeros((5, 2)))
path: jax.Array = chain.mode
axes = plots.losses({"flow": result})
