# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Images of digits: MNIST as bits, and the small grey ones that come with scikit-learn."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numpyro_maf.datasets.tabular import Splits

__all__ = ["LabelledImages", "load_binarized_mnist", "load_digits"]

PACKED = "binarized_mnist_packed.npz"
BYTES = 28 * 28 // 8  # of an image


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """``images`` ``(N, H, W, C)`` of integers, and what they show: ``labels`` ``(N,)``."""

    images: NDArray[np.integer[Any]]
    labels: NDArray[np.int64]


def load_binarized_mnist(path: str | Path) -> Splits:
    """Read MNIST with pixels 0 or 1, fixed once: 50,000 rows to train, 10,000 to validate, 10,000 to test.

    Larochelle's binarisation, on which MADE (Germain et al. 2015) and others report nats an image.

    :param path: an npz file with uint8 arrays ``train``, ``valid`` and ``test``, each ``(N, 98)``: rows of
        784 bits, packed by ``numpy.packbits``; or the folder with ``binarized_mnist_packed.npz``.
    :return: uint8 arrays ``(N, 784)`` of 0 and 1, each row 28 rows of 28 pixels.
    :raises FileNotFoundError: for a missing file.
    :raises ValueError: for one that holds other arrays.
    """
    path = Path(path)
    path = path / PACKED if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: arrays train, valid and test, uint8 (N, {BYTES})")
    with np.load(path) as file:
        if missing := {"train", "valid", "test"} - set(file):
            raise ValueError(f"{path} lacks the arrays {sorted(missing)}, it has {sorted(file)}")
        parts = [file[name] for name in ("train", "valid", "test")]
    for part in parts:
        if part.dtype != np.uint8 or part.shape[1:] != (BYTES,):
            raise ValueError(f"{path} must hold uint8 arrays (N, {BYTES}), got {part.dtype} {part.shape}")
    return Splits(*(np.unpackbits(part, axis=1) for part in parts))


def load_digits(seed: int = 0, held_out: float = 0.2) -> tuple[LabelledImages, LabelledImages]:
    """The 1,797 digits of scikit-learn, to train on and to test on: 8x8 pixels, grey levels from 0 to 16.

    Source: UCI Machine Learning Repository, Optical Recognition of Handwritten Digits, id 80, CC BY 4.0;
    its test part.

    :param seed: of the split; the same seed gives the same one.
    :param held_out: share of the images to test on, from 0 to 1, rounded to whole images.
    :return: uint8 images ``(N, 8, 8, 1)`` and labels ``(N,)`` from 0 to 9, twice.
    :raises ValueError: for a share that is none.
    :raises ImportError: without scikit-learn.
    """
    if not 0 <= held_out <= 1:
        raise ValueError(f"held_out must be from 0 to 1, got {held_out}")
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError('the digits need scikit-learn: pip install "numpyro_maf[examples]"') from error
    digits = datasets.load_digits()
    images, labels = digits.images[..., None].astype(np.uint8), digits.target.astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(images))
    test, train = np.split(order, [round(held_out * len(images))])
    return LabelledImages(images[train], labels[train]), LabelledImages(images[test], labels[test])
