"""One optimizer step: micro-batches, precision, the sum of gradients over the ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from inspect import signature

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from harness.config.schema import Config
from harness.data.batch import Batch
from harness.distributed import Reductions, World, sum_gradients
from harness.execution.compilation import compile_blocks, compiler_settings
from harness.execution.precision import autocast
from harness.execution.preprocess import Preprocess
from harness.models.ghost_batch_norm import RunningStatistics
from harness.recipe.optimizer import build_optimizer, set_lr
from harness.recipe.schedule import lr_at
from harness.training.metrics import Metrics
from harness.training.objective import Objective, build_objective
from harness.training.graphed_model import Capture, GraphedModel

# DDP's name of it: the older one is deprecated since torch 2.15
BUFFER_SYNC = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


def no_span(name: str) -> AbstractContextManager[object]:
    """A part of a step that nobody measures."""
    return nullcontext()


class Step:
    """Runs optimizer steps of this rank.

    `model` is on the device; `micro_batches` are the workers of each of the rank's micro-batches.
    `self.model` is what these go through (DDP, replayed, compiled), `self.network` the bare model,
    which is saved and evaluated. `objective` is what is minimised; plain training needs none.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        world: World,
        micro_batches: Sequence[range],
        objective: Objective | None = None,
    ) -> None:
        self.config, self.device = config, world.device
        self.micro_batches = len(micro_batches)  # may be set anew between two steps
        self.local_workers = sum(map(len, micro_batches))
        self.network = model
        self.objective = objective or build_objective(config, None)
        self.running_statistics = RunningStatistics(model)
        self.reductions = Reductions(
            torch.bfloat16 if config.run.gradient_precision == "bfloat16" else None
        )
        if config.run.compile is True:
            compile_blocks(model)
        self.graphed = GraphedModel(model)
        self.graphs = "none"  # CUDA graphs: whether they are used, in words for the log
        self.model: nn.Module = self.graphed
        if world.world_size > 1:
            # workers keep their own statistics, so no rank's are sent to others (section 2.3)
            ddp = DistributedDataParallel(
                self.model,
                device_ids=[world.device.index] if world.device.type == "cuda" else None,
                **{BUFFER_SYNC: False},  # type: ignore[arg-type]
                gradient_as_bucket_view=True,
            )
            ddp.register_comm_hook(self.reductions, sum_gradients)
            self.model = ddp
        self.optimizer = build_optimizer(model, config.recipe)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=config.run.precision == "float16"
        )
        self.pixels = Preprocess(config, self.device)
        self.metrics = Metrics(self.device, config.recipe.minibatch)
        self.part: Callable[[str], AbstractContextManager[object]] = no_span
        self.data_wait_s = 0.0
        self.replaced: list[tuple[int, int, int]] = []  # local: step, bad image id, id in its place

    def __call__(self, step: int, batches: Iterator[Batch]) -> None:
        """One update from this rank's next micro-batches; nothing here waits for the device."""
        set_lr(self.optimizer, lr_at(self.config, step))
        for number in range(self.micro_batches):
            waited_from_s = time.perf_counter()
            with self.part("data wait"):
                batch = next(batches)
            self.data_wait_s += time.perf_counter() - waited_from_s
            self.replaced += [(step, bad, other) for bad, other in batch.replaced]
            with self._gradients_stay_local(number < self.micro_batches - 1):
                self._forward_backward(step, batch)
        with self.part("optimizer"):
            self.scaler.step(self.optimizer)
            self.metrics.end_step(step, self._overflow())
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            self.running_statistics.update(self.local_workers)

    def _forward_backward(self, step: int, batch: Batch) -> None:
        with self.part("forward"):
            labels = batch.labels.to(self.device, non_blocking=True)
            loss_of = self.objective(step, batch)
            logits = self._logits(batch.images)
            loss = loss_of(logits, labels)
        with self.part("backward"):
            self.scaler.scale(loss.minimised).backward()
        self.metrics.add_micro_batch(loss.minimised, logits, labels, loss.kl)

    def _logits(self, pixels: Tensor) -> Tensor:
        images = self.pixels(pixels)
        with compiler_settings(self.config.run.compile is True), autocast(self.config, self.device):
            logits: Tensor = self.model(images)
        return logits

    def dry_pass(self, pixels: Tensor, local: bool = True) -> None:
        """Forward and backward pass of images (B, 3, H, W) uint8, which no other rank hears of.

        Not `local`: gradients are summed over the ranks, which all rehearse at once.
        After `forget_dry_passes` the run is as if it had not been.
        """
        with self._gradients_stay_local(local):
            logits = self._logits(pixels)
            self.scaler.scale(logits.float().logsumexp(1).mean()).backward()

    def capture(self, pixels: Tensor, capture: Capture) -> None:
        """Micro-batches like these (B, 3, H, W) uint8 are replayed from now on.

        To be forgotten like a rehearsal. Raises RuntimeError where they cannot be captured.
        """
        precision = partial(autocast, self.config, self.device)
        with compiler_settings(self.config.run.compile is True):
            self.graphed.capture(self.pixels(pixels), capture, precision)

    def forget_dry_passes(self) -> None:
        """Drops the gradients and sums that rehearsals have left."""
        self.optimizer.zero_grad(set_to_none=True)
        self.running_statistics.forget()

    def _gradients_stay_local(self, local: bool) -> AbstractContextManager[None]:
        if local and isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return nullcontext()

    def _overflow(self) -> Tensor | None:
        """float16: 1.0 on the device where this step's gradients overflowed (the same on all ranks,
        as it is seen in the summed gradients)."""
        if not self.scaler.is_enabled():
            return None
        found = self.scaler._found_inf_per_device(self.optimizer)
        return torch.stack([value.to(self.device) for value in found.values()]).amax()

    def state_dict(self) -> dict[str, object]:
        """Model, optimizer and scaler, as a checkpoint holds them."""
        return {
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Takes over what `state_dict` gave, from any number of ranks."""
        self.network.load_state_dict(state["model"], strict=True)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
