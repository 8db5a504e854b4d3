"""Launchers of installed packages, by the example of docs/launchers.md; cancelling runs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.records import read_records
from launch.registry import find_backend
from tests.faults import wait_for
from tests.packages import install, install_page

CLUSTER = """\
backend: {backend}
folder: {folder}
nodes: 1
gpus_per_node: 2
cpus_per_gpu: 1
timeout_min: 60
run: {{device: cpu}}
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Writes a cluster file for a launcher, the page's being installed."""
    site = tmp_path / "site"
    install_page("launchers.md", site, monkeypatch)

    def write(backend="torchrun"):
        path = tmp_path / "machine.yaml"
        path.write_text(CLUSTER.format(backend=backend, folder=tmp_path / "runs"))
        return str(path)

    return write


def test_the_pages_launcher_runs_two_ranks_to_the_end(machine, small, tmp_path, capfd):
    config, cluster = str(small()), machine()
    assert main(["submit", config, "--cluster", cluster, "--dry-run"]) == 0
    script = capfd.readouterr().out
    assert "torch.distributed.run --nproc-per-node 2" in script
    assert not (tmp_path / "runs").exists()
    assert main(["submit", config, "--cluster", cluster, "--wait"]) == 0
    shown = capfd.readouterr().out
    assert "finished: error " in shown and "step 15/15" in shown
    (run,) = (tmp_path / "runs").glob("*/status.json")
    log = (run.parent / "log.jsonl").read_text().splitlines()
    assert json.loads(log[0])["world_size"] == 2
    assert main(["status", str(run.parent)]) == 0
    assert "finished" in capfd.readouterr().out
    assert main(["cancel", str(run.parent)]) == 0
    assert "nothing is waiting or running" in capfd.readouterr().out


def test_a_run_on_this_machine_is_cancelled_and_can_be_resumed(small, tmp_path, capfd):
    study = tmp_path / "study.yaml"
    base = small(recipe__epochs=400, run__log_every_steps=1)
    study.write_text(f"base: {base}\nseeds: [1]\nvariants: {{base: {{set: {{}}}}}}\n")
    words = [sys.executable, "-m", "launch", "study", str(study), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
    wait_for(lambda: any((tmp_path / "out").glob("*/*/checkpoints/*.pt")), "a checkpoint")
    assert main(["cancel", str(tmp_path / "out")]) == 0
    assert "base-1: job " in capfd.readouterr().out
    out, _ = process.communicate()
    assert process.returncode == 75 and "stopped after step" in out
    assert main(["status", str(tmp_path / "out")]) == 0
    assert "submit it again to resume" in capfd.readouterr().out


def test_a_process_number_that_was_used_again_is_not_cancelled(small, tmp_path):
    """Another program may have got the number of a run that has ended."""
    other = subprocess.Popen(["sleep", "60"])
    try:
        study = tmp_path / "study.yaml"
        study.write_text(f"base: {small()}\nseeds: [1]\nvariants: {{base: {{set: {{}}}}}}\n")
        assert main(["study", str(study), "--out", str(tmp_path / "out")]) == 0
        path = tmp_path / "out.local" / "job.json"
        records = json.loads(path.read_text())
        records["base-1"]["job_id"] = str(other.pid)
        path.write_text(json.dumps(records))
        record = read_records(tmp_path / "out", "local")["base-1"]
        local = find_backend("local")
        assert local.state(record) is None
        local.cancel(record)
        time.sleep(0.2)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_records_of_before_the_key_backend_still_read(tmp_path):
    folder = tmp_path / "run.local"
    folder.mkdir()
    old = dict(name="run", run="r", config="c", log="l", job_id="", requeues=0, host="n1")
    old |= dict(after=None, code=None)
    (folder / "job.json").write_text(json.dumps({"run": old}))
    assert read_records(tmp_path / "run", "local")["run"].backend == "local"
    (tmp_path / "run.slurm").mkdir()
    (tmp_path / "run.slurm" / "job.json").write_text(json.dumps({"run": old | {"host": None}}))
    assert read_records(tmp_path / "run")["run"].backend == "slurm"


@pytest.mark.parametrize(
    ("backend", "named"),
    [
        ("torchrum", "no launcher 'torchrum'; did you mean 'torchrun'?"),
        ("broken", "cannot be imported: no such luck"),
        ("local", "local has no cluster file"),
    ],
)
def test_a_launcher_that_cannot_be_used_is_one_line(
    machine, small, tmp_path, monkeypatch, capfd, backend, named
):
    install(
        tmp_path / "site",
        monkeypatch,
        "broken_launcher",
        "raise OSError('no such luck')",
        "launch.backends",
        "broken = broken_launcher:Backend",
    )
    assert main(["submit", str(small()), "--cluster", machine(backend)]) == 2
    error = capfd.readouterr().err
    assert named in error and len(error.splitlines()) == 1
    assert os.listdir(tmp_path).count("runs") == 0
