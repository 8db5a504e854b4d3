"""Output files: found unwritable before the work, complete or unchanged afterwards."""

import os
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.output_file import check_output, write_output


@pytest.mark.parametrize(
    "name, reason",
    [
        ("folder", "is a folder; name a file"),
        ("nowhere/file.csv", "No such file or directory"),
        ("file.txt/file.csv", "Not a directory"),
        ("x" * 256, "File name too long"),
        ("/proc/file.csv", "No such file or directory"),  # a file system that takes no file
    ],
)
def test_what_cannot_be_written_is_found_before(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").touch()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=f"^--to .*: {reason}"):
        check_output(tmp_path / name, "--to")
    assert sorted(tmp_path.iterdir()) == before


def test_a_check_leaves_no_trace_and_a_failed_write_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file.csv"
    check_output(file, "--to")
    assert list(tmp_path.iterdir()) == []
    write_output(file, "--to", "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"^--to .*file.csv: No space left on device$"):
        write_output(file, "--to", "new")
    assert list(tmp_path.iterdir()) == [file] and file.read_text() == "old"


def test_names_that_are_not_utf8_keep_their_bytes(tmp_path: Path) -> None:
    write_output(tmp_path / "file.csv", "--to", f"γ {os.fsdecode(b'caf' + bytes([0xE9]))}")
    assert (tmp_path / "file.csv").read_bytes() == b"\xce\xb3 caf\xe9"


def test_a_link_stays_a_link_and_a_pipe_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file.csv")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("link", "pipe"):
        check_output(tmp_path / name, "--to")
        write_output(tmp_path / name, "--to", "content")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file.csv").read_text() == "content"
    assert (tmp_path / "pipe").is_fifo() and os.read(reader, 100) == b"content"
    os.close(reader)
