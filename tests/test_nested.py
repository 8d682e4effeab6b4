"""Large batches inside a jit inside a jit: the numbers are those of small ones.

XLA's products on CPUs read past the end of an operand that is broadcast along the batch, where they are fused
with a reduction (jaxlib 0.10.2 and 0.12.0.1). Small batches are not fused.
"""

import jax
import numpy as np
import pytest

import numpyro_maf as nm

BATCH = 2000


@pytest.mark.parametrize("hidden", [(3,), (4, 5)])
@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("builder", [nm.maf, nm.iaf])
def test_one_dimension_in_a_nested_jit(builder, context, hidden):
    flow = builder(
        jax.random.key(0), 1, context=context, transforms=1, hidden=hidden, scalar=nm.PiecewiseLinear(4)
    )
    rng = np.random.default_rng(1)
    flow = flow.with_weights(
        jax.tree.map(lambda w: w + 0.5 * rng.normal(size=w.shape).astype(w.dtype), flow.weights)
    )
    seen = (rng.normal(size=context).astype("float32"),) if context else ()
    x = rng.uniform(0.05, 0.95, (BATCH, 1)).astype("float32")

    @jax.jit
    def inner(flow, seen, x):
        d = flow(*seen)
        (transform,) = d.transforms
        return transform(x), d.log_prob(x), jax.grad(lambda x: d.log_prob(x).sum())(x)

    outer = jax.jit(lambda *args: inner(*args))
    got = outer(flow, seen, x)
    parts = [inner(flow, seen, part) for part in np.split(x, 20)]
    for large, small in zip(got, zip(*parts)):
        np.testing.assert_allclose(large, np.concatenate(small), rtol=1e-5, atol=1e-5)
