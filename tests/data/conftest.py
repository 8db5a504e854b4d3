"""Small folders of real photographs, in the sizes and kinds of files that data sets hold."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from harness.config.loading import config_from_mapping
from harness.config.schema import Config


@pytest.fixture(scope="session")
def photos() -> list[Image.Image]:
    """Two photographs, 640 x 427."""
    return [Image.fromarray(image) for image in load_sample_images().images]


@pytest.fixture(scope="session")
def photo(photos: list[Image.Image]) -> Callable[[int, int, int], Image.Image]:
    """A piece of a photograph of the given width and height; `number` says which."""

    def cut(number: int, width: int, height: int) -> Image.Image:
        left, top = 37 * number % (640 - width), 23 * number % (427 - height)
        return photos[number % 2].crop((left, top, left + width, top + height))

    return cut


def save_as(image: Image.Image, path: Path, mode: str) -> None:
    """Writes `image` in a mode of PIL; "I;16" is 16-bit gray."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if mode == "I;16":
        gray = np.asarray(image.convert("L")).astype(np.uint16)
        Image.fromarray(gray * 256 + 7).save(path, "PNG")
    else:
        image.convert(mode).save(path)


# class -> images: file name, width, height, mode
TRAIN = {
    "cat": [(f"{i}.jpg", 30 + i, 40 - i, "RGB") for i in range(14)],
    "ant": [
        ("gray.jpg", 25, 31, "L"),
        ("cmyk.jpg", 33, 27, "CMYK"),
        ("palette.png", 40, 22, "P"),
        ("alpha.png", 24, 24, "RGBA"),
        ("deep.png", 20, 29, "I;16"),
        ("tiny.png", 8, 8, "RGB"),
        *[(f"{i}.JPEG", 48, 32 + i, "RGB") for i in range(8)],
    ],
    "dog": [(f"{i:02}.png", 26, 26, "RGB") for i in range(12)],
}
VAL = {
    name: [(f"{i}.jpg", 28 + 5 * i, 30, "RGB") for i in range(images)]
    for name, images in (("cat", 4), ("ant", 4), ("dog", 3))
}


def write_split(folder: Path, classes: dict[str, list], photo: Callable) -> None:
    number = 0
    for name, images in classes.items():
        for file, width, height, mode in images:
            save_as(photo(number, width, height), folder / name / file, mode)
            number += 1


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory, photo: Callable) -> Path:
    folder = tmp_path_factory.mktemp("written")
    for split, classes in (("train", TRAIN), ("val", VAL)):
        write_split(folder / split, classes, photo)
    return folder


@pytest.fixture
def root(tmp_path: Path, written: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """40 training and 11 validation images of 3 classes, of many sizes and modes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(written, tmp_path / "data"))


@pytest.fixture
def make_config() -> Callable[..., Config]:
    """k = 6 workers of n = 2: kn = 12, so 3 steps an epoch and 9 in all; 40 mod 12 = 4 unused."""

    def make(**data: Any) -> Config:
        mapping = {
            "expect": {"error": 1.0, "source": "a test"},
            "data": {"train_images": 40, "val_images": 11, "classes": 3, "crop": 20, "resize": 24}
            | data,
            "model": {"name": "resnet8"},
            "recipe": {
                "minibatch": 12,
                "worker_batch": 2,
                "epochs": 3,
                "warmup": "none",
                "milestones": [2],
            },
        }
        return config_from_mapping(mapping, "a test")

    return make


@pytest.fixture
def break_images() -> Callable[[Path, Sequence[str]], None]:
    """Makes images undecodable: every other is cut in the middle, or becomes a text file."""

    def damage(folder: Path, names: Sequence[str]) -> None:
        for number, name in enumerate(names):
            content = (folder / name).read_bytes()
            text = b"404: not found\n" * 10
            (folder / name).write_bytes(text if number % 2 else content[: len(content) // 2])

    return damage
