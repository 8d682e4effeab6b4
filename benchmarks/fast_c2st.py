"""The benchmark's classifier two-sample test, compiled: scikit-learn's MLPClassifier, rule by rule.

``numpyro_maf.diagnostics.c2st`` is scikit-learn itself, and takes minutes for ten dimensions; a table of
hundreds of them needs something faster. Same network, initialisation, optimiser, batches, penalty and rule
when to stop.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from sklearn.model_selection import KFold


def c2st(reference, draws, seed=0, folds=5):
    """Cross-validated accuracy of a classifier that tells two sets of draws ``(N, D)`` apart."""
    mean, sd = reference.mean(0), reference.std(0, ddof=1)
    x = np.concatenate([(reference - mean) / sd, (draws - mean) / sd]).astype(np.float32)
    label = np.repeat([0.0, 1.0], len(reference)).astype(np.float32)
    accuracies = []
    for fold, (train, test) in enumerate(KFold(folds, shuffle=True, random_state=seed).split(x)):
        logits = _fit(jax.random.key(100 * seed + fold), x[train], label[train], x[test])
        accuracies.append(np.mean((np.asarray(logits) > 0) == label[test]))
    return float(np.mean(accuracies))


@partial(jax.jit, static_argnames=("batch", "patience", "most"))
def _fit(key, x, label, test, batch=200, patience=10, most=1000, tol=1e-4, alpha=1e-4):
    width = x.shape[1]
    sizes = (width, 10 * width, 10 * width, 1)
    init_key, key = jax.random.split(key)
    params = []
    for k, a, b in zip(jax.random.split(init_key, 3), sizes, sizes[1:]):
        bound = np.sqrt((6 if b > 1 else 2) / (a + b))  # Glorot, smaller before the logistic
        weight_key, bias_key = jax.random.split(k)
        weight = jax.random.uniform(weight_key, (a, b), minval=-bound, maxval=bound)
        params.append((weight, jax.random.uniform(bias_key, (b,), minval=-bound, maxval=bound)))
    optimizer = optax.adam(1e-3)

    def forward(params, x):
        for weight, bias in params[:-1]:
            x = jax.nn.relu(x @ weight + bias)
        return (x @ params[-1][0] + params[-1][1])[:, 0]

    def loss(params, rows):
        value = optax.sigmoid_binary_cross_entropy(forward(params, x[rows]), label[rows]).mean()
        return value + 0.5 * alpha / batch * sum((weight**2).sum() for weight, _ in params)

    def step(carry, rows):
        params, state = carry
        value, slopes = jax.value_and_grad(loss)(params, rows)
        updates, state = optimizer.update(slopes, state)
        return (optax.apply_updates(params, updates), state), value

    def epoch(carry):
        params, state, key, best, stale, count = carry
        key, order_key = jax.random.split(key)
        order = jax.random.permutation(order_key, len(x))[: len(x) // batch * batch].reshape(-1, batch)
        (params, state), values = lax.scan(step, (params, state), order)
        value = values.mean()
        stale = jnp.where(value > best - tol, stale + 1, 0)
        return params, state, key, jnp.minimum(best, value), stale, count + 1

    def going(carry):
        return (carry[4] <= patience) & (carry[5] < most)

    start = (params, optimizer.init(params), key, jnp.inf, 0, 0)
    return forward(lax.while_loop(going, epoch, start)[0], test)
