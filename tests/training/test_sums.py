"""Exact or fast sums: what is chosen, what is refused, and how a run with exact sums ends."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from harness import load_config
from harness.commands.command_line import main
from harness.config.errors import ConfigError
from harness.distributed import World
from harness.errors import UserError
from harness.outcome import Stopped
from harness.rank_card import Card, difference
from harness.recipe.minibatch import Minibatch
from harness.runs.logging.jsonl import read_log
from harness.training.replica import Replica
from harness.training.run import Diverged
from harness.training.setup import train
from harness.training.tuning.sums import check_deterministic
from tests.conftest import SMALL
from tests.test_same_bits import interrupt_after

ALONE = World(0, 1, 0, 1, "alone", torch.device("cpu"))
EXACT = ["run.micro_batch=auto", "run.sums=exact"]
AUTO = ["run.micro_batch=auto", "run.sums=auto"]


def status(run: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((run / "status.json").read_text())
    return found


def start_line(run: Path) -> dict[str, object]:
    return next(line for line in read_log(run / "log.jsonl") if line["event"] == "start")


@pytest.fixture(scope="module")
def exact(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with exact sums; its config stands beside."""
    folder = tmp_path_factory.mktemp("exact")
    run = SMALL["run"] | {"data_root": str(digits)}
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL | {"run": run}))
    train(load_config(folder / "small.yaml", EXACT), folder / "run")
    return folder / "run"


@pytest.mark.parametrize(("cost", "sums"), [(1e9, "exact"), (-1.0, "fast")])
def test_auto_takes_exact_sums_where_they_cost_little(
    exact, tmp_path, monkeypatch, capsys, cost, sums
):
    monkeypatch.setattr("harness.training.tuning.sums.COST", cost)
    run = tmp_path / "run"
    result = train(load_config(exact.parent / "small.yaml", AUTO), run)
    assert start_line(run)["sums"] == sums
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sums  ")]
    opening = {"exact": "sums  exact, in passes of 32 images: ", "fast": "sums  fast: "}[sums]
    assert len(said) == 1 and said[0].startswith(opening)
    same = result.weights_sha256 == status(exact)["weights_sha256"]
    assert same == (sums == "exact")  # the trial leaves nothing behind


@pytest.fixture(scope="module")
def interrupted(exact: Path) -> Path:
    """The same run, interrupted in its second epoch."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        interrupt_after(6, patch)
        train(load_config(exact.parent / "small.yaml", EXACT), exact.parent / "interrupted")
    return exact.parent / "interrupted"


def test_a_resume_keeps_what_was_measured(exact, interrupted, tmp_path, monkeypatch):
    monkeypatch.setattr("harness.training.tuning.sums.COST", -1.0)
    config, run = load_config(exact.parent / "small.yaml", AUTO), tmp_path / "run"
    shutil.copytree(interrupted, run)
    result = train(config, run, resume=True)
    assert result.weights_sha256 == status(exact)["weights_sha256"]


def test_a_resume_with_a_micro_batch_of_its_own_is_refused(exact, interrupted):
    config = load_config(exact.parent / "small.yaml")  # 256 images
    with pytest.raises(UserError, match=r"ran with exact sums, but run\.micro_batch is 256"):
        train(config, interrupted, resume=True)


def test_a_micro_batch_of_ones_own_means_fast_sums(small, tmp_path, capsys):
    train(load_config(small()), tmp_path / "run")  # 256 images, a unit has 32
    said = "sums  fast: run.micro_batch is 256 images, those of a unit are 32"
    assert said in capsys.readouterr().out.splitlines()
    assert start_line(tmp_path / "run")["sums"] == "fast"


def test_a_resume_under_other_conditions_says_so(exact, interrupted, tmp_path, capsys):
    recorded = json.loads((exact / "environment.json").read_text())["exact"]
    assert recorded["threads of an operation"] == 1  # whatever PyTorch's choice is
    assert recorded["CPU instructions"] == torch.backends.cpu.get_cpu_capability()
    shutil.copytree(interrupted, tmp_path / "run")
    before = torch.get_num_threads()
    keys = [*EXACT, "run.intra_op_threads=2"]
    train(load_config(exact.parent / "small.yaml", keys), tmp_path / "run", resume=True)
    said = capsys.readouterr().out
    assert "resumed at step 7 under other conditions: threads of an operation 1 → 2" in said
    assert torch.get_num_threads() == before
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ([*EXACT, "run.unit_workers=3"], "run.unit_workers: 3 does not divide the 8 workers"),
        (
            [*EXACT, "run.gradient_precision=bfloat16"],
            "run.gradient_precision: bfloat16 rounds each rank",
        ),
        (
            ["run.sums=exact", "run.micro_batch=64"],
            "run.micro_batch: 64, but a pass of exact sums is a unit of 32",
        ),
        (["run.sums=fast", "run.unit_workers=2"], "run.unit_workers: has no meaning with sums"),
    ],
)
def test_what_exact_sums_rule_out_is_refused(small, keys, says):
    with pytest.raises(ConfigError, match=says) as found:
        load_config(small(), keys)
    assert "\n" not in str(found.value)


def test_more_ranks_than_units_are_refused():
    minibatch = Minibatch(8, 32, unit_workers=2)
    assert [minibatch.workers_of(rank, 3) for rank in range(3)] == [
        *(range(0, 4), range(4, 6), range(6, 8))
    ]
    with pytest.raises(UserError, match=r"8 workers, 4 units of 2: start at most 4$"):
        minibatch.workers_of(0, 5)


def test_ranks_with_other_threads_are_refused():
    cards = [Card(rank, "node", exact={"threads of an operation": rank + 1}) for rank in range(2)]
    assert difference(*cards, lambda *_: None) == (
        "threads of an operation: 2, rank 0 on node has 1; exact sums need the same on all ranks: "
        "make them equal, or set run.sums=fast"
    )


class PutBackward(torch.autograd.Function):
    """An identity whose backward pass uses an operation that is not deterministic."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.put(torch.tensor([0]), torch.ones(1))


class InBackward(nn.Module):
    def forward(self, x):
        return PutBackward.apply(x)


class InForward(nn.Module):
    def forward(self, x):
        pooled, places = nn.functional.max_pool2d(x, 2, return_indices=True)
        return nn.functional.max_unpool2d(pooled, places, 2)


@pytest.mark.parametrize(
    ("module", "operation"), [(InForward, "max_unpooling2d_forward_out"), (InBackward, "put_")]
)
def test_an_operation_that_is_not_deterministic_is_named_with_its_module(small, module, operation):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), module(), nn.Flatten(), nn.Linear(144, 10))
    replica = Replica(load_config(small(), EXACT), network, ALONE)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(UserError) as found:
            check_deterministic(replica)
    finally:
        torch.use_deterministic_algorithms(False)
    assert str(found.value) == (
        f"run.sums: exact, but {operation} in 1 ({module.__name__}) has no deterministic "
        "implementation here; replace it, or set run.sums=fast"
    )
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_gradient_beyond_the_range_ends_like_a_divergence(small, tmp_path, monkeypatch):
    monkeypatch.setattr("harness.training.exact_gradients.LARGEST_SUM", 2.0**45)
    with pytest.raises(Diverged) as found:
        train(load_config(small(), EXACT), tmp_path / "run")
    assert str(found.value).startswith("the gradient of ")
    assert "is beyond the range of exact sums at step 0 (lr 0.1); its images" in str(found.value)
    assert status(tmp_path / "run")["state"] == "failed"
    assert not list((tmp_path / "run" / "checkpoints").glob("*.pt"))


def test_the_command_line_says_it_in_one_line(small, capsys):
    assert main(["train", str(small()), *EXACT, "run.unit_workers=3"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "run.unit_workers: 3 does not divide the 8 workers; lower it" in line


def test_the_final_line_shows_the_weights_digest(exact, capsys):
    config = str(exact.parent / "small.yaml")
    assert main(["train", config, *EXACT, "--out", str(exact), "--resume"]) == 0
    digits = str(status(exact)["weights_sha256"])
    assert len(digits) == 64
    assert capsys.readouterr().out.splitlines()[-1] == f"run folder {exact}, weights {digits[:12]}"
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") is None  # restored
