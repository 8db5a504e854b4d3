"""Where the listing of images is kept, and the lock under which one process scans it."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


def cache_places(folder: Path) -> list[Path]:
    """Return where the listing may be kept: beside the folder, else in the user's cache folder."""
    return [folder.parent / f".harness-index-{folder.name}.npz", user_cache_place(folder)]


def user_cache_place(data: Path, suffix: str = ".npz") -> Path:
    """Return the place in the user's cache folder for the listing of `data`."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(os.fsencode(data.resolve())).hexdigest()[:16]
    return home / "harness" / f"{name}{suffix}"


@contextmanager
def lock_first(places: Sequence[Path]) -> Iterator[Path | None]:
    """Lock and yield the first place that can be written; yield None where none can be."""
    for place in places:
        try:
            if len(places) == 1 or place is not places[0]:
                place.parent.mkdir(parents=True, exist_ok=True)
            stream = open(place.with_suffix(".lock"), "a")  # noqa: SIM115 (closed below)
        except OSError:
            continue
        with stream:
            with suppress(OSError):  # a file system without locks: every process scans
                fcntl.flock(stream, fcntl.LOCK_EX)
            try:
                yield place
            finally:
                with suppress(OSError):
                    fcntl.flock(stream, fcntl.LOCK_UN)
        return
    yield None
