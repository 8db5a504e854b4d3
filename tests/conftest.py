"""Fixtures of the whole suite: the digits as image folders, a small config on them, real ranks."""

from __future__ import annotations

import contextlib
import copy
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from harness.data.prepare.digits import prepare_digits

pytest_plugins = ["tests.distilling", "tests.limits"]

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
# nohup and background jobs ignore these signals, and the processes that tests start would inherit
# that: a run under nohup rightly outlives its terminal, which is not what the tests are about
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# files of a minute and more, which begin first, so that none is left to one process at the end
LONG = (
    *("test_verify.py", "test_faults.py", "test_elastic.py", "test_one_curve.py"),
    *("test_watchdog.py", "test_train.py", "test_ghost_batch_norm_triton.py", "test_stages.py"),
    *("test_local.py", "test_events.py", "test_bad_input.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first. Tests that need a GPU are skipped where there is none."""
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))  # stable
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # keywords hold the names of folders too
                item.add_marker(pytest.mark.skipif(True, reason="no CUDA device"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 1,797 digits: 1437 training and 360 validation images. Not to be changed."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    prepare_digits(folder)
    return folder


@pytest.fixture
def own_digits(digits: Path, tmp_path: Path) -> Path:
    """A copy of the digits that a test may damage."""
    return Path(shutil.copytree(digits, tmp_path / "digits"))


SMALL = {
    "seed": 1,
    "expect": {"error": 50.0, "source": "a test"},
    "data": {
        "train_images": 1437,
        "val_images": 360,
        "classes": 10,
        "crop": 8,
        "resize": 8,
        "crop_area": [0.7, 1.0],
        "flip": False,
    },
    "model": {"name": "resnet8", "width": 4},
    "recipe": {
        "minibatch": 256,
        "worker_batch": 32,
        "reference_minibatch": 32,
        "epochs": 3,
        "warmup_epochs": 1,
        "milestones": [2],
    },
    "run": {
        "device": "cpu",
        "loader": "memory",  # every process would import DALI
        "micro_batch": 256,  # "auto" is measured, so two runs may round differently
        "log_every_steps": 2,
        "keep_checkpoints": 100,
    },
}


@pytest.fixture
def small(digits: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a config of 3 epochs of 5 steps (k = 8, n = 32); keywords change dotted keys."""

    def write(name: str = "small.yaml", **changes: Any) -> Path:
        mapping = copy.deepcopy(SMALL)
        mapping["run"]["data_root"] = str(digits)
        for key, value in changes.items():
            section, _, leaf = key.partition("__")
            mapping[section][leaf] = value
        path = tmp_path / name
        path.write_text(yaml.safe_dump(mapping))
        return path

    return write


def free_port() -> int:
    """A port that is free now, and that the system hands to nobody: below its ephemeral ones."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun would set for a rank of one node."""
    return os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def start_ranks(world_size: int, arguments: list[str]) -> list[subprocess.Popen[str]]:
    """Starts `python arguments` as real processes, one a rank."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=rank_environment(rank, world_size, port) if world_size > 1 else None,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]


def harness(*arguments: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Runs `python -m harness` on so many ranks; the output is rank 0's, the code the greatest."""
    processes = start_ranks(ranks, ["-m", "harness", *map(str, arguments)])
    outputs = [process.communicate() for process in processes]
    code = max(process.returncode for process in processes)
    return subprocess.CompletedProcess(processes[0].args, code, *outputs[0])
