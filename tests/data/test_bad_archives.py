"""Archives that are damaged, hostile or change under a run: one line with member and offset."""

from __future__ import annotations

import errno
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from benchmarks.pass_through import PassThrough, missing
from harness.data.decode import read_encoded
from harness.data.sources.tar import reader
from harness.data.sources.tar.source import open_tar
from harness.errors import UserError
from tests.data.archives import archived, files_of, tar_config, write_layout
from tests.data.loading import loader_of
from tests.data.making import error_of, special, tar


@pytest.fixture
def train_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The error on archives of these contents; they are train-00000.tar and so on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def error(*archives: bytes) -> str:
        write_layout(tmp_path / "a", "train", list(archives))
        return error_of(open_tar, tmp_path / "a", "train")

    return error


JPEG = ("cat/0.jpg", b"\xff\xd8\xff" + bytes(700))  # 703 bytes: header 0, content 512, end 1536
# after JPEG: its member is at 1536
REFUSED = [
    ([special("cat/1.jpg", tarfile.SYMTYPE, "0.jpg")], "1536 refused: a link"),
    ([special("cat/1.jpg", tarfile.LNKTYPE, "cat/0.jpg")], "1536 refused: a link"),
    ([special("cat/1.jpg", tarfile.FIFOTYPE)], "1536 refused: it is neither a plain file"),
    ([special("cat/1.jpg", tarfile.GNUTYPE_SPARSE)], "1536 refused: it is sparse"),
    ([("/cat/1.jpg", b"x")], "'/cat/1.jpg' at offset 1536 refused: it points outside"),
    ([("cat/../1.jpg", b"x")], "1536 refused: it points outside"),
    ([("cat/1\n.jpg", b"x")], r"'cat/1\n.jpg' at offset 1536 refused: its name contains a control"),
    ([("cat/1.jpg.gz", b"x")], "1536 refused: it is compressed"),
    ([("cat/0.jpg", b"x")], "'cat/0.jpg' at offset 2048: the same class and name is in "),
    ([("dog.jpg", b"x")], "'dog.jpg' at offset 2048: is in no class folder and has no .cls"),
    ([("cat/sub/1.jpg", b"x")], "'cat/sub/1.jpg' at offset 2048: is not as deep in folders"),
    ([("cat/0.cls", b"")], "'cat/0.jpg' at offset 512: has no class in a .cls or .json"),
    ([("cat/0.cls", b"7"), ("cat/1.jpg", b"")], "'cat/1.jpg' at offset 3072: has no class"),
    ([("cat/1.cls", b"7")], "'cat/1.cls' at offset 2048: a label without a JPEG or PNG"),
    ([("cat/0.cls", b"7"), ("cat/0.png", b"")], "'cat/0.png' at offset 3072: a second image"),
    ([("café/0.jpg", b""), ("cafe\u0301/0.jpg", b"")], "look alike"),
]


@pytest.mark.parametrize(("more", "expected"), REFUSED)
def test_a_member_is_refused_by_name_and_offset(
    train_error: Callable[..., str], more: list, expected: str
) -> None:
    message = train_error(tar(JPEG, *more))
    assert expected in message and "train.tar" in message


def test_two_members_of_one_name_in_two_archives(train_error: Callable[..., str]) -> None:
    message = train_error(tar(JPEG), tar(("x/cat/0.jpg", b"")))
    assert "train-00001.tar: 'x/cat/0.jpg' at offset 512: is not as deep" in message
    message = train_error(tar(JPEG), tar(JPEG))
    assert message.endswith(
        "'cat/0.jpg' at offset 512: the same class and name is in "
        + message.partition(": ")[0].replace("00001", "00000")
        + " at offset 512"
    )


def test_every_cut_of_an_archive_is_noticed(train_error: Callable[..., str]) -> None:
    """Wherever it is cut, but within the zeros that follow the end mark."""
    nested = tar(("cat.tar", tar(("0.jpg", bytes(300)), ("1.jpg", bytes(600)))))
    for whole, content in ((tar(JPEG, ("cat/1.jpg", b"x" * 600)), 3072), (nested, 512 + 10240)):
        for cut in (*range(0, content + 512, 256), content - 1, content + 1):
            message = train_error(whole[:cut])
            assert "truncated" in message or "damaged or no tar archive" in message, (cut, message)
    assert "member 'cat/1.jpg' at offset 1536 should end at 2648, but the archive ends at 2560" in (
        train_error(tar(JPEG, ("cat/1.jpg", b"x" * 600))[:2560])
    )


def test_an_archive_is_not_read_only_in_part(train_error: Callable[..., str]) -> None:
    two = [tar(JPEG), tar(("cat/1.jpg", b"x"))]
    assert "data follows the end of the archive at offset 1536" in train_error(b"".join(two))
    damaged = bytearray(tar(JPEG, ("cat/1.jpg", b"x"), ("cat/2.jpg", b"x")))
    damaged[1536 + 150] ^= 1  # a bit of the second header's checksum
    assert "damaged: no header at offset 1536" in train_error(bytes(damaged))
    inner = tar(("cat.tar", tar(("0.jpg", b"x"))), ("dog.jpg", b"x"))
    assert "'dog.jpg' at offset 10752 refused: it is no archive" in train_error(inner)
    assert "no images" in train_error(tar(("readme.txt", b"x")))


def test_what_is_no_archive_says_so(tmp_path: Path, train_error: Callable[..., str]) -> None:
    assert "damaged or no tar archive" in train_error(b"x" * 2000)
    (tmp_path / "z").mkdir()
    assert "no archive of train in it (train.tar, " in error_of(open_tar, tmp_path / "z", "train")
    (tmp_path / "z" / "train.tar.gz").write_bytes(b"")
    assert "train.tar.gz: is compressed" in error_of(open_tar, tmp_path / "z", "train")
    assert "no archive of train in it" in error_of(open_tar, tmp_path / "nowhere", "train")


@pytest.mark.parametrize("name", ["reference", "dali"])
def test_an_archive_that_is_replaced_or_removed_ends_a_run(
    root: Path, make_config: Callable, name: str
) -> None:
    if name == "dali":
        pytest.importorskip("nvidia.dali")
    archives = archived(root)
    config, path = tar_config(make_config(on_bad_image="skip"), archives), archives / "train.tar"
    whole = path.read_bytes()
    for change, expected in (
        (lambda: path.write_bytes(whole), "the archive has changed since it was indexed"),
        (path.unlink, r"it was there when .*train\.tar was indexed"),
    ):
        with loader_of(archives, config, name) as loader:
            change()
            place = r"train\.tar: \w+/\S+ at offset \d+"
            with pytest.raises(UserError, match=f"{place}: cannot be read: {expected}"):
                list(loader.train(0))


def test_an_open_archive_that_is_overwritten_gives_no_other_images(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "RETRY_AFTER_S", (0.01, 0.01))
    archives = archived(root)
    path, files = archives / "train.tar", files_of(root / "train")
    images = open_tar(archives, "train")
    whole, expected = path.read_bytes(), [images.read(i) for i in range(40)]
    replacement = path.with_name("other")
    replacement.write_bytes(bytes(len(whole)))
    replacement.rename(path)  # the file that is open stays as it was
    assert [images.read(i) for i in range(40)] == expected

    path.write_bytes(whole)
    images = open_tar(archives, "train")
    images.read(0)
    path.write_bytes(tar(*dict(sorted(files.items(), reverse=True)).items()))
    for image in range(40):
        with suppress(OSError):
            assert images.read(image) == expected[image]
    with pytest.raises(OSError, match="has changed since it was indexed"):
        images.read(0)
    path.write_bytes(whole)
    images = open_tar(archives, "train")
    images.read(0)
    os.truncate(path, int(images.offsets[5]) + 100)
    message = rf"ant/\S+ at offset {images.offsets[5]}: cannot be read: the archive has changed"
    with pytest.raises(UserError, match=message):
        read_encoded(images, 5)


@pytest.fixture
def mounted(root: Path) -> Iterator[PassThrough]:
    if reason := missing():
        pytest.skip(reason)
    with PassThrough(archived(root), root.parent / "mounted") as mount:
        yield mount


def test_errors_that_pass_are_retried_and_others_named(
    mounted: PassThrough, root: Path, make_config: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "RETRY_AFTER_S", (0.05, 0.1))
    images = open_tar(mounted.mount, "train")
    expected = [content for _, content in sorted(files_of(root / "train").items())]
    before = mounted.operations()["read"]
    assert [images.read(i) for i in range(40)] == expected
    assert mounted.operations()["read"] - before == 40  # one operation an image
    for number, (error, times) in enumerate(((errno.EIO, 1), (errno.ESTALE, 2), (errno.EIO, 2))):
        mounted.fail(error, times)
        start_s = time.monotonic()
        assert images.read(number) == expected[number]
        assert time.monotonic() - start_s >= (0.05, 0.15)[times - 1]
    mounted.shorten(300)  # reads that return less than there is
    assert images.read(7) == expected[7]
    mounted.shorten(0)
    config = tar_config(make_config(on_bad_image="skip"), mounted.mount)
    with loader_of(mounted.mount, config) as loader:
        mounted.fail(errno.EIO, 10**6)
        message = r"at offset \d+: cannot be read: Input/output error; check it"
        with pytest.raises(UserError, match=message):
            list(loader.train(0))


def test_one_stripe_on_lustre_is_a_warning(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a stub of `lfs`: prints 1 or 4 for an archive, or fails as on other file systems."""
    (stubs := root / "bin").mkdir()
    monkeypatch.setenv("PATH", str(stubs), prepend=os.pathsep)
    archives = archived(root, "shards")
    for answer, warned in (("echo 1", True), ("echo 4", False), ("echo 1; exit 25", False)):
        (stubs / "lfs").write_text(f'#!/bin/sh\n[ "$1 $2" = "getstripe -c" ] || exit 9\n{answer}\n')
        (stubs / "lfs").chmod(0o755)
        for path in archives.iterdir():
            os.utime(path)
        open_tar(archives, "train")
        said = capsys.readouterr().err
        assert (f"lfs migrate -c -1 {archives}/train-00000.tar" in said) == warned == bool(said)
