"""Exact sums: the same bits on any number of ranks, through interruptions and with each loader.

A ResNet-8 on the digits with k = 8 workers of n = 7 images, label smoothing, warm-up and one decay:
2 epochs of floor(1437 / 56) = 25 steps, in float32 but where a run says otherwise.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from harness import load_config
from harness.data.batch import Batch
from harness.outcome import Stopped
from harness.resilience.agreement import Agreement
from harness.runs.checkpoint import list_checkpoints, load_checkpoint
from harness.runs.logging.jsonl import read_log
from harness.training.setup import train
from harness.training.step import Step
from tests.conftest import free_port, start_ranks
from tests.limits import starting
from tests.test_one_curve import write_config

pytestmark = starting(2 * (2 + 3 + 4))
STEPS = 50
MEMORY, REFERENCE = "run.loader=memory", "run.loader=reference"
# run -> (keys, the numbers of ranks on which it is made, each from its first step)
RUNS = {
    "plain": ([MEMORY], (1, 2, 3, 4)),
    "reference": ([REFERENCE, "run.loader_threads=1"], (1, 2)),
    "float16": ([MEMORY, "run.precision=float16"], (1, 3)),
    "bfloat16": ([MEMORY, "run.precision=bfloat16"], (1, 2)),
    "float64": ([MEMORY, "run.precision=float64"], (1, 3)),
    "lars": ([MEMORY, "recipe.optimizer=lars", "run.recalibrate_images=140"], (1, 3)),
    "units": ([MEMORY, "run.unit_workers=2"], (1, 3, 4)),  # 4 units of 2 workers
}
# ranks of each start of one run -> the step after which it is interrupted
INTERRUPTED = {1: 13, 2: 29, 3: 37, 4: None}


def interrupt_after(step: int | None, patch: pytest.MonkeyPatch) -> None:
    """Let this process send itself SIGTERM in the step, and the ranks agree after each step."""
    take = Step.__call__

    def interrupting(self: Step, number: int, batches: Iterator[Batch]) -> None:
        take(self, number, batches)
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)

    patch.setattr(Step, "__call__", interrupting)
    patch.setattr("harness.training.loop.Agreement", lambda control, _: Agreement(control, 0.0))


def run_as_rank(folder: Path, ports: list[int]) -> None:
    """What each rank of W does: the runs of W, and its part of the interrupted one."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    ports = list(ports)

    def start(name: str, keys: list[str], resume: bool = False) -> None:
        if world_size > 1:  # one rank runs in the process of the tests
            os.environ["MASTER_PORT"] = str(ports.pop())
        config = load_config(folder / "config.yaml", ["run.sums=exact", *keys])
        train(config, folder / name, resume=resume)

    with pytest.MonkeyPatch.context() as patch:
        # so large a scale that the first steps of float16 overflow
        scaler = partial(torch.amp.GradScaler, init_scale=2.0**30)
        patch.setattr("harness.training.replica.torch.amp.GradScaler", scaler)
        for name, (keys, world_sizes) in RUNS.items():
            if world_size in world_sizes:
                start(f"{name}-{world_size}", keys)
        interrupt_after(INTERRUPTED[world_size], patch)
        with suppress(Stopped):
            start("interrupted", [MEMORY], resume=world_size > 1)


@pytest.fixture(scope="module")
def runs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs, made once."""
    folder = tmp_path_factory.mktemp("same-bits")
    path = write_config(folder, digits)
    mapping = yaml.safe_load(path.read_text())
    del mapping["run"]["micro_batch"]
    path.write_text(yaml.safe_dump(mapping))
    run_as_rank(folder, [])
    for world_size in (2, 3, 4):
        ports = [str(free_port()) for _ in range(len(RUNS) + 1)]
        program = "import sys; from harness.startup import import_quickly; "
        program += "import_quickly('tests.test_same_bits'); "
        program += "from tests.test_same_bits import *; "
        program += "run_as_rank(Path(sys.argv[1]), sys.argv[2:])"
        ranks = start_ranks(world_size, ["-c", program, str(folder), *ports])
        outputs = [rank.communicate() for rank in ranks]
        assert all(rank.returncode == 0 for rank in ranks), outputs
    return folder


def digest(run: Path) -> str:
    """The SHA-256 of the final weights and running statistics, as the log has it."""
    *_, finish = read_log(run / "log.jsonl")
    assert (finish["event"], finish["step"]) == ("finish", STEPS)
    return str(finish["weights_sha256"])


def curve(run: Path) -> list[tuple[object, ...]]:
    """Each line of the log that counts: steps, losses and errors."""
    return [
        (line["event"], line["step"], line["loss"], line["error"], line.get("top5_error"))
        for line in read_log(run / "log.jsonl")
        if line["event"] in ("train", "evaluation")
    ]


def noise(run: Path) -> list[tuple[object, ...]]:
    """The norms of gradients that the noise scale is made of."""
    return [
        (line["step"], line["worker"], line["minibatch"])
        for line in read_log(run / "log.jsonl")
        if line["event"] == "noise_scale"
    ]


PAIRS = [(name, world_size) for name, (_, sizes) in RUNS.items() for world_size in sizes[1:]]


@pytest.mark.parametrize(("name", "world_size"), PAIRS)
def test_the_same_bits_on_any_number_of_ranks(runs, name, world_size):
    one, other = runs / f"{name}-1", runs / f"{name}-{world_size}"
    assert digest(other) == digest(one)
    assert curve(other) == curve(one)
    assert noise(other) == noise(one)
    assert len(curve(one)) == STEPS + 2
    measured = [step for step, *_ in noise(one)]
    # the first steps of float16 overflow
    assert measured == [1, 11, 21, 31, 41] if name != "float16" else measured[-3:] == [21, 31, 41]


def test_the_same_bits_with_each_loader(runs):
    """Both give the same pixels."""
    assert digest(runs / "reference-1") == digest(runs / "plain-1")


def test_the_same_bits_after_interruptions_on_other_numbers_of_ranks(runs):
    lines = read_log(runs / "interrupted" / "log.jsonl")
    starts = [line for line in lines if line["event"] in ("start", "resume")]
    assert [start["world_size"] for start in starts] == [1, 2, 3, 4]
    begun = [start["step"] for start in starts]
    assert begun[0] == 0 < begun[1] < begun[2] < begun[3] < STEPS  # ranks agree a step later
    assert digest(runs / "interrupted") == digest(runs / "plain-1")
    ends = [
        load_checkpoint(list_checkpoints(runs / name / "checkpoints")[0])
        for name in ("plain-1", "interrupted")
    ]
    momenta = [end["optimizer"]["state"] for end in ends]
    for number, state in momenta[0].items():
        assert torch.equal(state["momentum_buffer"], momenta[1][number]["momentum_buffer"])


def test_other_precisions_and_units_have_bits_of_their_own(runs):
    """Or the comparisons would show nothing."""
    assert len({digest(runs / f"{name}-1") for name in RUNS if name != "reference"}) == 6


def test_float16_overflowed(runs):
    lines = read_log(runs / "float16-1" / "log.jsonl")
    assert sum(line.get("overflows", 0) for line in lines if line["event"] == "train") > 0
