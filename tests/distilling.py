"""A teacher trained once for all tests of students, and students' configs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness import load_config
from harness.commands.command_line import main
from harness.data.prepare.digits import prepare_digits
from harness.training.setup import train
from tests.conftest import SMALL

Student = Callable[..., Path]
# changes of a student's config
TENTH = {"data__train_images": 143, "data__unlabelled_images": 1294}


@pytest.fixture(scope="session")
def tenth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits, a tenth of the training images labelled. Not to be changed."""
    folder = tmp_path_factory.mktemp("tenth") / "digits"
    prepare_digits(folder, 0.1)
    return folder


@pytest.fixture(scope="session")
def teacher(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of 6 epochs of a network wider than the student; its config stands beside."""
    folder = tmp_path_factory.mktemp("teacher")
    mapping = copy.deepcopy(SMALL)
    mapping["run"]["data_root"] = str(digits)
    mapping["model"]["width"] = 8
    mapping["recipe"] |= {"epochs": 6, "milestones": [4]}
    (folder / "teacher.yaml").write_text(yaml.safe_dump(mapping))
    train(load_config(folder / "teacher.yaml"), folder / "run")
    return folder / "run"


@pytest.fixture
def student(small: Callable[..., Path], teacher: Path) -> Student:
    """Writes a student's config; keywords go to its distill section, `changes` elsewhere."""

    def write(
        name: str = "student.yaml", *, changes: dict[str, Any] | None = None, **distill: Any
    ) -> Path:
        path = small(name, **(changes or {}))
        section = {"teacher": str(teacher), "precision": "float32"} | distill
        path.write_text(path.read_text() + yaml.safe_dump({"distill": section}))
        return path

    return write


def one_line(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What the harness says of a user's mistake."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line
