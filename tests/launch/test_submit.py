"""What is decided before the queue, without a SLURM; tests/cluster/ has the rest."""

import subprocess
import sys

import pytest
import yaml

from launch.__main__ import main
from launch.cluster_file import load_cluster, with_cluster
from launch.records import Record

CLUSTER = {
    "nodes": 2,
    "gpus_per_node": 2,
    "cpus_per_gpu": 3,
    "mem_gb": 1.5,
    "timeout_min": 30,
    "partition": "low",
}


@pytest.fixture
def cluster(tmp_path):
    def write(**keys):
        path = tmp_path / "cluster.yaml"
        path.write_text(yaml.safe_dump({"folder": str(tmp_path / "runs")} | CLUSTER | keys))
        return path

    return write


def script(capsys, *words):
    assert main(["submit", *map(str, words), "--dry-run"]) == 0
    return capsys.readouterr().out


def test_the_dry_run_prints_the_script_and_writes_nothing(small, cluster, tmp_path, capsys):
    text = script(capsys, small(), "--cluster", cluster(sbatch={"qos": "night", "exclusive": True}))
    for option in (
        *("nodes=2", "gpus-per-node=2", "cpus-per-task=6", "mem=1536M", "time=30"),
        *("partition=low", "requeue", "signal=USR2@60", "qos=night", "exclusive", "job-name=small"),
    ):
        assert f"#SBATCH --{option}\n" in text
    # a task a GPU, each with its cores; one rank's end is the job's
    assert "--kill-on-bad-exit=1 --ntasks-per-node=2 --cpus-per-task=3 --cpu-bind=cores" in text
    assert "spread-job" not in text and "--account" not in text
    assert f" -u {tmp_path}/runs/small.slurm/code-" in text  # the copy that the job starts from
    assert not (tmp_path / "runs").exists()


def test_the_dry_run_tells_the_plan_of_the_clusters_nodes_beside_the_script(cluster, capsys):
    config = "configs/imagenet/resnet50_8192.yaml"
    words = [config, "--cluster", cluster()]  # two nodes of two GPUs
    assert main(["submit", *map(str, words), "--dry-run"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("#!/bin/bash")
    assert "4 × one GPU" in said.err and "2 × 2 GPUs: NVLink" in said.err


def test_torchrun_is_one_agent_a_node_with_all_its_cores(small, cluster, capsys):
    keys = {"launcher": "torchrun", "nodes": "1-2", "requeues": 0}
    text = script(capsys, small(), "--cluster", cluster(**keys))
    assert "--ntasks-per-node=1 --cpus-per-task=6" in text
    assert "#SBATCH --nodes=1-2\n" in text and "#SBATCH --spread-job\n" in text
    assert "#SBATCH --no-requeue\n" in text and "#SBATCH --requeue" not in text


def test_a_student_is_a_job_that_waits_for_its_teachers(small, student, cluster, tmp_path, capsys):
    teacher = small("teacher.yaml", model__width=8)
    path = student(teacher=str(teacher))
    words = [path, "--cluster", cluster(), "teacher.recipe.epochs=4"]
    first, second = script(capsys, *words).split("#!/bin/bash")[1:]
    assert "--job-name=teacher\n" in first and "--dependency" not in first
    assert "--job-name=student\n" in second
    assert "#SBATCH --dependency=afterok:JOB_OF_teacher\n" in second
    assert main(["submit", *map(str, words), "recipe.epoch=1", "--dry-run"]) == 2
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--nodes", "5"], "10 ranks"),  # of 8 workers
        (["--nodes", "two"], "nodes: expected a number, or a range such as 2-4, found 'two'"),
        (["recipe.minibach=3"], "did you mean recipe.minibatch?"),
        (["recipe.minibatch=250"], "250 is not a multiple of worker_batch 32"),
    ],
)
def test_what_would_fail_never_reaches_the_queue(small, cluster, capsys, words, part):
    assert main(["submit", str(small()), "--cluster", str(cluster()), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and part in line


def test_without_slurm_it_says_so(small, cluster, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", str(small()), "--cluster", str(cluster())]) == 2
    assert "sbatch is not on PATH" in capsys.readouterr().err


def test_status_of_what_was_never_submitted(tmp_path, capsys):
    assert main(["status", str(tmp_path / "run")]) == 2
    assert "nothing was submitted for it" in capsys.readouterr().err


def test_typed_keys_beat_the_cluster_file_and_it_beats_the_config(small, cluster):
    path = cluster(run={"micro_batch": 64, "log_every_steps": 7})
    config = with_cluster(load_cluster(path), str(small()), ("run.micro_batch=32",))
    assert (config.run.micro_batch, config.run.log_every_steps) == (32, 7)
    assert config.run.loader_threads == 3  # the cores of a GPU
    typed = ("run.loader_threads=1",)
    assert with_cluster(load_cluster(path), str(small()), typed).run.loader_threads == 1


def test_a_begun_run_is_submitted_without_the_weights_that_it_started_from(
    small, cluster, tmp_path, capsys
):
    words = [small(), "model.weights=gone.pt", "--cluster", cluster()]
    assert main(["submit", *map(str, words), "--dry-run"]) == 2
    assert "gone.pt: no such file" in capsys.readouterr().err
    checkpoints = tmp_path / "runs" / "small" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "checkpoint-001-00000005.pt").touch()
    assert "#SBATCH" in script(capsys, *words)


def test_a_study_of_students_waits_for_their_teachers_in_a_dry_run_too(
    small, student, cluster, tmp_path, capsys
):
    base = student(teacher=str(small("teacher.yaml", model__width=8)))
    study = tmp_path / "study.yaml"
    study.write_text(f"base: {base}\nseeds: [1, 2]\nvariants: {{base: {{set: {{}}}}}}\n")
    assert main(["study", str(study), "--cluster", str(cluster()), "--dry-run"]) == 0
    scripts = capsys.readouterr().out
    assert scripts.count("#SBATCH --dependency=afterok:JOB_OF_teacher\n") == 1


def test_a_run_that_has_a_job_is_refused_before_its_teacher_is_submitted(
    student, cluster, capsys, monkeypatch
):
    def has_job(target, name, backend):
        if name == "student":
            return Record(name, str(target), "c.yaml", "run.log", "7", 3)
        raise AssertionError(f"{name} was looked at")

    monkeypatch.setattr("launch.status.active_record", has_job)
    assert main(["submit", str(student()), "--cluster", str(cluster())]) == 2
    assert "job 7 has it already" in capsys.readouterr().err


def test_the_state_of_runs_is_told_without_importing_pytorch():
    code = "import sys, launch.status, launch.slurm.backend, launch.local.backend\n"
    code += "sys.exit('torch' in sys.modules or 'submitit' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
