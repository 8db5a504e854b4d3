"""The images of any folder, with their classes or without."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from harness.data.prepare.label_table import read_labels
from harness.data.prepare.layouts import class_folders, labelled_files, visible_files
from harness.data.sources.image_format import usable_format
from harness.errors import UserError


def list_labelled(folder: Path, classes: Collection[str]) -> list[tuple[Path, str]]:
    """Return the images of `folder`, each with the name of its class.

    The images are in folder/CLASS/ or, of a data set with splits, in folder/val/CLASS/; or they
    are in the folder itself, with a CSV of their classes. `classes` are the known ones: only a
    folder that is none of them is taken for a split. Raises UserError.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    try:
        if "val" not in classes and (folder / "val").is_dir():
            folder = folder / "val"
        found = _in_class_folders(folder) if class_folders(folder) else _in_a_table(folder)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror}; make it readable") from None
    if not found:
        raise UserError(f"{folder}: no images in it")
    return found


def list_images(paths: Sequence[Path]) -> list[Path]:
    """Return the image files among `paths`, and all in its folders and their subfolders.

    Raises UserError for a path that is no image, and for a folder without any.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such image or folder")
        files = _below(path) if path.is_dir() else [path]
        images = [file for file in files if usable_format(file)]
        if not images:
            raise UserError(f"{path}: {'no images in it' if path.is_dir() else 'not an image'}")
        found += images
    return found


def _below(folder: Path) -> list[Path]:
    try:
        own = visible_files(folder)
        return own + [file for below in class_folders(folder) for file in _below(below)]
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror}; make it readable") from None


def _in_class_folders(folder: Path) -> list[tuple[Path, str]]:
    for file in visible_files(folder):
        if usable_format(file):
            raise UserError(f"{file}: not in a class folder; move it into one or elsewhere")
    found = []
    for place in class_folders(folder):
        if below := class_folders(place):
            raise UserError(f"{below[0]}: a folder inside a class; move its images up or elsewhere")
        found += [(file, place.name) for file in visible_files(place) if usable_format(file)]
    return found


def _in_a_table(folder: Path) -> list[tuple[Path, str]]:
    tables = [file for file in visible_files(folder) if file.suffix.lower() == ".csv"]
    if len(tables) != 1:
        what = "no class folders and no CSV" if not tables else f"{len(tables)} CSV files"
        raise UserError(
            f"{folder}: {what}; images belong in {folder}/CLASS/, or beside one CSV with the "
            "columns file and class"
        )
    labelled = labelled_files("val", folder, read_labels(tables[0]), tables[0])
    return [(one.file, one.class_name) for one in labelled]
