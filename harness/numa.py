"""The CPUs near a GPU: those of its NUMA node, by /sys."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

PCI_DEVICES = Path("/sys/bus/pci/devices")


@contextmanager
def near_gpu(device: torch.device) -> Iterator[None]:
    """Within, threads and processes started here run on the CPUs of the GPU's NUMA node.

    Only where this process may run on other nodes too: whoever has bound it prevails. Where it was
    bound to another node, a warning is printed.
    """
    near = cpus_near(pci_address(device)) if device.type == "cuda" else set()
    before = os.sched_getaffinity(0)
    if near and not near & before:
        print(
            f"warning: this rank is bound to CPUs {cpu_list(before)}, but {device} is near "
            f"{cpu_list(near)}; check --cpu-bind and --gpu-bind of srun",
            file=sys.stderr,
        )
    if not near & before or near >= before:
        yield
        return
    os.sched_setaffinity(0, near & before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def pci_address(device: torch.device) -> str:
    """Return a GPU's name in /sys, such as 0000:3b:00.0."""
    gpu = torch.cuda.get_device_properties(device)
    names = "pci_domain_id", "pci_bus_id", "pci_device_id"  # absent from torch's type stubs
    domain, bus, slot = (getattr(gpu, name) for name in names)
    return f"{domain:04x}:{bus:02x}:{slot:02x}.0"


def cpus_near(address: str, devices: Path = PCI_DEVICES) -> set[int]:
    """Return the CPUs on the NUMA node of a PCI device; empty where /sys does not say."""
    try:
        if int((devices / address / "numa_node").read_text()) < 0:
            return set()
        return parse_cpu_list((devices / address / "local_cpulist").read_text())
    except (OSError, ValueError):
        return set()


def parse_cpu_list(text: str) -> set[int]:
    """Return the CPUs of the kernel's list format: 0-2,8 -> {0, 1, 2, 8}."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def cpu_list(cpus: set[int]) -> str:
    """Return CPUs in the kernel's list format: {0, 1, 2, 8} -> 0-2,8."""
    ends = [cpu for cpu in sorted(cpus) if cpu + 1 not in cpus]
    starts = [cpu for cpu in sorted(cpus) if cpu - 1 not in cpus]
    spans = zip(starts, ends, strict=True)
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans)
