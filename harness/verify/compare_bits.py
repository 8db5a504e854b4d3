"""Comparison of two launches with exact sums: every bit of their trajectories must be equal."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import torch
from torch import Tensor

from harness.verify.compare import Line, compare_causes, compare_evaluations, equality
from harness.verify.results import Results
from harness.verify.setting import Setting


def compare_exactly(setting: Setting, where: str, one: Results, found: Results) -> Iterator[Line]:
    """Compare a launch with one rank, causes before effects; all bounds of the curve are 0."""
    yield from compare_causes(setting, where, one, found)
    yield from compare_bits(setting, where, one, found)
    yield from compare_evaluations(setting, where, one, found)
    losses = one["evaluation_loss"], found["evaluation_loss"]
    differ = int(_bits(losses[0]) != _bits(losses[1]))
    detail = f"{losses[1]!r} instead of {losses[0]!r}"
    yield equality(where, "evaluation loss, bits", f"{setting.val_images} images", differ, detail)


def compare_bits(setting: Setting, where: str, one: Results, found: Results) -> Iterator[Line]:
    """Compare the bits of the losses, and of the state after the last step."""
    precision, last = setting.curve_precision, setting.steps - 1
    first = len(one["losses"]) - len(found["losses"])  # the step at which it was resumed
    pairs = zip(one["losses"][first:], found["losses"], strict=True)
    apart = [step for step, (a, b) in enumerate(pairs, first) if _bits(a) != _bits(b)]
    detail = f"from step {apart[0]} on" if apart else ""
    over = f"steps {first} to {last}"
    yield equality(where, f"{precision}: loss, bits", over, len(apart), detail)
    for kind, tensors in one["state"].items():
        others = found["state"][kind]
        unequal = [name for name, value in tensors.items() if not _same_bits(value, others[name])]
        detail = f"first in {unequal[0]}" if unequal else ""
        what, over = f"{precision}: {kind}, bits", f"{len(tensors)} tensors"
        if tensors:  # no momentum where recipe.momentum is 0
            yield equality(where, what, over, len(unequal), detail)


def _bits(value: float) -> bytes:
    return struct.pack("d", value)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    flat = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (a, b))
    return torch.equal(*flat)
