"""Prediction for single images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.data.dataset import check_headers
from harness.data.labelled_files import list_images
from harness.data.sources.files import open_files
from harness.deployment.inference import open_inference
from harness.deployment.predictions import most_probable
from harness.errors import UserError
from harness.execution.trained_model import TrainedModel
from harness.recipe.losses import UNLABELLED


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image, each with its probability, in falling order."""

    path: str
    classes: tuple[tuple[str, float], ...]


def predict(trained: TrainedModel, paths: Sequence[Path], top: int = 5) -> list[Prediction]:
    """Predict the `top` most probable classes of image files and of all images in folders.

    Raises UserError for what is no intact image. An old checkpoint that records no class names
    gives the positions of its classes.
    """
    if top < 1:
        raise UserError(f"--top {top}: at least 1 is needed")
    files = list_images(paths)
    names = tuple(trained.class_names) or tuple(map(str, range(trained.config.data.classes)))
    labels = np.full(len(files), UNLABELLED, dtype=np.int64)
    images = open_files(Path(), files, names, labels)
    check_headers(images, skip=False, remedy="repair or remove it")
    found = []
    with open_inference(trained, images) as use:
        for batch, logits in use.logits():
            likely = zip(*(part.tolist() for part in most_probable(logits, top)), strict=True)
            for image_id, (shares, guesses) in zip(batch.ids.tolist(), likely, strict=True):
                pairs = tuple((names[g], s) for g, s in zip(guesses, shares, strict=True))
                found.append(Prediction(images.name(image_id), pairs))
    return found
