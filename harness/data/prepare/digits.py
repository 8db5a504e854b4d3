"""scikit-learn's 1,797 handwritten digits as image folders."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from harness.data.prepare.png import png_bytes
from harness.data.prepare.prepared_folder import Counts, PreparedFolder, prepare
from harness.errors import UserError

DIGITS = Counts(train=1_437, val=360, classes=10)


def prepare_digits(folder: Path, labelled: float = 1.0) -> str:
    """Prepare scikit-learn's 1,797 handwritten digits as 8-bit gray PNGs of 8x8 pixels.

    labelled: the share in (0, 1] of each class's training images that stays in train/<digit>/;
    the rest goes to unlabelled/, under names that do not reveal the class. Returns the line to
    print. Raises UserError without scikit-learn, for a share that leaves a class empty, and for a
    folder in use.
    """
    if not 0 < labelled <= 1:
        raise UserError(f"--labelled {labelled}: must be above 0 and at most 1")
    source = "digits" if labelled == 1 else f"digits, {labelled} labelled"

    def fill(prepared: PreparedFolder) -> Counts:
        pixels, labels = _load_digits()
        parts = _split_digits(labels, labelled)
        prepared.discard()
        for split, numbers in (("train", parts.train), ("val", parts.val)):
            for i in numbers:
                prepared.write(f"{split}/{labels[i]}/{i:04d}.png", png_bytes(pixels[i]))
        # numbered in the order of a hash, since scikit-learn's order is partly 0, 1, …, 9
        hashed = sorted(
            parts.unlabelled,
            key=lambda i: hashlib.sha256(b"%d " % i + pixels[i].tobytes()).digest(),
        )
        for place, i in enumerate(hashed):
            prepared.write(f"unlabelled/{place:04d}.png", png_bytes(pixels[i]))
        train = len(parts.train)
        return Counts(train, DIGITS.val, DIGITS.classes, unlabelled=DIGITS.train - train)

    return prepare(folder, source, fill)


class _Split(NamedTuple):
    train: list[int]
    val: list[int]
    unlabelled: list[int]


def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return pixels, uint8 (1797, 8, 8), and labels, int64 (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the digits need scikit-learn: pip install '.[quickstart]'") from error
    digits = load_digits()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target


def _split_digits(labels: np.ndarray, labelled: float) -> _Split:
    """Split the images by arithmetic alone, so no library's generator can change the result."""
    by_class = np.argsort(labels, kind="stable")
    val = by_class[::5]  # every fifth: 360 of 1797, a fifth of each class up to one image
    train: list[int] = []
    unlabelled: list[int] = []
    for label in range(10):
        numbers = np.setdiff1d(np.flatnonzero(labels == label), val).tolist()
        count = len(numbers)
        stay = round(labelled * count)
        if stay == 0:
            raise UserError(f"--labelled {labelled}: leaves no training image of class {label}")
        for i, number in enumerate(numbers):  # `stay` of them, evenly spaced
            (train if i * stay % count < stay else unlabelled).append(number)
    return _Split(train, val.tolist(), unlabelled)
