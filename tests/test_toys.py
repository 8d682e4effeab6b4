"""Images of digits, and two moons against other quadratures."""

import os
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from numpyro_maf.datasets import (
    load_binarized_mnist,
    load_digits,
    two_moons,
    two_moons_entropy,
    two_moons_log_prob,
)

# Images ------------------------------------------------------------------------------------------

PACKED = "binarized_mnist_packed.npz"


def test_packed_bits_become_pixels_in_order(tmp_path):
    pixels = [np.random.default_rng(i).integers(0, 2, (n, 784)) for i, n in enumerate((5, 3, 4))]
    bits = 2 ** np.arange(7, -1, -1)  # the first pixel is the highest bit
    packed = [(p.reshape(-1, 98, 8) * bits).sum(-1).astype(np.uint8) for p in pixels]
    np.savez(tmp_path / PACKED, train=packed[0], valid=packed[1], test=packed[2])
    for path in tmp_path, tmp_path / PACKED:
        splits = load_binarized_mnist(path)
        for part, expected in zip((splits.train, splits.validation, splits.test), pixels):
            assert part.dtype == np.uint8
            np.testing.assert_array_equal(part, expected)


def test_other_image_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=PACKED):
        load_binarized_mnist(tmp_path)
    rows = np.zeros((2, 98), np.uint8)
    np.savez(tmp_path / "short.npz", train=rows, test=rows)
    with pytest.raises(ValueError, match=r"lacks the arrays \['valid'\]"):
        load_binarized_mnist(tmp_path / "short.npz")
    np.savez(tmp_path / "wide.npz", train=rows, valid=np.zeros((2, 784), np.uint8), test=rows)
    with pytest.raises(ValueError, match=r"\(N, 98\), got uint8 \(2, 784\)"):
        load_binarized_mnist(tmp_path / "wide.npz")


def test_binarized_mnist_itself():
    root = Path(os.environ.get("NUMPYRO_MAF_DATA", "")) / "binarized_mnist"
    if not (root / PACKED).is_file():
        pytest.skip("NUMPYRO_MAF_DATA is not set to a directory that contains binarized_mnist/")
    splits = load_binarized_mnist(root)
    parts = splits.train, splits.validation, splits.test
    assert [part.shape for part in parts] == [(50_000, 784), (10_000, 784), (10_000, 784)]
    assert all(part.max() == 1 and 0.12 < part.mean() < 0.14 for part in parts)
    frame = np.ones((28, 28), bool)
    frame[2:-2, 2:-2] = False  # digits stay clear of the border
    assert all(part[:, frame.ravel()].mean() < 2e-3 for part in parts)


def test_digits_are_split_once_for_each_seed():
    sklearn = pytest.importorskip("sklearn.datasets")
    train, test = load_digits(seed=3)
    assert train.images.shape == (1438, 8, 8, 1) and test.images.shape == (359, 8, 8, 1)
    assert (train.images.min(), train.images.max()) == (0, 16)
    source = sklearn.load_digits()
    rows = [np.column_stack([part.images.reshape(-1, 64), part.labels]) for part in (train, test)]
    expected = np.column_stack([source.data, source.target])
    assert sorted(np.concatenate(rows).tolist()) == sorted(expected.tolist())
    again, other = load_digits(seed=3)[1], load_digits(seed=4)[1]
    np.testing.assert_array_equal(again.images, test.images)
    assert (other.images != test.images).any()
    assert [len(part.labels) for part in load_digits(held_out=0.0)] == [1797, 0]


def test_digits_refuse_a_share_that_is_none_and_name_what_they_need():
    with pytest.raises(ValueError, match="from 0 to 1"):
        load_digits(held_out=1.2)
    with patch.dict(sys.modules, {"sklearn": None}), pytest.raises(ImportError, match="numpyro_maf.examples"):
        load_digits()


# Two moons ---------------------------------------------------------------------------------------


def brute_force(x, noise, panels=2000):
    """The mixture of both half circles, each as written down, by ten Gauss points in each of many panels."""
    nodes, weights = np.polynomial.legendre.leggauss(10)
    angle = np.pi * ((np.arange(panels)[:, None] + (nodes + 1) / 2) / panels).ravel()
    log_weight = np.log(np.tile(weights / (2 * panels), panels) / 2)
    moons = [[np.cos(angle), np.sin(angle)], [1 - np.cos(angle), 0.5 - np.sin(angle)]]
    distances = [(x[:, :1] - a) ** 2 + (x[:, 1:] - b) ** 2 for a, b in moons]
    terms = [log_weight - square / (2 * noise**2) for square in distances]
    return np.logaddexp.reduce(np.concatenate(terms, axis=1), axis=1) - np.log(2 * np.pi * noise**2)


@pytest.mark.parametrize("noise", [0.03, 0.1, 0.4])
def test_two_moons_density_agrees_with_a_finer_rule(noise):
    rng = np.random.default_rng(0)
    x = np.concatenate([two_moons(15, noise), rng.uniform(-4, 4, (15, 2)), [[0, 0], [-1, 0], [0.5, 0.25]]])
    np.testing.assert_allclose(two_moons_log_prob(x, noise), brute_force(x, noise), rtol=0, atol=1e-8)


@pytest.mark.parametrize("noise", [0.05, 0.1, 0.3])
def test_two_moons_density_integrates_to_one(noise):
    step = noise / 2
    axes = (np.arange(low - 8 * noise, high + 8 * noise, step) for low, high in [(-1, 2), (-0.5, 1)])
    log_prob = two_moons_log_prob(np.stack(np.meshgrid(*axes), axis=-1), noise)
    assert np.exp(log_prob).sum() * step**2 == pytest.approx(1, abs=1e-10)


def test_two_moons_density_far_away_is_finite_and_keeps_shapes():
    x = np.array([[[50.0, -50.0], [0.0, 1.0]]])
    log_prob = two_moons_log_prob(x)
    assert log_prob.shape == (1, 2) and np.isfinite(log_prob).all()
    assert two_moons_log_prob([0.0, 1.0]) == pytest.approx(log_prob[0, 1], abs=1e-10)
    assert two_moons_log_prob(np.zeros((0, 2))).shape == (0,)


def test_two_moons_draws_have_the_moments_of_the_density():
    x, angle = two_moons(200_000, noise=0.1, seed=1), np.pi * (np.arange(1000) + 0.5) / 1000
    points = np.concatenate([
        np.array([np.cos(angle), np.sin(angle)]).T,
        np.array([1 - np.cos(angle), 0.5 - np.sin(angle)]).T,
    ])  # fmt: skip
    np.testing.assert_allclose(x.mean(0), [0.5, 0.25], atol=0.01)
    np.testing.assert_allclose(np.cov(x.T), np.cov(points.T) + 0.01 * np.eye(2), atol=0.01)
    for power in 3, 4:
        expected = ((points + 0.1 * np.random.default_rng(0).normal(size=points.shape)) ** power).mean(0)
        np.testing.assert_allclose((x**power).mean(0), expected, atol=0.15)


def test_two_moons_entropy_is_minus_the_mean_log_density():
    log_prob = two_moons_log_prob(two_moons(50_000, seed=2))
    error = log_prob.std() / np.sqrt(log_prob.size)
    assert abs(two_moons_entropy() + log_prob.mean()) < 4 * error < 0.02
    # With much noise the moons are one normal distribution, but for their spread of 0.76 and 0.25.
    assert two_moons_entropy(20.0) == pytest.approx(np.log(2 * np.pi * np.e * 400), abs=2e-3)


def test_two_moons_repeat_with_the_seed():
    np.testing.assert_array_equal(two_moons(9, seed=5), two_moons(9, seed=5))
    assert (two_moons(9, seed=5) != two_moons(9, seed=6)).all()


@pytest.mark.parametrize("noise", [0.0, -1.0, float("nan")])
def test_two_moons_refuse_a_noise_that_is_none(noise):
    for call in (lambda: two_moons(3, noise), lambda: two_moons_log_prob([0, 0], noise)):
        with pytest.raises(ValueError, match="noise must be positive"):
            call()


@pytest.mark.parametrize("x", [0.0, [1.0, 2.0, 3.0], [np.nan, 0.0]])
def test_two_moons_refuse_what_is_no_point(x):
    with pytest.raises(ValueError, match="x must be finite and of shape"):
        two_moons_log_prob(x)
