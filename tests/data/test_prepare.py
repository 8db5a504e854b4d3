"""Digits and CIFAR-10 as image folders, and the folder itself: finished, foreign, interrupted."""

import fcntl
import os
import pickle
import shutil
import signal
import struct
import tarfile
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from harness.data.prepare.cifar10 import CIFAR10_CLASSES, prepare_cifar10
from harness.data.prepare.digits import prepare_digits
from harness.data.prepare.prepared_folder import MARKER, PARTIAL, Counts
from tests.data.making import KILL_AT_RENAME, child, error_of, special, tar, tree

# ---- digits


def test_digits_counts_split_and_pixels(tmp_path: Path) -> None:
    line = prepare_digits(tmp_path / "digits")
    assert line.endswith("digits: 1,437 training and 360 validation images of 10 classes")
    counts = Counter(name.rsplit("/", 1)[0] for name in tree(tmp_path / "digits"))
    # classes of 178, 182, 177, 183, 181, 182, 181, 179, 174, 180 laid end to end, every fifth
    # from the first: multiples of 5 within [0, 178), [178, 360), [360, 537), [537, 720), ...
    val_counts = [36, 36, 36, 36, 37, 36, 36, 36, 35, 36]
    assert [counts[f"val/{label}"] for label in range(10)] == val_counts
    assert sum(counts[f"train/{label}"] for label in range(10)) == 1437
    digits = load_digits()
    # image 0 is the first of class 0; image 10 the second, so for training
    for name, number in (("val/0/0000.png", 0), ("train/0/0010.png", 10)):
        with Image.open(tmp_path / "digits" / name) as file:
            assert (file.mode, file.size) == ("L", (8, 8))
            pixels = np.asarray(file)
        assert pixels.tolist() == [
            [int(value * 255 / 16 + 0.5) for value in row] for row in digits.images[number]
        ]


def test_digits_labelled_share_keeps_every_image_and_tells_no_class(tmp_path: Path) -> None:
    prepare_digits(tmp_path / "all")
    prepare_digits(tmp_path / "tenth", labelled=0.1)
    whole, tenth = tree(tmp_path / "all"), tree(tmp_path / "tenth")
    labelled = Counter(name.split("/")[1] for name in tenth if name.startswith("train/"))
    # training images: 142, 146, 141, 147, 144, 146, 145, 143, 139, 144, a tenth of each
    assert [labelled[str(i)] for i in range(10)] == [14, 15, 14, 15, 14, 15, 14, 14, 14, 14]
    names = [name for name in tenth if name.startswith("unlabelled/")]
    assert names == [f"unlabelled/{i:04d}.png" for i in range(1437 - 143)]
    train = sorted(c for name, c in whole.items() if name.startswith("train/"))
    assert train == sorted(c for n, c in tenth.items() if n.startswith(("train/", "unlabelled/")))
    label_of = {c: name.split("/")[1] for name, c in whole.items() if name.startswith("train/")}
    labels = [int(label_of[tenth[name]]) for name in names]
    # in chance order a neighbour has the same class once in ten, and the next one as often
    for step in (0, 1):
        same = np.mean((np.diff(labels) - step) % 10 == 0)
        assert 0.06 < same < 0.14
    in_name_order = np.corrcoef(labels, np.arange(len(labels)))[0, 1]
    assert abs(in_name_order) < 0.1


@pytest.mark.parametrize("labelled", [0.0, -0.5, 1.5, float("nan"), 0.001])
def test_digits_refuses_an_impossible_share(tmp_path: Path, labelled: float) -> None:
    assert "--labelled" in error_of(prepare_digits, tmp_path / "digits", labelled)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_folder_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    prepare_digits(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert "prepared before: 1,437 training" in prepare_digits(folder)
    assert "contains digits, not cifar10" in error_of(prepare_cifar10, folder, None)
    assert "not digits, 0.5 labelled" in error_of(prepare_digits, folder, 0.5)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_folder_that_lost_files_is_counted_and_completed(tmp_path: Path) -> None:
    folder, whole = tmp_path / "digits", tmp_path / "whole"
    for place in (folder, whole):
        prepare_digits(place, labelled=0.5)
    kept_file = min((folder / "train" / "3").iterdir())
    kept = kept_file.stat()
    shutil.rmtree(folder / "val" / "7")
    for place in (folder / "train" / "2", folder / "unlabelled"):
        for file in sorted(place.iterdir())[:5]:
            file.unlink()
    line = prepare_digits(folder, labelled=0.5)
    # halves of 142, 146, 141, 147, 144, 146, 145, 143, 139, 144: 719 stay; class 7 of val has 36
    assert "has lost files: 714 training, 713 unlabelled and 324 validation images" in line
    assert line.endswith("719 training, 718 unlabelled and 360 validation images of 10 classes")
    assert tree(folder) == tree(whole)
    now = kept_file.stat()
    assert (now.st_ino, now.st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns)
    shutil.rmtree(folder / "train")
    assert "has lost files" in prepare_digits(folder, labelled=0.5)
    assert tree(folder) == tree(whole)


def test_a_folder_that_files_were_added_to_is_refused(tmp_path: Path) -> None:
    prepare_digits(tmp_path / "digits")
    for name in ("@eaDir/1.png", "3/.DS_Store", "3/notes.txt"):  # no images of it
        (tmp_path / "digits" / "train" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "digits" / "train" / name).touch()
    assert "prepared before: 1,437" in prepare_digits(tmp_path / "digits")
    (tmp_path / "digits" / "train" / "3" / "mine.png").touch()
    before = tree(tmp_path / "digits")
    message = error_of(prepare_digits, tmp_path / "digits")
    assert "has 1,438 training" in message and "files were added" in message
    assert tree(tmp_path / "digits") == before


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert "mine.txt" in error_of(prepare_digits, tmp_path)
    assert "not a folder" in error_of(prepare_digits, tmp_path / "mine.txt")
    assert tree(tmp_path) == {"mine.txt": b"mine"}


def test_damaged_marker_is_named(tmp_path: Path) -> None:
    (tmp_path / MARKER).write_text('{"source": "dig')
    assert MARKER in error_of(prepare_digits, tmp_path)
    (tmp_path / MARKER).write_text('{"source": "digits", "train": 3}')
    assert MARKER in error_of(prepare_digits, tmp_path)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    (tmp_path / PARTIAL).mkdir()
    with open(tmp_path / PARTIAL / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # enough to keep an exclusive one out
        assert "another process" in error_of(prepare_digits, tmp_path)
    assert "1,437" in prepare_digits(tmp_path)


# Renames: 1 the source's record, then 1797 images, 1799 train, 1800 val, 1801 the marker.
@pytest.mark.parametrize("n", [1, 500, 1800, 1801])
def test_digits_killed_then_prepared_again(tmp_path: Path, n: int) -> None:
    before = KILL_AT_RENAME.format(n=n)
    killed = child("prepare_digits(Path(sys.argv[1]))", tmp_path / "killed", before=before)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "killed" / MARKER).exists()
    prepare_digits(tmp_path / "killed")
    prepare_digits(tmp_path / "straight")
    assert tree(tmp_path / "killed") == tree(tmp_path / "straight")


# ---- CIFAR-10


def batch(pixels: np.ndarray, labels: list[int]) -> bytes:
    """uint8 (N, 3072): the pickle that Python 2 made for the official archive, by hand."""

    def string(value: bytes) -> bytes:  # SHORT_BINSTRING, or BINSTRING from 256 bytes on
        short = len(value) < 256
        head = b"U" + bytes([len(value)]) if short else b"T" + struct.pack("<i", len(value))
        return head + value

    numbers = b"(" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    reconstruct = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN" + b"J\xff\xff\xff\xff" * 2
    shape = b"K" + bytes([len(labels)]) + b"M" + struct.pack("<H", 3072) + b"\x86"
    data = reconstruct + b"(K\x01" + shape + dtype + b"K\x00tb\x89" + string(pixels.tobytes())
    head = string(b"batch_label") + string(b"training batch 1 of 5")
    body = string(b"labels") + b"]" + numbers + string(b"data") + data + b"tb"
    return b"\x80\x02}(" + head + body + b"u."


def official_cifar10(path: Path, **replaced: bytes) -> np.ndarray:
    """20 images a batch, labels 0 to 9 and again; returns the pixels by batch (6, 20, 3072)."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 20, 3072), dtype=np.uint8)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    batches = {name: batch(pixels[i], [*range(10)] * 2) for i, name in enumerate(names)}
    batches = {"batches.meta": b"not read", **batches, "readme.html": b"not read", **replaced}
    top = "cifar-10-batches-py"
    files = [(f"{top}/{name}", content) for name, content in batches.items()]
    path.write_bytes(tar(special(top, tarfile.DIRTYPE), *reversed(files), mode="w:gz"))
    return pixels


SMALL_CIFAR10 = Counts(train=100, val=20, classes=10)  # 5 batches and one, of 20


def test_cifar10_from_the_official_archive(tmp_path: Path) -> None:
    pixels = official_cifar10(tmp_path / "c.tar.gz")
    prepare_cifar10(tmp_path / "c", tmp_path / "c.tar.gz", expected=SMALL_CIFAR10)
    assert len(tree(tmp_path / "c")) == 121  # and the marker
    # image 13 of the third batch: number 2 * 10,000 + 13, label 3; red plane, then green, blue
    for name, planes in (("train/cat/20013", pixels[2, 13]), ("val/frog/00006", pixels[5, 6])):
        with Image.open(tmp_path / "c" / f"{name}.png") as file:
            assert (np.asarray(file) == planes.reshape(3, 32, 32).transpose(1, 2, 0)).all()


def test_cifar10_accepts_a_batch_that_this_numpy_pickled(tmp_path: Path) -> None:
    pixels = np.arange(20 * 3072, dtype=np.uint32).astype(np.uint8).reshape(20, 3072)
    repickled = pickle.dumps({b"labels": [*range(10)] * 2, b"data": pixels}, protocol=4)
    official_cifar10(tmp_path / "c.tar.gz", test_batch=repickled)
    prepare_cifar10(tmp_path / "c", tmp_path / "c.tar.gz", expected=SMALL_CIFAR10)
    with Image.open(tmp_path / "c/val/ship/00018.png") as file:
        assert np.asarray(file)[0, 1, 0] == pixels[18, 1]


class Payload:
    def __init__(self, *command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.mkdir, self.command


def test_cifar10_never_runs_a_pickle(tmp_path: Path) -> None:
    hostile = pickle.dumps({b"labels": [], b"data": Payload(str(tmp_path / "ran"))}, protocol=4)
    pickle.loads(hostile)
    (tmp_path / "ran").rmdir()  # it works
    official_cifar10(tmp_path / "c.tar.gz", data_batch_3=hostile)
    call = partial(prepare_cifar10, tmp_path / "c", tmp_path / "c.tar.gz")
    message = error_of(call)
    assert "data_batch_3" in message and "posix.mkdir is not allowed" in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        batch(np.zeros((20, 3072), np.uint8), [*range(10)] * 2)[:-40],
        batch(np.zeros((20, 3072), np.uint8), [10] * 20),
        batch(np.zeros((19, 3072), np.uint8), [1] * 20),
        pickle.dumps({b"labels": [1], b"data": np.zeros((1, 3072), np.uint16)}, protocol=4),
        pickle.dumps({b"labels": [1, 1], b"data": np.zeros((3072, 2), np.uint8).T}, protocol=4),
        pickle.dumps([1, 2, 3]),
        b"",
    ],
    ids=["cut", "label 10", "a row short", "uint16", "Fortran order", "a list", "empty"],
)
def test_cifar10_names_a_wrong_batch(tmp_path: Path, wrong: bytes) -> None:
    official_cifar10(tmp_path / "c.tar.gz", data_batch_4=wrong)
    call = partial(prepare_cifar10, tmp_path / "c", tmp_path / "c.tar.gz")
    assert "data_batch_4" in error_of(call)
    assert not (tmp_path / "c" / MARKER).exists()


@pytest.mark.parametrize("top", ["", "./", "cifar10/", "./cifar10/"])
def test_cifar10_from_image_folders(tmp_path: Path, top: str) -> None:
    files = {
        f"{split}/{label}/{i:04d}.jpg": f"{split} {label} {i}".encode()
        for split in ("train", "test")
        for label in CIFAR10_CLASSES
        for i in range(2)
    }
    packed = tar(*((top + name, content) for name, content in files.items()), mode="w:gz")
    (tmp_path / "c.tgz").write_bytes(packed)
    prepare_cifar10(tmp_path / "c", tmp_path / "c.tgz", expected=Counts(20, 20, 10))
    (tmp_path / "c" / MARKER).unlink()
    assert tree(tmp_path / "c") == {
        name.replace("test/", "val/"): content for name, content in files.items()
    }


def test_cifar10_refuses_other_counts_then_takes_the_right_archive(tmp_path: Path) -> None:
    archive = tmp_path / "c.tar.gz"
    official_cifar10(archive)
    message = error_of(prepare_cifar10, tmp_path / "c", archive)
    assert "50,000 training and 10,000 validation" in message
    assert "but has 100 training and 20 validation images of 10 classes" in message
    assert not (tmp_path / "c/train").exists()
    archive.write_bytes(tar(*((f"{s}/cat/{s}.jpg", b"x") for s in ("train", "test"))))
    prepare_cifar10(tmp_path / "c", archive, expected=Counts(1, 1, 1))
    assert set(tree(tmp_path / "c")) == {MARKER, "train/cat/train.jpg", "val/cat/test.jpg"}


def test_cifar10_that_lost_files_takes_no_other_archive(tmp_path: Path) -> None:
    folder, archive = tmp_path / "c", tmp_path / "c.tar.gz"
    official_cifar10(archive)
    prepare_cifar10(folder, archive, expected=SMALL_CIFAR10)
    whole = tree(folder)
    (folder / "train/cat/20013.png").unlink()
    lossy = tree(folder)
    files = [
        (f"{split}/{label}/{i}.jpg", b"x")
        for split, images in (("train", 10), ("test", 2))
        for label in CIFAR10_CLASSES
        for i in range(images)
    ]
    (tmp_path / "other.tar").write_bytes(tar(*files))
    for wrong in (tmp_path / "other.tar", tmp_path / "none.tar"):
        message = error_of(prepare_cifar10, folder, wrong, expected=SMALL_CIFAR10)
        assert "has lost files: 99 training and 20 validation images of 10" in message
        assert tree(folder) == lossy  # no file of another archive is mixed in
    assert "no such archive" in message
    prepare_cifar10(folder, archive, expected=SMALL_CIFAR10)
    assert tree(folder) == whole


@pytest.mark.parametrize(
    "name",
    [
        "../train/cat/a.jpg",
        "/train/cat/a.jpg",
        "train/cat/../../../a.jpg",
        "train/cat/a\n.jpg",
        "train/dragon/a.jpg",
        "train/cat/.jpg",
        "train/cat/a.jpg.sh",
        "x/y/train/cat/a.jpg",
    ],
)
def test_cifar10_refuses_odd_names(tmp_path: Path, name: str) -> None:
    (tmp_path / "c.tar").write_bytes(tar((name, b"x")))
    message = error_of(prepare_cifar10, tmp_path / "c", tmp_path / "c.tar")
    assert ascii(name) in message
    assert set(tree(tmp_path)) == {"c.tar"}


def test_cifar10_refuses_a_file_too_large_for_the_memory(tmp_path: Path) -> None:
    header = tarfile.TarInfo("train/cat/a.jpg")
    header.size = 2**28 + 1
    (tmp_path / "c.tar").write_bytes(header.tobuf())
    message = error_of(prepare_cifar10, tmp_path / "c", tmp_path / "c.tar")
    assert "268,435,457 bytes exceed any official file" in message


def test_cifar10_without_archive_or_connection(tmp_path: Path, monkeypatch) -> None:
    missing = tmp_path / "none.tar.gz"
    message = error_of(prepare_cifar10, tmp_path / "c", missing)
    assert "none.tar.gz: no such archive" in message
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    assert "--archive" in error_of(prepare_cifar10, tmp_path / "c", None)
    assert list(tmp_path.iterdir()) == []
