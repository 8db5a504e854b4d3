"""A trained network: read from a run folder or checkpoint, evaluated, exported."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from harness.config.loading import config_from_mapping
from harness.config.schema import Config
from harness.data.batch import Batch
from harness.data.batch_plan import BatchPlan
from harness.data.dataset import check_count, check_headers, open_training_images
from harness.data.loaders.choice import open_loader, resolve_loader, resolve_threads
from harness.data.sources.listing import first_three
from harness.data.sources.registry import open_source
from harness.data.sources.source import ImageSource
from harness.distributed import world_from_environment
from harness.errors import UserError
from harness.execution.evaluation import Evaluation, evaluate
from harness.execution.precision import master_dtype, set_precision
from harness.execution.preprocess import Preprocess
from harness.execution.recalibration import evaluation_statistics
from harness.models.registry import build_without_weights
from harness.output_file import check_output, write_output
from harness.recipe.minibatch import AUTO_MICRO_BATCH
from harness.runs.checkpoint import DamagedCheckpoint, load_checkpoint, newest_checkpoint


@dataclass(frozen=True)
class TrainedModel:
    """A network from a checkpoint, with the config of its training.

    `class_names` are in the order of the logits; old checkpoints do not record them.
    """

    config: Config
    model: nn.Module
    checkpoint: Path
    class_names: Sequence[str] = ()


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)  # standard output may be JSON


def load_trained(
    path: Path, overrides: Sequence[str] = (), report: Callable[[str], None] = _warn
) -> TrainedModel:
    """Load the newest valid checkpoint of a run folder, or the checkpoint itself.

    `overrides` may change `run.*` only; `report` receives warnings about checkpoints. Raises
    UserError if there is no checkpoint, or it is damaged.
    """
    for override in overrides:
        if not override.startswith("run."):
            raise UserError(
                f"{override}: only run.* may be changed; all other keys belong to the training"
            )
    if path.is_dir():
        found = newest_checkpoint(path / "checkpoints", report)
        if found is None:
            raise UserError(f"{path}: holds no valid checkpoint; give a run folder or a checkpoint")
        checkpoint, payload = found
    elif path.exists():
        try:
            checkpoint, payload = path, load_checkpoint(path, report)
        except DamagedCheckpoint as error:
            raise UserError(f"damaged checkpoint: {error}") from error
    else:
        raise UserError(f"{path}: no such run folder or checkpoint")
    if missing := [key for key in ("config", "model") if key not in payload]:
        raise UserError(f"{checkpoint}: no checkpoint of a run (it records no {missing[0]})")
    # the machine that evaluates need not be the one that trained
    overrides = ["run.loader_threads=auto", *overrides]
    config = config_from_mapping(payload["config"], str(checkpoint), overrides)
    model = build_without_weights(config)
    model.load_state_dict(payload["model"], strict=True)
    return TrainedModel(config, model, checkpoint, payload.get("class_names", ()))


def load_validation(trained: TrainedModel) -> ImageSource:
    """Load the validation images, each labelled with the network's class of its folder's name.

    The folder may lack some of the network's classes. Raises UserError if it has others, or is not
    the data that the config describes.
    """
    config = trained.config
    val = open_source(config.run, "val")
    check_count(val, "val_images", config.data.val_images)
    check_headers(val, skip=False, remedy="repair it")
    classes = tuple(trained.class_names)
    if not classes:  # an old checkpoint
        if len(val.classes) != config.data.classes:
            raise UserError(
                f"{val.location}: {len(val.classes)} classes, but the network has "
                f"{config.data.classes}, whose names {trained.checkpoint} does not record; give "
                "the folders of all of them"
            )
        _warn(
            f"{trained.checkpoint}: records no class names; taken to be those of {val.location}, "
            "sorted"
        )
        return val
    known = f"the network's {len(classes)} classes ({first_three(classes)})"
    for name in val.classes:
        if name not in classes:
            raise UserError(
                f"{val.location}: class {name} is none of {known}; rename the folder as it was in "
                "training, or remove it"
            )
    if absent := [name for name in classes if name not in val.classes]:
        _warn(f"{val.location}: has no images of {first_three(absent)} of {known}")
    return val.relabelled(classes)


def evaluate_trained(trained: TrainedModel, predictions: Path | None = None) -> Evaluation:
    """Evaluate on the whole validation set, in this one process.

    `predictions` is a CSV file to write, with a line for each image: path, label and prediction,
    the last two as class names.
    """
    if predictions is not None:
        check_output(predictions, "--predictions")
    config = trained.config
    world = world_from_environment(config.run.device)
    if world.world_size > 1:
        raise UserError("harness eval runs in one process; start it without torchrun or srun")
    set_precision(config.run.precision)
    val = load_validation(trained)
    train = open_training_images(config) if config.run.recalibrate_images else val.first(0)
    # the network was built for NCHW
    batch_plan = BatchPlan(config, train, val, 0, 1, AUTO_MICRO_BATCH, channels_last=False)
    threads = resolve_threads(config.run.loader_threads, local_ranks=1)
    name = resolve_loader(config.run.loader, world.rank)
    loader = open_loader(config, batch_plan, name, threads, world.device.type == "cuda")
    dtype = master_dtype(config.run.precision)
    rows: list[tuple[str, str, str]] = []

    def note(batch: Batch, logits: Tensor) -> None:
        for image_id, guess in zip(batch.ids.tolist(), logits.argmax(1).tolist(), strict=True):
            label = val.classes[val.labels[image_id]]
            rows.append((val.relative_path(image_id), label, val.classes[guess]))

    try:
        model = trained.model.to(world.device, dtype)
        pixels = Preprocess(config, world.device)
        with evaluation_statistics(config, model, 1.0, loader.recalibrate, pixels):
            evaluation = evaluate(
                config, model, loader.evaluate(), pixels, note if predictions else None
            )
    finally:
        loader.close()
    if predictions is not None:
        write_output(predictions, "--predictions", _predictions_csv(rows))
    return evaluation


def _predictions_csv(rows: list[tuple[str, str, str]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(("path", "label", "prediction"))
    writer.writerows(rows)
    return stream.getvalue()


def export_trained(trained: TrainedModel, file: Path) -> str:
    """Write the plain float32 state dict with the network's own names; return a line about it."""
    if file.suffix not in (".pt", ".safetensors"):
        raise UserError(f"--to {file}: the name must end in .pt or .safetensors")
    check_output(file, "--to")
    state = {
        name: (value.float() if value.is_floating_point() else value).contiguous()
        for name, value in trained.model.state_dict().items()
    }
    if file.suffix == ".safetensors":
        content = safetensors_bytes(state)
    else:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getvalue()
    write_output(file, "--to", content)
    return f"{file}: {len(state)} tensors of {trained.config.model.name}, from {trained.checkpoint}"
