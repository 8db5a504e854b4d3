"""The quickstart: the same error and bits on 1 and 2 ranks, those that the README states."""

import json
from pathlib import Path

import pytest

from tests.conftest import harness
from tests.limits import starting

pytestmark = starting(1 + 2)
ROOT = Path(__file__).parents[1]
RECORDED = json.loads((ROOT / "benchmarks" / "results" / "quickstart.json").read_text())


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory) -> list[Path]:
    """The run folders of one rank and of two."""
    folder = tmp_path_factory.mktemp("quickstart")
    words = "train", ROOT / "configs" / "quickstart.yaml", f"run.data_root={digits}"
    folders = [folder / f"{ranks}" for ranks in (1, 2)]
    for ranks, run in enumerate(folders, 1):
        done = harness(*words, "--out", run, ranks=ranks)
        assert done.returncode == 0, done.stderr
    return folders


def read(run: Path, name: str) -> dict:
    return json.loads((run / name).read_text())


def test_one_and_two_ranks_have_the_same_bits(runs):
    one, two = (read(run, "status.json") for run in runs)
    assert one["weights_sha256"] == two["weights_sha256"]
    assert one["error"] == two["error"]


def test_they_are_those_of_the_readme_on_its_kind_of_machine(runs):
    first, found = RECORDED["runs"][0], read(runs[0], "environment.json")
    assert first["seed"] == 1
    conditions = "exact", "versions"
    if {key: found[key] for key in conditions} != {key: first[key] for key in conditions}:
        pytest.skip("another CPU or other versions than the README's have bits of their own")
    status = read(runs[0], "status.json")
    assert (status["error"], status["weights_sha256"]) == (first["error"], first["weights_sha256"])
