import pytest

from tests.cluster.conftest import only

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600, func_only=True)]


def test_four_ranks_on_two_nodes_are_torchruns_curve(launch, straight):
    done = launch("submit", launch.config, "--cluster", launch.file, "--wait", gpus_per_node=2)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "ranks        4 (4 × 2 workers)" in done.stdout  # the plan
    assert f"run folder {launch.run}" in lines
    assert any(line.startswith("epoch 40/40  step 200/200  loss ") for line in lines)
    assert only("start", launch.expect_straight(straight, starts=1))["world_size"] == 4
    table = launch("status", launch.run).stdout.splitlines()
    assert table[1].split()[2:5] == ["finished", "200/200", "0"]
    again = launch("submit", launch.config, "--cluster", launch.file)
    assert again.returncode == 0 and f"finished already: {launch.run}" in again.stdout


def test_torchrun_as_launcher_is_the_same_training(launch, straight):
    job = launch.submit(launcher="torchrun", gpus_per_node=2, nodes="1-2")
    launch.wait_for_state(job, "COMPLETED")
    assert only("start", launch.expect_straight(straight, starts=1))["world_size"] == 4
