"""`harness verify` passes sound runs, names each planted fault, and leaves nothing behind."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from harness import load_config
from harness.commands.command_line import main
from harness.errors import UserError
from harness.verify import verify
from harness.verify.compare import Line, compare, compare_curves, own_steps
from harness.verify.launch import RANK_PROGRAM, Crashed, launch_ranks
from harness.verify.setting import Setting, check_setting
from harness.verify.table import render_verdict
from tests.conftest import SMALL, harness
from tests.faults import children_of
from tests.limits import Limit

STEPS = 11  # of 5 an epoch; single steps from 0 and 10
TASKS = ["known_sum", "curve", "own_steps", "float64_steps"]


@pytest.fixture(scope="module")
def config_file(digits, tmp_path_factory) -> Path:
    """k = 8 workers of 32 images, label smoothing, 15 steps."""
    mapping = SMALL | {
        "run": SMALL["run"] | {"data_root": str(digits)},
        "recipe": SMALL["recipe"] | {"label_smoothing": 0.1},
    }
    path = tmp_path_factory.mktemp("verify") / "small.yaml"
    path.write_text(yaml.safe_dump(mapping))
    return path


def setting_with(config_file: Path, folder: Path, fault: str = "") -> Setting:
    """Check a setting whose ranks run `fault` before their own program, whose module is `rank`."""
    program = [sys.executable, "-c", f"{PLANT}\n{fault}\nsys.exit(rank.main(sys.argv[1:]))"]
    config = load_config(config_file)
    return check_setting(config, [1, 2], STEPS, folder, program if fault else RANK_PROGRAM)


PLANT = """
import os, sys
from harness.startup import import_quickly
import_quickly("harness.verify.rank")
import harness.data.batch_plan as plan, harness.training.objective as objective
import harness.training.gradients as gradients
import harness.verify.rank as rank
import harness.models.ghost_batch_norm as ghost
me, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
"""


@pytest.fixture(scope="module")
def one(config_file, tmp_path_factory):
    """Return the results of one sound rank, and the folder of its states."""
    folder = tmp_path_factory.mktemp("one")
    setting = setting_with(config_file, folder)
    return launch_ranks(setting, "1 rank", 1, ["states", *TASKS]), folder


def lines_with(config_file: Path, one, fault: str) -> list[Line]:
    """Compare two ranks that have the fault with one that does not."""
    reference, folder = one
    setting = setting_with(config_file, folder, fault)
    found = launch_ranks(setting, "2 ranks", 2, TASKS)
    return list(compare(setting, "2 ranks", reference, found, twin=lambda: reference))


SEED_OF_ONE_RANK = """
load = rank.load_config
rank.load_config = lambda path: load(path, ["seed=2"] if me == 1 else [])
"""
WINDOWS_SEEDED_BY_RANK = """
crops = plan.crops
plan.crops = lambda seed, *rest: crops(seed + me, *rest)
"""
ORDER_OF_ONE_EPOCH = """
permutation = plan.permutation
def shuffled(seed, epoch, images):
    return permutation(seed, epoch, images)[:: -1 if (epoch, me) == (1, 1) else 1]
plan.permutation = shuffled
"""
LOSS_OVER_LOCAL_IMAGES = """
loss = objective.training_loss
objective.training_loss = lambda logits, labels, global_batch, label_smoothing: loss(
    logits, labels, global_batch // world_size, label_smoothing
)
"""
BUFFERS_SENT_BY_RANK_0 = """
ddp = gradients.DistributedDataParallel
class Sending(ddp):
    def __init__(self, model, **keys):
        super().__init__(model, **keys | dict.fromkeys(gradients.buffer_sync_off(), True))
gradients.DistributedDataParallel = Sending
"""
LOST_VALIDATION_IMAGE = """
evaluation = plan.BatchPlan.evaluation
def evaluation_of_others(self):
    for request in evaluation(self):
        request.ids[-1] = request.ids[0]
        yield request
plan.BatchPlan.evaluation = evaluation_of_others
"""


LAST_STATISTICS = f"float64: running statistics after step {STEPS - 1}"


@pytest.mark.parametrize(
    ("fault", "what", "detail"),
    [
        (SEED_OF_ONE_RANK, "seed, recipe, first weights", "rank 1: another seed, 2"),
        (WINDOWS_SEEDED_BY_RANK, "windows and flips", "first at step 0 (epoch 1), worker 4"),
        # reversed from the second epoch's first step on, at the places of rank 1's four workers
        (ORDER_OF_ONE_EPOCH, "images of each step", "first at step 5 (epoch 2), worker 4"),
        (
            LOSS_OVER_LOCAL_IMAGES,
            "gradient of a known sum",
            "it is 2 times the value that the labels imply",
        ),
        (BUFFERS_SENT_BY_RANK_0, LAST_STATISTICS, "running_"),
        (LOST_VALIDATION_IMAGE, "validation images, each once", "image 0: 2 times"),
    ],
    ids=["seed", "windows", "order", "loss", "buffers", "validation"],
)
def test_a_planted_fault_is_named_by_the_first_line_that_fails(
    config_file, one, fault, what, detail
):
    lines = lines_with(config_file, one, fault)
    failed = [line for line in lines if not line.passed]
    assert failed[0].what == what and detail in failed[0].detail
    assert render_verdict(lines).startswith(f"FAIL: {len(failed)} of {len(lines)} lines; first: ")
    also_failed = {line.what for line in failed[1:]}
    if fault is ORDER_OF_ONE_EPOCH:  # other images, each with its own window
        assert "windows and flips" not in also_failed
    if fault in (BUFFERS_SENT_BY_RANK_0, LOST_VALIDATION_IMAGE):  # they touch no training
        assert also_failed <= {"evaluation counts"}


def trajectory(weight: float) -> dict:
    """Return the losses and last state of two steps with one tensor of weights."""
    weights = {"w": torch.tensor([weight, 1.0], dtype=torch.float64)}
    return {"losses": [1.0, 2.0], "state": {"weights": weights}}


def gradients(*values: float) -> dict:
    """Return single steps whose gradient is one number."""
    return {
        "own_steps": [
            {"gradient": torch.tensor([value]), "loss": 1.0, "statistics": torch.ones(1)}
            for value in values
        ]
    }


def test_a_float16_overflow_must_be_that_of_all(config_file, tmp_path):
    """The first step overflows; the second, 1.002 for 1, may be off by 4 times the 0.001 that one
    rank is off float64."""
    setting = setting_with(config_file, tmp_path)
    config = load_config(config_file, ["run.precision=float16"])
    setting = replace(setting, config=config)
    exact = {"float64_steps": gradients(7.0, 1.001)["own_steps"]}
    one, inf = gradients(math.inf, 1.0) | exact, math.inf
    overflows, gradient, *_ = own_steps(setting, "2 ranks", one, gradients(inf, 1.002))
    assert overflows.passed and overflows.difference == 0
    assert gradient.passed and gradient.over == "1 steps"
    assert gradient.difference == pytest.approx(0.002, rel=1e-3)
    overflows, *_ = own_steps(setting, "2 ranks", one, gradients(7.0, 1.002))
    assert not overflows.passed and overflows.difference == 1
    *_, gradient, _, _ = own_steps(setting, "2 ranks", one, gradients(inf, 1.005))
    assert not gradient.passed and "at step 10" in gradient.detail


def test_a_recipe_that_makes_roundings_grow_is_held_to_its_twin(config_file, tmp_path):
    """w is 4e-8 of 4 apart, 1e-8; the twin's 4e-9 of 4 allow 100 * 1e-9, an equal twin 1e-10."""
    setting = setting_with(config_file, tmp_path)
    one, found, twin = trajectory(4.0), trajectory(4.0 + 4e-8), trajectory(4.0 + 4e-9)
    loss, weights = compare_curves(setting, "2 ranks", one, found, lambda: twin)
    assert loss.passed and loss.bound == 1e-10 and not loss.detail
    assert weights.passed and weights.bound == pytest.approx(1e-7)
    assert weights.difference == pytest.approx(1e-8)
    assert "one rounding of the initial weights alone grows to 1.0e-09" in weights.detail
    _, weights = compare_curves(setting, "2 ranks", one, found, lambda: one)
    assert not weights.passed and weights.bound == 1e-10 and weights.detail == "most in w"


def test_all_passes_on_uneven_ranks_and_through_an_interruption(config_file):
    """The command line, 3 and 2, 3, 3 workers a rank; SIGTERM at one rank in mid-epoch."""
    loader = ("run.loader=reference", "run.loader_threads=0")
    finished = harness("verify", config_file, "--ranks", "3", "--steps", STEPS, "--json", *loader)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found = json.loads(finished.stdout)
    assert found["passed"] and found["ranks"] == [1, 3] and found["steps"] == STEPS
    assert {line["where"] for line in found["lines"]} == {
        "1 rank",
        "1 rank, micro-batches of 32",
        "3 ranks",
        "stopped in mid-epoch on 3 ranks, resumed on 1",
    }
    assert all(line["passed"] and not line["detail"] for line in found["lines"])
    by_name = {line["what"]: line for line in found["lines"] if line["where"] == "3 ranks"}
    assert 0 < by_name["float32: gradient (middle step)"]["difference"] < 1e-5
    assert 0 < by_name[f"float64: weights after step {STEPS - 1}"]["difference"] < 1e-12
    assert by_name["images of each step"]["over"] == "11 × 256"
    assert "work: " in finished.stderr


def test_a_rank_that_fails_is_a_line_with_its_last_words(config_file, tmp_path, monkeypatch):
    raising = [sys.executable, "-c", "raise RuntimeError('no room')"]
    lines = list(verify(load_config(config_file), [2], STEPS, raising))
    assert [(line.where, line.what, line.passed) for line in lines] == [
        ("1 rank", "ran to completion", False)
    ]
    assert lines[0].detail == "rank 0: RuntimeError: no room"
    monkeypatch.setattr("harness.verify.launch.LAST_WORDS_S", 0.5)
    killed = (
        "import os, time; os.environ['RANK'] == '1' and os.kill(os.getpid(), 9); time.sleep(99)"
    )
    setting = replace(
        setting_with(config_file, tmp_path), rank_program=[sys.executable, "-c", killed]
    )
    with pytest.raises(Crashed, match="rank 1: killed by SIGKILL"):
        launch_ranks(setting, "2 ranks", 2, ["curve"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "1"], "nothing to compare one rank with"),
        (["--ranks", "1,9"], "only 8 workers"),
        (["--ranks", "0,2"], "--ranks 0"),
        (["--ranks", "two"], "whole numbers"),
        (["--steps", "0"], "give 1 to 15"),
        (["--steps", "16"], "give 1 to 15"),
        (["run.data_root=/nowhere"], "/nowhere"),
    ],
)
def test_a_mistake_is_one_line_with_code_2(config_file, capsys, arguments, message):
    assert main(["verify", str(config_file), "--steps", "9", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_under_torchrun_it_says_to_start_it_alone(config_file, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        next(verify(load_config(config_file), [2], STEPS))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_and_no_file_is_left(config_file, tmp_path, number):
    command = [sys.executable, "-m", "harness", "verify", str(config_file), "--ranks", "2"]
    process = subprocess.Popen(
        [*command, "--steps", "15"],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    limit = Limit(60)
    while not (ranks := children_of(process.pid)) or not list(tmp_path.rglob("progress.txt")):
        assert not limit.is_over() and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate()
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert not limit.is_over()
        time.sleep(0.05)
    if number == signal.SIGINT:
        assert process.returncode == 130 and error.endswith("error: interrupted\n")
        assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_more_ranks_than_gpus_share_them_by_gloo(config_file):
    ranks = torch.cuda.device_count() + 1
    finished = harness("verify", config_file, "--ranks", ranks, "--steps", 5, "run.device=cuda")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"{ranks} ranks on {ranks - 1} GPU" in finished.stdout and "Gloo" in finished.stdout
