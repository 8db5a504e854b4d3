"""One training pass of a network without data, which finds what would break the one curve.

The logits may depend on nothing but images and parameters: what a network draws at random, or
remembers from one pass to the next, would differ with the number of ranks and micro-batches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from harness.compat import BatchNorm, DispatchMode, draws_random, written_arguments


@dataclass(frozen=True)
class TrainingPass:
    """The result of a pass, and the faults that it showed: module name -> what the module does."""

    output: object
    faults: Mapping[str, str]


def try_training_pass(network: nn.Module, images: Sequence[int]) -> TrainingPass:
    """Run forward and backward of a copy of `network` on the meta device, which computes nothing.

    `images` is the shape (B, 3, H, W). Raises what the network raises for it.
    """
    twin = copy.deepcopy(network).to("meta").train()
    recorder = _Recorder(twin)
    with recorder:
        output = twin(torch.empty(tuple(images), device="meta"))
        if isinstance(output, torch.Tensor):
            output.sum().backward()
            for name, parameter in twin.named_parameters():
                if parameter.grad is None:
                    recorder.faults.setdefault(name.rpartition(".")[0], "gets no gradient")
    return TrainingPass(output, recorder.faults)


class _Recorder(DispatchMode):
    """Notes the module that runs whenever an operation draws, or writes to a buffer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.faults: dict[str, str] = {}
        self._running: list[str] = []  # names of the modules being called, the innermost last
        self._passed: set[str] = set()  # batch norms that were called
        self._owners: dict[int, str] = {}  # id of a buffer -> name of its module
        for name, module in network.named_modules():
            module.register_forward_pre_hook(self._enter(name))
            module.register_forward_hook(self._leave)
            if type(module) is not nn.BatchNorm2d:  # the harness keeps the statistics of those
                self._owners |= {id(buffer): name for buffer in module.buffers(recurse=False)}

    def _enter(self, name: str) -> Callable[[nn.Module, object], None]:
        def enter(module: nn.Module, inputs: object) -> None:
            if isinstance(module, BatchNorm) and name in self._passed:
                self.faults[name] = "is applied more than once"
            self._passed.add(name)
            self._running.append(name)

        return enter

    def _leave(self, module: nn.Module, inputs: object, output: object) -> None:
        self._running.pop()

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if draws_random(func):
            self.faults[self._running[-1] if self._running else ""] = "draws random numbers"
        for value in written_arguments(func, args):
            if id(value) in self._owners:
                self.faults[self._owners[id(value)]] = "changes a buffer"
        return func(*args, **(kwargs or {}))
