"""A network's predictions for labelled images, and its errors class by class."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from harness.data.batch import Batch
from harness.data.sources.source import ImageSource
from harness.output_file import check_output, write_output

TOP = 5
OPTION = "--predictions"


def most_probable(logits: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Return the largest probabilities (B, top) in falling order, and their classes (B, top)."""
    probabilities = logits.double().softmax(1)
    return probabilities.topk(min(top, logits.shape[1]))


@dataclass(frozen=True)
class ClassErrors:
    """The images of one class: how many, how many of them wrong, and the commonest wrong class."""

    name: str
    images: int
    wrong: int
    taken_for: str  # empty where none is wrong

    @property
    def error(self) -> float:
        """Error in %."""
        return 100.0 * self.wrong / self.images


@dataclass
class Predictions:
    """Predictions for `images`, noted batch by batch."""

    images: ImageSource
    rows: list[list[object]] = field(default_factory=list)
    pairs: list[tuple[int, int]] = field(default_factory=list)  # label, prediction

    def note(self, batch: Batch, logits: Tensor) -> None:
        """Add the predictions of a batch."""
        classes = self.images.classes
        probabilities, guesses = (found.tolist() for found in most_probable(logits, TOP))
        for image_id, shares, guessed in zip(
            batch.ids.tolist(), probabilities, guesses, strict=True
        ):
            label = int(self.images.labels[image_id])
            row: list[object] = [self.images.relative_path(image_id), classes[label]]
            for guess, share in zip(guessed, shares, strict=True):
                row += [classes[guess], f"{share:.6f}"]
            self.rows.append(row)
            self.pairs.append((label, guessed[0]))

    def confusion(self) -> NDArray[np.int64]:
        """Return the number of images by label and prediction, (K, K)."""
        matrix = np.zeros((len(self.images.classes),) * 2, dtype=np.int64)
        np.add.at(matrix, tuple(np.array(self.pairs, dtype=np.int64).reshape(-1, 2).T), 1)
        return matrix

    def by_class(self) -> list[ClassErrors]:
        """Return the errors of the classes that have images, in the order of the classes."""
        found, classes = [], self.images.classes
        for place, row in enumerate(self.confusion()):
            if images := int(row.sum()):
                others = row.copy()
                others[place] = 0
                worst = classes[int(others.argmax())] if others.any() else ""
                found.append(ClassErrors(classes[place], images, int(others.sum()), worst))
        return found

    def write(self, file: Path) -> None:
        """Write the predictions; beside a regular file, class errors and confusion matrix too."""
        top = range(2, min(TOP, len(self.images.classes)) + 1)
        others = [name for place in top for name in (f"top{place}", f"probability{place}")]
        header = ["path", "label", "prediction", "probability", *others]
        write_output(file, OPTION, _csv([header, *self.rows]))
        if beside := files_beside(file):
            write_output(beside[0], OPTION, _csv(self._class_table()))
            write_output(beside[1], OPTION, _csv(self._confusion_table()))

    def _class_table(self) -> list[list[object]]:
        errors = [[e.name, e.images, e.wrong, e.error, e.taken_for] for e in self.by_class()]
        return [["class", "images", "wrong", "error", "taken_for"], *errors]

    def _confusion_table(self) -> list[list[object]]:
        classes = self.images.classes
        rows = zip(classes, self.confusion().tolist(), strict=True)
        return [["label", *classes], *([name, *row] for name, row in rows)]


def check_files(file: Path) -> None:
    """Raise UserError, before any work, if one of the files could not be written."""
    check_output(file, OPTION)
    for place in files_beside(file):
        check_output(place, OPTION)


def files_beside(file: Path) -> tuple[Path, ...]:
    """Return the files of class errors and of the confusion matrix; none beside a pipe."""
    if file.exists() and not file.is_file():
        return ()
    return tuple(file.with_name(f"{file.stem}.{kind}.csv") for kind in ("classes", "confusion"))


def _csv(rows: Sequence[Sequence[object]]) -> str:
    stream = io.StringIO()
    csv.writer(stream).writerows(rows)
    return stream.getvalue()
