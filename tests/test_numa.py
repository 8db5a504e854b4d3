"""The CPUs near a GPU, by a /sys that is written here."""

import os
from types import SimpleNamespace

import pytest
import torch

from harness import numa
from harness.numa import cpu_list, cpus_near, near_gpu, parse_cpu_list, pci_address

CUDA, HERE = torch.device("cuda", 3), os.sched_getaffinity(0)


@pytest.fixture
def sys_says(tmp_path, monkeypatch):
    """Returns a function that places the GPU 0000:3b:00.0 on a NUMA node with these CPUs."""
    monkeypatch.setattr(numa, "pci_address", lambda device: "0000:3b:00.0")
    monkeypatch.setattr(cpus_near, "__defaults__", (tmp_path,))

    def write(cpus, node=1):
        (tmp_path / "0000:3b:00.0").mkdir()
        (tmp_path / "0000:3b:00.0" / "numa_node").write_text(f"{node}\n")
        (tmp_path / "0000:3b:00.0" / "local_cpulist").write_text(f"{cpu_list(cpus)}\n")

    return write


@pytest.mark.parametrize(
    ("text", "cpus"), [("0-2,8", {0, 1, 2, 8}), ("5", {5}), ("", set()), ("1,3-4", {1, 3, 4})]
)
def test_lists_of_cpus(text, cpus):
    assert parse_cpu_list(text + "\n") == cpus and cpu_list(cpus) == text


def test_the_name_of_a_gpu_in_sys(monkeypatch):
    gpu = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert pci_address(CUDA) == "0000:3b:00.0"


def test_within_a_rank_runs_near_its_gpu_and_afterwards_as_before(sys_says):
    near = {max(HERE), 4000}  # the node's other CPUs are not allowed here
    sys_says(near)
    with near_gpu(CUDA):
        assert os.sched_getaffinity(0) == {max(HERE)}
    assert os.sched_getaffinity(0) == HERE


def test_a_binding_to_another_node_stays_and_is_reported(sys_says, capsys):
    sys_says({4000, 4001})
    with near_gpu(CUDA):
        assert os.sched_getaffinity(0) == HERE
    assert "but cuda:3 is near 4000-4001" in capsys.readouterr().err


@pytest.mark.parametrize("node", [-1, "no number"])
def test_where_sys_does_not_say_nothing_changes(sys_says, capsys, node):
    sys_says({4000}, node)
    for device in (CUDA, torch.device("cpu")):
        with near_gpu(device):
            assert os.sched_getaffinity(0) == HERE
    assert capsys.readouterr().err == ""
