"""Nodes with a network of their own, one of which is cut off while it computes.

It must not write beside the requeued job.
"""

import fcntl
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.runs.logging.jsonl import read_log
from tests.cluster.conftest import Launcher, empty_queue, only, started
from tests.cluster.throwaway import ThrowawayCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600, func_only=True)]


@pytest.fixture(scope="module")
def namespaces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThrowawayCluster]:
    with (tmp_path_factory.getbasetemp().parent / "namespaces.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one such cluster at a time, of all test processes
        yield from started(tmp_path_factory.mktemp("namespaces") / "slurm", namespaces=True)


@pytest.fixture
def launch(namespaces, tmp_path, config):
    yield Launcher(namespaces, tmp_path, config, "eth0")
    empty_queue(namespaces)


def test_ranks_of_nodes_whose_own_name_is_127_0_1_1_meet_over_their_network(launch):
    words = ("submit", launch.config, "--cluster", launch.file, "--wait")
    done = launch(*words, "recipe.epochs=2", "recipe.milestones=[]", environment={})
    assert done.returncode == 0, done.stdout + done.stderr
    assert only("start", read_log(launch.run / "log.jsonl"))["world_size"] == 2


def test_the_cut_off_incarnation_ends_and_the_requeued_one_finishes(launch, straight):
    job = launch.submit(nodes=1)
    launch.wait_for_step(50)
    node = launch.job(job)["NodeList"]
    launch.cluster.cut_off(node)
    # frozen until the other has begun: it would have finished before SLURM misses the node
    cut_off = launch.signal_rank(0, signal.SIGSTOP)
    launch.wait("the requeued start", lambda: launch.status()["incarnation"] == 2)
    os.kill(cut_off, signal.SIGCONT)
    try:
        launch.wait_for_state(job, "COMPLETED")
        launch.wait("the cut-off one's end", lambda: not Path(f"/proc/{cut_off}").exists())
    finally:
        launch.cluster.connect(node)
    assert launch.job(job)["NodeList"] != node
    log = launch.expect_straight(straight, starts=2)
    assert only("resume", log)["step"] > 0
    assert launch.status()["incarnation"] == 2
    assert "incarnation 2 took over; 1 ends here" in launch.log
    assert f"{node}, rank 0: ended with exit code 1" in launch.log
