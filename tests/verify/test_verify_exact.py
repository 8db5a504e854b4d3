"""`harness verify` with exact sums: bounds of 0 in the run's precision, a rounding planted."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path

import pytest
import yaml

from harness.config.loading import load_config
from harness.verify.compare import Line
from harness.verify.compare_bits import compare_exactly
from harness.verify.launch import RANK_PROGRAM, launch_ranks
from harness.verify.setting import Setting, check_setting
from tests.conftest import SMALL
from tests.limits import starting
from tests.verify.test_verify import PLANT

pytestmark = starting(1 + 2 + 2)
STEPS, TASKS = 7, ["known_sum", "curve"]

# the smallest change that a float32 gradient can have, in one tensor of one rank's passes
ONE_ROUNDING = """
import harness.training.exact_gradients as exact
copy_all = exact.copy_all
def rounded(targets, sources):
    copy_all(targets, sources)
    if me == 1:
        targets[0].mul_(1 + 2.0**-23)
exact.copy_all = rounded
"""


@pytest.fixture(scope="module")
def config_file(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    mapping = copy.deepcopy(SMALL)
    mapping["run"] |= {"data_root": str(digits), "sums": "exact"}
    del mapping["run"]["micro_batch"]
    path = tmp_path_factory.mktemp("verify-exact") / "small.yaml"
    path.write_text(yaml.safe_dump(mapping))
    return path


def exact_setting(config_file: Path, fault: str = "") -> Setting:
    program = [sys.executable, "-c", f"{PLANT}\n{fault}\nsys.exit(rank.main(sys.argv[1:]))"]
    config = load_config(config_file)
    return check_setting(
        config, [1, 2], STEPS, config_file.parent, program if fault else RANK_PROGRAM
    )


@pytest.fixture(scope="module")
def lines(config_file: Path) -> dict[str, list[Line]]:
    """The lines of two sound ranks, and of two of which one rounds otherwise."""
    one = launch_ranks(exact_setting(config_file), "1 rank", 1, TASKS)
    found = {}
    for name, fault in {"sound": "", "rounded": ONE_ROUNDING}.items():
        setting = exact_setting(config_file, fault)
        two = launch_ranks(setting, "2 ranks", 2, TASKS)
        found[name] = list(compare_exactly(setting, "2 ranks", one, two))
    return found


def test_two_sound_ranks_have_the_bits_of_one(lines):
    sound = lines["sound"]
    assert all(line.passed for line in sound)
    bits = [line for line in sound if line.what.endswith("bits")]
    assert [line.what for line in bits] == [
        *(f"float32: {kind}, bits" for kind in ("loss", "weights", "momentum")),
        *("float32: running statistics, bits", "evaluation loss, bits"),
    ]
    assert all(line.bound == 0 for line in bits)


def test_a_single_rounding_on_one_rank_is_found(lines):
    failed = [line for line in lines["rounded"] if not line.passed]
    assert failed[0].what == "float32: loss, bits"
    assert re.fullmatch("from step [1-6] on", failed[0].detail)  # step 0 has the same weights
    assert failed[1].what == "float32: weights, bits"


def test_the_work_is_named_in_advance(config_file):
    """Trajectories on 1 and 2 ranks and one interrupted, of 7 steps, and two known sums."""
    assert exact_setting(config_file).work() == (
        "work: 23 steps of 256 images forward and backward, most in float32, "
        "and 720 images evaluated"
    )
