"""What must not reach the queue, or not fail there in silence: each is one line, with a remedy."""

import re

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600, func_only=True)]


def expect_one_line(done, *parts):
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and all(part in line for part in parts), line


def expect_no_job(launch):
    assert launch.cluster.command("squeue", "-h") == ""


def test_a_wrong_config_is_refused_before_submission(launch):
    words = ("submit", launch.config, "--cluster", launch.file)
    expect_one_line(launch(*words, "recipe.minibach=256"), "recipe.minibach", "recipe.minibatch")
    more_ranks_than_workers = launch(*words, nodes=5, gpus_per_node=2)
    expect_one_line(more_ranks_than_workers, "10 ranks", "8 workers")
    expect_one_line(launch(*words, partitoin="low"), "partitoin", "did you mean partition?")
    expect_no_job(launch)


def test_an_unknown_partition(launch):
    done = launch("submit", launch.config, "--cluster", launch.file, partition="lwo")
    expect_one_line(done, "nvalid partition", "lwo", "nothing was submitted")
    expect_no_job(launch)


def test_a_full_queue(launch):
    held = launch.cluster.command("sbatch", "--parsable", "--hold", "--wrap=true").strip()
    known = launch.cluster.command("scontrol", "-o", "show", "jobs").splitlines()
    launch.cluster.configure(MaxJobCount=f"{len(known)}")
    done = launch("submit", launch.config, "--cluster", launch.file)
    expect_one_line(done, "the queue is full", "squeue")
    assert launch.cluster.command("squeue", "-h", "-o", "%i").split() == [held]


def test_a_folder_that_cannot_be_written_here(launch, tmp_path):
    (tmp_path / "file").touch()
    done = launch("submit", launch.config, "--cluster", launch.file, folder=str(tmp_path / "file"))
    expect_one_line(done, "cannot be written", "folder")
    expect_no_job(launch)


def test_a_folder_that_the_nodes_cannot_write_is_told(launch):
    folder = launch.cluster.folder / "unshared"  # read-only on the nodes
    launch.runs, launch.run = folder, folder / "small"
    done = launch("submit", launch.config, "--cluster", launch.file, "--wait", folder=str(folder))
    assert done.returncode == 1
    last = done.stdout.splitlines()[-1]
    assert re.search(r"failed: n\[\d-\d\] cannot write .*: set folder in the cluster file", last)


def test_variables_are_not_overwritten_in_silence(launch, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    done = launch("submit", launch.config, "--cluster", launch.file)
    expect_one_line(done, "GLOO_SOCKET_IFNAME", "lo", "eth7", "unset")
    expect_no_job(launch)


def test_a_second_job_for_the_same_run_is_refused(launch):
    job = launch.submit("--nodes", "1-4", sbatch={"hold": True})
    done = launch("submit", launch.config, "--cluster", launch.file)
    expect_one_line(done, f"job {job} has it already", "launch status")
