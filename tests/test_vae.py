"""The example of a variational autoencoder, for a few steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from numpyro_maf.examples import vae


@pytest.mark.slow
def test_vae_of_digits(tmp_path):
    x = jnp.asarray(load_digits().data[:256], jnp.float32)
    guide, params, losses = vae.train(jax.random.key(0), x, steps=60, batch_size=64, progress=False)
    assert {"decoder", "prior$params", "auto$params", "auto_encoder"} <= set(params)
    assert losses[-10:].mean() < 0.8 * losses[:10].mean()
    elbo, bound = vae.bounds(jax.random.key(1), x[:20], "MAF", guide, params, draws=8)
    assert np.isfinite(elbo) and elbo < bound < 0  # Burda et al. 2016, theorem 1
    codes = jax.jit(guide.median)(params, x[:4])["z"]
    assert codes.shape == (4, vae.CODE)
    decode = jax.jit(lambda decoder, codes: jax.nn.sigmoid(decoder(None, codes)[..., 0, :]))
    rebuilt = vae.LEVELS * decode(params["decoder"], codes)
    vae.picture(tmp_path / "digits.png", x[:4], rebuilt, rebuilt)
    assert (tmp_path / "digits.png").stat().st_size > 3000
