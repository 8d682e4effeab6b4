# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""A variational autoencoder of digits whose posterior and prior are flows.

    python -m numpyro_maf.examples.vae [--out DIR] [--steps N]

The encoder gives the context of a guide, an inverse autoregressive flow; the prior of the code is a masked
autoregressive flow, trained with the rest. Both are compared with Normals: first the posterior becomes a
flow, then the prior too. The digits are scikit-learn's, 8x8 pixels of 0 to 16.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax.scipy.special import logsumexp
from numpyro import handlers
from numpyro.infer import SVI, Predictive, Trace_ELBO

from numpyro_maf import AutoAmortized, elementwise, flow_module, iaf, maf
from numpyro_maf.flows.scalars import Affine
from numpyro_maf.inference.checks import draw_and_score
from numpyro_maf.nn.mlp import MLP

CODE, PIXELS, LEVELS = 8, 64, 16
PRIORS = {
    "Normal": None,
    "MAF": partial(maf, features=CODE, transforms=3, hidden=(64, 64)),
}
POSTERIORS = {
    "Normal": partial(elementwise, scalar=Affine()),
    "IAF": partial(iaf, transforms=3, hidden=(64, 64)),
}


def decoder(key):
    """From codes to the logits of pixels."""
    return MLP.init(key, CODE, (1, PIXELS), hidden=(128, 128))


def model(x, prior: str = "MAF", batch_size: int | None = None):
    """Codes from the prior, pixels Binomial given the code.

    :param x: ``(N, 64)`` integers from 0 to 16; ``batch_size``: how many of them at a time, None for all.
    """
    network = numpyro.param("decoder", decoder)
    make = PRIORS[prior]
    if make is None:
        codes = dist.Normal(0, 1).expand([CODE]).to_event(1)
    else:
        codes = flow_module("prior", make)()
    with numpyro.plate("digits", len(x), subsample_size=batch_size) as rows:
        z = numpyro.sample("z", codes)
        logits = network(None, z)[..., 0, :]
        numpyro.sample("x", dist.Binomial(LEVELS, logits=logits).to_event(1), obs=x[rows])


def train(key, x, prior="MAF", posterior="IAF", steps=4000, batch_size=128, progress=True):
    """Train model and guide together; return the guide and the parameters."""
    guide = AutoAmortized(
        model,
        "digits",
        inputs=lambda x, *args, **kwargs: x / LEVELS - 0.5,
        encoder=(128, 64),
        builder=POSTERIORS[posterior],
    )
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    result = svi.run(key, steps, x, prior, batch_size, progress_bar=progress)
    return guide, result.params, np.asarray(result.losses)


def bounds(key, x, prior, guide, params, draws=64):
    """Mean over digits of the ELBO and of the importance-weighted bound with as many draws, in nats.

    Burda, Grosse & Salakhutdinov, *Importance Weighted Autoencoders* (2016), eq. 8.
    """

    @jax.jit
    def one(row, key):
        return draw_and_score(key, model, guide, params, (row[None], prior), {}, draws)[1]

    weights = jax.lax.map(lambda pair: one(*pair), (x, jax.random.split(key, len(x))), batch_size=64)
    return float(weights.mean()), float((logsumexp(weights, 1) - jnp.log(draws)).mean())


def picture(path, x, draws, rebuilt):
    """Digits, the same through the code, and new ones from the prior."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, images, title in zip(
        figure.subplots(3, 1), (x, rebuilt, draws), ("held-out digits", "through the code", "from the prior")
    ):
        rows = [np.pad(np.asarray(image).reshape(8, 8), 1) for image in images]
        axis.imshow(np.hstack(rows), cmap="gray_r", vmin=0, vmax=LEVELS)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_axis_off()
    figure.savefig(path, dpi=120)
    return figure


def main(arguments=None):
    """Train the three, print their bounds, draw a picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the picture")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    from sklearn.datasets import load_digits

    order = np.random.default_rng(0).permutation(1797)
    images = jnp.asarray(load_digits().data[order], jnp.float32)
    x, held_out = images[:1500], images[1500:]
    print("nats a digit        held out            of the training digits")
    print(f"{'posterior':10s}{'prior':8s}" + 2 * f"{'ELBO':>9s}{'IW bound':>10s} ")
    for posterior, prior in [("Normal", "Normal"), ("IAF", "Normal"), ("IAF", "MAF")]:
        key = jax.random.key(given.seed)
        guide, params, _ = train(key, x, prior, posterior, given.steps)
        found = [bounds(jax.random.key(1), rows, prior, guide, params) for rows in (held_out, x[:300])]
        columns = "".join(f"{elbo:9.2f}{bound:10.2f} " for elbo, bound in found)
        print(f"{posterior:10s}{prior:8s}{columns}", flush=True)
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        codes = guide.median(params, held_out[:16])["z"]
        rebuilt = LEVELS * jax.nn.sigmoid(params["decoder"](None, codes)[..., 0, :])
        free = handlers.uncondition(partial(model, prior=prior))
        draws = Predictive(free, params=params, num_samples=1)(jax.random.key(2), held_out[:16])["x"][0]
        path = given.out / "digits_vae.png"
        picture(path, held_out[:16], draws, rebuilt)
        print(f"picture in {path}")


if __name__ == "__main__":
    main()
