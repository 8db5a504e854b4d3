"""Several runs: a study as one array, a chain of two jobs."""

import json

import pytest
import yaml

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600, func_only=True)]
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
            # the keys typed on top make another recipe than the one that either is expected of
            assert config["expect"] is None
    records = json.loads((folder.with_name("momentum.slurm") / "job.json").read_text())
    assert len({record["job_id"].split("_")[0] for record in records.values()}) == 1
    again = launch(*words, **keys)
    assert again.returncode == 0 and "nothing to submit" in again.stdout


def job_of(launch, name):
    return json.loads((launch.runs / f"{name}.slurm" / "job.json").read_text())[name]["job_id"]


def taught(launch, folder):
    """Writes the config of a quick student of a quick teacher, both in `folder`."""
    teacher, student = folder / "teacher.yaml", folder / "student.yaml"
    quick = yaml.safe_load(launch.config.read_text())
    quick["recipe"] |= {"epochs": 2, "milestones": []}
    teacher.write_text(yaml.safe_dump(quick))
    quick["distill"] = {"teacher": str(teacher), "precision": "float32"}
    student.write_text(yaml.safe_dump(quick))
    return student


def test_a_study_of_students_waits_for_their_teacher(launch, tmp_path):
    """One job trains it, and the array begins when that has succeeded."""
    student = taught(launch, tmp_path)
    study = tmp_path / "warm.yaml"
    variants = {"cold": {"set": {"distill.temperature": 1.0}}, "warm": {"set": {}}}
    grid = {"base": str(student), "seeds": [1], "variants": variants}
    study.write_text(yaml.safe_dump(grid))
    words = ("study", study, "--cluster", launch.file)
    done = launch(*words, "--wait", nodes=1, environment={})
    assert done.returncode == 0, done.stdout + done.stderr
    teacher = launch.job(job_of(launch, "teacher"))
    records = json.loads((launch.runs / "studies" / "warm.slurm" / "job.json").read_text())
    assert records.keys() == {"cold-1", "warm-1"}
    for record in records.values():
        assert record["after"] == teacher["JobId"]
        assert teacher["EndTime"] <= launch.job(record["job_id"])["StartTime"]
    for variant in ("cold", "warm"):
        run = launch.runs / "studies" / "warm" / variant / "1"
        assert json.loads((run / "status.json").read_text())["state"] == "finished"
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert config["distill"]["teacher"] == str(launch.runs / "teacher")


def test_a_chain_whose_first_stage_fails(launch, tmp_path):
    """The second job is cancelled, with the reason; both go on when they are submitted again."""
    student = taught(launch, tmp_path)
    words = ("submit", student, "--cluster", launch.file)
    keys = {"nodes": 1, "environment": {}}

    done = launch(*words, "teacher.run.data_root=/nowhere", **keys)
    assert done.returncode == 0, done.stderr
    first, second = job_of(launch, "teacher"), job_of(launch, "student")
    assert f"job {second}, after job {first}\n" in done.stdout
    launch.wait_for_state(second, "CANCELLED")
    assert launch.job(first)["JobState"] == "FAILED"
    row = launch("status", launch.runs / "student").stdout.splitlines()[1]
    assert "cancelled" in row and f"job {first}, which it waited for, did not" in row
    assert "/nowhere" in launch("status", launch.runs / "teacher").stdout

    done = launch(*words, "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = job_of(launch, "teacher"), job_of(launch, "student")
    assert launch.job(first)["EndTime"] <= launch.job(second)["StartTime"]
    # what the student's log begins with: its teacher's error
    assert "teacher  error" in (launch.runs / "student.slurm" / "student.log").read_text()
    again = launch(*words)
    assert again.returncode == 0 and again.stdout.count("finished already") == 2
