"""Faults caused on purpose: killed at random moments, full disks, vanished folders, NaN."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from harness import load_config
from harness.runs.checkpoint import list_checkpoints, load_checkpoint, newest_checkpoint
from harness.runs.logging.jsonl import read_log
from harness.training.setup import train
from tests.conftest import free_port, harness
from tests.faults import SLOW_STEP, newest_step, read_until, start, wait_for
from tests.test_train import assert_same, final_weights

WRITER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from harness.runs.checkpoint import checkpoint_path, newest_checkpoint
from harness.runs.checkpoint import prune_checkpoints, save_checkpoint

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
moments = random.Random(1)

def write_for_ever(from_step, acknowledge):
    for step in range(from_step + 1, from_step + 10**6):
        weight = torch.full((200_000,), float(step))
        save_checkpoint(checkpoint_path(folder, 1, step), {"step": step, "weight": weight})
        prune_checkpoints(folder, 3, None)
        os.write(acknowledge, step.to_bytes(8, "little"))

step = torn = 0
for kill in range(kills):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        write_for_ever(step, writing)
    os.close(writing)
    acknowledged = os.read(reading, 8)  # it has written one
    time.sleep(moments.uniform(0.0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    acknowledged += b"".join(iter(lambda: os.read(reading, 2**16), b""))
    os.close(reading)
    torn += len(list(folder.glob("*.tmp"))) + len(list(folder.glob(".*.tmp"))) > 0
    for path in folder.glob(".*.tmp"):
        path.unlink()
    reports = []
    found = newest_checkpoint(folder, reports.append)
    newest = found[1]["step"] if found else 0
    last = int.from_bytes(acknowledged[-8:], "little")
    assert not reports, reports
    assert newest >= max(last, step), (newest, last, step)
    assert found is None or found[1]["weight"].eq(newest).all()
    step = newest
print(kills, step, torn)
"""


def test_100_kills_of_the_checkpoint_writer_leave_a_whole_newest_checkpoint(tmp_path):
    """Nothing that was acknowledged is lost, no torn file is taken, none is even reported."""
    out = subprocess.run(
        [sys.executable, "-c", WRITER, str(tmp_path), "100"], capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    kills, steps, torn = map(int, out.stdout.split())
    assert kills == 100
    assert steps >= 100 and torn >= 10  # it did write, and was hit while it wrote


def test_5_kills_of_a_whole_run_at_random_moments(small, tmp_path):
    check_kills_of_a_whole_run(small, tmp_path, kills=5)


@pytest.mark.soak
def test_100_kills_of_a_whole_run_at_random_moments(small, tmp_path):
    check_kills_of_a_whole_run(small, tmp_path, kills=100)


def check_kills_of_a_whole_run(small, tmp_path, kills: int) -> None:
    """Always resumable, on one rank or two in turn, to the weights of the straight run."""
    moments = random.Random(kills)
    # as many steps as the kills need: a checkpoint every 0.1 s
    config = small(
        recipe__epochs=max(4 * kills, 40),
        recipe__milestones=[],
        run__checkpoint_every_minutes=0.002,
        run__precision="float64",
        run__evaluate_every_epochs=10,
        run__keep_checkpoints=2,
    )
    arguments = ["train", config, "--out", tmp_path / "run", "--resume"]
    killed_at = []
    while len(killed_at) < kills:
        ranks, port = 1 + len(killed_at) % 2, free_port()
        processes = [start(arguments, rank, ranks, port) for rank in range(ranks)]
        before = newest_step(tmp_path / "run")
        victim = moments.choice(processes)
        wait_for(lambda before=before: newest_step(tmp_path / "run") > before, "a checkpoint")
        time.sleep(moments.uniform(0.0, 0.5))
        victim.kill()
        for process in processes:
            process.communicate()
        killed_at.append(newest_step(tmp_path / "run"))
    total_steps = load_config(config).total_steps
    assert killed_at == sorted(killed_at) and killed_at[0] > 0 and killed_at[-1] < total_steps
    last = start(arguments)
    out, _ = last.communicate()
    assert last.returncode == 0 and "damaged" not in out, out
    train(load_config(config), tmp_path / "straight")
    assert_same(final_weights(tmp_path / "straight"), final_weights(tmp_path / "run"), 1e-10)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["incarnation"] == kills + 1
    print(f"{kills} kills at steps {killed_at} of {total_steps}")


def limit_files(process, limit: int) -> None:
    """No file of the process may grow beyond `limit` bytes any more: what a full disk does."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def test_a_disk_full_for_a_while_costs_checkpoints_only(small, tmp_path):
    config = small(recipe__epochs=12, run__log_every_steps=1)
    plant = SLOW_STEP.format(step=11, rank=0, seconds=3)
    plant += SLOW_STEP.format(step=31, rank=0, seconds=3)
    process = start(["train", config, "--out", tmp_path / "run"], plant=plant)
    read_until(process, "reached step 11")
    wait_for(lambda: newest_step(tmp_path / "run") == 10, "the checkpoint of step 10")
    limit_files(process, 0)
    out = read_until(process, "reached step 31")
    older = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [load_checkpoint(path)["step"] for path in older] == [10, 5]
    assert "checkpoint-001-00000015.pt: not written: File too large; continuing" in out
    assert out.count("log.jsonl: not written: File too large; continuing") == 1
    assert out.count("status.json: not written: File too large") == 1
    limit_files(process, resource.RLIM_INFINITY)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    assert "Traceback" not in out
    train(load_config(config), tmp_path / "straight")
    assert_same(final_weights(tmp_path / "straight"), final_weights(tmp_path / "run"), 0.0)
    steps = [line["step"] for line in read_log(tmp_path / "run" / "log.jsonl")]
    assert 11 in steps and 20 not in steps and 60 in steps  # torn lines harm no others


@pytest.mark.counts_files
def test_a_disk_full_to_the_end_fails_and_says_so_and_resumes(small, tmp_path):
    config = small(recipe__epochs=4)
    plant = SLOW_STEP.format(step=11, rank=0, seconds=3)
    arguments = ["train", config, "--out", tmp_path / "run"]
    process = start(arguments, plant=plant)
    read_until(process, "reached step 11")
    wait_for(lambda: newest_step(tmp_path / "run") == 10, "the checkpoint of step 10")
    limit_files(process, 0)
    out, _ = process.communicate()
    assert process.returncode == 1, out
    assert "its checkpoint could not be written (File too large)" in out
    assert "Traceback" not in out
    assert newest_step(tmp_path / "run") == 10
    out = harness(*arguments, "--resume")
    assert out.returncode == 0, out.stderr
    train(load_config(config), tmp_path / "straight")
    assert_same(final_weights(tmp_path / "straight"), final_weights(tmp_path / "run"), 0.0)


def test_stopped_on_a_full_disk_says_that_no_checkpoint_was_written(small, tmp_path):
    config = small(recipe__epochs=4)
    plant = SLOW_STEP.format(step=7, rank=0, seconds=3)
    process = start(["train", config, "--out", tmp_path / "run"], plant=plant)
    read_until(process, "reached step 7")
    wait_for(lambda: newest_step(tmp_path / "run") == 5, "the checkpoint of step 5")
    limit_files(process, 0)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate()
    assert process.returncode == 75, out
    assert "stopped after step 8 of 20, its checkpoint could not be written" in out
    assert newest_step(tmp_path / "run") == 5


def test_a_run_folder_that_vanishes_is_not_made_again_in_silence(small, tmp_path):
    config = small(recipe__epochs=4)
    plant = SLOW_STEP.format(step=7, rank=0, seconds=3)
    process = start(["train", config, "--out", tmp_path / "run"], plant=plant)
    read_until(process, "reached step 7")
    wait_for(lambda: newest_step(tmp_path / "run") == 5, "the checkpoint of step 5")
    shutil.rmtree(tmp_path / "run")
    out, _ = process.communicate()
    assert process.returncode == 1, out
    assert "its checkpoint could not be written (No such file or directory)" in out
    assert "Traceback" not in out
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_cannot_be_written_is_told_before_anything_starts(small):
    out = harness("train", small(), "--out", "/proc/run")
    assert out.returncode == 2
    assert out.stderr.startswith("error: /proc/run: cannot be written: ")
    assert len(out.stderr.splitlines()) == 1


def test_of_two_runs_started_at_once_on_one_folder_one_is_refused(small, tmp_path):
    config = small(recipe__epochs=20)
    arguments = ["train", config, "--out", tmp_path / "run", "--resume"]
    processes = [start(arguments) for _ in range(3)]
    outputs = [process.communicate()[0] for process in processes]
    codes = [process.returncode for process in processes]
    assert sorted(codes) == [0, 2, 2], outputs
    for code, output in zip(codes, outputs, strict=True):
        if code == 2:
            assert "another process started on it" in output or "in use by process" in output
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["incarnation"]) == ("finished", 1)


def test_a_cut_off_incarnation_notices_and_writes_nothing_more(small, tmp_path):
    """Frozen for a while, as a node cut off: another process took over meanwhile."""
    config = small(recipe__epochs=8, run__log_every_steps=1)
    plant = SLOW_STEP.format(step=7, rank=0, seconds=1)
    arguments = ["train", config, "--out", tmp_path / "run"]
    process = start(arguments, plant=plant)
    read_until(process, "reached step 7")
    process.send_signal(signal.SIGSTOP)
    shorter = "from harness.runs import ownership; ownership.WATCH_S = 2.0"
    second = start([*arguments, "--resume"], plant=shorter)
    out, _ = second.communicate()
    assert second.returncode == 0, out
    assert f"waiting up to 2 s to see whether process {process.pid} on" in out
    weights, log = final_weights(tmp_path / "run"), (tmp_path / "run" / "log.jsonl").read_text()
    process.send_signal(signal.SIGCONT)
    out, _ = process.communicate()
    assert process.returncode == 1, out
    assert "incarnation 2 took over; 1 ends here" in out
    assert_same(weights, final_weights(tmp_path / "run"), 0.0)
    added = (tmp_path / "run" / "log.jsonl").read_text()[len(log) :].splitlines()
    assert len(added) <= 1, added  # the line whose status it could not write


NAN = """
from harness.training.step import Step
usual = Step._forward_backward
steps = []
def call(self, step, batch):
    steps.append(1)
    if rank == 1 and len(steps) == 8:
        self.replica.preprocess.mean.fill_(float("nan"))
    usual(self, step, batch)
Step._forward_backward = call
"""


def test_nan_at_one_rank_is_agreed_by_all_and_the_last_good_checkpoint_kept(small, tmp_path):
    config, port = small(recipe__epochs=8), free_port()
    arguments = ["train", config, "--out", tmp_path / "run"]
    processes = [start(arguments, rank, 2, port, plant=NAN) for rank in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], outputs
    for output in outputs:
        assert "the loss is not finite at step 7" in output
    (line,) = [e for e in read_log(tmp_path / "run" / "log.jsonl") if e["event"] == "diverged"]
    assert line["step"] == 8 and len(set(line["image_ids"])) == 256
    found = newest_checkpoint(tmp_path / "run" / "checkpoints", print)
    assert found is not None and found[1]["step"] == 5
    assert all(bool(torch.isfinite(value).all()) for value in found[1]["model"].values())


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"])
def test_a_signal_at_one_rank_stops_all_after_the_same_step(small, tmp_path, name):
    config, port = small(recipe__epochs=400, run__log_every_steps=1), free_port()
    arguments = ["train", config, "--out", tmp_path / "run"]
    processes = [start(arguments, rank, 2, port) for rank in range(2)]
    read_until(processes[0], "step 7/")
    os.kill(processes[1].pid, getattr(signal, name))
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [75, 75], outputs
    stopped = f"stopped after step {newest_step(tmp_path / 'run')} of 2000, checkpoint written"
    assert stopped in outputs[0]
