"""`harness data import`: create train/CLASS and val/CLASS from another layout."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from harness.data.loaders.child_process import worker_processes
from harness.data.prepare.layouts import LabelledFile, recognise
from harness.data.prepare.png import as_png
from harness.data.prepare.prepared_folder import Counts, PreparedFolder, prepare
from harness.data.sources.image_format import IMPORTED, usable_format
from harness.data.sources.listing import SUFFIXES, equal_but_for_form, is_class_name
from harness.errors import UserError


@dataclass(frozen=True)
class Entry:
    """One image: `file` becomes `name` in the new folder, unchanged or `decoded` to a PNG."""

    file: Path
    split: str
    class_name: str
    name: str
    decoded: bool


def import_layout(source: Path, folder: Path, val_share: float | None = None) -> str:
    """Create train/CLASS and val/CLASS in `folder` from `source`, which remains unchanged.

    JPEG and PNG become hard links, or copies where links are impossible; WebP, BMP, TIFF and GIF
    (its first frame) become PNGs with the same pixels. It can be interrupted and repeated.
    val_share: the share in (0, 1) of each class to hold out if the source has no validation
    images. Returns the lines to print. Raises UserError for a source that it cannot interpret.
    """
    if not source.is_dir():
        raise UserError(f"{source}: no such folder")
    here, there = source.resolve(), folder.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise UserError(f"{folder}: must be outside {source}, which remains unchanged")
    kind = f"import of {here}" + (f", {val_share} held out" if val_share is not None else "")
    left_out: list[str] = []

    def fill(prepared: PreparedFolder) -> Counts:
        files, formats = _labelled(source), {}
        for one in tqdm(files, desc="inspecting files", unit=" files", disable=None):
            formats[one] = usable_format(one.file)
        images = _with_val(source, [one for one in files if formats[one]], val_share)
        entries = _entries(images, {one.file: kind for one, kind in formats.items()})
        _check_free_space(entries, prepared.folder)
        left_out.extend(_left_out(source, images, [f.file for f in files if not formats[f]]))
        _gather(prepared, entries)
        os.sync()  # everything must be on disk before the marker
        splits = Counter(entry.split for entry in entries)
        classes = {entry.class_name for entry in entries}
        return Counts(splits["train"], splits["val"], len(classes))

    return "\n".join([prepare(folder, kind, fill), *left_out])


def _labelled(source: Path) -> list[LabelledFile]:
    """List all files of the layout, some of which may not be images."""
    layout = recognise(source)
    if layout is None:
        raise UserError(f"{source}: unknown layout (README.md lists the known ones)")
    if layout.files is None:
        raise UserError(f"{source}: {layout.advice(source)}")
    try:
        return list(layout.files(source))
    except OSError as error:
        raise UserError(f"{error.filename or source}: {error.strerror}") from None


def _with_val(
    source: Path, files: Sequence[LabelledFile], val_share: float | None
) -> Sequence[LabelledFile]:
    """Return `files`, with `val_share` of each class held out if none are for validation."""
    has_val = any(one.split == "val" for one in files)
    if has_val and val_share is not None:
        raise UserError(f"{source}: has validation images; omit --val {val_share}")
    if has_val:
        return files
    if val_share is None:
        raise UserError(
            f"{source}: no validation images; --val 0.1 holds out a tenth of each class"
        )
    return _hold_out(files, val_share)


def _hold_out(files: Sequence[LabelledFile], share: float) -> list[LabelledFile]:
    """Move `share` of each class, at least one image, to val, chosen by a hash of the names."""
    if not 0 < share < 1:
        raise UserError(f"--val {share}: must be above 0 and below 1")
    classes: dict[str, list[LabelledFile]] = defaultdict(list)
    for one in files:
        classes[one.class_name].append(one)
    result = []
    for name, members in classes.items():
        if len(members) < 2:
            raise UserError(f"class {name!a} has only one image: none can be held out")
        members.sort(key=lambda one: hashlib.sha256(os.fsencode(one.file.name)).digest())
        held_out = min(max(round(share * len(members)), 1), len(members) - 1)
        for place, one in enumerate(members):
            split = "val" if place < held_out else "train"
            result.append(LabelledFile(split, one.class_name, one.file))
    return result


def _entries(files: Sequence[LabelledFile], formats: dict[Path, str]) -> list[Entry]:
    """Name the new files; raise UserError for invalid or conflicting names."""
    names = sorted({one.class_name for one in files})
    for name in names:
        if not name or {"/", "\0"} & {*name} or not is_class_name(name):
            raise UserError(f"class {name!a}: not usable as a folder name; rename it")
    for alike in equal_but_for_form(names):
        shown = " and ".join(map(ascii, alike))
        raise UserError(f"classes {shown} differ only in Unicode form (NFC, NFD); merge them")
    entries: dict[str, Entry] = {}
    for one in files:
        entry = _entry(one, formats[one.file])
        if (other := entries.get(entry.name)) is not None:
            raise UserError(f"{other.file} and {one.file} would both become {entry.name}")
        entries[entry.name] = entry
    return list(entries.values())


def _entry(one: LabelledFile, kind: str) -> Entry:
    name, decoded = one.file.name, kind in IMPORTED
    if decoded:
        name += ".png"
    elif not name.lower().endswith(SUFFIXES):
        name += ".jpg" if kind == "JPEG" else ".png"
    place = f"{one.split}/{one.class_name}/{name}"
    return Entry(one.file, one.split, one.class_name, place, decoded)


def _check_free_space(entries: Sequence[Entry], folder: Path) -> None:
    """Raise UserError if the disk has no space for the copies and for PNGs at their old size."""
    device = folder.stat().st_dev
    states = ((entry, entry.file.stat()) for entry in entries)
    needed = sum(s.st_size for entry, s in states if entry.decoded or s.st_dev != device)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder}: {free / 1e6:,.0f} MB free, {needed / 1e6:,.0f} MB needed")


def _gather(prepared: PreparedFolder, entries: Sequence[Entry]) -> None:
    to_decode = [entry for entry in entries if entry.decoded and not prepared.holds(entry.name)]
    with tqdm(total=len(entries), unit=" images", disable=None) as bar:
        for entry in entries:
            if not entry.decoded:
                prepared.link(entry.name, entry.file)
                bar.update()
        if to_decode:
            files = [entry.file for entry in to_decode]
            with worker_processes(len(os.sched_getaffinity(0))) as workers:
                pngs = workers.map(as_png, files, chunksize=8)
                for entry, content in zip(to_decode, pngs, strict=True):
                    prepared.write(entry.name, content)
                    bar.update()


def _left_out(source: Path, files: Sequence[LabelledFile], not_images: list[Path]) -> list[str]:
    """Describe the parts of the source that are not in the new folder, in lines."""
    used = {one.file.relative_to(source).parts[0] for one in files}
    unused = sorted(e.name for e in source.iterdir() if is_class_name(e.name) and e.is_dir())
    lines = [f"left out: {name}/" for name in unused if name not in used]
    if not_images:
        example = not_images[0].relative_to(source)
        lines.append(f"left out: {len(not_images):,} files that are not images, such as {example}")
    return lines
