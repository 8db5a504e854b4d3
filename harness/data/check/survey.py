"""The inventory of a data folder: images that training reads, and what it skips or refuses."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from harness.data.check.findings import (
    BROKEN_LINK,
    EMPTY_CLASS,
    EMPTY_SPLIT,
    HIDDEN,
    LOOSE,
    MISNAMED,
    NO_IMAGE,
    ONE_SIDED,
    OTHER_FORMAT,
    PACKED,
    SAME_BUT_CASE,
    SAME_BUT_FORM,
    SAME_CLASS,
    SUBFOLDER,
    UNREADABLE,
    UNUSED_FOLDER,
    Finding,
)
from harness.data.prepare.layouts import recognise
from harness.data.sources.image_format import TRAINED_ON, image_format
from harness.data.sources.listing import SUFFIXES, equal_but_for_form, image_names, is_class_name
from harness.errors import UserError

# recognised by name if the content is inconclusive (an empty file, no signature)
OTHER_SUFFIXES: tuple[str, ...] = (".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif")
OTHER_SUFFIXES += (".avif", ".jp2", ".jxl", ".psd", ".svg", ".raw", ".dng", ".cr2", ".nef", ".dcm")
PACKED_SUFFIXES: tuple[str, ...] = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")
PACKED_SUFFIXES += (".parquet", ".arrow", ".npy", ".npz", ".h5", ".hdf5", ".tfrecord", ".pkl")


class Stored(NamedTuple):
    """Where an image lies: a file, or `size` bytes at `offset` of one; -1 is all of it.

    `path` is what findings call it: SPLIT/CLASS/NAME, or unlabelled/NAME.
    """

    path: str
    file: Path
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """Return its content. Raises OSError."""
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class Survey:
    """Images that training reads: split -> class -> number; unlabelled ones have class ""."""

    classes: dict[str, dict[str, int]]
    images: list[Stored]
    findings: list[Finding]


def survey(folder: Path) -> Survey:
    """List train/, val/ and, if present, unlabelled/.

    Raises UserError if train/ or val/ is missing.
    """
    for split in ("train", "val"):
        if not (folder / split).is_dir():
            layout = recognise(folder) if folder.is_dir() else None
            hint = f"; {layout.advice(folder)}" if layout else ""
            where = f"{folder / split}: no such folder"
            raise UserError(f"{where}; give the folder that contains train/ and val/{hint}")
    images: dict[str, dict[str, list[str]]] = {}
    findings: list[Finding] = []
    for split in ("train", "val"):
        images[split], found = _survey_split(folder, split)
        findings += found
    findings += one_sided(images)
    if (folder / "unlabelled").is_dir():  # flat: without classes
        names, found = _survey_folder(folder, "unlabelled")
        images["unlabelled"] = {"": names}
        findings += found
        if not names:
            findings.append(Finding(EMPTY_SPLIT, "unlabelled"))
    findings += _beside(folder)
    paths = [
        "/".join(filter(None, (split, class_name, name)))
        for split, classes in images.items()
        for class_name, names in classes.items()
        for name in names
    ]
    findings += alike(paths)
    sizes = {
        split: {name: len(of) for name, of in found.items()} for split, found in images.items()
    }
    return Survey(sizes, [Stored(path, folder / path) for path in paths], findings)


def _survey_split(folder: Path, split: str) -> tuple[dict[str, list[str]], list[Finding]]:
    """Return the images by class, and the findings."""
    images: dict[str, list[str]] = {}
    findings: list[Finding] = []
    for entry in _entries(folder / split, split, findings):
        path = f"{split}/{entry.name}"
        if not _is_dir(entry):
            findings += _left_out(entry, path, LOOSE)
        elif not is_class_name(entry.name):
            findings.append(Finding(UNUSED_FOLDER, path))
        else:
            images[entry.name], found = _survey_folder(folder, path)
            findings += found
            if not images[entry.name]:
                findings.append(Finding(EMPTY_CLASS, path))
    if not any(images.values()):
        findings.append(Finding(EMPTY_SPLIT, split))
    for names in equal_but_for_form(images):
        alike = ", ".join(map(ascii, names))
        findings.append(Finding(SAME_CLASS, f"{split}/{names[0]}", alike))
    return images, findings


def _survey_folder(folder: Path, path: str) -> tuple[list[str], list[Finding]]:
    """Return the images directly in folder/path, as training reads them, and other findings."""
    findings: list[Finding] = []
    entries = _entries(folder / path, path, findings)
    try:
        names = image_names(folder / path) if entries else []
    except UserError as error:
        return [], [Finding(UNREADABLE, path, str(error).removeprefix(f"{folder / path}: "))]
    taken = set(names)
    for entry in entries:
        if entry.name in taken:
            continue
        place = f"{path}/{entry.name}"
        if not _is_dir(entry):
            findings += _left_out(entry, place, MISNAMED)
        elif not is_class_name(entry.name):
            findings.append(Finding(UNUSED_FOLDER, place))
        elif inside := _images_below(Path(entry.path)):
            findings.append(Finding(SUBFOLDER, place, f"{inside:,} in it"))
        else:
            findings.append(Finding(NO_IMAGE, place, "a folder"))
    return names, findings


def _left_out(entry: os.DirEntry[str], path: str, image_kind: str) -> Iterator[Finding]:
    """Yield why a file is not read; `image_kind` is the kind for a visible, intact JPEG or PNG."""
    try:
        is_file = entry.is_file()
        if not is_file and entry.is_symlink():
            raise FileNotFoundError
        kind = image_format(Path(entry.path)) if is_file else ""
    except OSError as error:
        if entry.is_symlink():
            yield Finding(BROKEN_LINK, path, f"to {os.readlink(entry.path)}")
        else:
            yield Finding(UNREADABLE, path, error.strerror or "")
        return
    yield left_out(path, kind, image_kind)


def left_out(path: str, kind: str, image_kind: str) -> Finding:
    """Return why a file of the format `kind` ("" for none known) is not read; see _left_out."""
    name, suffix = Path(path).name, Path(path).suffix.lower()
    hidden = name.startswith(".")
    if kind in TRAINED_ON:
        return Finding(HIDDEN if hidden else image_kind, path)
    if kind or (not hidden and suffix in OTHER_SUFFIXES):
        return Finding(OTHER_FORMAT, path, kind or f"{suffix} by name")
    if not hidden and suffix in SUFFIXES:  # empty or damaged, and not in a class folder
        return Finding(image_kind, path, "but not an image by content")
    if not hidden and suffix in PACKED_SUFFIXES:
        return Finding(PACKED, path)
    return Finding(NO_IMAGE, path)


def _entries(place: Path, path: str, findings: list[Finding]) -> list[os.DirEntry[str]]:
    """List a folder by name; add a finding and return nothing if that is impossible."""
    try:
        with os.scandir(place) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        findings.append(Finding(UNREADABLE, path, error.strerror or ""))
        return []


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a circular link, or one into a folder without permission
        return False


def _images_below(folder: Path) -> int:
    """Count the images below a folder by name, at any depth."""
    suffixes = SUFFIXES + OTHER_SUFFIXES
    return sum(name.lower().endswith(suffixes) for _, _, names in os.walk(folder) for name in names)


def one_sided(images: Mapping[str, Collection[str]]) -> Iterator[Finding]:
    """Yield the classes in only one of train and val, each with its likely counterpart."""
    for split, other in (("train", "val"), ("val", "train")):
        by_key = {_folded(name): name for name in images[other]}
        for name in images[split]:
            if name not in images[other]:
                near = by_key.get(_folded(name))
                detail = f"not in {other}" + (f", which has {near!a}" if near is not None else "")
                if near is not None and equal_but_for_form([name, near]):
                    detail += f" in another Unicode form than {name!a}"
                yield Finding(ONE_SIDED, f"{split}/{name}", detail)


def _beside(folder: Path) -> Iterator[Finding]:
    """Yield findings on the data folder's own entries besides the splits."""
    for entry in _entries(folder, ".", []):
        if entry.name.startswith(".") or entry.name in ("train", "val", "unlabelled"):
            continue
        if _is_dir(entry):
            yield Finding(UNUSED_FOLDER, entry.name)
        elif entry.name.lower().endswith(SUFFIXES + OTHER_SUFFIXES):
            yield Finding(LOOSE, entry.name)


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def alike(paths: Iterable[str]) -> Iterator[Finding]:
    """Yield files that coincide on systems that ignore case or Unicode form."""
    groups: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        groups[_folded(path)].append(path)
    for group in groups.values():
        if len(group) > 1:
            kind = SAME_BUT_FORM if equal_but_for_form(group) else SAME_BUT_CASE
            yield Finding(kind, group[0], f"also {', '.join(map(ascii, group[1:]))}")
