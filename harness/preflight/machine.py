"""Measurements of one machine: compute, memory, files."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch

SIZE = 512  # of the matrices on a CPU; 16 times on a GPU
MEASURED_S = 0.4
READ_FILES, READ_BYTES = 64, 64_000_000
WRITTEN_BYTES, WRITES = 8_000_000, 3
CGROUPS = Path("/sys/fs/cgroup")
PROGRAM_S = 40.0  # time limit of dcgmi and of nccl-tests


def measure_compute(device: torch.device) -> dict[str, float]:
    """Measure a matrix product and a memory copy.

    On a CPU in process time, so that neighbours do not count; what a cgroup withholds counts as a
    figure of its own.
    """
    cuda = device.type == "cuda"
    size = SIZE * 16 if cuda else SIZE
    a, b = (torch.rand(size, size, device=device) for _ in range(2))
    source = torch.zeros(2**28 if cuda else 2**23, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    began_s, withheld_s = time.monotonic(), _withheld_s()
    with _one_thread():
        product_s = _fastest(lambda: torch.mm(a, b), device)
        copy_s = _fastest(lambda: target.copy_(source), device)
    withheld = (_withheld_s() - withheld_s) / (time.monotonic() - began_s)
    return {
        "matrix product": 2 * size**3 / product_s / 1e9,
        "memory copy": 2 * source.nbytes / copy_s / 1e9,
        "CPU time withheld by a cgroup": 100 * withheld,
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Return the least seconds that `work` took in MEASURED_S, at least five times."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    times: list[float] = []
    end_s = time.monotonic() + MEASURED_S
    while len(times) < 5 or time.monotonic() < end_s:
        began_s = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock() - began_s)
    return min(times)


def _withheld_s(process: Path = Path("/proc/self/cgroup"), root: Path = CGROUPS) -> float:
    """Return the seconds for which a CPU quota has stopped this process's cgroup, or one above."""
    longest = 0.0
    try:
        lines = process.read_text().splitlines()
    except OSError:
        return longest
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / controllers if controllers else root
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):
            longest = max(longest, _throttled_s(folder / "cpu.stat"))
            if folder == top:
                break
    return longest


def _throttled_s(path: Path) -> float:
    try:
        found = dict(line.split() for line in path.read_text().splitlines())
    except (OSError, ValueError):
        return 0.0
    # version 2 counts microseconds, version 1 nanoseconds
    return int(found.get("throttled_usec", 0)) / 1e6 + int(found.get("throttled_time", 0)) / 1e9


def measure_reading(root: Path) -> dict[str, float]:
    """Measure opening and reading images below `root`, from the disk where the system allows it."""
    opened_s: list[float] = []
    read_bytes, read_s = 0, 0.0
    for path in islice(_some_files(root), READ_FILES):
        began_s = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.read(1)
            opened_s.append(time.perf_counter() - began_s)
            read_bytes += 1 + len(file.read(READ_BYTES))
        read_s += time.perf_counter() - began_s
        if read_bytes > READ_BYTES:
            break
    if not opened_s:
        return {}
    figures = {"opening an image": 1e3 * sorted(opened_s)[len(opened_s) // 2]}
    if read_bytes > 1e6:  # less says nothing of a rate
        figures["reading images"] = read_bytes / read_s / 1e6
    return figures


def _some_files(root: Path) -> Iterator[Path]:
    """Yield files below `root`, a few of each folder, without listing all of them."""
    for place, folders, files in os.walk(root):
        folders.sort()
        yield from (Path(place) / name for name in sorted(files)[:4])


def data_identity(root: Path) -> str:
    """Return a short digest of what `root` contains: names, and the sizes of some files."""
    digest = hashlib.sha256()
    for path in islice(_some_files(root), 4 * READ_FILES):
        digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
    for folder in sorted(path for path in root.glob("*/") if path.is_dir()):
        digest.update(f"{folder.name} {sorted(os.listdir(folder))}\n".encode())
    return digest.hexdigest()[:12]


def measure_writing(folder: Path, rank: int) -> dict[str, float]:
    """Measure writing a file to `folder` and flushing it to the disk. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".preflight-{os.uname().nodename}-{rank}"
    content = os.urandom(WRITTEN_BYTES)
    try:
        fastest_s = min(_write_s(path, content) for _ in range(WRITES))
    finally:
        path.unlink(missing_ok=True)
    return {"writing the run folder": WRITTEN_BYTES / fastest_s / 1e6}


def _write_s(path: Path, content: bytes) -> float:
    began_s = time.perf_counter()
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - began_s


def measure_memory() -> dict[str, float]:
    """Return the free memory, and that of /dev/shm where there is one."""
    lines = Path("/proc/meminfo").read_text()
    available = re.search(r"MemAvailable:\s+(\d+) kB", lines)
    figures = {"free memory": int(available[1]) / 1e6} if available else {}
    if os.path.isdir("/dev/shm"):
        space = os.statvfs("/dev/shm")
        figures["free in /dev/shm"] = space.f_bavail * space.f_frsize / 1e6
    return figures


def measure_by_programs(gpus: int) -> dict[str, float]:
    """Run `dcgmi diag` and nccl-tests on this node's GPUs, where they are installed."""
    figures = {}
    if shutil.which("dcgmi"):
        figures["dcgmi diag failures"] = float(_output(["dcgmi", "diag", "-r", "1"]) is None)
    if shutil.which("all_reduce_perf"):
        words = ["all_reduce_perf", "-b", "64M", "-e", "64M", "-g", str(gpus)]
        found = re.search(r"Avg bus bandwidth\s*:\s*([\d.]+)", _output(words) or "")
        figures["nccl-tests bus bandwidth"] = float(found[1]) if found else 0.0
    return figures


def _output(words: list[str]) -> str | None:
    """Return a program's output; None where it fails or takes too long."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=PROGRAM_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
