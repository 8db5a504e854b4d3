"""A node whose cable is pulled goes on computing: it must not write beside the requeued job."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import Launcher, empty_queue, only, started
from tests.cluster.throwaway import ThrowawayCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600, func_only=True)]


@pytest.fixture(scope="module")
def namespaces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThrowawayCluster]:
    yield from started(tmp_path_factory.mktemp("namespaces") / "slurm", namespaces=True)


@pytest.fixture
def launch(namespaces, tmp_path, config):
    yield Launcher(namespaces, tmp_path, config, "eth0")
    empty_queue(namespaces)


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
