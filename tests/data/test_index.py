"""The index: what belongs to a data set, when it is scanned anew, and what is refused."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness.config.schema import Config
from harness.data.bad_image import BadImageError
from harness.data.check.folder import check_folder
from harness.data.dataset import check_dataset
from harness.data.decode import decode
from harness.data.sources import scan
from harness.data.sources.folder import open_folder
from harness.errors import UserError


def cache_of(root: Path, split: str = "train") -> Path:
    return root / f".harness-index-{split}.npz"


def resize_in_place(path: Path, size: tuple[int, int]) -> None:
    """Another image in the same file: its folder's time stamp stays."""
    Image.new("RGB", size).save(path)


def test_classes_are_sorted_and_so_are_their_images(root: Path) -> None:
    index = open_folder(root, "val")
    assert index.classes == ("ant", "cat", "dog")
    assert index.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 3
    assert index.relative_path(5) == "cat/1.jpg"
    assert index.name(5) == str(root / "val" / "cat" / "1.jpg")
    # the fixture's i-th image of a class is 28 + 5 i wide
    assert index.widths.tolist() == [28, 33, 38, 43] * 2 + [28, 33, 38]
    assert index.heights.tolist() == [30] * 11
    assert index.labels.dtype == np.int64 and index.widths.dtype == np.int32


def test_only_visible_images_directly_in_their_class_count(root: Path) -> None:
    ant = root / "val" / "ant"
    image = (ant / "0.jpg").read_bytes()
    for name in (".hidden.jpg", "notes.txt", "x.gif", "below/9.jpg"):
        (ant / name).parent.mkdir(exist_ok=True)
        (ant / name).write_bytes(image)
    (root / "val" / ".git").mkdir()
    (root / "val" / "loose.jpg").write_bytes(image)
    (ant / "UPPER.JPEG").write_bytes(image)
    (ant / "größe 1.jpg").write_bytes(image)
    index = open_folder(root, "val")
    names = [index.relative_path(i) for i in range(len(index)) if index.labels[i] == 0]
    assert names == [
        f"ant/{n}" for n in ("0.jpg", "1.jpg", "2.jpg", "3.jpg", "UPPER.JPEG", "größe 1.jpg")
    ]


def test_content_not_the_suffix_says_what_a_file_is(root: Path) -> None:
    Image.new("RGB", (17, 5)).save(root / "val" / "ant" / "0.jpg", "PNG")
    (root / "val" / "ant" / "1.jpg").write_text("no image")
    index = open_folder(root, "val")
    assert (index.widths[0], index.heights[0]) == (17, 5)
    assert (index.widths[1], index.heights[1]) == (0, 0)


def test_sizes_are_those_of_the_stored_pixels(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    Image.new("RGB", (30, 10)).save(root / "val" / "ant" / "0.jpg", exif=exif)
    index = open_folder(root, "val")
    assert (index.widths[0], index.heights[0]) == (30, 10)


def test_kept_index_is_read_not_scanned(root: Path) -> None:
    first = open_folder(root, "train")
    assert first.cache == cache_of(root) and first.cache.exists()
    resize_in_place(Path(first.name(0)), (7, 9))  # unseen: only folders are looked at
    second = open_folder(root, "train")
    assert second.classes == first.classes
    for name in ("names", "labels", "widths", "heights"):
        np.testing.assert_array_equal(getattr(second, name), getattr(first, name))
        assert getattr(second, name).dtype == getattr(first, name).dtype


def add_image(root: Path) -> None:
    Image.new("RGB", (5, 5)).save(root / "train" / "ant" / "new.png")


def add_image_unseen_by_the_clock(root: Path) -> None:
    folder = root / "train" / "ant"
    stamp = folder.stat()
    add_image(root)
    os.utime(folder, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


def remove_image(root: Path) -> None:
    (root / "train" / "dog" / "00.png").unlink()


def add_class(root: Path) -> None:
    (root / "train" / "bee").mkdir()
    Image.new("RGB", (5, 5)).save(root / "train" / "bee" / "0.png")


def rename_class(root: Path) -> None:
    (root / "train" / "dog").rename(root / "train" / "eel")


def mend_image(root: Path) -> None:
    resize_in_place(root / "train" / "ant" / "0.JPEG", (5, 5))


@pytest.mark.parametrize(
    ("change", "images"),
    [
        (add_image, 41),
        (add_image_unseen_by_the_clock, 41),
        (remove_image, 39),
        (add_class, 41),
        (rename_class, 40),
        (mend_image, 40),
    ],
)
def test_stale_index_is_scanned_anew(
    root: Path, change: Callable[[Path], None], images: int
) -> None:
    (root / "train" / "ant" / "0.JPEG").write_text("broken")
    os.utime(root / "train" / "ant")  # just made, as far as the clock can tell
    before = open_folder(root, "train")
    assert len(before) == 40 and before.widths[0] == 0
    change(root)
    cache_of(root).with_name("untouched.npz").write_bytes(cache_of(root).read_bytes())
    after = open_folder(root, "train")
    assert len(after) == images
    assert after.classes == tuple(sorted(path.name for path in (root / "train").iterdir()))
    assert cache_of(root).read_bytes() != (root / "untouched.npz").read_bytes()
    assert (after.widths[0] > 0) == (change is mend_image)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 torn"])
def test_damaged_kept_index_is_replaced(root: Path, content: bytes) -> None:
    open_folder(root, "train")
    cache_of(root).write_bytes(content)
    assert len(open_folder(root, "train")) == 40
    assert cache_of(root).stat().st_size > 1000


def forbid_writing_beside(root: Path) -> None:
    cache_of(root).with_suffix(".lock").mkdir()  # stands for a read-only file system, for root too


def test_kept_in_the_cache_folder_where_the_data_cannot_be_written(root: Path) -> None:
    forbid_writing_beside(root)
    first = open_folder(root, "train")
    assert first.cache is not None and first.cache.parent == root.parent / "cache" / "harness"
    assert not cache_of(root).exists()
    resize_in_place(Path(first.name(0)), (7, 9))
    assert open_folder(root, "train").widths[0] == first.widths[0]


def test_works_where_nothing_can_be_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_writing_beside(root)
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    index = open_folder(root, "train")
    assert len(index) == 40 and index.cache is None


def test_a_second_process_waits_and_reads(root: Path) -> None:
    kept = cache_of(root)
    old_width = open_folder(root, "train").widths[0]
    kept.rename(root / "moved")
    resize_in_place(root / "train" / "ant" / "0.JPEG", (7, 9))
    context = get_context("fork")
    answers = context.SimpleQueue()
    with open(kept.with_suffix(".lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = context.Process(
            target=lambda: answers.put(int(open_folder(root, "train").widths[0]))
        )
        process.start()
        process.join(0.3)
        assert process.is_alive()  # it waits
        (root / "moved").rename(kept)  # what the first process would write
        fcntl.flock(lock, fcntl.LOCK_UN)
    process.join(10)
    assert process.exitcode == 0
    assert answers.get() == old_width  # its own scan would have found 7


def test_several_processes_read_the_same_sizes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = open_folder(root, "train")
    cache_of(root).unlink()
    monkeypatch.setattr(scan, "PARALLEL_FROM", 1)
    monkeypatch.setattr(scan, "CHUNK", 5)
    many = open_folder(root, "train")
    np.testing.assert_array_equal(many.widths, one.widths)
    np.testing.assert_array_equal(many.heights, one.heights)


SCAN = """
import sys
from harness.data.sources import scan
from harness.data.sources.folder import open_folder
scan.PARALLEL_FROM, scan.CHUNK = 1, 50
open_folder(sys.argv[1], "train")
"""


def killed_in_the_middle(root: Path) -> int:
    """Scans in a process killed after a few of its 245 chunks; returns how many were kept."""
    process = subprocess.Popen([sys.executable, "-c", SCAN, str(root)])
    partial, lines = cache_of(root).with_suffix(".partial"), 0
    while lines < 5:
        lines = partial.read_text().count("key") if partial.exists() else 0
        assert process.poll() is None
    process.kill()
    process.wait()
    assert not cache_of(root).exists()
    return sum(line.startswith("{") for line in partial.read_text().splitlines())


@pytest.fixture
def many(root: Path) -> Path:
    """1 chunk of ant, 243 of cat (names c*.png, all one file of 26 x 26), 1 of dog."""
    for number in range(12_100):
        os.link(root / "train" / "dog" / "00.png", root / "train" / "cat" / f"c{number:05}.png")
    return root


def test_a_killed_scan_goes_on_where_it_was(many: Path) -> None:
    kept = killed_in_the_middle(many)
    assert 5 <= kept < 240
    partial = cache_of(many).with_suffix(".partial")
    with open(partial, "a") as stream:  # as a kill within a write leaves it
        stream.write('\n{"key": "12", "sizes": [[26,')
    resize_in_place(many / "train" / "dog" / "00.png", (7, 9))  # the file behind all names
    subprocess.run([sys.executable, "-c", SCAN, str(many)], check=True)
    index = open_folder(many, "train")
    assert len(index) == 12_140 and not partial.exists()
    # ant's 14 images are the first chunk; cat's follow in pieces of 50, its *.jpg before c*.png
    widths = index.widths[14 : 14 + 12_114]
    old = np.flatnonzero(widths == 26)
    assert len(old) == 50 * (kept - 1) - 14
    assert old.max() < 50 * (kept - 1)  # nothing kept was read again, all else was


def test_a_changed_class_is_not_taken_from_a_killed_scan(many: Path) -> None:
    killed_in_the_middle(many)
    resize_in_place(many / "train" / "dog" / "00.png", (7, 9))
    stamp = (many / "train" / "cat").stat()
    (many / "train" / "cat" / "c00000.png").rename(many / "train" / "cat" / "b.png")
    os.utime(many / "train" / "cat", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    subprocess.run([sys.executable, "-c", SCAN, str(many)], check=True)
    index = open_folder(many, "train")
    assert index.relative_path(14 + 14) == "cat/b.png"
    # of the first piece of cat only: the others hold the same images as before
    assert set(index.widths[14 + 14 : 14 + 50].tolist()) == {7}


def test_a_folder_changed_since_is_not_taken_from_a_killed_scan(many: Path) -> None:
    killed_in_the_middle(many)
    resize_in_place(many / "train" / "dog" / "00.png", (7, 9))
    os.utime(many / "train" / "cat")
    subprocess.run([sys.executable, "-c", SCAN, str(many)], check=True)
    index = open_folder(many, "train")
    assert set(index.widths[14 + 14 : 14 + 12_114].tolist()) == {7}


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere/train: No such file.*run\.data_root"):
        open_folder(tmp_path / "nowhere", "train")


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=r"train: no class folders.*run\.data_root"):
        open_folder(tmp_path, "train")


def test_folders_of_the_system_are_no_classes(root: Path) -> None:
    for name in ("@eaDir", "lost+found", "__MACOSX", ".ipynb_checkpoints"):
        (root / "train" / name).mkdir()
        shutil.copy(root / "train" / "cat" / "0.jpg", root / "train" / name)
    assert open_folder(root, "train").classes == ("ant", "cat", "dog")
    assert len(open_folder(root, "train")) == 40


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"  # the same text in NFC and NFD


def test_classes_that_differ_in_unicode_form_only_are_explained(
    root: Path, make_config: Callable[..., Config]
) -> None:
    (root / "train" / "cat").rename(root / "train" / COMPOSED)
    (root / "val" / "cat").rename(root / "val" / DECOMPOSED)
    train, val = open_folder(root, "train"), open_folder(root, "val")
    explained = r"'cafe\\u0301' and 'caf\\xe9' differ in Unicode form only \(NFC, NFD\)"
    with pytest.raises(UserError, match=explained):
        check_dataset(train, val, make_config())
    (root / "train" / DECOMPOSED).mkdir()
    with pytest.raises(UserError, match=r"train: the classes .* look alike, as their names differ"):
        open_folder(root, "train")


def test_class_without_images(root: Path) -> None:
    (root / "train" / "bee").mkdir()
    with pytest.raises(UserError, match=r"train: no images \(.*\) in class bee; add"):
        open_folder(root, "train")
    assert not cache_of(root).exists()


def check(root: Path, config: Config) -> None:
    check_dataset(open_folder(root, "train"), open_folder(root, "val"), config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train_images", 50, r"train: 40 images, but data\.train_images is 50"),
        ("val_images", 10, r"val: 11 images, but data\.val_images is 10"),
        ("classes", 4, r"train: 3 classes, but data\.classes is 4"),
    ],
)
def test_counts_are_checked(
    root: Path, make_config: Callable[..., Config], key: str, value: int, message: str
) -> None:
    check(root, make_config())
    with pytest.raises(UserError, match=message):
        check(root, make_config(**{key: value}))


def test_classes_of_train_and_val_are_the_same(
    root: Path, make_config: Callable[..., Config]
) -> None:
    (root / "val" / "dog").rename(root / "val" / "eel")
    with pytest.raises(UserError, match=r"differ: dog only in .*/train; eel only in .*/val"):
        check(root, make_config())


def test_an_image_of_too_many_pixels_is_refused_for_that(
    root: Path, make_config: Callable[..., Config]
) -> None:
    path = root / "train" / "ant" / "0.JPEG"
    Image.new("L", (14_000, 13_000)).save(path)  # 182 million; PIL's limit is 2 * 89,478,485
    why = r"it has more than 178,956,970 pixels, the most that PIL decodes; make it smaller"
    with pytest.raises(
        UserError, match=rf"ant/0\.JPEG: cannot be decoded: {why}; repair it or set"
    ):
        check(root, make_config())
    with pytest.raises(BadImageError, match=rf"ant/0\.JPEG: cannot be decoded: {why}$"):
        decode(path.read_bytes(), str(path))
    (found,) = check_folder(root).findings["cannot be decoded"]
    assert found.path == "train/ant/0.JPEG" and found.detail.startswith("it has more than 178,")


def test_a_bad_image_that_was_removed_is_no_obstacle(root: Path) -> None:
    path = root / "train" / "ant" / "0.JPEG"
    path.write_text("no image")
    open_folder(root, "train")
    stamp = path.parent.stat()
    path.unlink()
    os.utime(path.parent, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # unseen by its folder
    assert len(open_folder(root, "train")) == 39


def test_unreadable_headers_are_refused(root: Path, make_config: Callable[..., Config]) -> None:
    (root / "train" / "ant" / "0.JPEG").write_text("no image")
    with pytest.raises(UserError, match=r"train/ant/0\.JPEG: cannot be decoded.*on_bad_image=skip"):
        check(root, make_config())
    check(root, make_config(on_bad_image="skip"))
    (root / "val" / "ant" / "0.jpg").write_text("no image")
    cache_of(root, "val").unlink()  # what changes within a file is seen when it is decoded
    with pytest.raises(UserError, match=r"val/ant/0\.jpg: cannot be decoded"):
        check(root, make_config(on_bad_image="skip"))
