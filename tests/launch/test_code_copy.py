"""What is queued starts from a copy of the code, whatever becomes of the checkout meanwhile."""

import dataclasses
import json
import os
import pickle
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import harness
import launch
from harness.config.loading import load_config
from harness.errors import UserError
from harness.runs.environment import code_commit, code_digest
from launch.__main__ import main
from launch.backend import Request
from launch.cluster_file import load_cluster
from launch.records import read_records
from launch.run_spec import RunSpec
from launch.slurm.code_copy import CodeCopy
from launch.slurm.job_step import Task
from launch.slurm.submission import make_executor
from tests.conftest import free_port
from tests.packages import install_page

TASK = Task((), "run", "run.log", "srun", 1, 1, 0, {})


@pytest.fixture
def decoy(tmp_path):
    """A folder with a harness and a launch that cannot be imported, as half-edited ones."""
    for package in ("harness", "launch"):
        (tmp_path / "checkout" / package).mkdir(parents=True)
        (tmp_path / "checkout" / package / "__init__.py").write_text("def half(:\n")
    return tmp_path / "checkout"


@pytest.fixture
def written(tmp_path):
    copy = CodeCopy.of_this_code(tmp_path / "run.slurm")
    copy.write()
    return copy


def test_the_copy_is_the_packages_with_their_data_and_commit(written):
    for package in (harness, launch):
        folder = Path(package.__file__).parent
        for path in folder.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                copied = written.folder / folder.name / path.relative_to(folder)
                assert copied.read_bytes() == path.read_bytes()
    assert (written.folder / "harness" / "COMMIT").read_text().strip() == (code_commit() or "")
    assert not list(written.folder.parent.glob(".*"))


PROBE = """
import harness, launch.slurm.job_step, harness.runs.environment as p
print(harness.__file__, launch.slurm.job_step.__file__, p.code_commit(), p.code_digest())
"""


def test_the_copy_comes_before_working_directory_and_pythonpath(written, decoy):
    (decoy / "probe.py").write_text(PROBE)
    command = [sys.executable, written.folder, "probe"]
    environment = os.environ | {"PYTHONPATH": str(decoy)}
    out = subprocess.run(command, cwd=decoy, env=environment, check=True, capture_output=True)
    files = [
        str(written.folder / name) for name in ("harness/__init__.py", "launch/slurm/job_step.py")
    ]
    assert out.stdout.decode().split() == [*files, str(code_commit()), code_digest()]


def test_equal_code_shares_a_copy_and_other_code_or_commit_gets_its_own(
    written, tmp_path, monkeypatch
):
    again = CodeCopy.of_this_code(tmp_path / "run.slurm")
    again.write()
    assert again.folder == written.folder and len(list((tmp_path / "run.slurm").iterdir())) == 1
    monkeypatch.setattr("launch.slurm.code_copy.code_commit", lambda: "f" * 40)
    other = CodeCopy.of_this_code(tmp_path / "run.slurm")
    other.write()
    assert (other.folder / "harness" / "COMMIT").read_text() == "f" * 40 + "\n"
    assert len(list((tmp_path / "run.slurm").iterdir())) == 2


def test_a_copy_that_was_edited_is_not_used_again(written):
    path = written.folder / "harness" / "errors.py"
    path.chmod(0o644)
    path.write_text("half = (\n")
    with pytest.raises(UserError, match=r"harness/errors\.py: was changed or removed"):
        written.write()


def test_the_ranks_start_from_the_copy_by_both_launchers(tmp_path):
    class Place:
        nodes, raw_job_id, first_host, port, leader, host = 2, "7", "n1", 20007, True, "n1"

    task = dataclasses.replace(TASK, arguments=("c.yaml",), code="/copy")
    assert task._command(Place()) == [sys.executable, "/copy", "harness", "train", "c.yaml"]
    task = dataclasses.replace(task, launcher="torchrun")
    assert task._command(Place())[-4:] == ["/copy", "harness", "train", "c.yaml"]


def test_a_task_that_an_older_version_submitted_still_runs(tmp_path):
    values = dict(TASK.__dict__)
    del values["code"]  # it had none
    old = Task.__new__(Task)
    old.__dict__.update(values)
    loaded = pickle.loads(pickle.dumps(old))
    assert loaded._command(None) == [sys.executable, "-m", "harness", "train"]


@pytest.fixture
def submitted(small, decoy, tmp_path, monkeypatch):
    """Submits the small run from `decoy` to a pretended sbatch; returns the batch script."""
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text("#!/bin/sh\necho Submitted batch job 7\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(decoy)

    def submit(**keys):
        cluster = tmp_path / "cluster.yaml"
        size = {"nodes": 1, "gpus_per_node": 1, "cpus_per_gpu": 1, "timeout_min": 9}
        cluster.write_text(yaml.safe_dump({"folder": str(tmp_path / "runs")} | size | keys))
        assert main(["submit", str(small()), "--cluster", str(cluster)]) == 0
        return (tmp_path / "runs" / "small.slurm" / "7_submission.sh").read_text()

    return submit


def test_a_queued_job_trains_by_the_copy_after_the_checkout_broke(submitted, decoy, tmp_path):
    script, run = submitted(), tmp_path / "runs" / "small"
    code = Path(read_records(run)["small"].code)
    (line,) = [line for line in script.splitlines() if line.startswith("srun ")]
    command = shlex.split(line.partition("--cpu-bind=cores ")[2].removesuffix(" &"))
    assert command[:3] == [sys.executable, "-u", str(code)] and code.parent.name == "small.slurm"
    job = {"JOB_ID": "7", "JOB_NUM_NODES": "1", "JOB_NODELIST": "localhost", "NTASKS": "1"}
    job |= {"NODEID": "0", "PROCID": "0", "LOCALID": "0"}
    slurm = {f"SLURM_{name}": value for name, value in job.items()}
    slurm |= {"SUBMITIT_EXECUTOR": "slurm", "MASTER_PORT": str(free_port())}
    ended = subprocess.run(
        command, cwd=decoy, env=os.environ | slurm, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    environment = json.loads((run / "environment.json").read_text())
    assert environment["command"][0] == str(code / "harness" / "__main__.py")
    assert environment["git_commit"] == code_commit()
    assert environment["code_digest"] == code_digest()


def test_freeze_false_starts_the_code_that_is_there_by_then(submitted, tmp_path):
    script = submitted(freeze=False)
    assert f"{sys.executable} -u -m submitit.core._submit" in script
    assert read_records(tmp_path / "runs" / "small")["small"].code is None
    assert not list((tmp_path / "runs" / "small.slurm").glob("code-*"))


def test_a_jobs_copy_contains_the_plug_ins_of_its_runs(small, tmp_path, monkeypatch):
    install_page("networks.md", tmp_path / "site", monkeypatch)
    install_page("loggers.md", tmp_path / "site", monkeypatch)
    (tmp_path / "cluster.yaml").write_text(
        f"folder: {tmp_path}\nnodes: 1\ngpus_per_node: 1\ncpus_per_gpu: 1\ntimeout_min: 9\n"
    )
    cluster = load_cluster(tmp_path / "cluster.yaml")

    def files_for(*overrides):
        run = RunSpec("run", tmp_path / "run", load_config(small(), overrides))
        return set(make_executor(Request(cluster, tmp_path / "run", [run])).code.files)

    own = {"small_convnets.py", "csv_logger.py"}
    assert not files_for() & own
    assert files_for("model.name=convnet2", "model.width=null", "run.loggers=[csv]") >= own
