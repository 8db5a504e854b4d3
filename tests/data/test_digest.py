"""The digest of an index: fixed for given data, and the first difference of two data sets."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from harness.config.schema import Config
from harness.data.dataset import open_dataset
from harness.data.sources import folder as index_module
from harness.data.sources.digest import UNLABELLED_KEY, first_difference, first_differing_file
from harness.data.sources.folder import FolderSource, open_folder


def an_index(**changes: Any) -> FolderSource:
    """Three images of two classes and one without a class."""
    index = FolderSource(
        Path("nowhere"),
        ("ant", "größe"),
        np.array([b"0.jpg", b"10.png", b"\xff.jpg", b"u.jpg"]),
        np.array([0, 0, 1, -1]),
        np.array([500, 3, 0, 7], np.int32),
        np.array([375, 70000, 0, 8], np.int32),
    )
    return replace(index, **changes)


def test_the_digest_of_given_data_never_changes() -> None:
    # Computed with printf and sha256sum: of a class, the count (8 bytes, little-endian), the names
    # with a NUL behind each, widths and heights (4 bytes each); of all, name, NUL and the class's.
    index = an_index()
    assert index.class_digests() == {
        "ant": "735866992934bcee3340fd525195ee938f65dc7aa0ca2e57e0866bc8aa94d74e",
        "größe": "9d4e3be61bba73ce2f957bd9c970c98edcd78c18d9fdbc61aac4ac4fc506c5de",
        UNLABELLED_KEY: "b469dc9ad20c065de4aa97081ef96ee11b21e714d7058a405e4381bf02a3875b",
    }
    assert index.digest == "7ab118ea48d7f1ba2747592d7f8561828a814136b0d922cb1e4134d8979d93a7"


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": ("ant", "eel")},
        {"names": np.array([b"0.jpg", b"10.png", b"\xfe.jpg", b"u.jpg"])},
        {"labels": np.array([0, 1, 1, -1])},
        {"labels": np.array([0, 0, 1, 1])},
        {"labels": np.array([0, -1, 1, -1])},
        {"widths": np.array([500, 3, 1, 7], np.int32)},
        {"heights": np.array([375, 70000, 0, 9], np.int32)},
    ],
)
def test_each_part_of_the_data_counts(changes: dict[str, Any]) -> None:
    assert an_index(**changes).digest != an_index().digest


def test_where_and_how_the_data_lie_does_not_count() -> None:
    index = an_index()
    for changes in (
        {"location": Path("elsewhere"), "cache": Path("a cache")},
        {"names": index.names.astype("S99")},
        {"widths": index.widths.astype(">i4"), "labels": index.labels.astype(">i8")},
    ):
        assert an_index(**changes).digest == index.digest


def test_the_digest_is_kept_and_computed_where_it_is_missing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanned = open_folder(root, "train")
    kept = open_folder(root, "train")
    assert (
        kept.kept_digests
        == scanned.class_digests()
        == replace(kept, kept_digests=None).class_digests()
    )

    assert scanned.cache is not None
    with np.load(scanned.cache) as file:
        former = {key: file[key] for key in file.files if key != "digests"}
    np.savez(scanned.cache, **former)
    monkeypatch.setattr(index_module, "_scan", lambda *_: pytest.fail("scanned again"))
    old = open_folder(root, "train")
    assert old.kept_digests is None and old.digest == scanned.digest


def test_a_copy_has_the_same_digest_and_unlabelled_images_count(
    root: Path, make_config: Callable[..., Config]
) -> None:
    for number in range(2):
        path = root / "unlabelled" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (5 + number, 6)).save(path)
    copy = Path(shutil.copytree(root, root.parent / "copy"))

    def digest(folder: Path, unlabelled: int) -> str:
        config = make_config()
        data = config.data.model_copy(update={"unlabelled_images": unlabelled})
        run = config.run.model_copy(update={"data_root": str(folder)})
        train, _ = open_dataset(config.model_copy(update={"data": data, "run": run}))
        assert train.class_digests() == replace(train, kept_digests=None).class_digests()
        return train.digest

    assert digest(copy, 0) == digest(root, 0)
    assert digest(copy, 2) == digest(root, 2) != digest(root, 0)
    Image.new("RGB", (5, 6)).save(copy / "unlabelled" / "2.png")
    assert digest(copy, 3) != digest(root, 2)


def test_a_million_images_take_less_than_a_second() -> None:
    labels = np.arange(1_281_167) // 1282
    names = np.char.add("n01440764_", np.arange(len(labels)).astype(str)).astype("S16")
    sizes = np.full(len(labels), 500, np.int32)
    classes = tuple(f"n{number:08}" for number in range(1000))
    index = FolderSource(Path("nowhere"), classes, names, labels, sizes, sizes)
    start = time.process_time()
    assert len(index.digest) == 64
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("theirs", "difference"),
    [
        ({"ant": "1", "dog": "2"}, None),
        ({"ant": "1"}, "class dog only in A"),
        ({"ant": "1", "bee": "0", "dog": "2"}, "class bee only in B"),
        ({"ant": "3", "eel": "2"}, "class dog only in A, class eel only in B"),
        ({"dog": "2", "ant": "1"}, "class 0 is ant in A and dog in B"),
        ({"ant": "1", "dog": "3"}, "the images of class dog differ between A and B"),
        ({"ant": "1", "dog": "2", UNLABELLED_KEY: "4"}, "unlabelled images only in B"),
        ({"ant": "3", "dog": "3"}, "the images of class ant differ between A and B"),
    ],
)
def test_the_first_difference(theirs: dict[str, str], difference: str | None) -> None:
    assert first_difference({"ant": "1", "dog": "2"}, theirs, "A", "B") == difference


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({}, None),
        ({"names": np.array([b"0.jpg", b"1.png", b"", b""])}, "1.png is only in B"),
        ({"labels": np.array([0, 1, 1, -1])}, "10.png is only in A"),
        ({"heights": np.array([375, 7, 0, 8], np.int32)}, "10.png is 3x70000 in A and 3x7 in B"),
    ],
)
def test_the_first_differing_file(changes: dict[str, Any], difference: str | None) -> None:
    ours, theirs = an_index().sizes_of("ant"), an_index(**changes).sizes_of("ant")
    assert first_differing_file(ours, theirs, "A", "B") == difference
    assert an_index().sizes_of(UNLABELLED_KEY) == {"u.jpg": (7, 8)}
