"""Loaders for tests, and what torchvision makes of an image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms import functional

from harness.config.schema import Config
from harness.data.batch import Batch, Loader
from harness.data.batch_plan import BatchPlan
from harness.data.decode import decode
from harness.data.loaders.choice import open_loader
from harness.data.sampling import TrainBatchSpec
from harness.data.sources.registry import open_source


@contextmanager
def loader_of(
    root: Path,
    config: Config,
    name: str = "reference",
    threads: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Loader]:
    run = config.run.model_copy(update={"data_root": str(root)})
    train, val = open_source(run, "train"), open_source(run, "val")
    batch_plan = BatchPlan(config, train, val, rank, world_size, micro_batch=4, channels_last=True)
    loader = open_loader(config, batch_plan, name, threads, device_is_cuda=False)
    try:
        yield loader
    finally:
        loader.close()


def assert_equal(a: Batch, b: Batch) -> None:
    for name in ("images", "labels", "ids"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.replaced == b.replaced


def decode_file(path: Path) -> Image.Image:
    return decode(path.read_bytes(), str(path))


def expected_image(batch_plan: BatchPlan, request: TrainBatchSpec, place: int) -> torch.Tensor:
    window = [int(x[place]) for x in (request.top, request.left, request.height, request.width)]
    image = decode_file(Path(batch_plan.train.name(request.ids[place])))
    image = functional.resized_crop(image, *window, [20, 20])
    image = functional.hflip(image) if request.flip[place] else image
    return functional.pil_to_tensor(image)
