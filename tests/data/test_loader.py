"""The batch plan: the same images at the same places of a step, on any ranks and memory layout."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.config.schema import Config
from harness.data.batch_plan import BatchPlan
from harness.data.loaders.choice import open_loader, resolve_loader
from harness.data.loaders.shared_memory import check_shared_memory
from harness.data.sampling import TrainBatchSpec, crops, permutation
from harness.data.sources.folder import open_folder
from harness.errors import UserError
from harness.recipe.minibatch import Minibatch

FIELDS = ("ids", "top", "left", "height", "width", "flip")
Make = Callable[..., Config]


def batch_plan_of(
    root: Path,
    config: Config,
    rank: int = 0,
    world_size: int = 1,
    micro_batch: int = 4,
    channels_last: bool = False,
) -> BatchPlan:
    train, val = open_folder(root, "train"), open_folder(root, "val")
    return BatchPlan(config, train, val, rank, world_size, micro_batch, channels_last)


def steps_by_place(
    root: Path, config: Config, world_size: int, micro_batch: int, channels_last: bool
) -> list[dict[str, np.ndarray]]:
    """What all ranks are fed over the whole run, each step put together by place."""
    minibatch = Minibatch.of(config)
    steps = [
        {name: np.full(minibatch.size, -1) for name in FIELDS} for _ in range(config.total_steps)
    ]
    for rank in range(world_size):
        batch_plan = batch_plan_of(root, config, rank, world_size, micro_batch, channels_last)
        requests = batch_plan.training(0)
        for step in steps:
            for workers in minibatch.micro_batches(rank, world_size, micro_batch):
                places, request = minibatch.places(workers, channels_last), next(requests)
                for name in FIELDS:
                    assert (step[name][places] == -1).all()
                    step[name][places] = getattr(request, name)
        assert next(requests, None) is None
    return steps


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 2), (1, 12), (2, 4), (4, 4), (6, 2)])
def test_a_step_is_the_same_on_any_number_of_ranks(
    root: Path, make_config: Make, world_size: int, micro_batch: int, channels_last: bool
) -> None:
    config, train = make_config(), open_folder(root, "train")
    steps = steps_by_place(root, config, world_size, micro_batch, channels_last)
    assert len(steps) == 9
    batch_plan = batch_plan_of(root, config)
    for number, step in enumerate(steps):
        epoch, step_of_epoch = divmod(number, 3)  # floor(40 / 12) = 3 steps an epoch
        # section 2.3: a single shuffling an epoch; its last 40 mod 12 = 4 places are not used
        ids = permutation(1, epoch, 40)[12 * step_of_epoch : 12 * step_of_epoch + 12]
        expected = crops(1, epoch, ids, train.heights[ids], train.widths[ids], config.data)
        for name in FIELDS:
            np.testing.assert_array_equal(step[name], getattr(expected, name))
        np.testing.assert_array_equal(batch_plan.step_ids(number), ids)


@pytest.mark.parametrize("first_step", [0, 1, 3, 5, 8])
def test_starting_at_any_step_gives_what_the_straight_run_gives(
    root: Path, make_config: Make, first_step: int
) -> None:
    batch_plan = batch_plan_of(root, make_config(), rank=1, world_size=4)
    per_step = len(batch_plan.micro_batches)
    straight = list(batch_plan.training(0))[first_step * per_step :]
    resumed = list(batch_plan.training(first_step))
    assert len(resumed) == len(straight) == (9 - first_step) * per_step
    for a, b in zip(straight, resumed, strict=True):
        assert a.epoch == b.epoch
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_nothing_is_left_at_the_end_of_the_run(root: Path, make_config: Make) -> None:
    assert list(batch_plan_of(root, make_config()).training(9)) == []


def test_micro_batches_of_a_rank(root: Path, make_config: Make) -> None:
    # 6 workers on 4 ranks: 2, 2, 1, 1; in micro-batches of one worker of 2 images
    for rank, micro_batches in enumerate((2, 2, 1, 1)):
        batch_plan = batch_plan_of(root, make_config(), rank, 4, micro_batch=2)
        assert len(batch_plan.micro_batches) == micro_batches
        assert [len(request.ids) for request in islice(batch_plan.training(0), 3)] == [2, 2, 2]
    # 6 workers at 4 a time: 4, and a last one of 2
    batch_plan = batch_plan_of(root, make_config(), micro_batch=8)
    assert [len(request.ids) for request in islice(batch_plan.training(0), 4)] == [8, 4, 8, 4]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_evaluation_counts_every_image_once(root: Path, make_config: Make, world_size: int) -> None:
    shares = []
    for rank in range(world_size):
        requests = batch_plan_of(root, make_config(), rank, world_size).evaluation()
        shares.append([int(i) for request in requests for i in request.ids])
    assert [image_id for share in shares for image_id in share] == list(range(11))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_evaluation_with_fewer_images_than_ranks(root: Path, make_config: Make) -> None:
    train, val = open_folder(root, "train"), open_folder(root, "val")
    three = replace(
        val,
        names=val.names[:3],
        labels=val.labels[:3],
        widths=val.widths[:3],
        heights=val.heights[:3],
    )
    shares = []
    for rank in range(5):
        batch_plan = BatchPlan(make_config(), train, three, rank, 5, 2, False)
        shares.append([request.ids.tolist() for request in batch_plan.evaluation()])
    assert sorted(ids for share in shares for batch in share for ids in batch) == [0, 1, 2]
    assert shares.count([]) == 2


def test_evaluation_goes_in_batches(root: Path, make_config: Make) -> None:
    val = open_folder(root, "val")
    many = replace(
        val,
        names=np.resize(val.names, 600),
        labels=np.resize(val.labels, 600),
        widths=np.resize(val.widths, 600),
        heights=np.resize(val.heights, 600),
    )
    batch_plan = BatchPlan(make_config(), open_folder(root, "train"), many, 0, 1, 2, False)
    assert [len(request.ids) for request in batch_plan.evaluation()] == [256, 256, 88]


def test_a_loader_asked_for_by_name_is_taken() -> None:
    assert resolve_loader("reference", rank=0) == "reference"
    assert resolve_loader("memory", rank=0) == "memory"


def test_auto_takes_dali_where_it_is_installed(capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("nvidia.dali")
    assert resolve_loader("auto", rank=0) == resolve_loader("dali", rank=0) == "dali"
    assert capsys.readouterr().out == ""


INSTALL = "pip install -e '.[dali]' (CUDA 12: '.[dali-cuda12]')"


@pytest.fixture(params=["not installed", "broken"])
def without_dali(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """DALI is not there, or its libraries do not load; what is said of it."""
    for name in [
        name for name in sys.modules if name.startswith(("nvidia", "harness.data.loaders.dali"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    package = tmp_path / "site" / "nvidia"
    (package / "dali").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "site")
    if request.param == "not installed":
        (package / "dali").rmdir()
        return f"DALI is not installed: {INSTALL}"
    (package / "dali" / "__init__.py").write_text("import ctypes; ctypes.CDLL('libdali_absent.so')")
    why = "libdali_absent.so: cannot open shared object file: No such file or directory"
    return f"DALI cannot be imported ({why}): {INSTALL}"


def test_auto_without_dali_takes_the_reference_loader_and_says_so_once(
    without_dali: str, capsys: pytest.CaptureFixture
) -> None:
    assert [resolve_loader("auto", rank) for rank in (1, 0)] == ["reference", "reference"]
    said = f"run.loader: {without_dali}; using the reference loader\n"
    assert capsys.readouterr().out == said


def test_dali_by_name_without_it_is_refused(without_dali: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve_loader("dali", rank=0)
    assert str(caught.value) == f"run.loader: {without_dali}; or set run.loader=auto"


@pytest.mark.parametrize("name", ["reference", "memory"])
def test_loaders_by_name(root: Path, make_config: Make, name: str) -> None:
    config = make_config()
    batch_plan = batch_plan_of(root, config)
    loader = open_loader(config, batch_plan, name, threads=0, device_is_cuda=False)
    assert loader.name == name
    batch, request = next(loader.train(4)), next(batch_plan.training(4))
    assert isinstance(request, TrainBatchSpec)
    assert batch.ids.tolist() == request.ids.tolist()
    assert batch.labels.tolist() == batch_plan.train.labels[request.ids].tolist()
    loader.close()
    loader.close()


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "threads"), [("reference", 0), ("reference", 1), ("memory", 1)])
def test_batches_for_a_gpu_are_pinned(
    root: Path, make_config: Make, name: str, threads: int
) -> None:
    config = make_config()
    batch_plan = batch_plan_of(root, config)
    loader = open_loader(config, batch_plan, name, threads, device_is_cuda=True)
    plain = open_loader(config, batch_plan, name, threads, device_is_cuda=False)
    batches = zip(loader.train(0), plain.train(0), strict=True)
    for batch, expected in islice(batches, 5):
        assert batch.images.is_pinned() and batch.labels.is_pinned()
        assert torch.equal(batch.images, expected.images)
        assert batch.images.stride() == expected.images.stride()
    assert sum(len(batch.ids) for batch in loader.evaluate()) == 11
    loader.close()
    plain.close()


def test_a_small_shared_memory_is_named_before_workers_start(tmp_path, monkeypatch):
    room = os.statvfs(tmp_path)
    free = room.f_bavail * room.f_frsize
    a_quarter = free // 4
    check_shared_memory(a_quarter // 4, workers=2, folder=str(tmp_path))  # 2 × 2 × ¼ × ¼
    with pytest.raises(UserError, match=r"8 worker processes in each of 1 local ranks.*--shm-size"):
        check_shared_memory(a_quarter, workers=8, folder=str(tmp_path))
    for name, value in {"RANK": "0", "WORLD_SIZE": "32", "LOCAL_WORLD_SIZE": "16"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="16 local ranks"):  # who share it
        check_shared_memory(a_quarter // 4, workers=2, folder=str(tmp_path))
