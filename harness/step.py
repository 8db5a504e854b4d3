"""One optimizer step: micro-batches, precision, the sum of gradients over the ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from harness.compilation import compile_blocks, compiler_settings
from harness.config.schema import Config
from harness.data.batch import Batch
from harness.distributed import Reductions, World, sum_gradients
from harness.graphs import Capture, GraphedModel
from harness.metrics import Metrics
from harness.models.ghost_batch_norm import RunningStatistics
from harness.objective import Objective, build_objective
from harness.recipe.optimizer import build_optimizer, set_lr
from harness.recipe.schedule import lr_at

# DDP's name of it: the older one is deprecated since torch 2.15
BUFFER_SYNC = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)
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


class Pixels:
    """Brings a batch to the device: uint8 (B, 3, H, W) -> normalised floating point.

    Normalises on the device (section 2: "per-color mean and standard deviation"), so that a
    quarter of the bytes cross the bus.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.device = device
        self.dtype = torch.float64 if config.run.precision == "float64" else torch.float32
        self.memory_format = (
            torch.channels_last if device.type == "cuda" else torch.contiguous_format
        )
        shape = (1, 3, 1, 1)
        self.mean = (
            (255.0 * torch.tensor(config.data.mean, dtype=self.dtype)).view(shape).to(device)
        )
        self.scale = (
            (1 / (255.0 * torch.tensor(config.data.std, dtype=self.dtype))).view(shape).to(device)
        )

    def __call__(self, images: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True)
        images = images.to(self.dtype, memory_format=self.memory_format)
        return images.sub_(self.mean).mul_(self.scale)


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


def no_part(name: str) -> AbstractContextManager[object]:
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
        self.pixels = Pixels(config, self.device)
        self.metrics = Metrics(self.device, config.recipe.minibatch)
        self.part: Callable[[str], AbstractContextManager[object]] = no_part
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

    def rehearse(self, pixels: Tensor, local: bool = True) -> None:
        """Forward and backward pass of images (B, 3, H, W) uint8, which no other rank hears of.

        Not `local`: gradients are summed over the ranks, which all rehearse at once.
        After `forget_rehearsal` the run is as if it had not been.
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

    def forget_rehearsal(self) -> None:
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
