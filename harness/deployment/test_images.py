"""The images that a trained network is evaluated on, labelled with its classes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from harness.data.dataset import check_headers
from harness.data.labelled_files import list_labelled
from harness.data.sources.files import open_files
from harness.data.sources.listing import first_three
from harness.data.sources.registry import open_source
from harness.data.sources.source import ImageSource
from harness.errors import UserError
from harness.execution.trained_model import TrainedModel


def load_validation(trained: TrainedModel) -> ImageSource:
    """Load the validation images of the run, each with the class that its folder is named after.

    The folder may lack some of the network's classes. Raises UserError if it has others, or is not
    the data that the config describes.
    """
    val, expected = open_source(trained.config.run, "val"), trained.config.data.val_images
    if len(val) != expected:
        raise UserError(
            f"{val.location}: {len(val)} images, but data.val_images is {expected}; complete the "
            "folder, or evaluate on it as other images: --data "
            f"{val.location}"
        )
    check_headers(val, skip=False, remedy="repair it")
    return val.relabelled(_classes_of(trained, val.classes, str(val.location)))


def load_test_images(trained: TrainedModel, folder: Path) -> ImageSource:
    """Load all images of `folder`, in class folders or beside a CSV, by the names of classes.

    Raises UserError for a class that the network does not have, and where there are no images.
    """
    labelled = list_labelled(folder, trained.class_names)
    names = sorted({name for _, name in labelled})
    known = _classes_of(trained, names, str(folder))
    places = {name: known.index(name) for name in names if name in known}
    if not places:  # numbers for names
        places = {name: int(name) for name in names}
    labels = np.array([places[name] for _, name in labelled], dtype=np.int64)
    images = open_files(folder, [file for file, _ in labelled], known, labels)
    check_headers(images, skip=False, remedy="repair or remove it")
    return images


def _classes_of(trained: TrainedModel, found: Sequence[str], location: str) -> tuple[str, ...]:
    """Return the network's classes, in the order of its logits, after checking those found."""
    classes = tuple(trained.class_names)
    if not classes:  # an old checkpoint
        if len(found) != trained.config.data.classes:
            raise UserError(
                f"{location}: {len(found)} classes, but the network has "
                f"{trained.config.data.classes}, whose names {trained.checkpoint} does not record; "
                "give the folders of all of them"
            )
        warn(
            f"{trained.checkpoint}: records no class names; taken to be those of {location}, sorted"
        )
        return tuple(found)
    known = f"the network's {len(classes)} classes ({first_three(classes)})"
    if _are_positions(found, classes):
        warn(f"{location}: classes are numbers, taken as positions in {known}")
        return classes
    for name in found:
        if name not in classes:
            raise UserError(
                f"{location}: class {name} is none of {known}; rename it as it was in training, "
                "or remove it"
            )
    if absent := [name for name in classes if name not in found]:
        warn(f"{location}: has no images of {first_three(absent)} of {known}")
    return classes


def _are_positions(found: Sequence[str], classes: Sequence[str]) -> bool:
    """Return whether the names found are places in `classes`, as in ImageNet-V2 (0 to 999)."""
    numbers = all(name.isascii() and name.isdigit() for name in found)
    return numbers and not set(found) & set(classes) and max(map(int, found)) < len(classes)


def warn(text: str) -> None:
    """Print a warning on standard error, since standard output may be JSON."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
