"""Which folders of a split are classes, and which files of a class are its images."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from harness.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png")
# made by file servers, file systems and archivers; hidden folders are not classes either
NO_CLASSES: tuple[str, ...] = ("@eaDir", "lost+found", "__MACOSX", "#recycle", "$RECYCLE.BIN")
NO_CLASSES += ("System Volume Information", "__pycache__")


def class_folders(folder: Path) -> dict[str, int]:
    """Return class name -> time of the last change of its folder in ns, sorted by name.

    Raises UserError where there is no folder, no class, or two classes that look alike.
    """
    try:
        with os.scandir(folder) as entries:
            found = {
                entry.name: entry.stat().st_mtime_ns
                for entry in entries
                if is_class_name(entry.name) and entry.is_dir()
            }
    except OSError as error:
        raise UserError(
            f"{folder}: {error.strerror}; set run.data_root, or make it with `harness data`"
        ) from None
    if not found:
        raise UserError(
            f"{folder}: no class folders in it; images belong in {folder}/CLASS/, "
            "or set run.data_root to another folder"
        )
    for names in equal_but_for_form(found):
        raise UserError(
            f"{folder}: the classes {' and '.join(map(ascii, names))} look alike, as their names "
            "differ in Unicode form only (NFC, NFD); merge or rename them"
        )
    return dict(sorted(found.items()))


def is_class_name(name: str) -> bool:
    """Return whether a folder of this name in a split is a class: not hidden, not the system's."""
    return not name.startswith(".") and name not in NO_CLASSES


def equal_but_for_form(names: Iterable[str]) -> list[list[str]]:
    """Group names that are one text in several Unicode forms, such as é as one or two points."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(unicodedata.normalize("NFC", name), []).append(name)
    return [sorted(group) for group in groups.values() if len(group) > 1]


def image_names(folder: Path) -> list[str]:
    """Return the names of the images directly in `folder`, sorted."""
    try:
        with os.scandir(folder) as entries:
            return sorted(
                entry.name
                for entry in entries
                if entry.name.lower().endswith(SUFFIXES)
                and not entry.name.startswith(".")
                and entry.is_file()
            )
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; make it readable") from None


def first_three(names: Sequence[str]) -> str:
    """Return the first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
