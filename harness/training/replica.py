"""A rank's replica of the network: compiled, replayed, its gradients summed, with its passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from harness.config.schema import Config
from harness.distributed import World
from harness.execution.compilation import compile_blocks, compiler_settings
from harness.execution.precision import autocast
from harness.execution.preprocess import Preprocess
from harness.models.ghost_batch_norm import RunningStatistics
from harness.recipe.minibatch import Minibatch
from harness.resilience.step_observer import StepObserver
from harness.training.exact_gradients import ExactSums
from harness.training.gradients import FloatSums, StepSums
from harness.training.graphed_model import Capture, GraphedModel


class Replica:
    """The network on this rank's device, and the passes of a micro-batch through it.

    Tuning measures passes on a replica; a `Step` then takes it over. `network` is the bare network,
    which is saved and evaluated. A micro-batch goes through the model of `sums`: around CUDA graphs
    around compiled blocks. `observers` follow the step.
    """

    def __init__(
        self,
        config: Config,
        network: nn.Module,
        world: World,
        observers: Sequence[StepObserver] = (),
    ) -> None:
        self.config, self.world, self.device = config, world, world.device
        self.network = network
        self.observers = tuple(observers)
        self.running_statistics = RunningStatistics(network)
        if config.run.compile is True:
            compile_blocks(network, config.model.name)
        self.graphed = GraphedModel(network)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=config.run.precision == "float16"
        )
        self.sums = self.build_sums(config)
        self.preprocess = Preprocess(config, self.device)

    def build_sums(self, config: Config) -> StepSums:
        """Return sums as `config` wants them, which the replica does not use yet."""
        parts = self.graphed, self.running_statistics
        if config.run.sums == "exact":
            minibatch = Minibatch.of(config)
            return ExactSums(*parts, minibatch, self.world, self.scaler, self.observers)
        return FloatSums(*parts, config, self.world, self.observers)

    @contextmanager
    def summing(self, sums: StepSums) -> Iterator[None]:
        """Within, use these sums, for a comparison."""
        before, self.sums = self.sums, sums
        try:
            yield
        finally:
            self.sums = before

    def settle(self, config: Config, sums: StepSums) -> None:
        """Use `config` and its `sums` from now on, and close those used before."""
        if sums is not self.sums:
            self.sums.close()
        self.config, self.sums = config, sums

    def logits(self, pixels: Tensor) -> Tensor:
        """Run images (B, 3, H, W) uint8 forward; return logits (B, K)."""
        images = self.preprocess(pixels)
        with compiler_settings(self.config.run.compile is True), autocast(self.config, self.device):
            logits: Tensor = self.sums.model(images)
        return logits

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's loss, times float16's scale."""
        self.scaler.scale(loss).backward()

    def loss_scale(self) -> Tensor:
        """Return float16's scale of losses and gradients, on the device; 1 in other formats."""
        scale: Tensor = self.scaler.scale(torch.ones((), device=self.device))
        return scale

    def dry_pass(self, pixels: Tensor, is_last: bool = False) -> None:
        """Run images (B, 3, H, W) uint8 forward and backward, for a measurement.

        If it `is_last` of a step, gradients are summed over the ranks, which must all run a dry
        pass together. `forget_dry_passes` removes what it leaves behind.
        """
        with self.sums.of_pass(is_last):
            logits = self.logits(pixels)
            self.backward(logits.float().logsumexp(1).mean())
        if is_last:
            self.sums.finish(0)

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
        self.sums.forget()
