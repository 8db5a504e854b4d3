"""run.profile_steps: the straggling rank, by hand and with a rank that is really slow."""

import json

import pytest

from harness.runs.logging.jsonl import read_log
from harness.training.profiling import PARTS, straggling_rank
from tests.conftest import start_ranks


def times(forward, backward=2.0, wait=0.0, exposed=1.0):
    ms = dict.fromkeys((*PARTS, "other", "total"), 0.0)
    return ms | {
        "forward": forward,
        "backward": backward,
        "data wait": wait,
        "all-reduce exposed": exposed,
    }


def test_the_straggler_is_the_rank_that_is_last_to_sum_gradients():
    # busy 3, 3, 3 + 1.5 ms; that the others wait for it (exposed) is not their own time
    ranks = [times(1.0, exposed=3.0), times(1.0, exposed=3.0), times(1.0, wait=1.5)]
    rank, why = straggling_rank(ranks)
    assert rank == 2
    assert "2, 1.5 ms (50 %) a step longer" in why and why.endswith("1.5 ms of it data wait")


def test_chance_makes_no_straggler():
    rank, why = straggling_rank([times(1.0), times(1.12)])  # 0.12 of 3 ms: 4 %
    assert rank is None and why == "straggling rank: none, the slowest takes 4.0 % longer"
    assert straggling_rank([times(1.0)])[0] is None


SLOW = """
import os, sys, time
from harness import load_config
from harness.execution.preprocess import Preprocess as Pixels
from harness.training.setup import train

usual = Pixels.__call__
def slow(self, images):
    time.sleep(0.2)
    return usual(self, images)
if os.environ["RANK"] == "1":
    Pixels.__call__ = slow
train(load_config(sys.argv[1], ["run.profile_steps=2"]), sys.argv[2])
"""


def test_a_slow_rank_is_named(small, tmp_path):
    out = tmp_path / "run"
    processes = start_ranks(2, ["-c", SLOW, str(small(run__evaluate_every_epochs=9)), str(out)])
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    (line,) = [line for line in read_log(out / "log.jsonl") if line["event"] == "profile"]
    assert line["straggling_rank"] == 1 and line["step"] == 5 + 2 + 2  # warm-up, timed, traced
    fast, slow = line["ranks"]
    assert slow["forward"] > 200  # ms: one micro-batch a step
    assert fast["all-reduce exposed"] > 100  # waits for the other's gradients
    for ms in (fast, slow):
        parts = sum(ms[part] for part in (*PARTS, "other"))
        assert parts == pytest.approx(ms["total"]) and min(ms.values()) > -1e-6
    table = (out / "profile" / "table.txt").read_text()
    assert table.startswith("profile of steps 6 to 7, ms a step\nrank  data wait  forward")
    assert "straggling rank: 1," in table and table.rstrip().endswith("forward")
    assert table in outputs[0][0]
    for rank in (0, 1):
        trace = json.loads((out / "profile" / f"rank{rank}.pt.trace.json").read_text())
        names = [event.get("name") for event in trace["traceEvents"]]
        assert names.count("optimizer") == 2 and "aten::conv2d" in names
