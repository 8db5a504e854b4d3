"""Images that cannot be decoded: the error, and which images take their places."""

from __future__ import annotations

from collections.abc import Iterator

from harness.data.sampling import Purpose, hash64, uniform
from harness.errors import UserError

REPLACEMENTS = 100  # bad images in a row after which the data set is given up


class BadImageError(UserError):
    """An image that cannot be decoded; the message names it."""


def replacements(seed: int, epoch: int, bad_id: int, images: int) -> Iterator[int]:
    """Yield the ids to try in the place of a bad image, when data.on_bad_image is skip.

    Like everything in sampling, a pure function: every rank and every resumed run picks the same.
    """
    for attempt in range(REPLACEMENTS):
        yield replacement(seed, epoch, bad_id, attempt, images)


def replacement(seed: int, epoch: int, bad_id: int, attempt: int, images: int) -> int:
    """Return any of the `images` but `bad_id` itself, each equally likely."""
    if images < 2:
        raise UserError("data.on_bad_image: skip: there is no other image; add images")
    bits = hash64(Purpose.REPLACEMENT, seed, epoch, bad_id, attempt)
    other = int(uniform(bits) * (images - 1))
    return other + (other >= bad_id)
