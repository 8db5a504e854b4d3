"""torchrun's restarts: a lost node, a new node, a killed rank; the recipe and its curve stay."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from harness import load_config
from harness.runs.logging.jsonl import read_log
from harness.training.setup import train
from tests.conftest import free_port
from tests.faults import children_of, newest_step, wait_for
from tests.test_train import assert_same, final_weights

QUICK = "last_call_timeout=2,keep_alive_interval=2,keep_alive_max_attempt=3,is_host={}"


class Agent:
    """A torchrun agent with the ranks of one node, in a session of their own."""

    def __init__(self, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # torch 2.15's agents otherwise keep the store's address of the first round, for which
            # a node that joins later waits in vain
            env=os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        )
        self.output = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line

    def wait(self) -> int:
        code = self.process.wait()
        self._reader.join(timeout=10)
        return code

    def kill(self) -> None:
        """The node is gone: the agent and all its ranks at once."""
        for pid in [*descendants(self.process.pid), self.process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it ended with its parent
        self.process.wait()


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, each after its parent."""
    found = [pid]
    for parent in found:
        found += sorted(children_of(parent))
    return found[1:]


def incarnations(run):
    events = [e for e in read_log(run / "log.jsonl") if e["event"] in ("start", "resume")]
    return [(event["incarnation"], event["world_size"]) for event in events]


@pytest.fixture
def elastic(small, tmp_path):
    """Starts agents of one run, `--nnodes 1:2`; the first keeps the rendezvous."""
    config = small(
        recipe__epochs=60,
        recipe__milestones=[40],
        run__sums="exact",
        run__micro_batch="auto",
        run__log_every_steps=1,
        run__checkpoint_every_minutes=0.005,
    )
    port, agents = free_port(), []

    def node() -> Agent:
        host = int(not agents)
        rendezvous = ["--nnodes", "1:2", "--nproc-per-node", 1, "--max-restarts", 3]
        rendezvous += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
        rendezvous += ["--rdzv-id", "elastic", "--rdzv-conf", QUICK.format(host)]
        rendezvous += ["--local-addr", "127.0.0.1", "-m", "harness", "train", config]
        agents.append(Agent(*rendezvous, "--out", tmp_path / "run"))
        return agents[-1]

    yield config, tmp_path / "run", node
    for agent in agents:
        agent.kill()


def check_straight(config, run, tmp_path):
    train(load_config(config), tmp_path / "straight")
    assert_same(final_weights(tmp_path / "straight"), final_weights(run), 0.0)
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


def test_a_lost_node_is_outlived_by_the_other_to_the_same_weights(elastic, tmp_path):
    config, run, node = elastic
    survivor, other = node(), node()
    wait_for(lambda: newest_step(run) >= 20, "20 steps on two nodes", 90)
    other.kill()
    assert survivor.wait() == 0, survivor.output
    assert incarnations(run) == [(1, 2), (2, 1)]
    check_straight(config, run, tmp_path)


def test_a_node_that_joins_takes_its_share_to_the_same_weights(elastic, tmp_path):
    config, run, node = elastic
    first = node()
    wait_for(lambda: newest_step(run) >= 20, "20 steps on one node", 90)
    second = node()
    assert first.wait() == 0, first.output
    assert second.wait() == 0, second.output
    assert incarnations(run) == [(1, 1), (2, 2)]
    check_straight(config, run, tmp_path)


def test_a_killed_rank_is_started_again_by_torchrun(small, tmp_path):
    config = small(
        recipe__epochs=40,
        run__sums="exact",
        run__micro_batch="auto",
        run__log_every_steps=1,
        run__checkpoint_every_minutes=0.005,
    )
    run = tmp_path / "run"
    arguments = ["--nproc-per-node", 2, "--max-restarts", 1, "--master-port", free_port()]
    agent = Agent(*arguments, "-m", "harness", "train", config, "--out", run)
    try:
        wait_for(lambda: newest_step(run) >= 12, "12 steps", 90)
        os.kill(descendants(agent.process.pid)[-1], signal.SIGKILL)
        assert agent.wait() == 0, agent.output
    finally:
        agent.kill()
    assert incarnations(run) == [(1, 2), (2, 2)]
    check_straight(config, run, tmp_path)
