"""Images that cannot be decoded, lost files, stale indices: the same in both loaders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from harness.config.schema import Config
from harness.data.bad_image import BadImageError, replacement
from harness.data.batch import Batch
from harness.data.loaders.reference import ReferenceLoader
from harness.data.sampling import crops
from harness.data.sources.folder import open_folder
from harness.errors import UserError
from tests.data.loading import assert_equal, expected_image, loader_of

Make = Callable[..., Config]


def damaged_ids(root: Path, names: tuple[str, ...]) -> list[int]:
    train = open_folder(root, "train")
    return [i for i in range(len(train)) if train.relative_path(i) in names]


@pytest.mark.parametrize(("name", "threads"), [("reference", 0), ("reference", 1), ("memory", 0)])
@pytest.mark.parametrize("number", [0, 1])
def test_bad_image_fails_by_name(
    root: Path,
    make_config: Make,
    break_images: Callable,
    name: str,
    threads: int,
    number: int,
) -> None:
    kind = ["ant/0.JPEG", "ant/1.JPEG"]
    break_images(root / "train", kind if number else kind[:1])
    bad = "/train/ant/0.JPEG: cannot be decoded: "
    if number:  # only the text file
        Image.new("RGB", (9, 9)).save(root / "train" / "ant" / "0.JPEG")
        bad = "/train/ant/1.JPEG: cannot be decoded: neither JPEG nor PNG"
    with (
        pytest.raises(BadImageError) as caught,
        loader_of(root, make_config(), name, threads) as loader,
    ):
        list(loader.train(0))
    assert bad in str(caught.value) and "\n" not in str(caught.value)


def whole_run(
    root: Path, config: Config, name: str, threads: int, world_size: int, steps_in_all: int = 9
) -> list[Batch]:
    """The run's steps, each put together from all ranks: channels_last goes by place."""
    steps: list[list[Batch]] = [[] for _ in range(steps_in_all)]
    for rank in range(world_size):
        with loader_of(root, config, name, threads, rank, world_size) as loader:
            batches = list(loader.train(0))
        per_step = len(batches) // steps_in_all
        for number, batch in enumerate(batches):
            steps[number // per_step].append(batch)
    return [
        Batch(
            torch.cat([part.images for part in parts]),
            torch.cat([part.labels for part in parts]),
            torch.cat([part.ids for part in parts]),
            [pair for part in parts for pair in part.replaced],
        )
        for parts in steps
    ]


def test_bad_images_are_replaced_alike_on_any_number_of_ranks(
    root: Path, make_config: Make, break_images: Callable
) -> None:
    names = tuple(f"ant/{i}.JPEG" for i in range(8)) + tuple(f"cat/{i}.jpg" for i in range(8))
    break_images(root / "train", names)
    bad = damaged_ids(root, names)
    config, train = make_config(on_bad_image="skip"), open_folder(root, "train")
    one_rank = whole_run(root, config, "reference", 0, 1)
    for other in (("reference", 1, 2), ("memory", 0, 1), ("memory", 0, 4)):
        for a, b in zip(one_rank, whole_run(root, config, *other), strict=True):
            assert_equal(a, b)
    with loader_of(root, config) as loader:
        assert isinstance(loader, ReferenceLoader)
        batch_plan = loader._batch_plan
    for step, batch in enumerate(one_rank):
        asked = batch_plan.step_ids(step).tolist()
        assert [i for i, _ in batch.replaced] == [i for i in asked if i in bad]
        assert batch.labels.tolist() == train.labels[batch.ids].tolist()
        for place, (bad_id, image_id) in enumerate(zip(asked, batch.ids.tolist(), strict=True)):
            if bad_id not in bad:
                assert image_id == bad_id
                continue
            tried = [replacement(1, step // 3, bad_id, attempt, 40) for attempt in range(100)]
            assert image_id == next(i for i in tried if i not in bad)
            assert (bad_id, image_id) in batch.replaced
            ids = np.array([image_id])  # with its own window of this epoch
            request = crops(1, step // 3, ids, train.heights[ids], train.widths[ids], config.data)
            assert torch.equal(batch.images[place], expected_image(batch_plan, request, 0))
    assert sum(len(batch.replaced) for batch in one_rank) > 20


@pytest.mark.parametrize("name", ["reference", "memory"])
def test_a_bad_validation_image_always_fails(
    root: Path, make_config: Make, break_images: Callable, name: str
) -> None:
    break_images(root / "val", ["cat/0.jpg"])
    config = make_config(on_bad_image="skip")
    with (
        pytest.raises(BadImageError, match=r"val/cat/0\.jpg: cannot be decoded"),
        loader_of(root, config, name) as loader,
    ):
        list(loader.evaluate())


def test_a_data_set_of_bad_images_is_given_up(
    root: Path, make_config: Make, break_images: Callable
) -> None:
    train = open_folder(root, "train")
    break_images(root / "train", [train.relative_path(i) for i in range(40)])
    with (
        loader_of(root, make_config(on_bad_image="skip")) as loader,
        pytest.raises(BadImageError, match="nor can 100 images tried in its place"),
    ):
        list(loader.train(0))


@pytest.mark.parametrize("threads", [0, 1])
def test_a_lost_file_is_no_bad_image(root: Path, make_config: Make, threads: int) -> None:
    with loader_of(root, make_config(on_bad_image="skip"), threads=threads) as loader:
        (root / "train" / "ant" / "0.JPEG").unlink()
        message = r"0\.JPEG: cannot be read: it was there when .*train was indexed; .* is stale"
        with pytest.raises(UserError, match=message) as caught:
            list(loader.train(0))
        assert not isinstance(caught.value, BadImageError)


@pytest.mark.parametrize("name", ["reference", "memory"])
def test_a_changed_size_says_that_the_index_is_stale(
    root: Path, make_config: Make, name: str
) -> None:
    open_folder(root, "train")
    Image.new("RGB", (9, 9)).save(root / "train" / "ant" / "0.JPEG")
    message = (
        r"ant/0\.JPEG: 9 x 9 pixels, 48 x 32 when it was indexed; "
        r"the index is stale: delete .*/\.harness-index-train\.npz"
    )
    with (
        pytest.raises(UserError, match=message),
        loader_of(root, make_config(), name) as loader,
    ):
        list(loader.train(0))
