"""Evaluation of a trained network on the validation images of its run, or on any others."""

from __future__ import annotations

from pathlib import Path

from harness.deployment.inference import open_inference
from harness.deployment.predictions import Predictions, check_files
from harness.deployment.test_images import load_test_images, load_validation
from harness.execution.evaluation import Evaluation, evaluate
from harness.execution.trained_model import TrainedModel


def evaluate_trained(
    trained: TrainedModel, predictions: Path | None = None, data: Path | None = None
) -> tuple[Evaluation, Predictions | None]:
    """Evaluate in this one process; return the result, and what was written to `predictions`.

    `data` is a folder of other images than the run's validation set. `predictions` is a CSV file to
    write, with a line for each image. Raises UserError.
    """
    if predictions is not None:
        check_files(predictions)
    images = load_validation(trained) if data is None else load_test_images(trained, data)
    noted = None if predictions is None else Predictions(images)
    watch = None if noted is None else noted.note
    with open_inference(trained, images) as use:
        evaluation = evaluate(use.config, use.model, use.batches, use.preprocess, watch)
    if predictions is not None and noted is not None:
        noted.write(predictions)
    return evaluation, noted
