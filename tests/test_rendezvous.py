"""Where ranks meet: which launch a store belongs to, and who may come in."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict

import pytest
import torch.distributed as dist

from harness.distributed import world_from_environment
from harness.errors import UserError
from harness.outcome import RunFailed
from harness.rendezvous import OPENING, Opening, generation, launch_of, rendezvous
from tests.conftest import free_port, rank_environment


@pytest.fixture
def place(monkeypatch):
    """Rank 1 of 2, by hand, at a free port of this machine."""
    port = free_port()
    for name in [name for name in os.environ if name.startswith(("SLURM", "TORCHELASTIC"))]:
        monkeypatch.delenv(name)
    for name, value in rank_environment(1, 2, port).items():
        monkeypatch.setenv(name, value)
    return port


def open_store(port: int, **changes: object) -> dist.TCPStore:
    """What another process' rank 0 has opened for the next meeting of this process."""
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    meeting = f"generation-{int(generation(None).rpartition('-')[2]) + 1}"
    usual = Opening("a launch without an id", meeting, 2, "host-of-rank-0", "another process")
    store.set(OPENING, json.dumps(asdict(usual) | changes))
    return store


def test_a_rank_that_meets_the_last_groups_store_tries_again(place):
    """Rank 1 is quick: the store that it meets goes half a second later, and another one comes."""
    stores = [dist.TCPStore("127.0.0.1", place, is_master=True, wait_for_workers=False)]

    def replace() -> None:
        stores.pop()
        stores.append(open_store(place, generation=generation(None)))
        stores[0].set(f"{generation(None)}/mark", "the second")

    later = threading.Timer(0.5, replace)
    later.start()
    store = rendezvous(world_from_environment("cpu"), 30)
    later.join()
    assert store.get("mark") == b"the second"


def test_a_rank_of_another_launch_is_refused_with_both_names(place, monkeypatch):
    """Its run's store stays as it was: nobody there notices."""
    store = open_store(place, launch="SLURM job step 12.0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    begun_s = time.monotonic()
    with pytest.raises(UserError) as refused:
        rendezvous(world_from_environment("cpu"), 30)
    assert time.monotonic() - begun_s < 5
    assert f"127.0.0.1:{place} is that of SLURM job step 12.0, rank 0 on host-of" in str(
        refused.value
    )
    assert f"rank 1 on {socket.gethostname()} is of torchrun --rdzv-id mine" in str(refused.value)
    assert store.num_keys() in (1, 2)  # the opening, and a count of PyTorch's own


def test_a_second_rank_0_is_refused_where_the_address_leads_to_another_launchs_store(
    place, monkeypatch
):
    """As on another machine, where this port is free: there is a store at MASTER_ADDR already."""
    store, usual = open_store(place), dist.TCPStore
    monkeypatch.setattr(dist, "TCPStore", lambda *a, **k: usual(*a, **(k | {"is_master": False})))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="is taken by a launch without an id, rank 0 on host-of-"):
        rendezvous(world_from_environment("cpu"), 30)
    assert json.loads(store.get(OPENING))["host"] == "host-of-rank-0"


def test_a_rank_beyond_the_world_size_of_rank_0_is_refused(place):
    store = open_store(place, world_size=1)
    with pytest.raises(UserError, match=r"rank 1 on .* rank 0 on host-of-rank-0 has WORLD_SIZE=1"):
        rendezvous(world_from_environment("cpu"), 30)
    del store


def test_waiting_ends_by_the_time_out_where_nobody_or_another_program_answers(place):
    """PyTorch's own constructor would wait for ever for an answer."""
    with pytest.raises(RunFailed, match=rf"not all ranks joined at 127.0.0.1:{place} for 0.3 s"):
        rendezvous(world_from_environment("cpu"), 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", place))
        silent.listen()
        with pytest.raises(RunFailed, match="not all ranks joined"):
            rendezvous(world_from_environment("cpu"), 0.3)


def test_launches_by_their_ids():
    by_hand = world_from_environment("cpu", {"RANK": "0", "WORLD_SIZE": "2"})
    assert launch_of(by_hand, {}) == launch_of(by_hand, {"TORCHELASTIC_RUN_ID": "none"})
    assert launch_of(by_hand, {"TORCHELASTIC_RUN_ID": "a"}) == "torchrun --rdzv-id a"
    task = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1"}
    task |= {"SLURM_STEP_TASKS_PER_NODE": "2"}
    steps = [task | {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": step} for step in "01"]
    launches = [launch_of(world_from_environment("cpu", step), step) for step in steps]
    assert launches == ["SLURM job step 7.0", "SLURM job step 7.1"]
    # torchrun's agents may each be a step of their own
    inside = [step | {"TORCHELASTIC_RUN_ID": "7"} for step in steps]
    assert {launch_of(world_from_environment("cpu", rank), rank) for rank in inside} == {
        "torchrun --rdzv-id 7"
    }


@pytest.mark.parametrize("by_agent", [False, True])
def test_nodes_whose_agents_count_restarts_differently_meet_in_a_new_store(monkeypatch, by_agent):
    """A failed rank raises its own agent's count; a store that outlives the ranks needs it."""
    world = world_from_environment("cpu", {})
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(by_agent))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    other_nodes = generation(world)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert (generation(world) == other_nodes) == (not by_agent)


def test_a_port_in_use_is_one_line_with_code_2(small):
    with socket.socket() as occupied:
        occupied.bind(("127.0.0.1", 0))
        occupied.listen()
        port = occupied.getsockname()[1]
        finished = subprocess.run(
            [sys.executable, "-m", "harness", "train", str(small())],
            env=rank_environment(0, 2, port),
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert finished.returncode == 2
    assert f"port 127.0.0.1:{port} is in use" in finished.stderr
    assert "Traceback" not in finished.stderr
