"""Well-known layouts of image data sets: how to recognise them, their images and classes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.data.prepare.imagenet_archives import TRAIN
from harness.data.prepare.imagenet_devkit import DEVKIT, read_devkit
from harness.data.prepare.label_table import read_labels
from harness.data.sources.image_format import image_format
from harness.data.sources.listing import is_class_name
from harness.errors import UserError

SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "test", "testing"),  # the first that exists
}
TABLES = {
    "train": ("metadata.csv", "metadata.jsonl", "train.csv", "labels.csv", "train_labels.csv"),
    "val": ("metadata.csv", "metadata.jsonl", "val.csv", "valid.csv", "validation.csv"),
}
IMAGE_FOLDERS = ("", "images", "train", "train_images", "train/images")
VAL_SOLUTION = "LOC_val_solution.csv"
VAL_NAME = re.compile(r"ILSVRC2012_val_([0-9]{8})\.JPEG")
WNID_AT_END = re.compile(r".+_(n[0-9]{8})\.JPEG")


@dataclass(frozen=True)
class LabelledFile:
    """An image with its class; `split` is train or val."""

    split: str
    class_name: str
    file: Path


@dataclass(frozen=True)
class Layout:
    """A layout. `name` completes "this is …"; `files` yields a folder's images or raises UserError.

    `remedy`: what to do with such a folder.
    """

    name: str
    is_layout_of: Callable[[Path], bool]
    files: Callable[[Path], Iterator[LabelledFile]] | None = None
    remedy: str = "`harness data import {folder} NEW` creates train/CLASS and val/CLASS from it"

    def advice(self, folder: Path) -> str:
        """Describe the folder's layout, and what to do."""
        return f"this is {self.name}: {self.remedy.format(folder=folder)}"


def recognise(folder: Path) -> Layout | None:
    """Return the layout of `folder`, or None if it is unknown. Raises UserError."""
    try:
        return next((layout for layout in LAYOUTS if layout.is_layout_of(folder)), None)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror}") from None


def split_folders(folder: Path) -> dict[str, Path]:
    """Return the existing folders of train and val, whatever their names."""
    found = {entry.name.casefold(): entry for entry in folder.iterdir() if entry.is_dir()}
    return {
        split: next(found[name] for name in names if name in found)
        for split, names in SPLIT_NAMES.items()
        if found.keys() & set(names)
    }


def class_folders(folder: Path) -> list[Path]:
    """List class folders by name."""
    return sorted(e for e in folder.iterdir() if is_class_name(e.name) and e.is_dir())


def visible_files(folder: Path) -> list[Path]:
    """List files by name, broken links included."""
    return sorted(e for e in folder.iterdir() if not e.name.startswith(".") and not e.is_dir())


# ---- tiny-imagenet: train/CLASS/images/*, val/images/* and val/val_annotations.txt


def _is_tiny_imagenet(folder: Path) -> bool:
    train = split_folders(folder).get("train")
    nested = train is not None and any((c / "images").is_dir() for c in class_folders(train))
    return nested and (folder / "val" / "val_annotations.txt").is_file()


def _tiny_imagenet(folder: Path) -> Iterator[LabelledFile]:
    for place in class_folders(folder / "train"):
        for file in visible_files(place / "images"):
            yield LabelledFile("train", place.name, file)
    table = folder / "val" / "val_annotations.txt"
    lines = table.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    labels = dict(line.split("\t")[:2] for line in lines if line.count("\t"))
    yield from labelled_files("val", folder / "val" / "images", labels, table)


# ---- ImageNet with a flat val, from Kaggle or unpacked from the official archives


def _imagenet_base(folder: Path) -> Path:
    places = (folder / "ILSVRC" / "Data" / "CLS-LOC", folder / "Data" / "CLS-LOC")
    return next((place for place in places if place.is_dir()), folder)


def _is_flat_imagenet(folder: Path) -> bool:
    base = _imagenet_base(folder)
    flat = (base / "val").is_dir() and any(
        VAL_NAME.fullmatch(e.name) for e in _first_entries(base / "val")
    )
    return base != folder or flat


def _flat_imagenet(folder: Path) -> Iterator[LabelledFile]:
    base = _imagenet_base(folder)
    if not (base / "train").is_dir() or not (base / "val").is_dir():
        raise UserError(f"{base}: train/ or val/ is missing; unpack the whole archive")
    for place in class_folders(base / "train"):
        for file in visible_files(place):
            yield LabelledFile("train", place.name, file)
    places = [folder, *([] if base == folder else [base, base.parent, base.parent.parent])]
    for place in places:
        if (table := place / VAL_SOLUTION).is_file():
            labels = _val_solution(table)
            break
        if (table := place / DEVKIT).is_file():
            classes = read_devkit(table).val_classes
            labels = {f"ILSVRC2012_val_{i:08d}": name for i, name in enumerate(classes, start=1)}
            break
    else:
        raise UserError(
            f"{base / 'val'}: the classes of its images are unknown; put Kaggle's {VAL_SOLUTION} "
            f"or image-net.org's {DEVKIT} into {folder}"
        )
    yield from labelled_files("val", base / "val", labels, table)


def _val_solution(table: Path) -> dict[str, str]:
    """Read rows of ImageId,PredictionString: a class and a box, repeated for each object."""
    lines = table.read_text().splitlines()[1:]
    rows = [line.replace(",", " ").split() for line in lines if line.strip()]
    if any(len(row) < 2 for row in rows):
        raise UserError(f"{table}: damaged: a line without ImageId,PredictionString")
    return {row[0].removesuffix(".JPEG"): row[1] for row in rows}


def _first_entries(folder: Path) -> Iterator[Path]:
    """Yield the first entries, enough to recognise a folder's contents."""
    for number, entry in enumerate(folder.iterdir()):
        if number == 100:
            return
        yield entry


# ---- ImageNet from Hugging Face, unpacked: train/n01440764_10026_n01440764.JPEG


def _is_named_by_wnid(folder: Path) -> bool:
    splits = split_folders(folder)
    return len(splits) == 2 and all(
        any(WNID_AT_END.fullmatch(entry.name) for entry in _first_entries(place))
        for place in splits.values()
    )


def _named_by_wnid(folder: Path) -> Iterator[LabelledFile]:
    for split, place in split_folders(folder).items():
        for file in visible_files(place):
            match = WNID_AT_END.fullmatch(file.name)
            if match is None:
                raise UserError(f"{file}: its name does not end in _WNID.JPEG; move it elsewhere")
            yield LabelledFile(split, match[1], file)


# ---- a table of labels beside the images: Kaggle's competitions, Hugging Face's metadata


def _tables(folder: Path) -> dict[str, Path]:
    splits = split_folders(folder)
    found: dict[str, Path] = {}
    for split, names in TABLES.items():
        places = [*([splits[split]] if split in splits else []), folder]
        tables = [place / name for place in places for name in names]
        table = next((table for table in tables if table.is_file()), None)
        if table is not None and table not in found.values():
            found[split] = table
    return found if "train" in found else {}


def _labelled_by_tables(folder: Path) -> Iterator[LabelledFile]:
    for split, table in _tables(folder).items():
        labels = read_labels(table)
        names = [name.replace("train", split) for name in IMAGE_FOLDERS]
        places = [table.parent / name for name in names if (table.parent / name).is_dir()]
        first = next(iter(labels))
        holding = [place for place in places if _named_file(place, first)]
        if not holding:
            raise UserError(
                f"{table}: {first} is in none of {', '.join(map(str, places))}; unpack the images"
            )
        by_split = _by_split(folder, split, labels) if holding[0] == folder else {split: labels}
        for name, part in by_split.items():
            yield from labelled_files(name, holding[0], part, table)


def _by_split(folder: Path, split: str, labels: dict[str, str]) -> dict[str, dict[str, str]]:
    """Split the labels of one table beside train/ and test/ by the folder of their images."""
    splits = {place.name: name for name, place in split_folders(folder).items()}
    parts: dict[str, dict[str, str]] = {}
    for name, label in labels.items():
        parts.setdefault(splits.get(Path(name).parts[0], split), {})[name] = label
    return parts


def _named_file(place: Path, name: str) -> Path | None:
    """Find the file of a name in a table, which often omits the suffix."""
    for suffix in ("", ".jpg", ".jpeg", ".png", ".JPEG", ".JPG", ".webp", ".bmp", ".tif", ".tiff"):
        if (file := place / f"{name}{suffix}").is_file():
            return file
    return None


def labelled_files(
    split: str, place: Path, labels: dict[str, str], table: Path
) -> Iterator[LabelledFile]:
    """Yield the images of `labels` (name, perhaps without a suffix -> class) in `place`.

    Raises UserError for a name that points outside, a missing image and an image without a class.
    """
    found = set()
    for name, class_name in labels.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{table}: {name!a} points outside {place}")
        file = _named_file(place, name)
        if file is None:
            raise UserError(f"{table}: {name!a} is not in {place}; unpack all images")
        found.add(file)
        yield LabelledFile(split, class_name, file)
    rest = [file for file in visible_files(place) if file not in found and image_format(file)]
    if rest:
        raise UserError(
            f"{rest[0]} (and {len(rest) - 1} more): has no class in {table}; move it elsewhere"
        )


# ---- class folders, below train and val under various names, or without splits


def _is_split_by_class(folder: Path) -> bool:
    train = split_folders(folder).get("train")
    return train is not None and bool(class_folders(train))


def _split_by_class(folder: Path) -> Iterator[LabelledFile]:
    for split, place in split_folders(folder).items():
        yield from _by_class(split, place)


def _is_by_class(folder: Path) -> bool:
    classes = class_folders(folder)
    return len(classes) > 1 and all(visible_files(place) for place in classes)


def _by_class(split: str, folder: Path) -> Iterator[LabelledFile]:
    if loose := visible_files(folder):
        raise UserError(f"{loose[0]}: not in a class folder; move it into one or elsewhere")
    for place in class_folders(folder):
        if below := class_folders(place):
            raise UserError(f"{below[0]}: a folder inside a class; move its images up or elsewhere")
        for file in visible_files(place):
            yield LabelledFile(split, place.name, file)


def _holds(pattern: str) -> Callable[[Path], bool]:
    return lambda folder: any(True for _ in folder.glob(pattern))


# ours, except for the names of the splits and the formats of the images
SPLIT_BY_CLASS = Layout(
    "a set of class folders in train/ and val/", _is_split_by_class, _split_by_class
)
LAYOUTS = (
    Layout(
        "a folder of ImageNet's official archives",
        lambda folder: (folder / TRAIN).is_file(),
        remedy="`harness data imagenet NEW --archives {folder}` creates train/CLASS and val/CLASS "
        "from them",
    ),
    Layout(
        "ImageNet as Kaggle provides it, ILSVRC/Data/CLS-LOC, or with a flat val/",
        _is_flat_imagenet,
        _flat_imagenet,
    ),
    Layout(
        "ImageNet as Hugging Face provides it, in archives",
        lambda folder: any(map(_holds("*_images*.tar.gz"), (folder, folder / "data"))),
        remedy="unpack train_images_*.tar.gz into a folder train/ and val_images.tar.gz into val/ "
        "beside it, then give the folder that contains them to `harness data import`",
    ),
    Layout(
        "tiny-imagenet's layout, train/CLASS/images/ and val/val_annotations.txt",
        _is_tiny_imagenet,
        _tiny_imagenet,
    ),
    Layout("ImageNet as Hugging Face provides it, unpacked", _is_named_by_wnid, _named_by_wnid),
    Layout(
        "a set of images with a table of their classes, as on Kaggle and Hugging Face",
        lambda folder: bool(_tables(folder)),
        _labelled_by_tables,
    ),
    Layout(
        "a Hugging Face data set in parquet files",
        lambda folder: any(map(_holds("*.parquet"), (folder, folder / "data"))),
        remedy="parquet is not supported; save each image as train/CLASS/NAME and val/CLASS/NAME "
        "with the library `datasets`",
    ),
    SPLIT_BY_CLASS,
    Layout(
        "a set of class folders without train/ and val/",
        _is_by_class,
        lambda folder: _by_class("train", folder),
        "`harness data import {folder} NEW --val 0.1` creates train/CLASS and val/CLASS from it, "
        "with a tenth of each class in val",
    ),
)
