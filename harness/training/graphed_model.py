"""CUDA graphs: a network's forward and backward pass, captured once a size and replayed each step.

A step of a small network is hundreds of kernels that take longer to launch than to run; a replay
launches them at once, on the same memory. Loss, sum over the ranks, optimizer and data stay
outside, so that micro-batches, the teacher, float16's scaler and DDP's hooks are as without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

T = TypeVar("T")
Replay = Callable[[], None]
WARM_UPS = 3  # passes before a capture: compilers and libraries choose their kernels


class Capture(Protocol):
    """What makes graphs. Those of one `Capture` share their memory: a forward pass is followed by
    its backward pass before another is replayed."""

    def warm_up(self, work: Callable[[], object]) -> None:
        """Runs what is to be captured, for the first time."""
        ...

    def __call__(self, work: Callable[[], T]) -> tuple[T, Replay]:
        """The result of the work, in memory that stays, and what fills it anew from the same
        inputs' memory. The result holds nothing before the first replay."""
        ...


class CudaCapture:
    """Graphs on the current CUDA device."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], object]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)

    def __call__(self, work: Callable[[], T]) -> tuple[T, Replay]:
        graph = torch.cuda.CUDAGraph()
        # other threads, the loader's and NCCL's, may use the device meanwhile
        capturing = torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local")
        # torch.cuda.graph stays in its stream where a refused capture raises as it ends
        with torch.cuda.stream(torch.cuda.current_stream()), capturing:
            result = work()
        return result, graph.replay


@dataclass(frozen=True)
class Passes:
    """A captured forward and backward pass; the tensors are where their kernels read and write."""

    images: Tensor
    logits: Tensor
    logits_gradient: Tensor
    gradients: Sequence[Tensor]  # of the parameters that are trained
    forward: Replay
    backward: Replay


class _Replayed(torch.autograd.Function):
    """The passes as one operation of the parameters, whose gradients reach DDP as always."""

    @staticmethod
    def forward(ctx: Any, passes: Passes, images: Tensor, *parameters: Tensor) -> Tensor:
        ctx.passes = passes
        passes.images.copy_(images)
        passes.forward()
        return passes.logits.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, logits_gradient: Tensor) -> tuple[Tensor | None, ...]:
        passes: Passes = ctx.passes
        passes.logits_gradient.copy_(logits_gradient)
        passes.backward()
        # held here too, so autograd copies or adds them: it never makes one a parameter's .grad,
        # which the next replay would overwrite
        return None, None, *passes.gradients


class GraphedModel(nn.Module):
    """`network`, by replay where training's passes of that many images have been captured."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.replays = True  # False: as if nothing had been captured
        self._passes: dict[torch.Size, Passes] = {}

    def forward(self, images: Tensor) -> Tensor:
        passes = self._passes.get(images.shape)
        if passes is None or not (self.replays and self.network.training):
            return self.network(images)
        return _Replayed.apply(passes, images, *_trained(self.network))

    def capture(
        self,
        images: Tensor,
        capture: Capture,
        precision: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Captures the passes of images (B, 3, H, W); `precision` gives a forward pass's context.

        What buffers have added up is to be dropped after. Raises RuntimeError where a pass does
        something that a graph cannot hold, or does not fit in memory.
        """
        parameters = _trained(self.network)

        def run() -> Tensor:
            with precision():  # a new one for each pass: autocast keeps cast weights to its end
                logits: Tensor = self.network(images)
                return logits

        def warm_up() -> None:
            logits = run()
            torch.autograd.grad(logits, parameters, torch.zeros_like(logits))

        images = images.clone()
        for _ in range(WARM_UPS):
            capture.warm_up(warm_up)
        logits, forward = capture(run)
        gradient = torch.zeros_like(logits)
        gradients, backward = capture(lambda: torch.autograd.grad(logits, parameters, gradient))
        self._passes[images.shape] = Passes(
            images, logits.detach(), gradient, gradients, forward, backward
        )

    def drop(self) -> None:
        """Forgets what was captured, and frees its memory."""
        self._passes.clear()


def _trained(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]
