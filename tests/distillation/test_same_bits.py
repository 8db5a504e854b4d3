"""Distillation with exact sums: a student's bits on any number of ranks, taught live and cached."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness import load_config
from harness.commands.command_line import main
from harness.training.setup import train
from tests.conftest import harness
from tests.distilling import Student
from tests.limits import starting

pytestmark = starting(2 * 3)
EXACT = {"run__micro_batch": "auto", "run__sums": "exact", "recipe__label_smoothing": 0.1}


@pytest.fixture
def caches(student: Student, tmp_path: Path) -> list[Path]:
    """The same cache, written by one rank and by two."""
    folders = [tmp_path / "one", tmp_path / "two"]
    paths = [student(f"{f.name}.yaml", cache=str(f), changes=EXACT) for f in folders]
    words = "--epochs", "2", "--dtype", "float32"
    assert main(["cache", str(paths[0]), *words]) == 0
    done = harness("cache", paths[1], *words, ranks=2)
    assert done.returncode == 0, done.stderr
    return folders


def test_one_and_two_ranks_train_the_same_student(student, caches, tmp_path):
    one, two = (json.loads((folder / "manifest.json").read_text()) for folder in caches)
    assert one == two  # with a checksum of each shard, and the teacher's evaluation
    students = {"live": student("live.yaml", changes=EXACT), "cached": tmp_path / "two.yaml"}
    digests = {}
    for name, path in students.items():
        alone = train(load_config(path), tmp_path / f"{name}-1").weights_sha256
        done = harness("train", path, "--out", tmp_path / f"{name}-2", ranks=2)
        assert done.returncode == 0, done.stderr
        status = json.loads((tmp_path / f"{name}-2" / "status.json").read_text())
        assert status["weights_sha256"] == alone
        digests[name] = alone
    assert digests["live"] != digests["cached"]  # the crops of the third epoch
