"""A run that is resumed on other data than it began with is refused; data that moved is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from harness import load_config
from harness.config.schema import Config
from harness.errors import UserError
from harness.runs.checkpoint import checkpoint_path, load_checkpoint, save_checkpoint
from harness.training.setup import train


@pytest.fixture(scope="module")
def straight(
    tmp_path_factory: pytest.TempPathFactory, digits: Path
) -> Callable[[Path, Callable[..., Path]], Path]:
    """Trains once; returns the folder of that run."""
    folder = tmp_path_factory.mktemp("straight") / "run"

    def run(small: Callable[..., Path]) -> Path:
        if not folder.exists():
            train(load_config(small()), folder)
        return folder

    return run


@pytest.fixture
def stopped(straight: Callable, small: Callable[..., Path], tmp_path: Path) -> Path:
    """A run folder as it was after its first epoch, of 5 steps."""
    folder = Path(shutil.copytree(straight(small), tmp_path / "run"))
    status = json.loads((folder / "status.json").read_text()) | {"state": "stopped"}
    (folder / "status.json").write_text(json.dumps(status))
    for path in (folder / "checkpoints").glob("checkpoint-*"):
        if "00000005" not in path.name:
            path.unlink()
    return folder


def on(small: Callable[..., Path], data: Path) -> Config:
    return load_config(small(run__data_root=str(data)))


def without_digests(folder: Path) -> None:
    """Makes the checkpoint one of a harness that kept no digests."""
    path = checkpoint_path(folder / "checkpoints", 1, 5)
    payload = load_checkpoint(path)
    del payload["class_digests"]
    save_checkpoint(path, payload)


def rename_class(data: Path) -> None:
    for split in ("train", "val"):
        (data / split / "7").rename(data / split / "0_seven")


def rename_image(data: Path, split: str) -> None:
    first = sorted((data / split / "4").iterdir())[0]
    first.rename(first.with_name("x.png"))


def resize_image(data: Path) -> None:
    path = sorted((data / "train" / "4").iterdir())[0]
    path.unlink()
    Image.new("L", (9, 8)).save(path)


def move_image(data: Path) -> None:
    path = sorted((data / "val" / "4").iterdir())[0]
    path.rename(data / "val" / "3" / path.name)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (rename_class, "class 7 only in the checkpoint, class 0_seven only in .*/digits/train"),
        (resize_image, "the images of class 4 differ between the checkpoint and .*/digits/train"),
        (
            lambda data: rename_image(data, "val"),
            "the images of class 4 differ between the checkpoint and .*/digits/val",
        ),
        (move_image, "the images of class 3 differ between the checkpoint and .*/digits/val"),
    ],
)
def test_other_data_is_refused_with_the_first_difference(
    change: Callable[[Path], None],
    difference: str,
    stopped: Path,
    own_digits: Path,
    small: Callable[..., Path],
) -> None:
    change(own_digits)
    before = (stopped / "checkpoints").stat().st_mtime_ns, (stopped / "log.jsonl").read_bytes()
    with pytest.raises(UserError, match=f"run: was trained on other data: {difference}; restore"):
        train(on(small, own_digits), stopped, resume=True)
    after = (stopped / "checkpoints").stat().st_mtime_ns, (stopped / "log.jsonl").read_bytes()
    assert after == before


@pytest.mark.parametrize("old", [False, True])
def test_data_that_moved_gives_the_same_run_and_an_old_checkpoint_warns(
    old: bool,
    stopped: Path,
    straight: Callable,
    own_digits: Path,
    small: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    if old:
        without_digests(stopped)
    train(on(small, own_digits), stopped, resume=True)
    assert ("has no digest of the data" in capsys.readouterr().out) == old
    resumed = load_checkpoint(checkpoint_path(stopped / "checkpoints", 2, 15))["model"]
    whole = load_checkpoint(checkpoint_path(straight(small) / "checkpoints", 1, 15))["model"]
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_an_old_checkpoint_knows_its_classes(
    stopped: Path, own_digits: Path, small: Callable[..., Path]
) -> None:
    without_digests(stopped)
    rename_class(own_digits)
    with pytest.raises(UserError, match="class 7 only in the checkpoint"):
        train(on(small, own_digits), stopped, resume=True)
