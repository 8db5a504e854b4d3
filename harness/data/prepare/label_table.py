"""Tables of images and their classes: Kaggle's CSV, Hugging Face's metadata.csv and .jsonl."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from harness.errors import UserError

# in order of preference
FILE_COLUMNS: tuple[str, ...] = ("file_name", "filename", "file", "path", "image_path")
FILE_COLUMNS += ("image_name", "image_id", "imageid", "image", "img", "id", "name")
LABEL_COLUMNS: tuple[str, ...] = ("label", "labels", "class", "class_name", "classname")
LABEL_COLUMNS += ("category", "target", "breed", "species", "label_name", "class_id", "label_id")


def read_labels(table: Path) -> dict[str, str]:
    """Read a table: image name, as written there, -> class.

    Raises UserError for a missing or empty column of images or classes, and for an image with two
    classes.
    """
    labels: dict[str, str] = {}
    columns: tuple[str, str] | None = None
    for number, row in enumerate(_rows(table), start=1):
        columns = columns or _columns(table, list(row))
        image, label = (str(row.get(column) or "").strip() for column in columns)
        if not image or not label:
            raise UserError(f"{table}: entry {number} has no {columns[0 if not image else 1]}")
        if labels.setdefault(image, label) != label:
            raise UserError(f"{table}: {image} has two classes, {labels[image]} and {label}")
    if not labels:
        raise UserError(f"{table}: no images in it")
    return labels


def _columns(table: Path, names: list[str]) -> tuple[str, str]:
    plain = {name.strip().casefold().replace(" ", "_"): name for name in names}
    file = next((plain[name] for name in FILE_COLUMNS if name in plain), None)
    label = next((plain[name] for name in LABEL_COLUMNS if name in plain), None)
    if file is None or label is None:
        lacking = (
            "of file names (file_name, image_id, …)" if file is None else "of classes (label, …)"
        )
        raise UserError(f"{table}: no column {lacking}; found {', '.join(names)}")
    return file, label


def _rows(table: Path) -> Iterator[dict[str, object]]:
    try:
        with open(table, newline="", encoding="utf-8-sig", errors="surrogateescape") as stream:
            if table.suffix == ".jsonl":
                yield from (json.loads(line) for line in stream if line.strip())
            else:
                yield from csv.DictReader(stream)
    except OSError as error:
        raise UserError(f"{table}: {error.strerror}") from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"{table}: damaged ({error})") from None
