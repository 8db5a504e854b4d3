"""A data format of another package: the one of docs/data_formats.md, executed out of the page."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.commands.command_line import main
from harness.config.loading import load_config
from harness.config.schema import Config
from harness.data.bad_image import BadImageError
from harness.data.sources.folder import open_folder
from harness.data.sources.registry import data_format, open_source
from harness.data.sources.source import ImageSource, join
from harness.errors import UserError
from tests.data.loading import assert_equal, loader_of
from tests.data.test_bad_images import damaged_ids, whole_run

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data_formats.md").read_text()
LOADERS = ["reference", "memory", "dali"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def write_package(folder: Path) -> None:
    folder.mkdir()
    (folder / "zip_images.py").write_text(*blocks("python"))
    (folder / "pyproject.toml").write_text(*blocks("toml"))


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as pip leaves it: the page's module and its entry points."""
    folder = tmp_path_factory.mktemp("installed") / "zip-images"
    write_package(folder)
    ((group, entry),) = re.findall(r'entry-points\."(.*?)"\]\n(.*)', *blocks("toml"))
    metadata = folder / "zip_images-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: zip-images\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{entry.replace(chr(34), '')}\n")
    return folder


@pytest.fixture(autouse=True)
def on_the_path(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(installed)


def packed(root: Path) -> Path:
    """The splits of a folder as ZIP archives, made by the page's command."""
    folder = root.parent / f"{root.name}-zip"
    folder.mkdir()
    for split in root.iterdir():
        if split.is_dir():
            zipfile.main(["-c", str(folder / f"{split.name}.zip"), *map(str, split.iterdir())])
    return folder


def zip_config(config: Config, root: Path) -> Config:
    run = config.run.model_copy(update={"data_root": str(root), "data_format": "zip"})
    return config.model_copy(update={"run": run})


def check_equal(source: ImageSource, other: ImageSource) -> None:
    assert source.classes == other.classes and source.digest == other.digest
    for column in ("names", "labels", "widths", "heights"):
        assert np.array_equal(getattr(source, column), getattr(other, column)), column
    assert all(source.read(i) == other.read(i) for i in range(len(source)))


def test_a_folder_and_its_archives_are_the_same_images(root: Path, make_config: Callable) -> None:
    shutil.copytree(root / "train" / "ant", root / "unlabelled")
    archives = packed(root)
    run = zip_config(make_config(), archives).run
    for split in ("train", "val", "unlabelled"):
        check_equal(open_source(run, split), open_folder(root, split))
    labelled, unlabelled = (open_source(run, split) for split in ("train", "unlabelled"))
    both = join(labelled, unlabelled)
    folders = join(open_folder(root, "train"), open_folder(root, "unlabelled"))
    check_equal(both, folders)
    assert both.cache is None and folders.cache == root / ".harness-index-*"
    assert both.name(14) == labelled.name(14) == str(archives / "train.zip" / "cat" / "0.jpg")


@pytest.mark.parametrize("name", LOADERS)
def test_every_loader_renders_the_same_batches(
    root: Path, make_config: Callable, break_images: Callable, name: str
) -> None:
    if name == "dali":
        pytest.importorskip("nvidia.dali")
    bad = ("ant/1.JPEG", "cat/3.jpg")
    break_images(root / "train", bad)
    config = make_config(on_bad_image="skip")
    (root / "train" / "dog" / "01.png").write_bytes(b"")  # the header is missing, too
    archives = packed(root)
    expected = whole_run(root, config, name, 0, 1)
    got = whole_run(archives, zip_config(config, archives), name, 0, 2)
    for one, other in zip(got, expected, strict=True):
        assert_equal(one, other)
    replaced = {i for batch in got for i, _ in batch.replaced}
    assert replaced >= {*damaged_ids(root, bad)}
    with (
        loader_of(root, config, name) as folder_loader,
        loader_of(archives, zip_config(config, archives), name) as zip_loader,
    ):
        pairs = zip(zip_loader.evaluate(), folder_loader.evaluate(), strict=True)
        assert [assert_equal(*pair) for pair in pairs]


@pytest.mark.parametrize("name", LOADERS)
def test_a_bad_image_is_named(
    root: Path, make_config: Callable, break_images: Callable, name: str
) -> None:
    if name == "dali":
        pytest.importorskip("nvidia.dali")
    break_images(root / "train", ("ant/1.JPEG",))
    archives, config = packed(root), make_config()
    with (
        pytest.raises(BadImageError, match=r"data-zip/train\.zip/ant/1\.JPEG: cannot be decoded"),
        loader_of(archives, zip_config(config, archives), name) as loader,
    ):
        list(loader.train(0))
    archives.joinpath("train.zip").unlink()
    with pytest.raises(UserError, match=r"train\.zip: No such file.*; check run\.data_root"):
        open_source(zip_config(config, archives).run, "train")


def test_an_archive_that_is_removed_or_replaced_is_noticed(
    root: Path, make_config: Callable
) -> None:
    pytest.importorskip("nvidia.dali")
    archives = packed(root)
    config = zip_config(make_config(), archives)
    for name in ("reference", "dali"):
        with loader_of(archives, config, name) as loader:
            (archives / "train.zip").rename(archives / "away")
            with pytest.raises(UserError, match=r"was there when .*train\.zip was indexed"):
                list(loader.train(0))
            (archives / "away").rename(archives / "train.zip")


def final_weights(out: Path) -> dict[str, torch.Tensor]:
    newest = max((out / "checkpoints").glob("*.pt"), key=lambda path: path.stat().st_mtime_ns)
    return torch.load(newest, weights_only=True)["model"]


def test_a_whole_run_is_equal_resumes_and_refuses_other_data(
    small: Callable[..., Path], own_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archives = packed(own_digits)
    config = small(recipe__epochs=2, recipe__milestones=[1], run__data_root=str(own_digits))
    as_zip = [f"run.data_root={archives}", "run.data_format=zip"]

    def train(out: str, *words: str) -> int:
        return main(["train", str(config), "--out", str(tmp_path / out), *words])

    assert train("folder") == 0
    expected = final_weights(tmp_path / "folder")
    for loader in ("memory", "reference"):
        assert train(loader, *as_zip, f"run.loader={loader}", "run.loader_threads=1") == 0
        weights = final_weights(tmp_path / loader)
        assert all(torch.equal(weights[name], value) for name, value in expected.items())

    predictions = [tmp_path / "folder.csv", tmp_path / "zip.csv"]
    for file, words in zip(predictions, ([f"run.data_root={own_digits}"], as_zip), strict=True):
        assert main(["eval", str(tmp_path / "folder"), *words, "--predictions", str(file)]) == 0
    assert predictions[0].read_text() == predictions[1].read_text()

    # a run from the folder continues from the archives; not from archives of other images
    def undo_the_last_epoch() -> None:
        for file in (tmp_path / "folder").rglob("*-00000010.*"):
            file.unlink()
        status = tmp_path / "folder" / "status.json"
        status.write_text(status.read_text().replace("finished", "stopped"))

    undo_the_last_epoch()
    assert train("folder", *as_zip, "--resume") == 0
    weights = final_weights(tmp_path / "folder")
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    undo_the_last_epoch()
    one = min((own_digits / "train" / "3").iterdir())
    one.rename(one.with_name("other.png"))
    shutil.rmtree(archives)
    packed(own_digits)
    capsys.readouterr()
    assert train("folder", *as_zip, "--resume") == 2
    assert "was trained on other data: the images of class 3 differ" in capsys.readouterr().err


def test_plan_knows_the_formats(
    small: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(small()), "run.data_format=zip"]) == 0
    assert main(["plan", str(small()), "run.data_format=zpi"]) == 2
    assert "no format 'zpi'; take one of folder, tar, zip, or install" in capsys.readouterr().err


def test_mistakes_in_the_format_are_one_line(
    root: Path, make_config: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = zip_config(make_config(), packed(root)).run
    with pytest.raises(UserError, match="no format 'zpi'; take one of folder, tar, zip"):
        data_format("zpi")
    images = open_source(run, "val")
    for changes, problem in (
        ({"labels": images.labels.astype(np.int32)}, "labels: expected int64"),
        ({"labels": images.labels + 1}, "labels: expected -1 to 2"),
        ({"widths": images.widths[:-1]}, "widths: expected int32"),
        ({"names": [b"x"] * len(images)}, "names: expected an array, found list"),
    ):
        wrong = replace(images, **changes)
        monkeypatch.setattr("zip_images.open_zip", lambda *_, wrong=wrong: wrong)
        with pytest.raises(UserError, match=rf"run\.data_format: zip: val: {problem}"):
            open_source(run, "val")
    monkeypatch.delattr("zip_images.open_zip")
    with pytest.raises(UserError, match="zip_images:open_zip cannot be imported"):
        open_source(run, "val")


@pytest.mark.soak
def test_the_page_works_by_its_commands_alone(tmp_path: Path) -> None:
    """Installs the package with pip, packs the digits, trains and verifies, as the page says."""
    write_package(tmp_path / "zip-images")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    install, *rest = "\n".join(blocks("bash")).splitlines()
    packages, pip = tmp_path / "packages", [sys.executable, "-m", "pip"]
    flags = ["--no-build-isolation", "--no-deps", "--no-index", "--target", packages]
    subprocess.run([*pip, *install.split()[1:], *flags], cwd=tmp_path, check=True)
    environment = os.environ | {
        "PYTHONPATH": f"{packages}:{ROOT}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    script = 'set -e\nharness() { python -m harness "$@"; }\n' + "\n".join(rest)
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert load_config(tmp_path / "runs" / "zip" / "config.yaml").run.data_format == "zip"
