"""Export of a trained network to a file."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from safetensors.torch import save as safetensors_bytes

from harness.errors import UserError
from harness.execution.trained_model import TrainedModel
from harness.output_file import check_output, write_output


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
