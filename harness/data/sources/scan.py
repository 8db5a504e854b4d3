"""Widths and heights of a folder's images, read from their headers by all cores.

A scan that was interrupted, even killed, continues where it stopped: see `read_sizes`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from harness.data.loaders.child_process import worker_processes
from harness.data.sources.header import size_of
from harness.data.sources.partial import PartialResults

CHUNK = 200  # headers that one process reads at a time
PARALLEL_FROM = 20_000  # images; below, starting processes takes longer than reading

Sizes = NDArray[np.int32]


@dataclass(frozen=True)
class _Chunk:
    """Some images of a class folder, and the time of that folder's last change."""

    folder: Path
    names: Sequence[str]
    changed_ns: int

    def key(self) -> str:
        """Return the key of its sizes in the partial file; it changes when the folder does."""
        text = "\0".join([self.folder.name, str(self.changed_ns), *self.names])
        return hashlib.sha256(os.fsencode(text)).hexdigest()


def read_sizes(
    folder: Path,
    names: dict[str, list[str]],
    changed_ns: dict[str, int],
    partial: PartialResults[list[list[int]]],
) -> Sizes:
    """Return the widths and heights, int32 (N, 2), of each class's images; 0, 0 without a header.

    changed_ns: class -> time of the last change of its folder.
    partial: records the sizes as they are read, so that a call after an interruption reads only
        the rest and what has changed. The caller removes it at the end.
    Raises UserError for a file that cannot be read.
    """
    chunks = [
        _Chunk(folder / name, found[start : start + CHUNK], changed_ns[name])
        for name, found in names.items()
        for start in range(0, len(found), CHUNK)
    ]
    images = sum(map(len, names.values()))
    if images < PARALLEL_FROM:
        return np.concatenate([_sizes(chunk) for chunk in chunks])
    kept = partial.read()
    keys = [chunk.key() for chunk in chunks]
    sizes = {
        place: np.array(kept[key], dtype=np.int32) for place, key in enumerate(keys) if key in kept
    }
    missing = [place for place in range(len(chunks)) if place not in sizes]
    # twice as many processes as cores, since they wait for the disk part of the time
    with (
        worker_processes(2 * len(os.sched_getaffinity(0))) as workers,
        tqdm(total=images, desc=f"index of {folder}", unit=" images", disable=None) as bar,
    ):
        bar.update(sum(map(len, sizes.values())))
        parts = workers.map(_sizes, [chunks[place] for place in missing])
        for place, part in zip(missing, parts, strict=True):
            sizes[place] = part
            if part.all():  # a bad image may be repaired before the scan continues
                partial.add(keys[place], part.tolist())
            bar.update(len(part))
    return np.concatenate([sizes[place] for place in range(len(chunks))])


def _sizes(chunk: _Chunk) -> Sizes:
    return np.array([size_of(chunk.folder / name) for name in chunk.names], dtype=np.int32)
