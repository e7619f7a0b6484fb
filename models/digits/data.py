"""scikit-learn's copy of the UCI handwritten digits: 1,797 scans of 8×8 pixels, ten classes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

SEED: Final = 20
PIXELS: Final = 64
CLASSES: Final = 10
DATASET_NAME: Final = "uci-digits"
DATASET_URI: Final = "sklearn.datasets.load_digits"
_TEST_SHARE: Final = 0.25
_MAX_PIXEL: Final = 16.0

Images = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Digits:
    """A fixed split. Images are float32 [n, 64] in [0, 1], row-major; labels int64 [n]."""

    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels
    digest: str


def load_digits() -> Digits:
    """The data set, split the same way each time.

    `digest` is the SHA-256 of pixels and labels as they come, "sha256:" in front.
    """
    from sklearn import datasets

    pixels, labels = datasets.load_digits(return_X_y=True)
    pixels = np.ascontiguousarray(pixels, np.float32)
    labels = np.ascontiguousarray(labels, np.int64)
    digest = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
    order = np.random.default_rng(SEED).permutation(len(pixels))
    images: Images = (pixels[order] / _MAX_PIXEL).astype(np.float32)
    labels = labels[order]
    cut = round(len(images) * (1 - _TEST_SHARE))
    return Digits(images[:cut], labels[:cut], images[cut:], labels[cut:], f"sha256:{digest}")


def held_out() -> tuple[Images, Labels]:
    """The test images and labels, which no training sees."""
    digits = load_digits()
    return digits.test_images, digits.test_labels
