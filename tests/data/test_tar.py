"""The format "tar": the same images as in folders, in whatever archives they lie."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.commands.command_line import main
from harness.data.sources.folder import open_folder
from harness.data.sources.registry import open_source
from harness.data.sources.tar import scan
from harness.data.sources.tar.source import TarSource, open_tar
from harness.errors import UserError
from tests.data.archives import LAYOUTS, archived, files_of, tar_config, write_layout
from tests.data.loading import assert_equal, loader_of
from tests.data.making import tar
from tests.data.test_bad_images import damaged_ids, whole_run
from tests.data.test_imagenet_archives import WNIDS, class_tar, devkit_tar, val_image

LOADERS = ["reference", "memory", "dali"]


def check_equal(source: TarSource, folder: Path, split: str) -> None:
    other = open_folder(folder, split)
    assert source.classes == other.classes and source.digest == other.digest
    for column in ("names", "labels", "widths", "heights"):
        assert np.array_equal(getattr(source, column), getattr(other, column)), column
    assert all(source.read(i) == other.read(i) for i in range(len(other)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders_and_archives_of_any_layout_are_the_same_images(root: Path, layout: str) -> None:
    archives = archived(root, layout)
    before = {path.name for path in archives.iterdir()}
    for split in ("train", "val"):
        check_equal(open_tar(archives, split), root, split)
        check_equal(open_tar(archives, split), root, split)  # by its index
    assert {path.name for path in archives.iterdir()} == before  # nothing is written there


def test_gnu_tar_and_its_long_names(root: Path) -> None:
    long = root / "train" / "cat" / f"{'é' * 60}.jpg"  # 120 bytes: a header of its own
    (root / "train" / "cat" / "0.jpg").rename(long)
    for style in ("gnu", "ustar", "posix", "v7"):
        if style in ("ustar", "v7"):
            long = long.rename(long.with_name("short.jpg"))
        (archives := root.parent / style).mkdir()
        command = ["tar", f"--format={style}", "-C", root / "train", "-cf"]
        subprocess.run([*command, archives / "train.tar", "."], check=True)
        check_equal(open_tar(archives, "train"), root, "train")


@pytest.mark.parametrize("layout", ["class_folders", "with_prefix", "nested"])
@pytest.mark.parametrize("segment", [512, 1536, 4096])
def test_processes_that_begin_anywhere_list_the_same_members(
    root: Path, layout: str, segment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that holds an archive looks like headers to who begins in its middle."""
    inner = tar(("false/0.jpg", b"x" * 700), ("false/1.jpg", b"y" * 100))
    (root / "train" / "cat" / "archive.jpg").write_bytes(inner)
    monkeypatch.setattr(scan, "SEGMENT", segment)
    monkeypatch.setattr(scan, "PARALLEL_FROM", 10**9)
    check_equal(open_tar(archived(root, layout), "train"), root, "train")


def test_the_official_archives_need_no_unpacking(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "ILSVRC2012_img_train.tar").write_bytes(tar(*map(class_tar, WNIDS)))
    val = tar(*(val_image(i) for i in (3, 1, 2, 6, 5, 4)))
    (tmp_path / "i" / "ILSVRC2012_img_val.tar").write_bytes(val)
    with pytest.raises(UserError, match=r"ILSVRC2012_devkit_t12\.tar\.gz, which is missing"):
        open_tar(tmp_path / "i", "val")
    (tmp_path / "i" / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(devkit_tar())
    train, images = open_tar(tmp_path / "i", "train"), open_tar(tmp_path / "i", "val")
    assert train.classes == images.classes == tuple(sorted(WNIDS))
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    # the ground truth 5 7 7 2 5 2, where 7 is the first class, 2 the second and 5 the third
    assert [name[-6:] for name in images.names.tolist()] == [
        b"%d.JPEG" % i for i in (2, 3, 4, 6, 1, 5)
    ]
    assert images.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert images.read(0) == val_image(2)[1]
    (tmp_path / "i" / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(
        devkit_tar(truth=(5, 5, 7, 2, 5, 2))
    )
    assert open_tar(tmp_path / "i", "val").labels.tolist() == [
        0,
        1,
        1,
        2,
        2,
        2,
    ]  # not the old index


def test_whole_numbers_as_labels_are_sorted_as_numbers(root: Path) -> None:
    jpeg = (root / "val" / "cat" / "0.jpg").read_bytes()
    files = [(f"{i:03}.jpg", jpeg) for i in range(12)] + [
        (f"{i:03}.cls", b"%d" % i) for i in range(12)
    ]
    write_layout(root / "t", "train", [tar(*files[::-1])])
    images = open_tar(root / "t", "train")
    assert images.classes == tuple(map(str, range(12))) and images.labels.tolist() == [*range(12)]


def test_unlabelled_images_have_no_class(root: Path) -> None:
    shutil.copytree(root / "train" / "cat", root / "unlabelled")
    archives = archived(root)
    subprocess.run(["tar", "-C", root / "unlabelled", "-cf", archives / "unlabelled.tar", "."])
    check_equal(open_tar(archives, "unlabelled"), root, "unlabelled")
    check_equal(open_tar(archives, "unlabelled"), root, "unlabelled")


@pytest.mark.parametrize("name", LOADERS)
def test_every_loader_renders_the_same_batches(
    root: Path, make_config: Callable, break_images: Callable, name: str
) -> None:
    if name == "dali":
        pytest.importorskip("nvidia.dali")
    bad = ("ant/1.JPEG", "cat/3.jpg")  # one is cut off
    break_images(root / "train", bad)
    (root / "train" / "dog" / "01.png").write_bytes(b"")
    config, archives = make_config(on_bad_image="skip"), archived(root, "shards")
    expected = whole_run(root, config, name, 0, 1)
    got = whole_run(archives, tar_config(config, archives), name, 1, 2)
    for one, other in zip(got, expected, strict=True):
        assert_equal(one, other)
    assert {i for batch in got for i, _ in batch.replaced} >= {*damaged_ids(root, bad)}
    with (
        loader_of(root, config, name) as folder_loader,
        loader_of(archives, tar_config(config, archives), name) as tar_loader,
    ):
        pairs = zip(tar_loader.evaluate(), folder_loader.evaluate(), strict=True)
        assert [assert_equal(*pair) for pair in pairs]


def final_weights(out: Path) -> dict[str, torch.Tensor]:
    newest = max((out / "checkpoints").glob("*.pt"), key=lambda path: path.stat().st_mtime_ns)
    return torch.load(newest, weights_only=True)["model"]


def test_a_run_from_the_folder_continues_from_archives_bit_for_bit(
    small: Callable[..., Path],
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    archives = tmp_path / "archives"
    for split in ("train", "val"):
        write_layout(archives, split, LAYOUTS["shards"](files_of(digits / split)))
    config = str(small(recipe__epochs=2, recipe__milestones=[1]))
    as_tar = [f"run.data_root={archives}", "run.data_format=tar"]
    assert main(["train", config, "--out", str(tmp_path / "folder")]) == 0
    assert main(["train", config, "--out", str(tmp_path / "tar"), *as_tar]) == 0
    expected = final_weights(tmp_path / "folder")
    for file in (tmp_path / "folder").rglob("*-00000010.*"):
        file.unlink()
    status = tmp_path / "folder" / "status.json"
    status.write_text(status.read_text().replace("finished", "stopped"))
    assert main(["train", config, "--out", str(tmp_path / "folder"), *as_tar, "--resume"]) == 0
    for out in ("tar", "folder"):
        weights = final_weights(tmp_path / out)
        assert all(torch.equal(weights[name], value) for name, value in expected.items())
    capsys.readouterr()
    assert main(["train", config, f"run.data_root={archives}", "--out", str(tmp_path / "x")]) == 2
    assert "holds archives of train; set run.data_format=tar" in capsys.readouterr().err


def test_an_index_is_built_once_and_again_for_other_archives(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, usual = [], scan.list_span
    monkeypatch.setattr(scan, "list_span", lambda span: built.append(1) or usual(span))
    archives = archived(root)
    path = archives / "train.tar"
    for _ in range(2):
        open_tar(archives, "train")
    assert len(built) == 1
    # of the same size and time, but the first image has another name
    before = path.stat()
    (root / "train" / "ant" / "0.JPEG").rename(root / "train" / "ant" / "+.JPEG")
    path.write_bytes(LAYOUTS["class_folders"](files_of(root / "train"))[0])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    check_equal(open_tar(archives, "train"), root, "train")
    assert len(built) == 2
    os.utime(path)
    check_equal(open_tar(archives, "train"), root, "train")
    assert len(built) == 3


def test_an_interrupted_scan_continues(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third span fails; the next scan lists only what the first one had not recorded."""
    monkeypatch.setattr(scan, "SEGMENT", 4096)
    monkeypatch.setattr(scan, "worker_processes", one_after_another)
    usual, listed = scan.list_span, []

    def failing(span):
        listed.append(span.start)
        if len(listed) == 3:
            raise KeyboardInterrupt
        return usual(span)

    archives = archived(root)
    spans = -(-(archives / "train.tar").stat().st_size // 4096)
    monkeypatch.setattr(scan, "list_span", failing)
    with pytest.raises(KeyboardInterrupt):
        open_tar(archives, "train")
    images = open_tar(archives, "train")
    check_equal(images, root, "train")
    assert len(set(listed[:2])) == 2 and not {*listed[:2]} & {*listed[3:]}
    assert {*listed} == {4096 * i for i in range(spans)} and images.cache is not None
    assert not list(images.cache.parent.glob("*.partial"))


class one_after_another:
    """In the place of worker processes: in this one, as results are asked for."""

    def __init__(self, count: int) -> None: ...

    def __enter__(self) -> one_after_another:
        return self

    def __exit__(self, *_: object) -> None: ...

    map = staticmethod(map)


def test_archives_are_staged_once_a_node(
    root: Path,
    make_config: Callable,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(root / "val", root / "plain")
    archives, disk = archived(root, "shards"), root / "disk"
    config = tar_config(make_config(), archives)
    run = config.run.model_copy(update={"stage_to": str(disk)})
    with ThreadPoolExecutor(3) as pool:  # ranks of a node
        sources = list(pool.map(lambda _: open_source(run, "train"), range(3)))
    copies = sorted(disk.glob("*/*.tar"))
    assert [path.name for path in copies] == [f"train-0000{i}.tar" for i in range(3)]
    assert [copy.read_bytes() for copy in copies] == [
        p.read_bytes() for p in sorted(archives.glob("train*"))
    ]
    inodes = [path.stat().st_ino for path in copies]
    for path in archives.glob("train*"):
        path.write_bytes(path.read_bytes()[::-1])  # the copies are read from now on
        os.utime(path, ns=(0, 0))
    for source in sources:
        check_equal(source, root, "train")
        assert source.name(0).startswith(f"{copies[0].parent}/train-0000")

    # a copy that was changed, and one that is missing, are made again; others stay
    run = run.model_copy(update={"data_root": str(archived(root, "class_folders"))})
    shutil.rmtree(disk)
    open_source(run, "val")
    (copy,) = disk.glob("*/val.tar")
    copy.write_bytes(b"")
    check_equal(open_source(run, "val"), root, "val")
    assert copy.stat().st_size > 1000 and not list(disk.glob("*/*.partial"))
    kept = copy.stat().st_ino
    check_equal(open_source(run, "val"), root, "val")
    assert copy.stat().st_ino == kept and len(inodes) == 3

    usage = shutil.disk_usage(disk)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"run\.stage_to: .*disk: 0\.0 GB are to be copied there"):
        open_source(run, "train")
    (root / "file").write_bytes(b"")
    run = run.model_copy(update={"stage_to": str(root / "file")})
    with pytest.raises(UserError, match=r"run\.stage_to: .*file/harness-\w+: Not a directory; fix"):
        open_source(run, "train")


def test_staging_needs_archives(
    small: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(small()), "run.stage_to=/tmp/x"]) == 2
    assert "run.stage_to: has no meaning with data_format: folder" in capsys.readouterr().err
    assert main(["plan", str(small()), "run.stage_to=/tmp/x", "run.data_format=tar"]) == 0
