"""The benchmark of loaders runs, and every contender does the work."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from benchmarks import conditions, loaders
from harness.runs.environment import git_commit


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Pieces of a photograph: five JPEGs in two class folders, one PNG beside them."""
    photo = Image.fromarray(load_sample_image("china.jpg"))
    for number in range(5):
        path = tmp_path / "images" / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.crop((50 * number, 0, 50 * number + 120, 90 + number)).save(path)
    photo.crop((0, 0, 40, 30)).save(tmp_path / "images" / "6.png")
    return loaders.find_images(tmp_path / "images")


def test_every_contender_delivers_what_is_asked(
    images: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert [path.name for path in images] == ["6.png", "0.jpg", "2.jpg", "4.jpg", "1.jpg", "3.jpg"]
    job = loaders.make_job(images, batches=2, cores=2, batch=3)
    rows, absent = loaders.measure(list(loaders.CONTENDERS), job, repetitions=2, batches=2)
    names = [row["contender"] for row in rows]
    assert names == [name for name in loaders.CONTENDERS if name not in absent]
    # what the tests' own extra brings along cannot be absent
    assert set(names) >= {name for name in loaders.CONTENDERS if "torchvision" in name}
    assert "this project, reference" in names
    for row in rows:
        bare = "libjpeg" in row["contender"]
        pixels = {(3, 3)} if bare else {(3, 3, 224, 224), (3, 224, 224, 3)}
        assert row["batch_shape"] in pixels
        assert row["images_per_s"]["repetitions"] == 2 and row["images_per_s"]["min"] > 0
    assert rows[-1]["ratio to torchvision, PIL"]["median"] > 0
    loaders.print_table(rows, absent)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(loaders.CONTENDERS)
    told = lines[len(lines) - len(absent) :]
    for line, (name, reason) in zip(told, absent.items(), strict=True):
        assert line.startswith(name) and f"not run: {reason}" in line


def test_a_block_counts_images_and_seconds(
    images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # 4 batches of 2 after the warm-up, a tick of the clock from the first to the last
    ticks = iter([10.0, 14.0])
    monkeypatch.setattr(loaders.time, "perf_counter", lambda: next(ticks))
    job = loaders.make_job(images, batches=4, cores=0, batch=2)
    rate, delivered, _ = loaders.images_per_s("torchvision, PIL", job, 4)
    assert (rate, delivered) == (2.0, 8)


def test_ratios_are_of_the_same_round() -> None:
    rates = {"a": [20.0, 30.0, 90.0], "b": [10.0, 10.0, 90.0]}
    assert loaders.ratio(rates, "a", "b")["median"] == 2.0


def test_the_file_of_results(
    images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conditions, "RESULTS", tmp_path / "results")
    words = ["--repetitions", "2", "--batches", "1", "--batch", "4", "--cores", "1"]
    only = ["--only", "this project, reference", "torchvision, PIL"]
    monkeypatch.setattr(
        sys, "argv", ["loaders", str(tmp_path / "images"), *words, "--write", *only]
    )
    cores = os.sched_getaffinity(0)
    try:
        loaders.main()
        assert len(os.sched_getaffinity(0)) == 1
    finally:
        os.sched_setaffinity(0, cores)
    results = json.loads((tmp_path / "results" / "loaders.json").read_text())
    assert [row["contender"] for row in results["rows"]] == only[1:]
    assert (results["images"], results["batch"], results["cores"]) == (6, 4, 1)
    commit = git_commit(Path(conditions.__file__).parent)  # None where git is not installed
    assert results["commit"] == commit and "pillow" in results["versions"]
    for row in results["rows"]:
        rate = row["images_per_s"]
        assert rate["quartile_1"] <= rate["median"] <= rate["quartile_3"]


def test_the_gpu_is_measured_in_batches_that_were_asked_for(
    images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nvidia.dali")
    asked = []

    def rate(job: loaders.Job, batches: int) -> float:
        asked.append((job.batch, job.cores, batches))
        return 1.0

    monkeypatch.setattr(loaders, "gpu_images_per_s", rate)
    monkeypatch.setattr("harness.data.loaders.dali_tasks.HARDWARE_LOAD", 0.0)
    words = ["--gpu", "--repetitions", "2", "--batches", "3", "--batch", "5", "--write"]
    monkeypatch.setattr(sys, "argv", ["loaders", str(tmp_path / "images"), *words, str(tmp_path)])
    loaders.main()
    assert asked == 2 * [(5, threads, 3) for threads in loaders.GPU_THREADS for _ in range(2)]
    results = json.loads((tmp_path / "loaders_gpu.json").read_text())
    assert (results["batch"], results["batches_a_block"]) == (5, 3)


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no images in it or its subfolders"):
        loaders.find_images(tmp_path)
