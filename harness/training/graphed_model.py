"""A network whose passes are CUDA graphs: captured once per batch size, replayed in each step.

A step of a small network is hundreds of kernels that take longer to launch than to run; a replay
launches them together, on the same memory. Loss, gradient sum, optimizer and data stay outside, so
that micro-batches, the teacher, float16's scaler and DDP's hooks work as without graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

T = TypeVar("T")
Replay = Callable[[], None]
WARM_UPS = 3  # passes before a capture: compilers and libraries choose their kernels


class Capture(Protocol):
    """Makes graphs that share their memory.

    Each forward pass must be followed by its backward pass before another one is replayed.
    """

    def warm_up(self, work: Callable[[], object]) -> None:
        """Run `work` before its capture, so that libraries choose their kernels."""
        ...

    def __call__(self, work: Callable[[], T]) -> tuple[T, Replay]:
        """Return the result of `work`, in memory that stays, and a call that recomputes it.

        The result holds nothing before the first replay.
        """
        ...


class CudaCapture:
    """Captures graphs on the current CUDA device."""

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
        # torch.cuda.graph does not leave its stream where a refused capture raises at its end
        with torch.cuda.stream(torch.cuda.current_stream()), capturing:
            result = work()
        return result, graph.replay


@dataclass(frozen=True)
class Passes:
    """A captured forward and backward pass, and the tensors that their kernels read and write."""

    images: Tensor
    logits: Tensor
    logits_gradient: Tensor
    gradients: Sequence[Tensor]  # of the parameters that are trained
    forward: Replay
    backward: Replay


class _Replayed(torch.autograd.Function):
    """The passes as one operation of the parameters, whose gradients reach DDP as usual."""

    @staticmethod
    def forward(ctx: FunctionCtx, passes: Passes, images: Tensor, *parameters: Tensor) -> Tensor:
        ctx.passes = passes  # type: ignore[attr-defined]
        passes.images.copy_(images)
        passes.forward()
        return passes.logits.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, logits_gradient: Tensor) -> tuple[Tensor | None, ...]:
        passes: Passes = ctx.passes  # type: ignore[attr-defined]
        passes.logits_gradient.copy_(logits_gradient)
        passes.backward()
        # held here too, so autograd copies or adds them: it never makes one a parameter's .grad,
        # which the next replay would overwrite
        return None, None, *passes.gradients


class GraphedModel(nn.Module):
    """Runs `network`, by replay where training passes of this batch size have been captured."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._replays = True
        self._passes: dict[torch.Size, Passes] = {}

    def forward(self, images: Tensor) -> Tensor:
        passes = self._passes.get(images.shape)
        if passes is None or not (self._replays and self.network.training):
            return self.network(images)
        return _Replayed.apply(passes, images, *_trained(self.network))

    def capture(
        self,
        images: Tensor,
        capture: Capture,
        precision: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Capture the passes of images (B, 3, H, W); `precision` gives a forward pass's context.

        Buffers change on the way: the caller resets them. Raises RuntimeError where a pass does
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

    @contextmanager
    def replaying(self, replays: bool) -> Iterator[None]:
        """Within, replay captured passes, or, for a comparison, run the network itself."""
        before, self._replays = self._replays, replays
        try:
            yield
        finally:
            self._replays = before

    def drop(self) -> None:
        """Forget what was captured, and free its memory."""
        self._passes.clear()


def _trained(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]
