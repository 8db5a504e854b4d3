"""A trained network on this machine's device, and batches of the images it is applied to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness.config.schema import Config
from harness.data.batch import Batch
from harness.data.batch_plan import BatchPlan
from harness.data.dataset import open_training_images
from harness.data.loaders.choice import open_loader, resolve_loader, resolve_threads
from harness.data.sources.source import ImageSource
from harness.distributed import world_from_environment
from harness.errors import UserError
from harness.execution.evaluation import logits_of
from harness.execution.precision import master_dtype, precision_within
from harness.execution.preprocess import Preprocess
from harness.execution.recalibration import evaluation_statistics
from harness.execution.trained_model import TrainedModel
from harness.recipe.minibatch import AUTO_MICRO_BATCH

FEW = 64  # images that are decoded before a loader's processes or DALI would have started


@dataclass(frozen=True)
class Inference:
    """A network in evaluation mode on its device, and the images in the order of their ids."""

    config: Config
    model: nn.Module
    preprocess: Preprocess
    batches: Iterator[Batch]

    @torch.no_grad()
    def logits(self) -> Iterator[tuple[Batch, Tensor]]:
        """Yield each batch with its logits (B, K)."""
        self.model.eval()
        for batch in self.batches:
            yield batch, logits_of(self.config, self.model, self.preprocess, batch.images)


@contextmanager
def open_inference(trained: TrainedModel, images: ImageSource) -> Iterator[Inference]:
    """Within: the network on the device and in the precision of `run`, and a loader of `images`.

    With `run.recalibrate_images`, its running statistics are from the run's training images.
    Raises UserError where several ranks were started.
    """
    data = trained.config.data.model_copy(update={"val_images": len(images)})
    config = trained.config.model_copy(update={"data": data})
    world = world_from_environment(config.run.device)
    if world.world_size > 1:
        raise UserError("this command runs in one process; start it without torchrun or srun")
    train = open_training_images(config) if config.run.recalibrate_images else images.first(0)
    # the network was built for NCHW
    plan = BatchPlan(config, train, images, 0, 1, AUTO_MICRO_BATCH, channels_last=False)
    few = len(images) <= FEW and config.run.loader == "auto"
    name = "reference" if few else resolve_loader(config.run.loader, world.rank)
    threads = 0 if few else resolve_threads(config.run.loader_threads, local_ranks=1)
    with precision_within(config.run.precision):
        loader = open_loader(config, plan, name, threads, world.device.type == "cuda")
        try:
            model = trained.model.to(world.device, master_dtype(config.run.precision))
            pixels = Preprocess(config, world.device)
            with evaluation_statistics(config, model, 1.0, loader.recalibrate, pixels):
                yield Inference(config, model, pixels, loader.evaluate())
        finally:
            loader.close()
