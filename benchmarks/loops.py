"""Training loops for comparison: each trains a model from micro-batches until these end.

This project's is the whole loop of `harness train`: agreement, watchdog, counters, log lines. The
others are written as their users would write them, with plain batch norm over the micro-batch, mean
cross entropy, SGD with Nesterov momentum (fused on a GPU) and a constant learning rate. The bare
loop reads, counts, checks and logs nothing; Lightning logs the loss every 20 steps through its
default logger, without progress bar and checkpoints; accelerate's loop prints it every 20 steps.

composer is not included: mosaicml 0.32.1 needs torch below 2.7.1.
"""

from __future__ import annotations

import itertools
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, redirect_stdout, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from harness.config.schema import Config
from harness.data.batch import Batch
from harness.data.batch_plan import BatchPlan
from harness.data.sources.folder import FolderSource
from harness.distributed import World
from harness.execution.precision import autocast, set_precision
from harness.models.ghost_batch_norm import GhostBatchNorm2d
from harness.models.registry import build_model
from harness.outcome import State
from harness.resilience.stopping import StopRequest
from harness.resilience.watchdog import Watchdog
from harness.runs.run_folder import RunFolder
from harness.training.loop import run_steps
from harness.training.profiling import Profile
from harness.training.replica import Replica
from harness.training.run import Run
from harness.training.setup import on_device
from harness.training.step import Step
from harness.training.tuning.cuda_graphs import tune_cuda_graphs
from harness.training.tuning.malloc import keep_freed_memory

OURS, BARE = "this project", "bare PyTorch"
LOG_EVERY_STEPS = 20
Loop = Callable[[Config, nn.Module, Iterable[Batch], torch.device], None]


class Unavailable(Exception):
    """The reason why a loop cannot run here."""


def build(name: str, config: Config, device: torch.device) -> nn.Module:
    """Build the model that loop `name` trains, with the same weights for all."""
    model = build_model(config, channels_last=device.type == "cuda")
    if name != OURS:
        for place, module in list(model.named_modules()):
            if isinstance(module, GhostBatchNorm2d):
                stock = nn.BatchNorm2d(module.num_features)
                stock.load_state_dict(module.state_dict())
                model.set_submodule(place, stock)
    return on_device(model, config, device)


# ---- this project


class Given:
    """A loader of batches that already exist."""

    name = "given"

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = batches

    def train(self, first_step: int) -> Iterator[Batch]:
        return iter(self._batches)

    def evaluate(self) -> Iterator[Batch]:
        return iter(())

    def recalibrate(self) -> Iterator[Batch]:
        return iter(())

    def close(self) -> None:
        """Do nothing: there is nothing to close."""


def harness_loop(
    config: Config, model: nn.Module, batches: Iterable[Batch], device: torch.device
) -> None:
    """Run what `harness train` runs on one rank, on given batches."""
    if device.type == "cpu":
        keep_freed_memory()
    world, stop = World(0, 1, 0, 1, "alone", device), StopRequest()
    images = config.data.train_images
    # the index is never read: untouched zeros take no memory
    names, labels, sizes = (np.zeros(images, dtype) for dtype in ("S1", np.int64, np.int32))
    index = FolderSource(Path("none"), ("none",), names, labels, sizes, sizes)
    cuda = device.type == "cuda"
    batch_plan = BatchPlan(
        config, index, index, 0, 1, int(config.run.micro_batch), channels_last=cuda
    )
    with tempfile.TemporaryDirectory() as name, Watchdog(world, 300.0, stop) as watchdog:
        folder = RunFolder(Path(name) / "run")
        folder.open(config, {})
        profile = Profile(0, world, None, folder.path)
        replica = Replica(config, model, world, (watchdog, profile))
        graphs = tune_cuda_graphs(replica, batch_plan.sizes, None, watchdog)
        step = Step(config, replica, batch_plan.micro_batches)
        folder.write_status(State.RUNNING)
        ways = Given(batches), None, stop, watchdog, profile
        run = Run(config, world, folder, step, batch_plan, *ways, graphs=graphs)
        with closing(run), folder.heartbeat(print), suppress(StopIteration):
            run_steps(run)  # until the batches end


# ---- others


class Normalise:
    """Convert uint8 pixels to normalised float32, as is common."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.mean = torch.tensor(config.data.mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(config.data.std, device=device).view(1, 3, 1, 1)
        cuda = device.type == "cuda"
        self.layout = torch.channels_last if cuda else torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        floats = images.to(torch.float32, memory_format=self.layout)
        return floats.div_(255).sub_(self.mean).div_(self.std)


def build_sgd(config: Config, model: nn.Module) -> torch.optim.SGD:
    """Build SGD with one parameter group and one learning rate."""
    recipe = config.recipe
    fused = next(model.parameters()).is_cuda or None
    return torch.optim.SGD(
        model.parameters(),
        lr=recipe.reference_lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        fused=fused,
    )


def compiled(config: Config, model: nn.Module) -> nn.Module:
    """Return the model, compiled if the config says so."""
    return torch.compile(model) if config.run.compile is True else model  # type: ignore[return-value]


class Pairs(IterableDataset):
    """Yield the batches as (images, labels)."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((batch.images, batch.labels) for batch in self._batches)


def bare_loop(
    config: Config, model: nn.Module, batches: Iterable[Batch], device: torch.device
) -> None:
    """Train with a loop as one writes it by hand."""
    normalise, optimizer = Normalise(config, device), build_sgd(config, model)
    network = compiled(config, model)
    for batch in batches:
        images = normalise(batch.images.to(device, non_blocking=True))
        labels = batch.labels.to(device, non_blocking=True)
        with autocast(config, device):
            loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def accelerate_loop(
    config: Config, model: nn.Module, batches: Iterable[Batch], device: torch.device
) -> None:
    """Train as in Hugging Face's documentation of accelerate."""
    try:
        from accelerate import Accelerator
        from accelerate.utils import DataLoaderConfiguration
    except ImportError as error:
        raise Unavailable(f"{error}: pip install -e '.[bench]'") from None
    accelerator = Accelerator(
        mixed_precision={"bfloat16": "bf16", "float16": "fp16"}.get(config.run.precision, "no"),
        cpu=device.type == "cpu",
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
    )
    model, optimizer, loader = accelerator.prepare(
        compiled(config, model),
        build_sgd(config, model),
        DataLoader(Pairs(batches), batch_size=None),
    )
    normalise = Normalise(config, device)
    for step, (images, labels) in enumerate(loader):
        optimizer.zero_grad()
        with accelerator.autocast():
            loss = F.cross_entropy(model(normalise(images)), labels)
        accelerator.backward(loss)
        optimizer.step()
        if step % LOG_EVERY_STEPS == 0:
            accelerator.print(f"step {step}: loss {loss.item():.4f}")


def lightning_loop(
    config: Config, model: nn.Module, batches: Iterable[Batch], device: torch.device
) -> None:
    """Train with a LightningModule and a Trainer."""
    try:
        import lightning
    except ImportError as error:
        raise Unavailable(f"{error}: pip install -e '.[bench]'") from None

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.network = model, compiled(config, model)
            self.normalise = Normalise(config, device)

        def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
            images, labels = batch
            loss = F.cross_entropy(self.network(self.normalise(images)), labels)
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.SGD:
            return build_sgd(config, self.model)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    precision = {"bfloat16": "bf16-mixed", "float16": "16-mixed"}.get(config.run.precision, 32)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about worker processes, which this data does not need
        trainer = lightning.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            precision=precision,
            max_epochs=1,
            log_every_n_steps=LOG_EVERY_STEPS,
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.fit(Classifier(), DataLoader(Pairs(batches), batch_size=None))


LOOPS: dict[str, Loop] = {
    OURS: harness_loop,
    BARE: bare_loop,
    "Lightning": lightning_loop,
    "accelerate": accelerate_loop,
}


# ---- running them in blocks


def make_batches(config: Config) -> list[Batch]:
    """Return the data of all loops: eight micro-batches of random pixels, pinned for a GPU."""
    generator = torch.Generator().manual_seed(0)
    size = int(config.run.micro_batch)
    shape = (size, config.data.crop, config.data.crop, 3)
    batches = []
    for _ in range(8):
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, config.data.classes, (size,), generator=generator)
        batch = Batch(pixels.permute(0, 3, 1, 2), labels, torch.arange(size), [])
        batches.append(batch.pin_memory() if torch.cuda.is_available() else batch)
    return batches


class Runner:
    """A loop in a process of its own, which runs as many steps as it is given.

    A block lasts from one request for a batch to the one `steps` later, so it is that
    many steps however far ahead the loop prefetches. Raises Unavailable if the loop cannot run.
    """

    def __init__(self, name: str, config: Config) -> None:
        self._pipe, theirs = (context := get_context("spawn")).Pipe()
        self._process = context.Process(target=_work, args=(name, config, theirs), daemon=True)
        self._process.start()
        theirs.close()  # so its death is an end of file here
        self._answer()

    def run(self, steps: int) -> tuple[float, float]:
        """Run steps; return seconds, and processor seconds of all threads of the process."""
        self._pipe.send(steps)
        return self._answer()

    def end(self) -> int:
        """Let the loop run out of batches; return how many it has consumed."""
        self._pipe.send(0)
        taken: int = self._answer()
        self._process.join()
        return taken

    def _answer(self) -> Any:
        answer = self._pipe.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer


def _work(name: str, config: Config, pipe: Connection) -> None:
    """Run in the process: train in blocks, and answer each with its times."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    set_precision(config.run.precision)
    batches = itertools.cycle(make_batches(config))

    def gate() -> Iterator[Batch]:
        taken = 0
        pipe.send(None)
        while steps := pipe.recv():
            begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
            yield from itertools.islice(batches, steps)
            taken += steps
            if device.type == "cuda":
                torch.cuda.synchronize()
            pipe.send((time.perf_counter() - begun_s, time.process_time() - begun_cpu_s))
        pipe.send(taken)

    try:
        with open(os.devnull, "w") as quiet, redirect_stdout(quiet):
            LOOPS[name](config, build(name, config, device), gate(), device)
    except BaseException as error:
        pipe.send(error)
