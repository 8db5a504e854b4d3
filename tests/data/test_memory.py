"""The memory loader: the reference loader's batches bit by bit, and a thread that ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch

from harness.config.schema import Config
from harness.data.batch import Batch
from harness.data.batch_plan import BatchPlan
from harness.data.loaders.choice import open_loader
from harness.data.loaders.prefetch import DEPTH, Prefetcher
from harness.data.sources.folder import open_folder

Make = Callable[..., Config]


def batch_plan_of(root: Path, config: Config) -> BatchPlan:
    train, val = open_folder(root, "train"), open_folder(root, "val")
    return BatchPlan(config, train, val, 0, 1, micro_batch=8, channels_last=False)


def test_bit_equal_to_the_reference_loader(
    root: Path, make_config: Make, break_images: Callable
) -> None:
    break_images(root / "train", ["cat/0.jpg", "dog/03.png", "dog/04.png"])
    config = make_config(on_bad_image="skip")
    batch_plan = batch_plan_of(root, config)
    memory = open_loader(config, batch_plan, "memory", 1, False)
    reference = open_loader(config, batch_plan, "reference", 0, False)
    replaced = 0
    for batches in (
        zip(memory.train(0), reference.train(0), strict=True),
        zip(memory.evaluate(), reference.evaluate(), strict=True),
    ):
        for a, b in batches:
            assert torch.equal(a.images, b.images) and a.images.stride() == b.images.stride()
            assert torch.equal(a.labels, b.labels) and torch.equal(a.ids, b.ids)
            assert a.replaced == b.replaced
            replaced += len(a.replaced)
    assert replaced > 0
    memory.close()
    reference.close()


def test_images_are_read_once(root: Path, make_config: Make) -> None:
    config = make_config()
    loader = open_loader(config, batch_plan_of(root, config), "memory", 1, False)
    for path in (root / "train" / "cat").iterdir():
        path.unlink()
    assert len(list(loader.train(0))) == 18  # 9 steps of 8 + 4 images
    loader.close()


def test_training_goes_on_after_an_evaluation(root: Path, make_config: Make) -> None:
    config = make_config()
    loader = open_loader(config, batch_plan_of(root, config), "memory", 1, False)
    straight = [batch.ids.tolist() for batch in loader.train(2)]
    batches = loader.train(2)
    interrupted = [batch.ids.tolist() for batch in islice(batches, 5)]
    assert sum(len(batch.ids) for batch in loader.evaluate()) == 11
    interrupted += [batch.ids.tolist() for batch in batches]
    assert interrupted == straight
    loader.close()


def threads_ahead() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_an_early_end_leaves_no_thread(root: Path, make_config: Make) -> None:
    config = make_config()
    loader = open_loader(config, batch_plan_of(root, config), "memory", 1, False)
    batches = loader.train(0)
    next(batches)
    next(loader.evaluate())
    assert threads_ahead()
    loader.close()
    assert not threads_ahead()
    assert list(batches) == []  # instead of waiting for ever


def a_batch(number: int) -> Batch:
    return Batch(torch.zeros(1), torch.zeros(1), torch.tensor([number]), [])


def test_errors_come_in_their_place_in_the_order() -> None:
    def batches() -> Iterator[Batch]:
        yield from (a_batch(number) for number in range(3))
        raise OSError("disk on fire")

    ahead = Prefetcher(batches(), pin=False)
    assert [int(next(ahead).ids) for _ in range(3)] == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(OSError, match="disk on fire"):
            next(ahead)
    ahead.close()


def test_only_a_few_batches_are_made_ahead() -> None:
    made: list[int] = []

    def batches() -> Iterator[Batch]:
        for number in range(100):
            made.append(number)
            yield a_batch(number)

    ahead = Prefetcher(batches(), pin=False)
    next(ahead)
    ahead._thread.join(0.3)  # time enough to make all 100
    # one taken, DEPTH that wait, and one that waits for a place
    assert len(made) == DEPTH + 2
    ahead.close()
