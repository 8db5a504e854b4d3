"""`harness data pack`: the same data in archives, whatever interrupts it; and the check of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

from harness.commands.command_line import main
from harness.data.prepare.pack import PARTIAL, pack
from harness.data.sources.folder import open_folder
from harness.data.sources.tar.source import open_tar
from tests.data.archives import archived, files_of
from tests.data.making import error_of, tree

PACK = """
import resource, sys
from itertools import chain
from pathlib import Path
from harness.commands.command_line import main
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.exit(main(["data", "pack", sys.argv[1], "--to", sys.argv[2], "--shards", "2"]))
"""


def listed(archive: Path) -> list[str]:
    done = subprocess.run(["tar", "-tf", archive], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def test_archives_hold_the_folder_in_order(root: Path) -> None:
    shutil.copytree(root / "train" / "dog", root / "unlabelled")
    (root / "val" / "cat" / f"{'é' * 60}.jpg").write_bytes(b"x" * 512)  # a header of its own
    line = pack(root, root / "one", None)
    assert "3 archives (40 in train, 12 in val, 12 in unlabelled), every image compared" in line
    assert "packed before, 3 archives" in pack(root, root / "one", None)
    pack(root, root / "many", 5)
    names = [f"{split}-{i:05}.tar" for split in ("train", "unlabelled", "val") for i in range(5)]
    assert sorted(os.listdir(root / "many")) == names
    for split in ("train", "val", "unlabelled"):
        folder = open_folder(root, split)
        expected = [
            path.removeprefix("unlabelled/")
            for path in map(folder.relative_path, range(len(folder)))
        ]
        assert open_tar(root / "one", split).digest == folder.digest
        assert open_tar(root / "many", split).digest == folder.digest
        shards = sorted((root / "many").glob(f"{split}-*"))
        parts = [listed(path) for path in shards]
        if split == "train":
            assert listed(root / "one" / "train.tar") == expected == [*chain(*parts)]
            assert [len(part) for part in parts] == [8] * 5
    subprocess.run(["tar", "-C", root / "one", "-xf", root / "one" / "train.tar"], check=True)
    assert files_of(root / "train") == files_of(root / "one")


def test_what_was_written_before_an_interruption_stays(root: Path) -> None:
    """A limit on the size of files stops it in the middle of an archive."""
    pack(root, root / "whole", 2)
    size = (root / "whole" / "train-00000.tar").stat().st_size
    command = [sys.executable, "-c", PACK.format(limit=size // 3), root, root / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "File too large; fix that and repeat" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    partial = root / "out" / PARTIAL / "train-00000.tar"
    assert os.listdir(root / "out") == [PARTIAL] and 0 < partial.stat().st_size <= size // 3
    assert "was begun for other images or shards" in error_of(pack, root, root / "out", 3)
    inode = partial.stat().st_ino
    pack(root, root / "out", 2)
    assert tree(root / "out") == tree(root / "whole")
    assert (root / "out" / "train-00000.tar").stat().st_ino == inode


def test_a_wrong_byte_is_noticed(root: Path) -> None:
    pack(root, root / "out", None)
    archive = root / "out" / "val.tar"
    content = bytearray(archive.read_bytes())
    content[700] ^= 1
    archive.write_bytes(content)
    message = error_of(pack, root, root / "out", None)
    assert "val.tar: differs from" in message and "val/ant/0.jpg at offset 0; delete" in message
    archive.write_bytes(content + bytes(10240))
    assert "val.tar: is not of the size" in error_of(pack, root, root / "out", None)
    archive.unlink()
    assert "val.tar is missing" in error_of(pack, root, root / "out", None)


def test_mistakes_are_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--shards 0: at least 1" in error_of(pack, root, root / "out", 0)
    assert "nowhere/train: No such file" in error_of(pack, root / "nowhere", root / "out", None)
    (root / "file").write_bytes(b"")
    assert "file: File exists" in error_of(pack, root, root / "file", None)
    (root / "train" / "cat" / "a\nb.jpg").write_bytes(b"")
    assert "its name contains a control character" in error_of(pack, root, root / "out", None)
    assert main(["data", "pack", str(root), "--to", str(root / "out")]) == 2
    assert not (root / "out").exists()


def test_the_check_finds_in_archives_what_it_finds_in_the_folder(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = root / "train" / "cat" / "1.jpg"
    cut.write_bytes(cut.read_bytes()[:300])
    shutil.copy(root / "train" / "cat" / "2.jpg", root / "val" / "cat" / "9.jpg")
    archives = archived(root, "with_prefix")
    reports = []
    for folder in (root, archives):
        assert main(["data", "check", str(folder), "--json"]) == 1
        reports.append(json.loads(capsys.readouterr().out))
    for key in ("images", "classes", "config", "damaged", "refused"):
        assert reports[0][key] == reports[1][key], key
    # in this layout there are three more members, that are not read
    more = {"no image": ["train.tar/._cat", "train.tar/cat/._0.jpg", "train.tar/cat/readme.txt"]}
    found = {kind: [row["path"] for row in rows] for kind, rows in reports[1]["findings"].items()}
    others = {path.replace("train.tar", "val.tar") for path in more["no image"]}
    assert {*found.pop("no image")} == {*more["no image"], *others}
    expected = {
        kind: [row["path"] for row in rows] for kind, rows in reports[0]["findings"].items()
    }
    expected.pop("no image")
    assert found == expected
    assert main(["data", "check", str(archives)]) == 1
    assert capsys.readouterr().out.splitlines()[-3:-1] == ["run:", "  data_format: tar"]
