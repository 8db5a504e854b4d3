"""CIFAR-10 as image folders, downloaded or from an archive."""

import io
import os
import pickle
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from harness.data.prepare.archive import members, open_archive, read_member, refusal
from harness.data.prepare.png import png_bytes
from harness.data.prepare.prepared_folder import Counts, PreparedFolder, prepare
from harness.errors import UserError

CIFAR10 = Counts(train=50_000, val=10_000, classes=10)

# in the order of the labels
CIFAR10_CLASSES: tuple[str, ...] = ("airplane", "automobile", "bird", "cat", "deer")
CIFAR10_CLASSES += ("dog", "frog", "horse", "ship", "truck")


def prepare_cifar10(folder: Path, archive: Path | None, *, expected: Counts = CIFAR10) -> str:
    """Prepare CIFAR-10 from torchvision's download (170 MB) or from an archive.

    archive: the official cifar-10-python.tar.gz (written as PNGs, named by their position), or
    an archive of image folders train/CLASS/* and test/CLASS/* (copied unchanged). val is made
    from test. Returns the line to print. Raises UserError without a connection and for a damaged
    or hostile archive, counts that differ from the official ones, or a folder in use.
    """

    def fill(prepared: PreparedFolder) -> Counts:
        prepared.discard()
        path = archive or _download_cifar10(prepared.partial)
        with (
            open_archive(path) as tar,
            tqdm(total=expected.train + expected.val, unit=" images", disable=None) as bar,
        ):
            for name, content in _cifar10_images(tar, path):
                prepared.write(name, content)
                bar.update()
        os.sync()  # everything must be on disk before the marker
        return expected

    return prepare(folder, "cifar10", fill)


def _download_cifar10(folder: Path) -> Path:
    from torchvision.datasets import CIFAR10 as TORCHVISION
    from torchvision.datasets.utils import download_url

    try:  # only the file, verified by its MD5: the dataset class would run its pickles
        download_url(TORCHVISION.url, folder, TORCHVISION.filename, TORCHVISION.tgz_md5)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{TORCHVISION.url}: cannot be downloaded ({error}); "
            "give the archive with --archive FILE"
        ) from error
    return folder / TORCHVISION.filename


def _cifar10_images(archive: tarfile.TarFile, path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield names in the data folder and contents, from either layout."""
    batch_name = re.compile(r"(?:.*/)?(?:data_batch_([1-5])|test_batch)")
    image_name = re.compile(
        rf"(?:[^/]+/)?(train|test)/({'|'.join(CIFAR10_CLASSES)})/([0-9A-Za-z_-]+\.(?:jpe?g|png))"
    )
    for member in members(archive, path):
        name = str(PurePosixPath(member.name))  # without a leading ./
        if match := image_name.fullmatch(name):
            split, label_name, file_name = match.groups()
            split = "val" if split == "test" else "train"
            yield f"{split}/{label_name}/{file_name}", read_member(archive, path, member)
        elif match := batch_name.fullmatch(name):
            split = "train" if match[1] else "val"
            first = 10_000 * (int(match[1] or 1) - 1)  # the tar's own order differs
            images, labels = read_cifar10_batch(
                read_member(archive, path, member), f"{path}: {name}"
            )
            for i, (image, label) in enumerate(zip(images, labels, strict=True), start=first):
                yield f"{split}/{CIFAR10_CLASSES[label]}/{i:05d}.png", png_bytes(image)
        elif PurePosixPath(name).name not in ("batches.meta", "readme.html"):
            raise refusal(path, member, "it is no CIFAR-10 batch and not train|test/CLASS/IMAGE")


def read_cifar10_batch(content: bytes, where: str) -> tuple[np.ndarray, list[int]]:
    """Return uint8 (N, 32, 32, 3) and N labels of an official batch, a pickle, without running it.

    `where` names the batch in the UserError for any other content.
    """
    try:
        batch = _BatchUnpickler(io.BytesIO(content), encoding="bytes").load()
        labels, data = batch[b"labels"], batch[b"data"]
        pixels = np.frombuffer(data.content, np.uint8).reshape(len(labels), 3, 32, 32)
        if not all(type(label) is int and 0 <= label < 10 for label in labels):
            raise ValueError("a label outside 0 to 9")
    except Exception as error:  # a hostile pickle can raise nearly anything
        raise UserError(
            f"{where}: not an official CIFAR-10 batch ({str(error)[:120]!a})"
        ) from error
    return pixels.transpose(0, 2, 3, 1), labels


class _PickledArray:
    """A stand-in for numpy's array: keeps its bytes and calls nothing."""

    content = b""

    def __setstate__(self, state: tuple) -> None:
        _version, _shape, _dtype, fortran_order, self.content = state
        if fortran_order:
            raise ValueError("an array in Fortran order")


class _PickledDtype:
    """A stand-in for numpy's dtype; the length check of the pixels shows whether it was uint8."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: tuple) -> None: ...


class _BatchUnpickler(pickle.Unpickler):
    """An unpickler that admits the names in an official batch only, each with a stand-in."""

    def find_class(self, module: str, name: str) -> object:
        names = {
            "numpy.core.multiarray._reconstruct": lambda *_: _PickledArray(),
            "numpy._core.multiarray._reconstruct": lambda *_: _PickledArray(),
            "numpy.ndarray": "ndarray",
            "numpy.dtype": _PickledDtype,
        }
        if f"{module}.{name}" not in names:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return names[f"{module}.{name}"]
