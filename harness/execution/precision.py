"""Number formats of a run: float32, TF32, bfloat16, float16, float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from harness.config.schema import Config

# of everything, then of each operation that may have a setting of its own. On torch 2.11 and 2.12
# cuDNN's convolutions have one from the start, TF32
FLOAT32_SETTINGS: tuple[Any, ...] = (
    torch.backends,
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,  # type: ignore[attr-defined]
    torch.backends.cudnn.rnn,
    torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
    torch.backends.mkldnn.conv,  # type: ignore[attr-defined]
    torch.backends.mkldnn.rnn,  # type: ignore[attr-defined]
)
AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def master_dtype(precision: str) -> torch.dtype:
    """Return the number format of weights and images: float64 if `precision` is, else float32."""
    return torch.float64 if precision == "float64" else torch.float32


def set_precision(precision: str) -> None:
    """Set PyTorch's float32 arithmetic for the rest of this process: TF32 only for "tf32".

    For programs that own their process; a library uses `precision_within`.
    """
    arithmetic = "tf32" if precision == "tf32" else "ieee"
    for setting in FLOAT32_SETTINGS:
        setting.fp32_precision = arithmetic


@contextmanager
def precision_within(precision: str) -> Iterator[None]:
    """Set PyTorch's float32 arithmetic within a block, and restore what was set before."""
    before = [setting.fp32_precision for setting in FLOAT32_SETTINGS]
    set_precision(precision)
    try:
        yield
    finally:
        for setting, arithmetic in zip(FLOAT32_SETTINGS, before, strict=True):
            setting.fp32_precision = "none"  # inherit, if that gives what was there before
            if setting.fp32_precision != arithmetic:
                setting.fp32_precision = arithmetic


def autocast(config: Config, device: torch.device) -> AbstractContextManager[None]:
    """Return the context of a forward pass in `run.precision`."""
    dtype = AUTOCAST.get(config.run.precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
