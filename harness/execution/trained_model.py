"""A trained network, loaded from a run folder or a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from harness.config.loading import config_from_mapping
from harness.config.schema import Config
from harness.errors import UserError
from harness.models.registry import build_without_weights
from harness.runs.checkpoint import DamagedCheckpoint, load_checkpoint, newest_checkpoint

# what `harness eval` may change: the machine, and the size of the test set in run.data_root
CHANGEABLE = ("run.", "data.val_images=")


@dataclass(frozen=True)
class TrainedModel:
    """A network from a checkpoint, with the config of its training.

    Attributes:
        config: The config of the run, with the overrides of this command.
        model: The network on the CPU.
        checkpoint: The file.
        class_names: In the order of the logits; old checkpoints do not record them.
        step: Number of steps after which the checkpoint was written.
        errors: Epoch, counted from 1 -> validation error in %, of the run so far.
        class_digests: Split -> class -> digest of its images; old checkpoints do not record them.
        world_size: Number of ranks that wrote the checkpoint.

    """

    config: Config
    model: nn.Module
    checkpoint: Path
    class_names: Sequence[str] = ()
    step: int = 0
    errors: Mapping[int, float] = field(default_factory=dict)
    class_digests: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    world_size: int = 1


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)  # standard output may be JSON


def load_trained(
    path: Path, overrides: Sequence[str] = (), report: Callable[[str], None] = _warn
) -> TrainedModel:
    """Load the newest valid checkpoint of a run folder, or the checkpoint itself.

    `overrides` may change `run.*` and `data.val_images` only; `report` receives warnings about
    checkpoints. Raises UserError if there is no checkpoint, or it is damaged.
    """
    for override in overrides:
        if not override.startswith(CHANGEABLE):
            raise UserError(
                f"{override}: only run.* and data.val_images may be changed; all other keys belong "
                "to the training"
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
    return TrainedModel(
        config,
        model,
        checkpoint,
        payload.get("class_names", ()),
        payload["step"],
        payload.get("errors", {}),
        payload.get("class_digests", {}),
        payload.get("world_size", 1),
    )
