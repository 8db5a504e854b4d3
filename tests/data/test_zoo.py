"""Every kind of JPEG and PNG gives the same pixels, within rounding, in every loader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from harness.config.loading import config_from_mapping
from harness.config.schema import Config
from harness.data.batch import Batch
from harness.data.sources.folder import open_folder
from tests.data.loading import loader_of
from tests.data.zoo import SIDE, refused, zoo

# Levels of 255, and the share of values that differ at all, against PIL, of any one file. The
# memory loader decodes and resizes with PIL too; DALI decodes the same and PyTorch resizes.
BOUNDS = {"memory": (0, 0.0), "dali": (1, 0.15)}


@pytest.fixture(scope="module")
def folder(photo: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kinds in train and in val; in train also what no loader decodes."""
    folder = tmp_path_factory.mktemp("zoo")
    kinds, bad = zoo(photo(3, SIDE, SIDE)), refused(photo(3, SIDE, SIDE))
    for place, files in (("train/kinds", kinds), ("val/kinds", kinds), ("train/refused", bad)):
        (folder / place).mkdir(parents=True)
        for name, content in files.items():
            (folder / place / name).write_bytes(content)
    (folder / "val" / "refused").mkdir()
    (folder / "val" / "refused" / "0.jpg").write_bytes(kinds["gray.jpg"])
    return folder


@pytest.fixture(scope="module")
def config(folder: Path) -> Config:
    """Four epochs of all training images, of which those that cannot be decoded are replaced."""
    images = len(open_folder(folder, "train"))
    mapping = {
        "data": {
            "train_images": images,
            "val_images": len(open_folder(folder, "val")),
            "classes": 2,
            "crop": 20,
            "resize": 24,
            "on_bad_image": "skip",
        },
        "expect": {"error": 1.0, "source": "a test"},
        "model": {"name": "resnet8"},
        "recipe": {"minibatch": images, "worker_batch": 1, "epochs": 4, "warmup": "none"},
    }
    mapping["recipe"] |= {"milestones": []}  # type: ignore[operator]
    return config_from_mapping(mapping, "a test")


@pytest.fixture(scope="module")
def expected(folder: Path, config: Config) -> list[Batch]:
    return batches_of(folder, config, "reference")


def batches_of(folder: Path, config: Config, name: str) -> list[Batch]:
    """Training, then evaluation: one batch of all kinds, with headers that DALI cannot read, such
    as that of a PNG without its last chunk. Its decoder crashed on these, in two runs of three."""
    with loader_of(folder, config, name) as loader:
        return [*loader.train(0), *loader.evaluate()]


@pytest.mark.parametrize("name", ["memory", "dali"])
def test_every_kind_is_within_the_same_bounds(
    name: str, folder: Path, config: Config, expected: list[Batch]
) -> None:
    if name == "dali":
        pytest.importorskip("nvidia.dali")
    levels, share = BOUNDS[name]
    seen, beyond = set(), {}
    found = batches_of(folder, config, name)
    for batch, other in zip(expected, found, strict=True):
        assert torch.equal(batch.ids, other.ids) and batch.replaced == other.replaced
        index = open_folder(folder, "train" if batch in expected[:-1] else "val")
        for image_id, a, b in zip(batch.ids.tolist(), batch.images, other.images, strict=True):
            difference = (a.int() - b.int()).abs()
            kind = index.relative_path(image_id)
            seen.add(kind)
            if difference.max() > levels or (difference > 0).double().mean() > share:
                beyond[kind] = int(difference.max()), float((difference > 0).double().mean())
    assert beyond == {}
    assert len(seen) == len(list((folder / "train" / "kinds").iterdir())) + 1


def test_what_no_loader_decodes_is_replaced(folder: Path, expected: list[Batch]) -> None:
    train = open_folder(folder, "train")
    bad = {train.relative_path(i) for batch in expected for i, _ in batch.replaced}
    assert bad == {f"refused/{path.name}" for path in (folder / "train" / "refused").iterdir()}
