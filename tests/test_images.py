"""Images as vectors, integers as densities, and moving in a flow's base."""

import itertools
from dataclasses import replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import normals, shaken

import numpyro_maf as nm
from numpyro_maf.flows import images

# Geometry ----------------------------------------------------------------------------------------


def test_squeeze_puts_each_two_by_two_block_in_one_pixel():
    at = np.arange(4 * 4 * 3).reshape(4, 4, 3)
    squeezed = images.squeeze(at)
    assert squeezed.shape == (2, 2, 12)
    for row, column in itertools.product(range(2), range(2)):
        block = at[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert set(squeezed[row, column]) == set(block.ravel())
    with pytest.raises(ValueError, match="3 by 4"):
        images.squeeze(np.zeros((3, 4, 1)))


def test_a_checkerboard_has_no_two_neighbours():
    for parity in (0, 1):
        board = np.zeros(4 * 6 * 2, bool)
        board[list(images.checkerboard((4, 6, 2), parity))] = True
        board = board.reshape(4, 6, 2)
        assert board.sum() == 24 and (board[..., 0] == board[..., 1]).all()
        assert (board[1:] != board[:-1]).all() and (board[:, 1:] != board[:, :-1]).all()


@pytest.mark.parametrize("random", [False, True])
def test_channel_halves_come_in_complementary_pairs(random):
    for number in range(0, 6, 2):
        both = [images.halves((2, 3, 4), n, random) for n in (number, number + 1)]
        assert sorted(both[0] + both[1]) == list(range(24))
        for half in both:
            assert len(half) == 12 and {i % 4 for i in half} == {half[0] % 4, half[1] % 4}


@pytest.mark.parametrize("builder", [nm.realnvp, nm.glow, nm.flowpp, nm.nsf, nm.nice])
def test_every_number_of_an_image_is_moved_and_seen(builder, x64):
    """Multi-scale flows leave nothing out: each number of the base moves, and each reacts to others."""
    options = dict(coupling=True) if builder is nm.nsf else dict(heads=1) if builder is nm.flowpp else {}
    flow = shaken(builder(jax.random.key(0), (4, 4, 2), transforms=2, hidden=(4,), **options), 1, 0.2)

    @jax.jit
    def facts(flow, x):
        jacobian, z = jax.jacfwd(lambda x: (nm.encode(flow(), x),) * 2, has_aux=True)(x)
        return jacobian.reshape(32, 32), z, flow().log_prob(x)

    jacobian, z, log_prob = jax.tree.map(np.asarray, facts(flow, normals(2, 4, 4, 2)))
    assert (abs(np.diagonal(jacobian)) > 1e-8).all()
    assert ((jacobian != 0).sum(0) > 1).all()
    base = -0.5 * np.sum(z**2) - 16 * np.log(2 * np.pi)
    np.testing.assert_allclose(log_prob, base + np.linalg.slogdet(jacobian)[1], rtol=1e-6)


def test_images_too_small_for_their_levels_are_refused():
    with pytest.raises(ValueError, match="too small for so many levels"):
        nm.realnvp(jax.random.key(0), (2, 2, 1), levels=2)


# ActNorm's start ---------------------------------------------------------------------------------


def walk(bijectors, x, found):
    """From data to base, with what each ActNorm makes of the events."""
    for bijector in reversed(bijectors):
        if isinstance(bijector, nm.Part):
            part = x[..., np.array(bijector.indices)]
            walk(bijector.bijector.bijectors, part, found)
        elif isinstance(bijector, nm.ActNorm):
            y = bijector._inverse(x)
            found.append(y.reshape(-1, bijector.loc.shape[-1]))
        x = bijector._inverse(x)
    return found


@jax.jit
def started(flow, x, c):
    """With its start, and what each ActNorm then makes of the same events."""
    ready = flow.initialized(x, c)
    bijectors = ready.bijectors if c is None else [b.bind(c) for b in ready.bijectors]
    return ready, walk(bijectors, x.reshape(len(x), -1), [])


@pytest.mark.parametrize("shape, context", [((3,), 0), ((3,), 2), ((4, 4, 1), 0)])
def test_initialized_normalises_every_layer(shape, context):
    features = shape if len(shape) == 3 else shape[0]
    flow = shaken(nm.glow(jax.random.key(0), features, context=context, transforms=2, hidden=(6,)), 1)
    x = 3 * normals(2, 300, *shape) ** 3 + 7
    ready, found = started(flow, x, normals(3, 300, context) if context else None)
    assert len(found) == (4 if len(shape) == 3 else 2)
    for rows in map(np.asarray, found):
        np.testing.assert_allclose(rows.mean(0), 0, atol=2e-3)
        np.testing.assert_allclose(rows.std(0), 1, atol=2e-3)
    assert jax.tree.structure(ready) == jax.tree.structure(flow)


def test_initialized_undoes_scale_and_logit_first():
    flow = nm.glow(jax.random.key(0), (2, 2, 1), transforms=1, hidden=(4,), levels=1, logit=0.05)
    x = np.random.default_rng(1).random((500, 2, 2, 1), np.float32)
    z = nm.encode(started(flow, x, None)[0](), x)
    assert abs(z.mean()) < 0.1 and abs(z.std() - 1) < 0.1


# Dequantisation ----------------------------------------------------------------------------------

LEVELS = 4


@jax.jit
def score(flow, y, context=None):
    return (flow() if context is None else flow(context)).log_prob(y)


@lru_cache
def box_flow():
    """A density of one number in the unit box, and its probabilities of four bins by quadrature."""
    flow = shaken(nm.nis(jax.random.key(0), 1, hidden=(4,), transforms=1), 1, 1.0)
    ends = np.linspace(0, 1, LEVELS * 2000 + 1, dtype=np.float32)
    density = np.exp(np.asarray(score(flow, (ends[1:] + ends[:-1])[:, None] / 2), float))
    return flow, density.reshape(LEVELS, -1).sum(1) * float(ends[1] - ends[0])


@lru_cache
def noise_flow():
    return shaken(nm.realnvp(jax.random.key(3), 1, context=1, hidden=(4,), transforms=1, logit=0.0), 4, 0.2)


bound = jax.jit(nm.Dequantize.bound, static_argnames="samples")


@pytest.mark.parametrize("variational", [False, True], ids=["uniform", "variational"])
def test_the_bound_is_the_integral_over_the_noise(variational):
    """One sample's mean, against quadrature of the module's formula over the noise."""
    noise = noise_flow() if variational else None
    flow, dequantize, x = box_flow()[0], nm.Dequantize(LEVELS, noise), np.arange(LEVELS)[:, None]
    u = (np.arange(2000) + 0.5)[:, None, None] / 2000
    log_q = 0.0 if noise is None else np.asarray(score(noise, u, x / (LEVELS - 1)), float)
    log_p = np.asarray(score(flow, (x + u).reshape(-1, 1) / LEVELS), float).reshape(-1, LEVELS)
    q = np.exp(log_q) * np.ones_like(log_p)
    np.testing.assert_allclose(q.mean(0), 1, rtol=1e-3)
    expected = (q * (log_p - np.log(LEVELS) - log_q)).mean(0)
    rows = np.repeat(x, 4000, 0)
    single = np.asarray(bound(dequantize, flow, jax.random.key(0), rows), float).reshape(LEVELS, -1)
    assert (abs(single.mean(1) - expected) < 5 * single.std(1) / np.sqrt(4000) + 3e-4).all()


def test_more_samples_bring_the_bound_to_the_probability():
    flow, probabilities = box_flow()
    np.testing.assert_allclose(probabilities.sum(), 1, rtol=1e-4)
    assert probabilities.max() > 1.5 * probabilities.min()
    x = np.arange(LEVELS)[:, None]
    many = bound(nm.Dequantize(LEVELS), flow, jax.random.key(1), x, samples=20000)
    np.testing.assert_allclose(np.exp(many), probabilities, rtol=0.03)


def test_a_flat_density_costs_the_levels_own_bits():
    flow = nm.nis(jax.random.key(0), 3, hidden=(4,))
    flow = flow.with_weights(jax.tree.map(jnp.zeros_like, flow.weights))
    x = np.random.default_rng(0).integers(0, 8, (50, 3))
    found = bound(nm.Dequantize(8), flow, jax.random.key(0), x)
    np.testing.assert_allclose(nm.bits_per_dimension(found, 3), 3.0, rtol=1e-5)


def test_dequantised_events_stay_in_their_bins():
    x = np.random.default_rng(0).integers(0, LEVELS, (200, 1))
    for noise in (None, noise_flow()):
        y, log_noise = nm.Dequantize(LEVELS, noise).sample(jax.random.key(0), x)
        np.testing.assert_array_equal(np.floor(np.minimum(y * LEVELS, x + 0.999)), x)
        assert log_noise.shape == (200,) and np.isfinite(log_noise).all()


def test_noise_is_trained_and_tightens_the_bound():
    """Half-empty bins: where in the bin the density lives, the noise has to find out."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2, (2000, 1)) * 3
    flow = nm.nis(jax.random.key(0), 1, hidden=(8,), transforms=1)
    options = dict(max_epochs=15, batch_size=200, learning_rate=1e-2, progress=False, validation=0.0)
    flat = nm.fit(0, flow, x, dequantize=nm.Dequantize(4), **options)
    noise = nm.realnvp(jax.random.key(1), 1, context=1, hidden=(8,), transforms=1, logit=0.0)
    result = nm.fit(0, flow, x, dequantize=nm.Dequantize(4, noise), **options)
    assert flat.dequantize.noise is None
    changed = zip(jax.tree.leaves(noise.weights), jax.tree.leaves(result.dequantize.weights), strict=True)
    assert all((a != b).any() for a, b in changed if a.size)
    for fitted in (flat, result):
        found = bound(fitted.dequantize, fitted.flow, jax.random.key(5), x, samples=8)
        np.testing.assert_allclose(found.mean(), -np.log(2), atol=0.05)


def test_noise_flows_are_checked():
    with pytest.raises(ValueError, match="levels must be 2 or more"):
        nm.Dequantize(1)
    with pytest.raises(ValueError, match="as wide as its events, 2"):
        nm.Dequantize(4, nm.maf(jax.random.key(0), 2, context=1, logit=0.0))


# Latent arithmetic -------------------------------------------------------------------------------


@lru_cache
def standardised():
    """A flow that does nothing but scale: known places in the base."""
    x = np.array([[1.0, 10.0], [3.0, 30.0], [5.0, 20.0], [7.0, 40.0]])
    flow = nm.elementwise(jax.random.key(0), 2, scalar=nm.Affine())
    return replace(flow, event_scale=nm.Standardize(jnp.array(x.mean(0)), jnp.array(x.std(0))))(), x


def test_encode_and_decode_known_answers():
    d, x = standardised()
    z = (x - x.mean(0)) / x.std(0)
    np.testing.assert_allclose(nm.encode(d, x), z, atol=1e-5)
    np.testing.assert_allclose(nm.decode(d, z), x, rtol=1e-5)
    path = nm.interpolate(d, x[0], x[1], steps=3)
    np.testing.assert_allclose(path, [[1, 10], [2, 20], [3, 30]], rtol=1e-5)
    direction = nm.attribute(d, x[2:], x[:2])
    np.testing.assert_allclose(direction, (x[2:].mean(0) - x[:2].mean(0)) / x.std(0), rtol=1e-5)


def test_interpolation_keeps_its_ends(x64):
    d = shaken(nm.realnvp(jax.random.key(0), (2, 2, 1), hidden=(4,), levels=1), 1)()
    start, end = normals(2, 2, 3, 2, 2, 1)
    path = nm.interpolate(d, start, end, steps=5)
    assert path.shape == (5, 3, 2, 2, 1)
    np.testing.assert_allclose(path[0], start, atol=1e-8)
    np.testing.assert_allclose(path[-1], end, atol=1e-8)
    with pytest.raises(ValueError, match="steps must be 2 or more"):
        nm.interpolate(d, start, end, steps=1)


def test_a_made_has_no_base():
    with pytest.raises(TypeError, match="expected a FlowDistribution"):
        nm.encode(nm.made(jax.random.key(0), 2)(), jnp.zeros(2))
