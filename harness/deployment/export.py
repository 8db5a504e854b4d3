"""Export of a trained network to a file, by its suffix, or to a folder for model hubs."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from harness.deployment.hub import export_hub
from harness.deployment.network_facts import gather_facts
from harness.deployment.onnx_file import export_onnx
from harness.errors import UserError
from harness.execution.trained_model import TrainedModel
from harness.output_file import check_output, write_output


def export_trained(
    trained: TrainedModel, to: Path, hub: bool = False, data: Path | None = None
) -> str:
    """Write the network to the file `to`, or to the folder `to` for a `hub`; return lines about it.

    `data` is a folder of images to check an ONNX file on, instead of the run's validation images.
    Raises UserError.
    """
    if hub:
        return export_hub(trained, to)
    if (write := WRITERS.get(to.suffix)) is None:
        *others, last = WRITERS
        raise UserError(f"--to {to}: the name must end in {', '.join(others)} or {last}")
    check_output(to, "--to")
    return write(trained, to, data)


def plain_state(trained: TrainedModel) -> dict[str, Tensor]:
    """Return the state dict in float32, with the network's own names."""
    return {
        name: (value.float() if value.is_floating_point() else value).contiguous()
        for name, value in trained.model.state_dict().items()
    }


def _pickle(trained: TrainedModel, file: Path, data: Path | None) -> str:
    buffer = io.BytesIO()
    torch.save(state := plain_state(trained), buffer)
    write_output(file, "--to", buffer.getvalue())
    return _line(file, state, trained)


def _safetensors(trained: TrainedModel, file: Path, data: Path | None) -> str:
    state = plain_state(trained)
    # some readers refuse a file that does not name its format
    metadata = {"format": "pt", **gather_facts(trained).metadata()}
    write_output(file, "--to", safetensors_bytes(state, metadata))
    return _line(file, state, trained)


def _line(file: Path, state: dict[str, Tensor], trained: TrainedModel) -> str:
    return f"{file}: {len(state)} tensors of {trained.config.model.name}, from {trained.checkpoint}"


WRITERS: dict[str, Callable[[TrainedModel, Path, Path | None], str]] = {
    ".pt": _pickle,
    ".pth": _pickle,
    ".safetensors": _safetensors,
    ".onnx": export_onnx,
}
