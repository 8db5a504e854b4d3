"""Number formats of a run: float32, TF32, bfloat16, float16, float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from harness.config.schema import Config

# float32's arithmetic: of everything, then of each operation that may have a setting of its own.
# On torch 2.11 and 2.12 cuDNN's convolutions have one from the start, TF32
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


def set_precision(precision: str) -> None:
    """Set PyTorch's float32 arithmetic for this process: TF32 only if `precision` asks for it."""
    arithmetic = "tf32" if precision == "tf32" else "ieee"
    for setting in FLOAT32_SETTINGS:
        setting.fp32_precision = arithmetic


@contextmanager
def precision_within(precision: str) -> Iterator[None]:
    """`set_precision` for a block, as a teacher's precision may differ from its student's."""
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
    """The context of a forward pass in `run.precision`."""
    dtype = AUTOCAST.get(config.run.precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
