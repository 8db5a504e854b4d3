import os

import pytest
import torch
import torch.distributed as dist

from harness.distributed import World, process_group
from harness.network_interface import (
    INTERFACE,
    address_among,
    address_towards,
    gloo_interface,
    interface_of,
    is_loopback,
)
from harness.outcome import RunFailed
from tests.conftest import free_port


@pytest.fixture
def store(monkeypatch):
    monkeypatch.delenv(INTERFACE, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    return dist.TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)


def test_addresses_of_the_machine_itself():
    assert address_towards("127.0.0.1") == "127.0.0.1" and interface_of("127.0.0.1") == "lo"
    assert interface_of("127.0.1.1") == interface_of("::1") == "lo"
    assert is_loopback("127.0.1.1") and is_loopback("::1") and not is_loopback("10.0.0.1")
    assert address_towards("no-such-host.invalid") == "" and interface_of("") == ""
    assert interface_of("198.51.100.7") == ""  # an address of the documentation's network


def test_a_rank_whose_own_address_is_loopback_asks_for_the_way_to_another(monkeypatch):
    ways = {"10.0.0.2": "10.0.0.1", "fd00::2": "fd00::1"}
    monkeypatch.setattr("harness.network_interface.address_towards", ways.__getitem__)
    assert address_among(["127.0.0.1", "10.0.0.2"]) == "10.0.0.1"
    assert address_among(["127.0.0.1", "", "fd00::2"]) == "fd00::1"
    assert address_among(["127.0.0.1", "127.0.0.1"]) == "127.0.0.1"  # all on one machine


def test_gloo_gets_the_interface_that_reaches_rank_0_while_groups_are_created(store):
    store.set("address-1", "127.0.0.1")
    with gloo_interface(store, rank=0, world_size=2):
        assert os.environ[INTERFACE] == "lo"
    assert INTERFACE not in os.environ
    assert store.get("address-0") == b"127.0.0.1"


def test_the_users_interface_prevails(store, monkeypatch):
    monkeypatch.setenv(INTERFACE, "ib7")
    store.set("address-1", "127.0.0.1")
    with gloo_interface(store, rank=0, world_size=2):
        assert os.environ[INTERFACE] == "ib7"
    assert os.environ[INTERFACE] == "ib7"


def test_an_interface_that_does_not_exist_is_named(store, monkeypatch):
    monkeypatch.setenv(INTERFACE, "ib7")
    world = World(0, 1, 0, 1, "torchrun", torch.device("cpu"))
    message = "cannot connect the ranks over ib7 .*; set GLOO_SOCKET_IFNAME to the interface"
    with pytest.raises(RunFailed, match=message), process_group(world, store, 5.0):
        pass
    assert not dist.is_initialized()
