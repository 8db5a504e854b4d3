"""A node whose cable is pulled goes on computing: it must not write beside the requeued job."""

from collections.abc import Iterator

import pytest

from tests.cluster.conftest import Launcher, empty_queue, only, started
from tests.cluster.throwaway import ThrowawayCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120, func_only=True)]


@pytest.fixture(scope="module")
def namespaces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThrowawayCluster]:
    yield from started(tmp_path_factory.mktemp("namespaces") / "slurm", namespaces=True)


@pytest.fixture
def launch(namespaces, tmp_path, config):
    yield Launcher(namespaces, tmp_path, config, "eth0")
    empty_queue(namespaces)


def test_the_cut_off_incarnation_ends_and_the_requeued_one_finishes(launch, straight):
    # slowly, so that the cut-off one still runs when the other has taken over
    slowly = ("run.micro_batch=32", "run.evaluate_every_epochs=1")
    job = launch.submit(*slowly, nodes=1)
    launch.wait_for_step(20)
    (node,) = {launch.job(job)["NodeList"]}
    launch.cluster.cut_off(node)
    try:
        launch.wait_for_state(job, "COMPLETED", timeout_s=100)
        assert launch.job(job)["NodeList"] != node
    finally:
        launch.cluster.connect(node)
    log = launch.expect_straight(straight, starts=2)
    assert launch.status()["incarnation"] == 2
    assert "incarnation 2 took over; 1 ends here" in launch.log
    assert f"{node}, rank 0: ended with exit code 1" in launch.log
    # of what the cut-off one wrote, nothing stands after the other had begun
    assert only("resume", log)["step"] > 0
