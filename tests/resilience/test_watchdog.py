"""Ranks that hang, freeze, die or are too slow to stop: named, and all ranks ended in time."""

import signal
import socket
import time

import pytest
import torch

from harness.distributed import World
from harness.resilience.stopping import StopRequest
from harness.resilience.watchdog import Watchdog
from tests.conftest import free_port
from tests.faults import SLOW_STEP, newest_step, read_until, start, wait_for

HOST = socket.gethostname()
TIMEOUT_S = 4


def test_a_compilation_that_moves_on_is_no_hang(monkeypatch):
    clock = {"s": 0.0}
    monkeypatch.setattr("harness.resilience.watchdog.time.monotonic", lambda: clock["s"])
    watchdog = Watchdog(World(0, 1, 0, 1, "alone", torch.device("cpu")), TIMEOUT_S, StopRequest())
    assert watchdog.place().age_s == 0
    clock["s"] = 2.0 * TIMEOUT_S
    assert watchdog.place().age_s == 2 * TIMEOUT_S  # nothing was compiled

    def slow(graph, inputs):
        watchdog.place()  # its threads look every second or so
        clock["s"] += TIMEOUT_S - 1
        ages.append(watchdog.place().age_s)
        return aot_eager(graph, inputs)

    ages = []
    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    block = torch.compile(lambda x: (x * x).sin(), backend=slow, dynamic=False)
    for size in (2, 3, 4):  # a graph each, in far more time than the limit
        block(torch.ones(size, requires_grad=True))
    assert ages == [TIMEOUT_S - 1] * 3
    assert watchdog.place().age_s == 0
    clock["s"] += TIMEOUT_S + 1
    assert watchdog.place().age_s == TIMEOUT_S + 1  # a compiler that hangs is found


def start_two(small, tmp_path, plant="", **environment):
    config = small(recipe__epochs=2000, run__hang_timeout_s=TIMEOUT_S, run__log_every_steps=1)
    port = free_port()
    arguments = ["train", config, "--out", tmp_path / "run"]
    return [start(arguments, rank, 2, port, plant, **environment) for rank in range(2)]


def end(processes):
    for process in processes:
        process.kill()
        with process:
            pass  # waits, and closes its pipe


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_rank_is_found_and_all_ranks_end(small, tmp_path, frozen):
    processes = start_two(small, tmp_path)
    try:
        read_until(processes[0], "step 3/")
        processes[frozen].send_signal(signal.SIGSTOP)
        begun_s = time.monotonic()
        out, _ = processes[1 - frozen].communicate()
        assert processes[1 - frozen].returncode == 1, out
        assert time.monotonic() - begun_s < 8 * TIMEOUT_S  # and not the group's 68 s
        if frozen == 1:
            assert f"rank 1 on {HOST} (pid {processes[1].pid}) at step" in out
            assert f"process frozen or lost for {TIMEOUT_S} s (run.hang_timeout_s)" in out
        else:  # it keeps the store that the ranks talk over
            assert "the ranks' store at 127.0.0.1:" in out and "does not answer" in out
        processes[frozen].send_signal(signal.SIGCONT)
        out, _ = processes[frozen].communicate()
        assert processes[frozen].returncode == 1, out
    finally:
        end(processes)


def test_a_hung_rank_is_told_from_the_one_that_waits_for_it(small, tmp_path):
    """Both processes live and stand still; rank 1 has sent no gradients of step 3."""
    plant = SLOW_STEP.format(step=3, rank=1, seconds=1000)
    processes = start_two(small, tmp_path, plant)
    try:
        waiting, _ = processes[0].communicate()
        hung, _ = processes[1].communicate()
        assert [process.returncode for process in processes] == [1, 1]
        named = f"rank 1 on {HOST} (pid {processes[1].pid}) at step 3"
        assert named in waiting and named in hung
        assert "time.sleep(1000)" in hung or "in call" in hung  # where its main thread stands
    finally:
        end(processes)


def test_a_slow_rank_that_moves_is_waited_for(small, tmp_path):
    """A step of 8 micro-batches takes 8 s, twice the limit; rank 0 waits, rank 1 moves."""
    plant = """
from harness.training.step import Step
usual = Step._forward_backward
def slow(self, step, batch):
    time.sleep(1)
    usual(self, step, batch)
if rank == 1:
    Step._forward_backward = slow
"""
    config = small(run__hang_timeout_s=TIMEOUT_S, run__log_every_steps=1)
    port, out = free_port(), tmp_path / "run"
    arguments = ["train", config, "recipe.minibatch=1024", "run.micro_batch=64", "--out", out]
    arguments += ["recipe.epochs=1", "recipe.milestones=[]"]  # one step
    processes = [start(arguments, rank, 2, port, plant) for rank in range(2)]
    try:
        out, _ = processes[0].communicate()
        assert processes[0].wait() == 0, out
        assert processes[1].wait() == 0
    finally:
        end(processes)


def test_a_killed_rank_is_named_at_once(small, tmp_path):
    processes = start_two(small, tmp_path)
    try:
        read_until(processes[0], "step 3/")
        processes[1].kill()
        out, _ = processes[0].communicate()
        assert processes[0].returncode == 1
        assert f"lost rank 1 on {HOST} (pid {processes[1].pid})" in out
        assert "Traceback" not in out and "frame #" not in out
    finally:
        end(processes)


def test_a_step_longer_than_the_grace_time_is_left_with_the_newest_checkpoint(small, tmp_path):
    config = small(recipe__epochs=5)
    plant = SLOW_STEP.format(step=7, rank=0, seconds=1000)
    arguments = ["train", config, "--out", tmp_path / "run"]
    process = start(arguments, plant=plant, HARNESS_GRACE_S="2")
    try:
        read_until(process, "reached step 7")
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate()
        assert process.returncode == 75, out
        assert "no step ended within 2 s of the signal; the newest checkpoint is kept" in out
        assert newest_step(tmp_path / "run") == 5
    finally:
        end([process])


def test_a_second_ctrl_c_ends_at_once(small, tmp_path):
    config = small(recipe__epochs=5)
    plant = SLOW_STEP.format(step=7, rank=0, seconds=1000)
    process = start(["train", config, "--out", tmp_path / "run"], plant=plant)
    try:
        read_until(process, "reached step 7")
        process.send_signal(signal.SIGINT)
        time.sleep(2.2)  # later than a launcher's copy of the first one
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        wait_for(lambda: process.poll() is not None, "the end", 5)
        assert process.returncode == 130
    finally:
        end([process])
