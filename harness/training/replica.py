"""A rank's replica of the network: compiled, replayed and wrapped in DDP, with its passes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from harness.compat import buffer_sync_off
from harness.config.schema import Config
from harness.distributed import World
from harness.execution.compilation import compile_blocks, compiler_settings
from harness.execution.precision import autocast
from harness.execution.preprocess import Preprocess
from harness.models.ghost_batch_norm import RunningStatistics
from harness.resilience.step_observer import StepObserver
from harness.training.gradients import GradientReducer
from harness.training.graphed_model import Capture, GraphedModel


class Replica:
    """The network on this rank's device, and the passes of a micro-batch through it.

    Tuning measures passes on a replica; a `Step` then takes it over. `network` is the bare network,
    which is saved and evaluated; `model` is what a micro-batch goes through (DDP around CUDA graphs
    around compiled blocks). `observers` follow the step.
    """

    def __init__(
        self,
        config: Config,
        network: nn.Module,
        world: World,
        observers: Sequence[StepObserver] = (),
    ) -> None:
        self.config, self.device, self.network = config, world.device, network
        self.observers = tuple(observers)
        self.running_statistics = RunningStatistics(network)
        if config.run.compile is True:
            compile_blocks(network, config.model.name)
        self.graphed = GraphedModel(network)
        self.model: nn.Module = self.graphed
        if world.world_size > 1:
            # workers keep their own statistics, so no rank's are sent to others (section 2.3)
            ddp = DistributedDataParallel(
                self.model,
                device_ids=[world.device.index] if world.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                **buffer_sync_off(),  # type: ignore[arg-type]
            )
            in_bfloat16 = config.run.gradient_precision == "bfloat16"
            dtype = torch.bfloat16 if in_bfloat16 else None
            GradientReducer(dtype, self.observers).register(ddp)
            self.model = ddp
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=config.run.precision == "float16"
        )
        self.preprocess = Preprocess(config, self.device)

    def logits(self, pixels: Tensor) -> Tensor:
        """Run images (B, 3, H, W) uint8 forward; return logits (B, K)."""
        images = self.preprocess(pixels)
        with compiler_settings(self.config.run.compile is True), autocast(self.config, self.device):
            logits: Tensor = self.model(images)
        return logits

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's loss, times float16's scale."""
        self.scaler.scale(loss).backward()

    def gradients_stay_local(self, local: bool) -> AbstractContextManager[None]:
        """Within, if `local`, backward passes send no gradients to other ranks."""
        if local and isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return nullcontext()

    def dry_pass(self, pixels: Tensor, local: bool = True) -> None:
        """Run images (B, 3, H, W) uint8 forward and backward, for a measurement.

        If not `local`, gradients are summed over the ranks, which must all run a dry pass together.
        `forget_dry_passes` removes what it leaves behind.
        """
        with self.gradients_stay_local(local):
            logits = self.logits(pixels)
            self.backward(logits.float().logsumexp(1).mean())

    def capture(self, pixels: Tensor, capture: Capture) -> None:
        """Replay the passes of micro-batches like these (B, 3, H, W) uint8 from now on.

        `forget_dry_passes` removes what it leaves behind. Raises RuntimeError where the passes
        cannot be captured.
        """
        precision = partial(autocast, self.config, self.device)
        with compiler_settings(self.config.run.compile is True):
            self.graphed.capture(self.preprocess(pixels), capture, precision)

    def forget_dry_passes(self) -> None:
        """Drop the gradients and batch-norm sums of dry passes and captures."""
        self.network.zero_grad(set_to_none=True)
        self.running_statistics.forget()
