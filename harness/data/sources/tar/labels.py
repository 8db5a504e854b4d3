"""The classes of the images in archives: from their folders, label files or the development kit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from harness.data.prepare.imagenet_devkit import DEVKIT, read_devkit
from harness.data.sources.listing import is_class_name
from harness.data.sources.tar.members import LABEL_SUFFIXES, Member, is_image
from harness.data.sources.tar.reader import Archive
from harness.errors import UserError

VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


@dataclass(frozen=True)
class Image:
    """An image in an archive. `class_name` is "" where it has none."""

    archive: int
    member: Member
    class_name: str

    @property
    def name(self) -> str:
        """Its file name, unique within its class."""
        return _name(self.member.path)


@dataclass(frozen=True)
class Split:
    """The images of a split in their order, its classes in theirs, and the files not read."""

    images: list[Image]
    classes: tuple[str, ...]
    ignored: list[tuple[int, Member]]


def labelled_split(
    archives: Sequence[Archive], members: Sequence[Sequence[Member]], split: str
) -> Split:
    """Give each image of a split its class, and sort by class and name.

    WebDataset's shards state classes in KEY.cls or KEY.json, and whole numbers are sorted as such.
    Elsewhere the class is the folder or the nested archive of an image; the official validation
    images have theirs in the development kit beside the archive. "unlabelled" has no classes.
    Raises UserError, which names archive, member and offset, where a class or an image is missing.
    """
    images: list[tuple[int, Member]] = []
    ignored: list[tuple[int, Member]] = []
    for number, of_archive in enumerate(members):
        for member in of_archive:
            (images if _is_read(member.path) else ignored).append((number, member))
    labels = {} if split == "unlabelled" else _label_files(archives, images, ignored)
    ignored = [
        (number, member)
        for number, member in ignored
        if not (member.path.endswith(LABEL_SUFFIXES) and _key(number, member) in labels)
    ]
    if split == "unlabelled":
        class_names = [""] * len(images)
    elif labels:
        class_names = _by_label_files(archives, images, labels)
    elif _is_official_val(images):
        class_names = _by_devkit(archives, images)
    else:
        class_names = _by_folder(archives, images)
    known = {*class_names} - {""}
    numbers = bool(labels) and all(name.isdecimal() for name in known)
    classes = sorted(known, key=int) if numbers else sorted(known)
    places = {name: place for place, name in enumerate(["", *classes])}
    found = [
        Image(number, member, name)
        for (number, member), name in zip(images, class_names, strict=True)
    ]
    found.sort(key=lambda image: (places[image.class_name], image.name))
    _check_names(archives, found)
    return Split(found, tuple(classes), ignored)


def problem(archive: Archive, member: Member, what: str) -> UserError:
    """Return the error for a member."""
    path = ascii(member.path[:120])
    return UserError(f"{archive.path}: {path} at offset {member.offset}: {what}")


def _is_read(path: str) -> bool:
    """Return whether a member is an image, and neither hidden nor in a folder that is not read."""
    *folders, name = path.split("/")
    return is_image(path) and not name.startswith(".") and all(map(is_class_name, folders))


def _name(path: str) -> str:
    return path.rpartition("/")[2]


Key = tuple[str, str]  # the folder and the stem of an image and its labels, as in WebDataset


def _key(number: int, member: Member) -> Key:
    folder, _, name = member.path.rpartition("/")
    return f"{number}/{folder}", name.partition(".")[0]


def _label_files(
    archives: Sequence[Archive],
    images: Sequence[tuple[int, Member]],
    others: Sequence[tuple[int, Member]],
) -> dict[Key, Member]:
    """Return the .cls or else .json of each key; empty where the archives hold no labels.

    Raises UserError for a .cls without an image.
    """
    labels = [
        (number, member)
        for number, member in others
        if member.path.endswith(LABEL_SUFFIXES) and not _name(member.path).startswith(".")
    ]
    keys = {_key(*image) for image in images} if labels else set()
    found: dict[Key, Member] = {}
    for number, member in labels:
        key = _key(number, member)
        is_cls = member.path.endswith(".cls")
        if key in keys:
            if is_cls or (member.label and key not in found):
                found[key] = member
        elif is_cls:
            raise problem(archives[number], member, "a label without a JPEG or PNG; restore it")
    return found


def _by_label_files(
    archives: Sequence[Archive], images: Sequence[tuple[int, Member]], labels: dict[Key, Member]
) -> list[str]:
    seen: set[Key] = set()
    classes = []
    for number, member in images:
        key = _key(number, member)
        if key in seen:
            raise problem(archives[number], member, "a second image for one label; remove one")
        seen.add(key)
        label = labels[key].label if key in labels else ""
        if not label or not label.isprintable():
            raise problem(
                archives[number], member, "has no class in a .cls or .json of its name; add it"
            )
        classes.append(label)
    return classes


def _is_official_val(images: Sequence[tuple[int, Member]]) -> bool:
    """Return whether all images are ImageNet's validation images, and none is in a class folder."""
    paths = [member.path.rpartition("/") for _, member in images]
    return (
        all(VAL_NAME.fullmatch(name) for *_, name in paths)
        and len({path[0] for path in paths}) == 1
    )


def devkit_of(archives: Sequence[Archive]) -> Path:
    """Return the place of the development kit: beside the archives."""
    return archives[0].path.parent / DEVKIT


def _by_devkit(archives: Sequence[Archive], images: Sequence[tuple[int, Member]]) -> list[str]:
    number, member = images[0]
    devkit = devkit_of(archives)
    if not devkit.is_file():
        raise problem(archives[number], member, f"its class is in {devkit}, which is missing")
    classes, found = read_devkit(devkit).val_classes, []
    for number, member in images:
        match = VAL_NAME.fullmatch(_name(member.path))
        assert match is not None, "by _is_official_val"
        if not 1 <= int(match[1]) <= len(classes):
            raise problem(archives[number], member, f"{devkit} has no class for it")
        found.append(classes[int(match[1]) - 1])
    return found


def _by_folder(archives: Sequence[Archive], images: Sequence[tuple[int, Member]]) -> list[str]:
    classes, depth = [], 0
    for number, member in images:
        parts = member.path.split("/")
        if len(parts) < 2:
            raise problem(
                archives[number], member, "is in no class folder and has no .cls or .json"
            )
        depth = depth or len(parts)
        if len(parts) != depth:
            raise problem(
                archives[number], member, "is not as deep in folders as the images before"
            )
        classes.append(parts[-2])
    return classes


def _check_names(archives: Sequence[Archive], images: Sequence[Image]) -> None:
    """Raise UserError for two images of one class and one name; `images` are sorted by these."""
    for one, other in pairwise(images):
        if one.class_name == other.class_name and one.name == other.name:
            first = f"{archives[one.archive].path} at offset {one.member.offset}"
            raise problem(
                archives[other.archive], other.member, f"the same class and name is in {first}"
            )
