"""The inventory of archives: images that training reads, and the members that it skips."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from harness.data.check.findings import MISNAMED, UNUSED_FOLDER, Finding
from harness.data.check.survey import Stored, Survey, alike, left_out, one_sided
from harness.data.sources.image_format import format_of
from harness.data.sources.listing import is_class_name
from harness.data.sources.tar.find import holds_archives
from harness.data.sources.tar.members import is_image
from harness.data.sources.tar.source import TarSource, open_tar


def is_archived(folder: Path) -> bool:
    """Return whether a data folder holds archives, rather than class folders."""
    train = folder / "train"
    unpacked = train.is_dir() and any(
        entry.is_dir() and is_class_name(entry.name) for entry in os.scandir(train)
    )
    return not unpacked and holds_archives(folder, "train")


def survey_archives(folder: Path) -> Survey:
    """List the archives of train, val and, if present, unlabelled.

    Raises UserError for archives that training refuses.
    """
    splits = {
        split: open_tar(folder, split)
        for split in ("train", "val", "unlabelled")
        if split != "unlabelled" or holds_archives(folder, split)
    }
    images = [stored for split, source in splits.items() for stored in _images(split, source)]
    findings = [found for source in splits.values() for found in _ignored(source)]
    classes = {split: _class_sizes(source) for split, source in splits.items()}
    findings += one_sided({split: classes[split] for split in ("train", "val")})
    findings += alike(stored.path for stored in images)
    return Survey(classes, images, findings)


def _class_sizes(source: TarSource) -> dict[str, int]:
    if not source.classes:
        return {"": len(source)}
    sizes = np.bincount(source.labels, minlength=len(source.classes))
    return dict(zip(source.classes, sizes.tolist(), strict=True))


def _images(split: str, source: TarSource) -> Iterator[Stored]:
    columns = source.archives.tolist(), source.offsets.tolist(), source.sizes.tolist()
    for image_id, (archive, offset, size) in enumerate(zip(*columns, strict=True)):
        path = source.relative_path(image_id)
        path = f"{split}/{path}" if source.classes else path
        yield Stored(path, source.files[archive].path, offset, size)


def _ignored(source: TarSource) -> Iterator[Finding]:
    """Yield a finding for each member that is not read."""
    ignored = source.ignored
    columns = ignored.archives.tolist(), ignored.paths, ignored.offsets.tolist()
    for archive, member, offset, size in zip(*columns, ignored.sizes.tolist(), strict=True):
        file, path = source.files[archive].path, os.fsdecode(bytes(member))
        head = Stored(path, file, offset, min(size, 16)).read()
        image_kind = UNUSED_FOLDER if is_image(path) else MISNAMED
        yield left_out(f"{file.name}/{path}", format_of(head), image_kind)
