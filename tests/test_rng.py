"""Random numbers of a set-up: JAX's own, whichever way they are drawn."""

import jax
import numpy as np
import pytest

from numpyro_maf.rng import as_key, generator, normal, split

KEYS = {"typed": jax.random.key(3), "legacy": jax.random.PRNGKey(3), "rbg": jax.random.key(3, impl="rbg")}


def numbers(keys):
    return [np.asarray(jax.random.uniform(key)) for key in keys]


@pytest.mark.parametrize("kind", ["typed", "legacy"])
@pytest.mark.parametrize("count", [1, 2, 5, 8, 9])
def test_keys_are_those_of_jax(kind, count):
    key = KEYS[kind]
    expected = numbers(jax.random.split(key, count))
    assert numbers(split(key, count)) == expected
    assert numbers(jax.jit(lambda key: split(key, count))(key)) == expected


def test_keys_of_another_generator_stay_its_own():
    keys = split(KEYS["rbg"], 3)
    assert {jax.random.key_impl(key) for key in keys} == {jax.random.key_impl(KEYS["rbg"])}
    assert len({float(n) for n in numbers(keys)}) == 3


@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (70, 80)])
def test_normals_are_those_of_jax(shape):
    expected = jax.random.normal(KEYS["typed"], shape)
    # The bits are the same; the last digits of erf_inv depend on how a processor's program is vectorised.
    np.testing.assert_allclose(normal(KEYS["typed"], shape), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        jax.jit(lambda key: normal(key, shape))(KEYS["typed"]), expected, rtol=1e-6, atol=1e-6
    )


def test_an_integer_is_a_key():
    assert generator(as_key(3)).random() == generator(KEYS["typed"]).random()
    assert as_key(KEYS["typed"]) is KEYS["typed"]
