"""The reference loader: torchvision's pixels, and processes that leave nothing behind."""

from __future__ import annotations

import gc
import os
import signal
import time
import warnings
from collections.abc import Callable
from itertools import islice
from multiprocessing import active_children, get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

from harness.config.schema import Config
from harness.data.decode import render_crop, render_resize
from harness.data.loaders.reference import ReferenceLoader
from harness.data.sampling import resizes
from tests.data.loading import assert_equal, decode_file, expected_image, loader_of

Make = Callable[..., Config]


def solid(mode: str, colour: tuple[int, ...] | int) -> Image.Image:
    return Image.new(mode, (16, 16), colour)


@pytest.mark.parametrize(
    ("image", "suffix", "rgb"),
    [
        (solid("RGB", (10, 200, 30)), "png", (10, 200, 30)),
        (solid("L", 77), "png", (77, 77, 77)),
        (solid("L", 77), "jpg", (77, 77, 77)),
        (solid("1", 1), "png", (255, 255, 255)),
        (solid("LA", (77, 128)), "png", (77, 77, 77)),
        (solid("RGBA", (10, 200, 30, 128)), "png", (10, 200, 30)),
        # 255 - cyan etc. without black; a JPEG's rounding is within 2
        (solid("CMYK", (55, 155, 205, 0)), "jpg", (200, 100, 50)),
        # the upper byte of 0x4D07 is 0x4D = 77; clipping would give 255
        (Image.fromarray(np.full((16, 16), 0x4D07, dtype=np.uint16)), "png", (77, 77, 77)),
    ],
)
def test_every_kind_of_image_becomes_rgb(
    tmp_path: Path, image: Image.Image, suffix: str, rgb: tuple[int, int, int]
) -> None:
    path = tmp_path / f"image.{suffix}"
    image.save(path)
    decoded = decode_file(path)
    assert decoded.mode == "RGB" and decoded.size == (16, 16)
    tolerance = 2 if suffix == "jpg" else 0
    np.testing.assert_allclose(
        np.asarray(decoded, dtype=int), np.broadcast_to(rgb, (16, 16, 3)), atol=tolerance
    )


def test_palettes_with_transparency_keep_their_colours(tmp_path: Path) -> None:
    image = solid("P", 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.save(tmp_path / "image.png", transparency=b"\x00\x80")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = decode_file(tmp_path / "image.png")
    assert decoded.getpixel((3, 3)) == (10, 200, 30)


def test_exif_orientation_is_not_applied(
    tmp_path: Path, photo: Callable[[int, int, int], Image.Image]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    photo(0, 40, 24).save(tmp_path / "rotated.jpg", exif=exif)
    photo(0, 40, 24).save(tmp_path / "plain.jpg")
    rotated = decode_file(tmp_path / "rotated.jpg")
    assert rotated.size == (40, 24)
    assert rotated.tobytes() == decode_file(tmp_path / "plain.jpg").tobytes()


def test_windows_are_rendered_as_by_torchvision(photos: list[Image.Image]) -> None:
    image = photos[0]
    config = transforms.RandomResizedCrop(32)
    torch.manual_seed(1)
    for number in range(20):
        top, left, height, width = config.get_params(image, config.scale, config.ratio)
        flip = number % 2 == 1
        theirs = functional.resized_crop(image, top, left, height, width, [32, 32])
        theirs = functional.hflip(theirs) if flip else theirs
        ours = render_crop(image, top, left, height, width, flip, 32)
        np.testing.assert_array_equal(ours, np.asarray(theirs))


def test_evaluation_is_rendered_as_by_torchvision(
    photo: Callable[[int, int, int], Image.Image], make_config: Make
) -> None:
    data = make_config(crop=23, resize=28).data
    random = np.random.default_rng(1)
    sizes = [(28, 28), (28, 60), (29, 28), (8, 8), (400, 40), (1, 30), (300, 301)]
    sizes += [tuple(size) for size in random.integers(2, 120, (60, 2)).tolist()]
    transform = transforms.Compose([transforms.Resize(28), transforms.CenterCrop(23)])
    for number, (width, height) in enumerate(sizes):
        image = photo(number, width, height)
        r = resizes(np.arange(1), np.array([height]), np.array([width]), data)
        resized, corner = (r.resized_height[0], r.resized_width[0]), (r.top[0], r.left[0])
        ours = render_resize(image, *resized, *corner, size=23)
        np.testing.assert_array_equal(ours, np.asarray(transform(image)))


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_batches_hold_what_torchvision_gives(root: Path, make_config: Make, threads: int) -> None:
    config = make_config()
    with loader_of(root, config, threads=threads) as loader:
        assert isinstance(loader, ReferenceLoader)
        batch_plan = loader._batch_plan
        batches = list(loader.train(0))
        requests = list(batch_plan.training(0))
        evaluated = list(loader.evaluate())
    assert len(batches) == len(requests) == 27  # 9 steps of 12 images, 4 at a time
    for batch, request in zip(batches, requests, strict=True):
        assert batch.images.shape == (4, 3, 20, 20) and batch.images.dtype == torch.uint8
        assert batch.labels.dtype == batch.ids.dtype == torch.int64
        assert batch.ids.tolist() == request.ids.tolist() and batch.replaced == []
        assert batch.labels.tolist() == batch_plan.train.labels[request.ids].tolist()
        expected = [expected_image(batch_plan, request, place) for place in range(4)]
        assert torch.equal(batch.images, torch.stack(expected))
    assert [batch.ids.tolist() for batch in evaluated] == [list(range(11))]
    transform = transforms.Compose([transforms.Resize(24), transforms.CenterCrop(20)])
    for image_id in range(11):
        image = transform(Image.open(batch_plan.val.name(image_id)).convert("RGB"))
        assert torch.equal(evaluated[0].images[image_id], functional.pil_to_tensor(image))
    assert evaluated[0].labels.tolist() == batch_plan.val.labels.tolist()


@pytest.mark.parametrize("threads", [0, 2])
def test_starts_at_any_step_and_again(root: Path, make_config: Make, threads: int) -> None:
    with loader_of(root, make_config(), threads=threads) as loader:
        straight = list(loader.train(0))
        for first_step in (4, 2, 8):
            resumed = list(islice(loader.train(first_step), 3))  # left in the middle
            for a, b in zip(straight[3 * first_step :], resumed, strict=False):
                assert_equal(a, b)


def test_training_goes_on_after_an_evaluation(root: Path, make_config: Make) -> None:
    with loader_of(root, make_config(), threads=1) as loader:
        straight = list(loader.train(0))
        batches = loader.train(0)
        interrupted = list(islice(batches, 5))
        for _ in range(2):
            assert sum(len(batch.ids) for batch in loader.evaluate()) == 11
        interrupted += batches
    for a, b in zip(straight, interrupted, strict=True):
        assert_equal(a, b)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int], seconds: float) -> list[int]:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(map(is_running, pids)):
        time.sleep(0.02)
    return [pid for pid in pids if is_running(pid)]


def test_an_early_end_leaves_no_process(root: Path, make_config: Make) -> None:
    with loader_of(root, make_config(), threads=2) as loader:
        next(loader.train(0))
        next(loader.evaluate())
        pids = [int(child.pid or 0) for child in active_children()]
        assert len(pids) == 4  # two to train, two to evaluate
        started = time.monotonic()
    assert time.monotonic() - started < 4
    assert wait_until_gone(pids, 0) == []


def test_workers_leave_signals_to_their_parent(root: Path, make_config: Make) -> None:
    with loader_of(root, make_config(), threads=1) as loader:
        batches = loader.train(0)
        next(batches)
        for child in active_children():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
                os.kill(int(child.pid or 0), number)
        assert len(list(batches)) == 26


class Noted:
    """A part of a reference cycle, which notes the process in which it is collected."""

    def __init__(self, pids: list[int]) -> None:
        self.itself, self.pids = self, pids

    def __del__(self) -> None:
        self.pids.append(os.getpid())


def test_no_child_inherits_garbage(root: Path, make_config: Make) -> None:
    """A former run's DDP is a cycle too, and has threads that no fork has."""
    pids: list[int] = []
    Noted(pids)
    gc.disable()
    try:
        with loader_of(root, make_config(), threads=1):
            assert pids == [os.getpid()]
    finally:
        gc.enable()


def test_workers_die_with_their_parent(root: Path, make_config: Make) -> None:
    context = get_context("fork")
    pids = context.SimpleQueue()

    def hold() -> None:
        with loader_of(root, make_config(), threads=1) as loader:
            next(loader.train(0))
            pids.put([child.pid for child in active_children()])
            time.sleep(60)

    parent = context.Process(target=hold)
    parent.start()
    workers = pids.get()
    assert len(workers) == 2 and all(map(is_running, workers))
    os.kill(int(parent.pid or 0), signal.SIGKILL)
    parent.join()
    assert wait_until_gone(workers, 3) == []  # PyTorch's own watch over the parent takes 5 s
