"""The training and validation images of a config, and whether they are what it describes."""

from __future__ import annotations

import io

import numpy as np

from harness.config.schema import Config
from harness.data.decode import read_encoded
from harness.data.sources.header import image_fault, read_header
from harness.data.sources.listing import equal_but_for_form, first_three
from harness.data.sources.registry import open_source
from harness.data.sources.source import ImageSource, join
from harness.errors import UserError

REPAIR_OR_SKIP = "repair it or set data.on_bad_image=skip"


def open_dataset(config: Config) -> tuple[ImageSource, ImageSource]:
    """Return the training images, followed by the unlabelled ones, and the validation images.

    Raises UserError where they are not the data that the config describes.
    """
    train, val = open_source(config.run, "train"), open_source(config.run, "val")
    check_dataset(train, val, config)
    return _with_unlabelled(train, config), val


def open_training_images(config: Config) -> ImageSource:
    """Return the training images as `open_dataset`, which need no validation images beside them."""
    train = open_source(config.run, "train")
    check_count(train, "train_images", config.data.train_images)
    check_headers(train, config.data.on_bad_image == "skip")
    return _with_unlabelled(train, config)


def _with_unlabelled(train: ImageSource, config: Config) -> ImageSource:
    data = config.data
    if data.unlabelled_images == 0:
        return train
    unlabelled = open_source(config.run, "unlabelled")
    check_count(unlabelled, "unlabelled_images", data.unlabelled_images)
    check_headers(unlabelled, data.on_bad_image == "skip")
    return join(train, unlabelled)


def check_dataset(train: ImageSource, val: ImageSource, config: Config) -> None:
    """Raise UserError where the images are not the data that the config describes."""
    data = config.data
    check_count(train, "train_images", data.train_images)
    check_count(val, "val_images", data.val_images)
    check_alike(train, val)
    if len(train.classes) != data.classes:
        raise UserError(
            f"{train.location}: {len(train.classes)} classes, but data.classes is {data.classes}; "
            f"complete the folder or set data.classes={len(train.classes)}"
        )
    check_headers(train, data.on_bad_image == "skip")
    check_headers(val, skip=False, remedy="repair it")


def check_alike(train: ImageSource, val: ImageSource) -> None:
    """Raise UserError where train and val have other classes."""
    if train.classes == val.classes:
        return
    only_train = sorted({*train.classes} - {*val.classes})
    only_val = sorted({*val.classes} - {*train.classes})
    parts = [
        f"{first_three(names)} only in {images.location}"
        for names, images in ((only_train, train), (only_val, val))
        if names
    ]
    if names := next(iter(equal_but_for_form([*only_train, *only_val])), None):
        parts.append(f"{' and '.join(map(ascii, names))} differ in Unicode form only (NFC, NFD)")
    what = "; ".join(parts) or "they are in another order"
    raise UserError(f"the classes of train and val differ: {what}; repair them")


def check_count(images: ImageSource, key: str, expected: int) -> None:
    """Raise UserError where there are not as many images as data.`key` says."""
    if len(images) != expected:
        raise UserError(
            f"{images.location}: {len(images)} images, but data.{key} is {expected}; "
            f"complete the folder or set data.{key}={len(images)}"
        )


def check_headers(images: ImageSource, skip: bool, remedy: str = REPAIR_OR_SKIP) -> None:
    """Raise UserError for the first image without a header, unless `skip`."""
    bad = np.flatnonzero(images.widths == 0).tolist()
    if bad and not skip:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        _, fault = read_header(io.BytesIO(read_encoded(images, bad[0])))
        why = image_fault(fault) if fault else "no JPEG or PNG header"
        raise UserError(f"{images.name(bad[0])}{more}: cannot be decoded: {why}; {remedy}")
