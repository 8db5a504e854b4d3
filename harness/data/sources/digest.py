"""Digests that identify a data set, one per class, and the first difference of two data sets."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

# The key of the images without a class. No class has this name, as no folder's has a slash.
UNLABELLED_KEY = "unlabelled/"


def positions_by_class(labels: NDArray[np.int64], classes: int) -> list[NDArray[np.int64]]:
    """Return the positions of each class's images, ascending; last those of the label -1."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], np.arange(-1, classes + 1))
    unlabelled, *labelled = (order[a:b] for a, b in pairwise(starts))
    return [*labelled, unlabelled]


def digests_by_class(
    classes: Sequence[str],
    names: NDArray[np.bytes_],
    labels: NDArray[np.int64],
    widths: NDArray[np.int32],
    heights: NDArray[np.int32],
) -> dict[str, str]:
    """Return class -> SHA-256 (hex) over its images' names, widths and heights, in their order.

    `names`, `labels`, `widths` and `heights` are (N,). Images of the label -1 come last, under
    UNLABELLED_KEY. Does not depend on the byte order or on how wide the array of names is.
    """
    digests = {}
    of_class = positions_by_class(labels, len(classes))
    for name, images in zip((*classes, UNLABELLED_KEY), of_class, strict=True):
        digest = hashlib.sha256(len(images).to_bytes(8, "little"))
        digest.update(b"\0".join(names[images].tolist()) + b"\0")
        digest.update(widths[images].astype("<i4").tobytes())
        digest.update(heights[images].astype("<i4").tobytes())
        digests[name] = digest.hexdigest()
    if len(of_class[-1]) == 0:
        del digests[UNLABELLED_KEY]
    return digests


def combined_digest(digests: Mapping[str, str]) -> str:
    """Return the SHA-256 (hex) over the classes, in their order, and their digests."""
    digest = hashlib.sha256()
    for name, of_class in digests.items():
        digest.update(os.fsencode(name) + b"\0" + bytes.fromhex(of_class))
    return digest.hexdigest()


def first_difference(
    ours: Mapping[str, str], theirs: Mapping[str, str], us: str, them: str
) -> str | None:
    """Describe the first difference of two results of digests_by_class; None where equal.

    Classes come first: "class dog only in US, class eel only in THEM". Where the classes are the
    same: "the images of class cat differ between US and THEM".
    """
    missing = [(name, us) for name in ours if name not in theirs][:1]
    missing += [(name, them) for name in theirs if name not in ours][:1]
    if missing:
        return ", ".join(f"{_group(name)} only in {place}" for name, place in missing)
    for number, (name, other) in enumerate(zip(ours, theirs, strict=True)):
        if name != other:
            return f"class {number} is {name} in {us} and {other} in {them}"
    for name, digest in ours.items():
        if digest != theirs[name]:
            return f"the {_images_of(name)} differ between {us} and {them}"
    return None


def _group(name: str) -> str:
    return "unlabelled images" if name == UNLABELLED_KEY else f"class {name}"


def _images_of(name: str) -> str:
    return "unlabelled images" if name == UNLABELLED_KEY else f"images of class {name}"


def first_differing_file(
    ours: Mapping[str, Sequence[int]], theirs: Mapping[str, Sequence[int]], us: str, them: str
) -> str | None:
    """Describe the first file, by name, in which two results of ImageSource.sizes_of differ."""
    for name in sorted({*ours, *theirs}):
        if name not in theirs or name not in ours:
            return f"{name} is only in {us if name in ours else them}"
        (width, height), (other_width, other_height) = ours[name], theirs[name]
        if (width, height) != (other_width, other_height):
            return f"{name} is {width}x{height} in {us} and {other_width}x{other_height} in {them}"
    return None
