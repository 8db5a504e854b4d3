"""A job that waits in the queue while its checkout is changed and deleted."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import harness
from tests.cluster.conftest import COMMAND_S
from tests.cluster.throwaway import search_path

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600, func_only=True)]
ROOT = Path(harness.__file__).parents[1]


@pytest.fixture
def checkout(tmp_path):
    """A repository with this code, which says that it is version frozen."""
    folder = tmp_path / "checkout"
    for package in ("harness", "launch"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, folder / package, ignore=ignored)
    (folder / "harness" / "VERSION").write_text("frozen\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "all")
    return folder


def git(folder, *words):
    done = subprocess.run(["git", "-C", folder, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_a_job_outlives_the_checkout_that_it_was_submitted_from(launch, checkout, launcher):
    commit = git(checkout, "rev-parse", "HEAD")
    launch.file.write_text(
        yaml.safe_dump(launch.mapping | {"launcher": launcher, "sbatch": {"hold": True}})
    )
    submit = ["-m", "launch", "submit", launch.config, "--cluster", launch.file]
    environment = {"SLURM_CONF": str(launch.cluster.conf), "PATH": search_path()}
    subprocess.run(
        [sys.executable, *map(str, submit)],
        cwd=checkout,
        env=os.environ | environment,
        check=True,
        capture_output=True,
        timeout=COMMAND_S,
    )
    (record,) = json.loads((launch.runs / "small.slurm" / "job.json").read_text()).values()
    shutil.rmtree(checkout)
    launch.cluster.command("scontrol", "release", record["job_id"])
    launch.wait_for_state(record["job_id"], "COMPLETED")
    assert launch.status()["state"] == "finished"
    found = json.loads((launch.run / "environment.json").read_text())
    assert found["command"][0] == f"{record['code']}/harness/__main__.py"
    assert found["versions"]["harness"] == "frozen"
    assert (found["git_commit"], found["ranks"]) == (commit, 2)
