"""Digits, CIFAR-10 and ImageNet as image folders: train/CLASS/*, val/CLASS/*, unlabelled/*.

Every call can be interrupted at any moment and given again: a folder is finished when its marker
is there (prepared_folder.py), and a finished one is left as it is.
"""

import hashlib
import io
import os
import pickle
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from harness.data.archive import members, opened, read, refusal
from harness.data.imagenet_archives import archive_paths, fill_imagenet
from harness.data.layouts import recognise
from harness.data.prepared_folder import Counts, PreparedFolder, prepare
from harness.errors import UserError

DIGITS = Counts(train=1_437, val=360, classes=10)
CIFAR10 = Counts(train=50_000, val=10_000, classes=10)
IMAGENET = Counts(train=1_281_167, val=50_000, classes=1_000)

# in the order of the labels
CIFAR10_CLASSES: tuple[str, ...] = ("airplane", "automobile", "bird", "cat", "deer")
CIFAR10_CLASSES += ("dog", "frog", "horse", "ship", "truck")


def prepare_digits(folder: Path, labelled: float = 1.0) -> str:
    """The 1,797 handwritten digits that scikit-learn carries, as 8-bit gray PNGs of 8x8 pixels.

    labelled: the share in (0, 1] of each class's training images that stays in train/<digit>/;
    the rest goes to unlabelled/, under names that do not tell the class. Returns the line to
    print. UserError: no scikit-learn, a share that leaves a class empty, a folder in use.
    """
    if not 0 < labelled <= 1:
        raise UserError(f"--labelled {labelled}: must be above 0 and at most 1")
    source = "digits" if labelled == 1 else f"digits, {labelled} labelled"

    def fill(prepared: PreparedFolder) -> Counts:
        pixels, labels = _load_digits()
        parts = _split_digits(labels, labelled)
        prepared.discard()
        for split, numbers in (("train", parts.train), ("val", parts.val)):
            for i in numbers:
                prepared.write(f"{split}/{labels[i]}/{i:04d}.png", _png(pixels[i]))
        # numbered in the order of a hash: scikit-learn's order runs 0, 1, ... 9 in places
        hashed = sorted(
            parts.unlabelled,
            key=lambda i: hashlib.sha256(b"%d " % i + pixels[i].tobytes()).digest(),
        )
        for place, i in enumerate(hashed):
            prepared.write(f"unlabelled/{place:04d}.png", _png(pixels[i]))
        train = len(parts.train)
        return Counts(train, DIGITS.val, DIGITS.classes, unlabelled=DIGITS.train - train)

    return prepare(folder, source, fill)


def prepare_cifar10(folder: Path, archive: Path | None, *, expected: Counts = CIFAR10) -> str:
    """CIFAR-10 from torchvision's download (170 MB), or from an archive.

    archive: the official cifar-10-python.tar.gz (written as PNGs, named by their place in it), or
    an archive of image folders train/CLASS/* and test/CLASS/* (copied as they are). val is made
    from test. Returns the line to print. UserError: no connection, a damaged or hostile archive,
    other counts than the official ones, a folder in use.
    """

    def fill(prepared: PreparedFolder) -> Counts:
        prepared.discard()
        path = archive or _download_cifar10(prepared.partial)
        with (
            opened(path) as tar,
            tqdm(total=expected.train + expected.val, unit=" images", disable=None) as bar,
        ):
            for name, content in _cifar10_images(tar, path):
                prepared.write(name, content)
                bar.update()
        os.sync()  # on the disk before the marker says so
        return expected

    return prepare(folder, "cifar10", fill)


def prepare_imagenet(folder: Path, archives: Path, *, expected: Counts = IMAGENET) -> str:
    """ImageNet from the folder that holds the official train, val and development kit archives.

    Images keep their names and bytes. Goes on where an earlier call stopped. Returns the line to
    print. UserError: a missing, damaged or hostile archive, other counts, a folder in use.
    """

    def fill(prepared: PreparedFolder) -> Counts:
        try:
            archive_paths(archives)
        except UserError as error:
            if archives.is_dir() and (layout := recognise(archives)):
                raise UserError(f"{error}; {layout.advice(archives)}") from None
            raise
        fill_imagenet(prepared, archives, expected.train + expected.val)
        return expected

    return prepare(folder, "imagenet", fill)


class _Split(NamedTuple):
    train: list[int]
    val: list[int]
    unlabelled: list[int]


def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    """uint8 (1797, 8, 8) and int64 (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the digits need scikit-learn: pip install '.[quickstart]'") from error
    digits = load_digits()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target


def _split_digits(labels: np.ndarray, labelled: float) -> _Split:
    """Numbers of the images; by arithmetic, so that no library's generator can change it."""
    by_class = np.argsort(labels, kind="stable")
    val = by_class[::5]  # every fifth: 360 of 1797, a fifth of each class give or take one
    train: list[int] = []
    unlabelled: list[int] = []
    for label in range(10):
        numbers = np.setdiff1d(np.flatnonzero(labels == label), val).tolist()
        count = len(numbers)
        stay = round(labelled * count)
        if stay == 0:
            raise UserError(f"--labelled {labelled}: leaves no training image of class {label}")
        for i, number in enumerate(numbers):  # `stay` of them, evenly spaced
            (train if i * stay % count < stay else unlabelled).append(number)
    return _Split(train, val.tolist(), unlabelled)


def _png(pixels: np.ndarray) -> bytes:
    """uint8 (H, W) or (H, W, 3) -> a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _download_cifar10(folder: Path) -> Path:
    from torchvision.datasets import CIFAR10 as TORCHVISION
    from torchvision.datasets.utils import download_url

    try:  # only the file, checked by its MD5: the dataset class would run its pickles
        download_url(TORCHVISION.url, folder, TORCHVISION.filename, TORCHVISION.tgz_md5)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{TORCHVISION.url}: cannot be downloaded ({error}); "
            "give the archive with --archive FILE"
        ) from error
    return folder / TORCHVISION.filename


def _cifar10_images(archive: tarfile.TarFile, path: Path) -> Iterator[tuple[str, bytes]]:
    """Names in the data folder and contents, from either layout."""
    batch_name = re.compile(r"(?:.*/)?(?:data_batch_([1-5])|test_batch)")
    image_name = re.compile(
        rf"(?:[^/]+/)?(train|test)/({'|'.join(CIFAR10_CLASSES)})/([0-9A-Za-z_-]+\.(?:jpe?g|png))"
    )
    for member in members(archive, path):
        name = str(PurePosixPath(member.name))  # without a leading ./
        if match := image_name.fullmatch(name):
            split, label_name, file_name = match.groups()
            split = "val" if split == "test" else "train"
            yield f"{split}/{label_name}/{file_name}", read(archive, path, member)
        elif match := batch_name.fullmatch(name):
            split = "train" if match[1] else "val"
            first = 10_000 * (int(match[1] or 1) - 1)  # the tar's own order is another one
            images, labels = read_cifar10_batch(read(archive, path, member), f"{path}: {name}")
            for i, (image, label) in enumerate(zip(images, labels, strict=True), start=first):
                yield f"{split}/{CIFAR10_CLASSES[label]}/{i:05d}.png", _png(image)
        elif PurePosixPath(name).name not in ("batches.meta", "readme.html"):
            raise refusal(path, member, "neither a batch of CIFAR-10 nor train|test/CLASS/IMAGE")


def read_cifar10_batch(content: bytes, where: str) -> tuple[np.ndarray, list[int]]:
    """uint8 (N, 32, 32, 3) and N labels of an official batch, a pickle, without running it.

    where: for the UserError over anything but such a batch.
    """
    try:
        batch = _BatchUnpickler(io.BytesIO(content), encoding="bytes").load()
        labels, data = batch[b"labels"], batch[b"data"]
        pixels = np.frombuffer(data.content, np.uint8).reshape(len(labels), 3, 32, 32)
        if not all(type(label) is int and 0 <= label < 10 for label in labels):
            raise ValueError("a label outside 0 to 9")
    except Exception as error:  # a hostile pickle can make nearly anything of its parts
        raise UserError(f"{where}: no official batch of CIFAR-10 ({str(error)[:120]!a})") from error
    return pixels.transpose(0, 2, 3, 1), labels


class _PickledArray:
    """Stands in for numpy's array: keeps its bytes and calls nothing."""

    content = b""

    def __setstate__(self, state: tuple) -> None:
        _version, _shape, _dtype, fortran_order, self.content = state
        if fortran_order:
            raise ValueError("an array in Fortran's order")


class _PickledDtype:
    """Stands in for numpy's dtype; the length check of the pixels tells whether it was uint8."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: tuple) -> None: ...


class _BatchUnpickler(pickle.Unpickler):
    """Admits the three names in an official batch, each answered by a stand-in of ours."""

    def find_class(self, module: str, name: str) -> Any:
        names = {
            "numpy.core.multiarray._reconstruct": lambda *_: _PickledArray(),
            "numpy._core.multiarray._reconstruct": lambda *_: _PickledArray(),
            "numpy.ndarray": "ndarray",
            "numpy.dtype": _PickledDtype,
        }
        if f"{module}.{name}" not in names:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in it")
        return names[f"{module}.{name}"]
