"""Which archives of a folder hold a split."""

from __future__ import annotations

import os
import re
from pathlib import Path

from harness.errors import UserError

WORDS = {"train": "train(?:ing)?", "val": "val(?:id|idation)?", "unlabelled": "unlabell?ed"}
COMPRESSED = re.compile(r"\.(?:tgz|tar\.(?:gz|bz2|xz|zst))", re.IGNORECASE)


def find_archives(data_root: Path, split: str) -> list[Path]:
    """Return the archives of a split, sorted: data_root/NAME.tar, or all tars in data_root/split/.

    NAME ends with the split's name, or with that and a number: train, ILSVRC2012_img_train,
    imagenet-train-0003, train-00000-of-00128. Raises UserError where there are none, or where one
    is compressed.
    """
    number = r"(?:[-_.]?\d+(?:[-_]of[-_]\d+)?)?"
    named = re.compile(rf"(?:.*[^a-z0-9])?{WORDS[split]}{number}", re.IGNORECASE)
    found = {path: COMPRESSED.sub("", path.name) for path in _files(data_root)}
    chosen = [path for path, name in found.items() if named.fullmatch(name.removesuffix(".tar"))]
    chosen = chosen or _files(data_root / split)
    for path in chosen:
        if COMPRESSED.search(path.name):
            raise UserError(
                f"{path}: is compressed, so no image in it can be read by itself; decompress it"
            )
    if not chosen:
        raise UserError(
            f"{data_root}: no archive of {split} in it ({split}.tar, {split}-00000.tar, …, or tars "
            f"in {split}/); set run.data_root, or pack a folder with `harness data pack`"
        )
    return sorted(chosen)


def holds_archives(data_root: Path, split: str) -> bool:
    """Return whether a folder holds archives of a split."""
    try:
        return bool(find_archives(data_root, split))
    except (UserError, OSError):
        return False


def _files(folder: Path) -> list[Path]:
    """Return the archives directly in a folder; none where there is no folder."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return [
            folder / entry.name
            for entry in entries
            if not entry.name.startswith(".")
            and (entry.name.endswith(".tar") or COMPRESSED.search(entry.name))
            and entry.is_file()
        ]
