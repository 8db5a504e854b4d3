"""Several runs: a study as one array, a chain of two jobs."""

import json

import pytest
import yaml

from launch.cluster import load_cluster, with_cluster
from launch.slurm import submit
from launch.wanted import Wanted

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120, func_only=True)]
QUICK = ("recipe.epochs=2", "recipe.milestones=[]")


def test_a_study_is_one_array_of_four_runs_two_at_once(launch, tmp_path):
    study = tmp_path / "momentum.yaml"
    plain = {"set": {"recipe.nesterov": False}, "expect": {"error": 60.0, "source": "a guess"}}
    variants = {"plain": plain, "nesterov": {"set": {}}}
    study.write_text(
        yaml.safe_dump({"base": str(launch.config), "seeds": [1, 2], "variants": variants})
    )
    words = ("study", study, "--cluster", launch.file, "--at-once", 2, *QUICK)
    keys = {"nodes": 1, "environment": {}}
    done = launch(*words, **keys)
    assert done.returncode == 0, done.stderr
    folder = launch.runs / "studies" / "momentum"
    most = 0

    def all_finished():
        nonlocal most
        table = launch("status", folder).stdout
        most = max(most, table.count(" running ") + table.count(" starting "))
        return table.count(" finished ") == 4

    launch.wait("four finished runs", all_finished)
    assert most == 2
    for variant in ("plain", "nesterov"):
        for seed in (1, 2):
            config = yaml.safe_load((folder / variant / str(seed) / "config.yaml").read_text())
            assert (config["seed"], config["recipe"]["nesterov"]) == (seed, variant == "nesterov")
            assert config["expect"]["error"] == (60.0 if variant == "plain" else 50.0)
    records = json.loads((folder.with_name("momentum.slurm") / "job.json").read_text())
    assert len({record["job_id"].split("_")[0] for record in records.values()}) == 1
    again = launch(*words, **keys)
    assert again.returncode == 0 and "nothing to submit" in again.stdout


def test_a_chain_whose_first_stage_fails(launch, monkeypatch):
    """The second job is cancelled, with the reason; both go on when they are submitted again."""
    monkeypatch.setenv("SLURM_CONF", str(launch.cluster.conf))
    launch("status", launch.run, nodes=1, environment={})  # writes the cluster file
    cluster = load_cluster(launch.file)

    def stage(name, *overrides):
        typed = (*QUICK, *overrides)
        config = with_cluster(cluster, str(launch.config), typed)
        return Wanted(name, launch.runs / name, config, typed)

    def submit_chain(*overrides):
        (first,) = submit(cluster, launch.runs / "teacher", [stage("teacher", *overrides)])
        student = launch.runs / "student"
        return first, *submit(cluster, student, [stage("student")], after=first.job_id)

    first, second = submit_chain("run.data_root=/nowhere")
    launch.wait_for_state(second.job_id, "CANCELLED")
    assert launch.job(first.job_id)["JobState"] == "FAILED"
    row = launch("status", launch.runs / "student").stdout.splitlines()[1]
    assert "cancelled" in row and f"job {first.job_id}, which it waited for, did not" in row
    assert "/nowhere" in launch("status", launch.runs / "teacher").stdout
    first, second = submit_chain()
    launch.wait_for_state(second.job_id, "COMPLETED")
    assert launch.job(first.job_id)["JobState"] == "COMPLETED"
    assert launch.job(first.job_id)["EndTime"] <= launch.job(second.job_id)["StartTime"]
