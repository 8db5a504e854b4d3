"""A config for a folder of images, which fixes counts, classes and sizes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.config.schema import RunConfig
from harness.data.dataset import check_alike
from harness.data.prepare.layouts import recognise
from harness.data.sources.listing import SUFFIXES, class_folders, first_three
from harness.data.sources.registry import open_source
from harness.data.sources.source import ImageSource
from harness.drafts.draft import Draft
from harness.errors import UserError
from harness.models.registry import find_family

WORKER_BATCH = 32  # the paper's n
STEPS = 20  # of an epoch, at least
LARGEST_MINIBATCH = 8192  # section 5.1: up to here the error does not depend on kn
FULL_SIDE, SMALL_SIDE = 224, 64  # pixels: the paper's crop; below, photos become thumbnails
LARGE_NETWORK, SMALL_NETWORK = "resnet50", "resnet20"


@dataclass(frozen=True)
class FolderFacts:
    """Counts, classes and sizes of a folder.

    `side` is the median short side of the training images, in pixels.
    """

    folder: Path
    train_images: int
    val_images: int
    classes: tuple[str, ...]
    side: int

    @property
    def crop(self) -> int:
        """Side of the crop: the paper's, or less where the images are smaller."""
        if self.side < SMALL_SIDE:
            return self.side
        return min(self.side // 32 * 32, FULL_SIDE)


def inspect_folder(folder: Path) -> FolderFacts:
    """Read counts, classes and sizes from DIR/train/CLASS and DIR/val/CLASS.

    Raises UserError, with what to do, where the images are not laid out so or cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if not all((folder / split).is_dir() for split in ("train", "val")):
        layout = recognise(folder)
        if layout is None:
            raise UserError(f"{folder}: images belong in {folder}/train/CLASS/ and val/CLASS/")
        raise UserError(f"{folder}: {layout.advice(folder)}")
    run = RunConfig(data_root=str(folder))
    train, val = open_source(run, "train"), open_source(run, "val")
    check_alike(train, val)
    for images in (train, val):
        _report_left_out(images)
    sides = np.minimum(train.widths, train.heights)
    side = int(np.median(sides[sides > 0])) if sides.any() else FULL_SIDE
    return FolderFacts(folder, len(train), len(val), train.classes, side)


def _report_left_out(images: ImageSource) -> None:
    """Print how many files beside the images training would not read."""
    others = [
        entry
        for name in class_folders(images.location)
        for entry in sorted((images.location / name).iterdir())
        if not entry.name.startswith(".") and not entry.name.lower().endswith(SUFFIXES)
    ]
    if others:
        print(
            f"warning: {images.location}: training does not read {len(others):,} entries that are "
            f"no {', '.join(SUFFIXES)}, such as {others[0]}; `harness data import` converts other "
            "formats",
            file=sys.stderr,
        )


def largest_minibatch(images: int) -> int:
    """Return the largest 32 · 2^i that leaves 20 steps an epoch, at most 8192 and at least 32."""
    minibatch = WORKER_BATCH
    while minibatch < LARGEST_MINIBATCH and images // (2 * minibatch) >= STEPS:
        minibatch *= 2
    return minibatch


def draft_for(folder: Path, model: str | None = None, ranks: int | None = None) -> str:
    """Return a complete, commented config that trains on the images of `folder`.

    Raises UserError for a folder that cannot be trained on, an unknown network, and more ranks
    than workers.
    """
    facts = inspect_folder(folder)
    if facts.train_images < WORKER_BATCH:
        raise UserError(
            f"{folder}: {facts.train_images} training images; a minibatch needs at least "
            f"{WORKER_BATCH}"
        )
    small = facts.crop < SMALL_SIDE
    name = model or (SMALL_NETWORK if small else LARGE_NETWORK)
    find_family(name)
    minibatch = largest_minibatch(facts.train_images)
    if ranks is not None and not 1 <= ranks <= minibatch // WORKER_BATCH:
        raise UserError(
            f"--ranks {ranks}: the largest minibatch that leaves {STEPS} steps an epoch is "
            f"{minibatch}, of {minibatch // WORKER_BATCH} workers; give 1 to that many ranks"
        )
    return _draft(facts, name, minibatch, small).render(ranks)


def _draft(facts: FolderFacts, model: str, minibatch: int, small: bool) -> Draft:
    enough = facts.train_images // minibatch >= STEPS
    why = f"the largest 32 * 2^i that leaves {STEPS} steps an epoch"
    data: dict[str, object] = {
        "train_images": facts.train_images,
        "val_images": facts.val_images,
        "classes": len(facts.classes),
        "crop": facts.crop,
        "resize": facts.crop if small else round(facts.crop * 256 / 224),
    }
    if small:  # as configs/cifar10
        data |= {"crop_area": [0.6, 1.0], "crop_ratio": [0.9, 1.1111111111111112]}
    data["flip"] = True
    return Draft(
        f"{model} on the {len(facts.classes)} classes of {_printable(str(facts.folder))}, drafted "
        "by `harness init`",
        {
            "data": data,
            "model": {"name": model},
            "recipe": {"minibatch": minibatch, "worker_batch": WORKER_BATCH, "epochs": 90},
            "run": {"data_root": str(facts.folder)},
        },
        {
            "data.classes": _printable(first_three(facts.classes)),
            "data.crop": f"half of the images have a short side of {facts.side} pixels or more",
            "data.crop_area": "narrow: small images",
            "data.flip": "false where a mirror image means something else, as with text",
            "recipe.minibatch": why if enough else f"the smallest: under {STEPS} steps an epoch",
            "recipe.epochs": "lr * 0.1 after 30, 60 and 80 of them, unless milestones says others",
        },
        (
            "No expect: nobody has measured the error of this recipe on these images.",
            "harness plan FILE; on W ranks: torchrun --nproc-per-node W -m harness train FILE",
        ),
        {
            "model": (
                "weights: FILE               # fine-tune: a state dict, checkpoint or run folder",
                "freeze: backbone            # train the classifier alone",
            ),
            "recipe": (
                "reference_lr: 0.01          # 0.1 by default; trained weights need less",
                "milestones: [15, 25]        # with fewer epochs, such as 30",
            ),
        },
    )


def _printable(text: str) -> str:
    """Return the text for a comment, which must not break the line."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
