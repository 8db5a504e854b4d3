"""A run on the digits, trained once, and the words of a command on it."""

import copy
import json

import pytest
import yaml

from harness import load_config
from harness.commands.command_line import main
from harness.training.setup import train
from tests.conftest import SMALL


@pytest.fixture(scope="session")
def run(digits, tmp_path_factory):
    """The run folder. Not to be changed."""
    mapping = copy.deepcopy(SMALL)
    mapping["run"]["data_root"] = str(digits)
    folder = tmp_path_factory.mktemp("trained")
    (folder / "digits.yaml").write_text(yaml.safe_dump(mapping))
    train(load_config(folder / "digits.yaml"), folder / "run")
    return folder / "run"


@pytest.fixture
def output_of(capsys):
    """Runs a command that must succeed; returns its standard output, parsed if it is JSON."""

    def call(*words):
        capsys.readouterr()
        assert main([*map(str, words)]) == 0, capsys.readouterr().err
        out = capsys.readouterr().out
        return json.loads(out) if "--json" in words else out

    return call


@pytest.fixture
def refusal_of(capsys):
    """Runs a command that must end with code 2 and one line after warnings; returns the line."""

    def call(*words):
        capsys.readouterr()
        assert main([*map(str, words)]) == 2
        *warnings, line = capsys.readouterr().err.splitlines()
        assert all(warning.startswith("warning: ") for warning in warnings)
        assert line.startswith("error: ")
        return line

    return call
