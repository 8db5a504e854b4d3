"""Studies on this machine: real processes on the digits."""

import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from harness.runs.logging.jsonl import read_log
from launch.__main__ import main
from launch.local.study import devices_here, only_command
from launch.records import read_status
from launch.study import study_runs


@pytest.fixture
def study(small, tmp_path):
    """Writes a study on the small config: a variant a keyword, each with its `set`."""

    def write(*seeds, **variants):
        lines = [f"base: {small()}", f"seeds: {[*seeds]}", "variants:"]
        lines += [f"  {name}: {{set: {set_}}}" for name, set_ in variants.items()]
        path = tmp_path / "study.yaml"
        path.write_text("\n".join(lines))
        return path

    return write


@pytest.fixture
def start():
    """Starts `launch study` as a process, which is killed after the test, and its runs with it."""
    started = []

    def run(path, folder, *words):
        words = ["-m", "launch", "study", str(path), "--out", str(folder), *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen([sys.executable, *words], **pipes))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        with process:
            pass  # waits, and closes its pipe


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def table(folder, capsys):
    """`launch status`: each run's line, by its name."""
    capsys.readouterr()
    assert main(["status", str(folder)]) == 0
    return {row.split()[0]: row for row in capsys.readouterr().out.splitlines()}


@pytest.mark.timeout(480)  # five processes that import PyTorch
def test_side_by_side_interrupted_and_gone_on_with(start, study, tmp_path, capsys, monkeypatch):
    """A stopped run goes on where it stood, a finished one is not run again, and one that fails, of
    a variant that was added, is told and stops nobody."""
    long = "{recipe.minibatch: 32, recipe.epochs: 15, run.log_every_steps: 5}"
    variants = {"short": "{}", "long": long}
    folder = tmp_path / "runs" / "mine"
    first = start(study(1, **variants), folder, "--at-once", "2")

    def at_work():
        short, long = (read_status(folder / name / "1") for name in ("short", "long"))
        return short.get("state") == "finished" and long.get("step", 0) >= 5

    wait_for(at_work, first)  # a finished short run beside a long one
    states = table(folder, capsys)
    first.send_signal(signal.SIGINT)
    output = first.communicate()[0]
    assert first.returncode == 75, output
    assert " finished " in states["short-1"] and " running " in states["long-1"]
    assert "short-1 finished: error" in output and "long-1 stopped: stopped after step" in output
    assert "2 runs: 1 finished, 1 stopped" in output
    stopped_at = read_status(folder / "long" / "1")["step"]
    assert 5 <= stopped_at < 660
    assert " stopped " in table(folder, capsys)["long-1"]

    monkeypatch.setitem(sys.modules, "submitit", None)  # not needed here
    log = (folder / "short" / "1" / "log.jsonl").read_bytes()
    path = study(1, wrong="{data.train_images: 1400}", **variants)
    assert main(["study", str(path), "--out", str(folder)]) == 1
    output = capsys.readouterr().out
    assert "2 of 3 runs to do" in output and "short-1 started" not in output
    # as `harness train` tells it
    assert "wrong-1 failed: ended with exit code 2: " in output and "1437 images, but" in output
    assert output.index("wrong-1 failed") < output.index("long-1 finished: error")
    assert "3 runs: 2 finished, 1 failed" in output
    assert " failed " in table(folder, capsys)["wrong-1"]
    events = read_log(folder / "long" / "1" / "log.jsonl")
    starts = [(line["event"], line["step"]) for line in events if "world_size" in line]
    assert starts == [("start", 0), ("resume", stopped_at)]

    assert main(["study", str(study(1, **variants)), "--out", str(folder)]) == 0
    output = capsys.readouterr().out
    assert "0 of 2 runs to do" in output and "started" not in output
    assert (folder / "short" / "1" / "log.jsonl").read_bytes() == log


@pytest.fixture
def taught(small, tmp_path, monkeypatch):
    """Writes a study of students, two seeds, whose teacher is a config; runs/ is the test's own."""
    monkeypatch.chdir(tmp_path)

    def write(**teachers_recipe):
        quick = {"recipe__epochs": 2, "recipe__milestones": []}
        teacher = small("teacher.yaml", **quick, **teachers_recipe)
        base = small("student.yaml", **quick, model__width=2)
        base.write_text(f"{base.read_text()}distill: {{teacher: {teacher}, precision: float32}}")
        path = tmp_path / "study.yaml"
        path.write_text(f"base: {base}\nseeds: [1, 2]\nvariants: {{warm: {{set: {{}}}}}}")
        return path

    return write


@pytest.mark.timeout(480)  # three processes that import PyTorch
def test_students_of_one_teacher_wait_for_it(taught, tmp_path, capsys):
    """It is trained once, then both at once; and not again for a run that is missing later."""
    words = ["--at-once", "2", "run.log_every_steps=1"]
    assert main(["study", str(taught()), *words]) == 0
    output = capsys.readouterr().out
    assert "teacher-teacher: 10 steps" in output and "3 of 3 runs to do" in output
    ended = output.index("teacher-teacher finished: error")
    assert output.count("teacher-teacher started") == 1
    started = [output.index(f"warm-{seed} started") for seed in (1, 2)]
    finished = [output.index(f"warm-{seed} finished") for seed in (1, 2)]
    assert ended < min(started) and max(started) < min(finished)
    assert "3 runs: 3 finished" in output
    study = tmp_path / "runs" / "studies" / "study"
    for seed in (1, 2):
        config = yaml.safe_load((study / "warm" / str(seed) / "config.yaml").read_text())
        assert (config["seed"], config["distill"]["teacher"]) == (seed, "runs/teacher")
    shutil.rmtree(tmp_path / "runs" / "teacher")
    assert main(["study", str(tmp_path / "study.yaml"), *words]) == 0
    assert "0 of 2 runs to do" in capsys.readouterr().out


@pytest.mark.timeout(480)
def test_students_of_a_teacher_that_fails_are_not_started(taught, capsys):
    words = ["--at-once", "2", "teacher.run.data_root=/nowhere"]
    assert main(["study", str(taught()), *words]) == 1
    output = capsys.readouterr().out
    assert "teacher-teacher failed: ended with exit code 2: /nowhere" in output
    for seed in (1, 2):
        assert f"warm-{seed} not started: its teacher, runs/teacher, has failed" in output
    assert "3 runs: 3 failed" in output


def test_the_dry_run_shows_the_plans_and_writes_nothing(study, tmp_path, capsys):
    path, folder = study(1, 2, a="{}", b="{recipe.reference_lr: 0.05}"), tmp_path / "runs"
    assert main(["study", str(path), "--out", str(folder), "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "a: 15 steps, peak lr 0.1 × 256/32 = 0.8\n" in output
    assert "b: 15 steps, peak lr 0.05 × 256/32 = 0.4\n" in output
    assert "4 of 4 runs to do" in output and not folder.exists()


def test_one_command_at_a_time(study, tmp_path, capsys):
    with only_command(tmp_path / "runs"):
        assert main(["study", str(study(1, a="{}")), "--out", str(tmp_path / "runs")]) == 2
    assert "another command runs this study; wait for it" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--nodes", "2"], "--nodes has no meaning without --cluster"),
        (["--wait"], "--wait has no meaning without --cluster"),
        (["--at-once", "0"], "--at-once 0: at least 1 is needed"),
        (["recipe.epoch=3"], "did you mean recipe.epochs?"),
    ],
)
def test_mistakes_start_nothing(study, tmp_path, capsys, words, part):
    folder = tmp_path / "runs"
    assert main(["study", str(study(1, a="{}")), "--out", str(folder), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and part in line
    assert not folder.exists()


def test_runs_are_dealt_out_to_the_gpus(study, tmp_path, monkeypatch):
    """Two GPUs that this process may see, 8 cores: a run each, or as many as are asked for."""
    path = study(1, a="{}")
    runs = study_runs(path, tmp_path, ["run.device=auto"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    assert [(d.gpu, d.threads) for d in devices_here(runs, None)] == [("3", 4), ("5", 4)]
    dealt = [(d.gpu, d.threads) for d in devices_here(runs, 3)]
    assert dealt == [("3", 2), ("5", 2), ("3", 2)]
    on_cpu = study_runs(path, tmp_path)
    assert [(d.gpu, d.threads) for d in devices_here(on_cpu, None)] == [(None, 8)]
    assert [(d.gpu, d.threads) for d in devices_here(on_cpu, 2)] == [(None, 4)] * 2
