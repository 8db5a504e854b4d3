"""Loaders for tests, and what torchvision makes of an image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torchvision.transforms import functional

from harness.config.schema import Config
from harness.data.index import load_index
from harness.data.loader import Batch, Feed, Loader, open_loader
from harness.data.reference import decode
from harness.data.sampling import Crops


@contextmanager
def loader_of(
    root: Path,
    config: Config,
    name: str = "reference",
    threads: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Loader]:
    train, val = load_index(root, "train"), load_index(root, "val")
    feed = Feed(config, train, val, rank, world_size, micro_batch=4, channels_last=True)
    loader = open_loader(config, feed, name, threads, device_is_cuda=False)
    try:
        yield loader
    finally:
        loader.close()


def assert_equal(a: Batch, b: Batch) -> None:
    for name in ("images", "labels", "ids"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.replaced == b.replaced


def expected_image(feed: Feed, request: Crops, place: int) -> torch.Tensor:
    window = [int(x[place]) for x in (request.top, request.left, request.height, request.width)]
    image = decode(feed.train.path(request.ids[place]))
    image = functional.resized_crop(image, *window, [20, 20])
    image = functional.hflip(image) if request.flip[place] else image
    return functional.pil_to_tensor(image)
