"""A folder that timm loads as a local model: weights, config.json and a model card."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

from safetensors.torch import save_file

from harness.config.schema import DataConfig
from harness.deployment.model_card import render_card
from harness.deployment.network_facts import NetworkFacts, gather_facts
from harness.errors import UserError
from harness.execution.trained_model import TrainedModel
from harness.models.registry import build_plain
from harness.models.torchvision_networks import RESNETS


def export_hub(trained: TrainedModel, folder: Path) -> str:
    """Write model.safetensors, config.json and README.md to a new folder; return a line about it.

    Raises UserError for a network that timm does not have, and where the folder holds anything.
    """
    _check(trained, folder)
    facts = gather_facts(trained)
    network = build_plain(trained.config).float()
    network.load_state_dict(trained.model.state_dict(), strict=True)
    part = folder.with_name(f".{folder.name}.{os.getpid()}")  # complete before it gets its name
    try:
        part.mkdir()
        try:
            save_file(network.state_dict(), part / "model.safetensors", {"format": "pt"})
            config = json.dumps(timm_config(facts), indent=2)
            (part / "config.json").write_text(config + "\n", encoding="utf-8")
            card = render_card(facts).encode(errors="backslashreplace")
            (part / "README.md").write_bytes(card)
            os.rename(part, folder)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    except OSError as error:
        raise UserError(f"--to {folder}: {error.strerror}") from None
    files = "model.safetensors, config.json and README.md"
    return (
        f"{folder}: {files} of {trained.config.model.name}, from {trained.checkpoint}\n"
        f"load it with timm.create_model('local-dir:{folder}', pretrained=True)"
    )


def _check(trained: TrainedModel, folder: Path) -> None:
    model = trained.config.model
    if model.name not in RESNETS or model.options:
        options = f" with model.options {model.options}" if model.options else ""
        raise UserError(
            f"--format hub: timm has no {model.name}{options} with these weights (it has "
            f"{', '.join(RESNETS)}); export a .safetensors file instead"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--to {folder}: exists and is not an empty folder; choose another")


def timm_config(facts: NetworkFacts) -> dict[str, object]:
    """Return the config.json of timm."""
    config = facts.trained.config
    data, classes = config.data, facts.classes
    network = build_plain(config)
    return {
        "architecture": config.model.name,
        "num_classes": data.classes,
        "num_features": network.fc.in_features,  # type: ignore[union-attr]
        **({"label_names": classes} if classes else {}),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, data.crop, data.crop],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": crop_share(data),
            "crop_mode": "center",
            "mean": list(data.mean),
            "std": list(data.std),
            "num_classes": data.classes,
            "first_conv": "conv1",
            "classifier": "fc",
        },
    }


def crop_share(data: DataConfig) -> float:
    """Return crop/resize, so that timm, which divides and rounds down, arrives at `resize`."""
    share = data.crop / data.resize
    return (
        share if math.floor(data.crop / share) == data.resize else data.crop / (data.resize + 0.5)
    )
