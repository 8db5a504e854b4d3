"""A throwaway SLURM for the tests of this folder, and what they do on it.

Left out of a plain run of pytest; `make test-cluster` runs them, several processes side by side,
with a cluster each. Every wait ends by itself; its limit is for a machine that is busy with other
things too, and no measure of how long a scenario takes.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from harness.runs.checkpoint import newest_checkpoint
from harness.runs.logging.jsonl import read_log
from launch.__main__ import main
from tests.cluster.throwaway import ThrowawayCluster, missing, search_path, wait_for
from tests.conftest import SMALL, free_port

COMMAND_S, JOB_S = 240, 240
EPOCHS = 40  # of 5 steps


@pytest.fixture(scope="session", autouse=True)
def needs_slurm() -> None:
    if reason := missing():
        pytest.skip(reason)


def started(folder: Path, namespaces: bool = False) -> Iterator[ThrowawayCluster]:
    cluster = ThrowawayCluster(folder, namespaces, owned=True)
    cluster.start()
    try:
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def simple(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThrowawayCluster]:
    yield from started(tmp_path_factory.mktemp("simple") / "slurm")


@pytest.fixture(scope="session")
def config(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits for 200 steps in float64 with exact sums, a log line at every second one."""
    changes: dict[str, Any] = {
        "recipe": {"epochs": EPOCHS, "milestones": [EPOCHS // 2]},
        "run": {
            "evaluate_every_epochs": EPOCHS,
            "data_root": str(digits),
            "precision": "float64",
            "loader": "memory",
            "sums": "exact",
        },
    }
    mapping = {
        k: SMALL[k] | changes.get(k, {}) if isinstance(SMALL[k], dict) else SMALL[k] for k in SMALL
    }
    del mapping["run"]["micro_batch"]
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(yaml.safe_dump(mapping))
    return path


@pytest.fixture(scope="session")
def straight(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the same config, uninterrupted, on 2 ranks of torchrun.

    The first of the test processes that wants it trains it for all of them.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    run = folder / "straight"
    with (folder / "straight.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not run.exists():
            ranks = ["--nproc-per-node", "2", "--master-port", str(free_port())]
            train = ["-m", "harness", "train", str(config), "--out", str(run)]
            command = [sys.executable, "-m", "torch.distributed.run", *ranks, *train]
            subprocess.run(command, check=True, timeout=COMMAND_S, capture_output=True)
    return run


class Launcher:
    """`python -m launch` on a cluster, its files in `folder`."""

    def __init__(self, cluster: ThrowawayCluster, folder: Path, config: Path, network: str) -> None:
        self.cluster, self.folder, self.config = cluster, folder, config
        self.runs = folder / "runs"
        self.run = self.runs / "small"
        self.file = folder / "cluster.yaml"
        self.mapping: dict[str, Any] = {
            "folder": str(self.runs),
            "nodes": 2,
            "gpus_per_node": 1,
            "cpus_per_gpu": 1,
            "timeout_min": 10,
            "partition": "low",
            "launcher": "srun",
            "environment": {"GLOO_SOCKET_IFNAME": network},
        }

    def __call__(self, *words: object, **keys: Any) -> subprocess.CompletedProcess[str]:
        """Runs a command of the launcher; `keys` change the cluster file, for later ones too.

        Within this process, which has PyTorch already: importing it is most of a scenario's work.
        """
        self.mapping |= keys
        self.file.write_text(yaml.safe_dump(self.mapping))
        arguments, out, err = [str(word) for word in words], io.StringIO(), io.StringIO()
        names = {"SLURM_CONF": str(self.cluster.conf), "PATH": search_path()}
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), variables(names):
            code = main(arguments)
        return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())

    def submit(self, *words: object, **keys: Any) -> str:
        """Submits the small config; returns the job's id."""
        done = self("submit", self.config, "--cluster", self.file, *words, **keys)
        assert done.returncode == 0, done.stdout + done.stderr
        record = json.loads((self.runs / "small.slurm" / "job.json").read_text())["small"]
        assert f"job {record['job_id']}\n" in done.stdout
        return record["job_id"]

    @property
    def log(self) -> str:
        path = self.runs / "small.slurm" / "small.log"
        return path.read_text() if path.exists() else ""

    def status(self) -> dict[str, Any]:
        path = self.run / "status.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def job(self, job_id: str) -> dict[str, str]:
        shown = self.cluster.command("scontrol", "-o", "show", "job", job_id)
        return dict(pair.split("=", 1) for pair in shown.split() if "=" in pair)

    def wait_for_step(self, step: int) -> int:
        """Until the run, at work, has logged so many steps; returns the step it has come to."""

        def reached() -> bool:
            status = self.status()
            return status.get("state") == "running" and status["step"] >= step

        self.wait(f"step {step}", reached)
        return self.status()["step"]

    def wait_for_state(self, job_id: str, *states: str, timeout_s: float = JOB_S) -> None:
        self.wait(
            f"job {job_id} {' or '.join(states)}",
            lambda: self.job(job_id)["JobState"] in states,
            timeout_s,
        )

    def signal_rank(self, rank: int, number: int) -> int:
        """To the harness of that rank (or, under torchrun, node), not its task; returns its pid."""
        by_torchrun = self.mapping["launcher"] == "torchrun"
        name = f"RANK={rank}" if by_torchrun else f"SLURM_PROCID={rank}"
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (process / "cmdline").read_bytes().decode().split("\0")
                names = (process / "environ").read_bytes().decode().split("\0")
                agent = "torch.distributed.run" in words
                if str(self.run) in words and "harness" in words and name in names and not agent:
                    os.kill(int(process.name), number)
                    return int(process.name)
        raise AssertionError(f"no process of rank {rank}")

    def wait(self, what: str, done: Callable[[], object], timeout_s: float = JOB_S) -> None:
        """Tells the run's log where it does not come."""
        try:
            wait_for(what, done, timeout_s)
        except TimeoutError as error:
            queue = self.cluster.command("squeue") + self.cluster.command("sinfo", "-N", "-l")
            raw = "".join(p.read_text()[-2000:] for p in self.runs.glob("*.slurm/*_log.*"))
            raise AssertionError(f"{error}\n{queue}\n{self.log[-3000:]}\n{raw[-6000:]}") from None

    def expect_straight(self, straight: Path, starts: int) -> list[dict[str, Any]]:
        """The run went on to the very end of the uninterrupted one; returns its log."""
        assert self.status()["state"] == "finished", self.status()
        expect_same_weights(self.run, straight)
        log = read_log(self.run / "log.jsonl")
        losses = {line["step"]: line["loss"] for line in log if line["event"] == "train"}
        expected = {
            line["step"]: line["loss"]
            for line in read_log(straight / "log.jsonl")
            if line["event"] == "train"
        }
        common = losses.keys() & expected.keys()
        assert len(common) > 0.9 * len(expected)
        # a stop may have divided a line's steps otherwise
        same = [s for s in common if losses[s] == expected[s]]
        assert len(same) >= len(common) - 2 * (starts - 1)
        assert self.log.count("--- job") == starts, self.log
        return log


@contextlib.contextmanager
def variables(names: dict[str, str]) -> Iterator[None]:
    """Within: environment variables."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        yield


def only(event: str, log: list[dict[str, Any]]) -> dict[str, Any]:
    """The one line of that event."""
    (line,) = (line for line in log if line["event"] == event)
    return line


def expect_same_weights(run: Path, other: Path) -> None:
    """The bits are equal, whatever interrupted the run and on however many ranks it went on."""
    weights = [final_weights(folder) for folder in (run, other)]
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key]), key


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    def refuse(text: str) -> None:
        raise AssertionError(text)

    found = newest_checkpoint(run / "checkpoints", refuse)
    assert found is not None and found[1]["step"] == EPOCHS * 5
    return found[1]["model"]


@pytest.fixture
def launch(simple: ThrowawayCluster, tmp_path: Path, config: Path) -> Iterator[Launcher]:
    """The launcher on the simple cluster, which has no job before and after."""
    launcher = Launcher(simple, tmp_path, config, "lo")
    yield launcher
    empty_queue(simple)
    simple.configure(SlurmctldParameters="", MaxJobCount="100")


def empty_queue(cluster: ThrowawayCluster) -> None:
    for _ in range(2):  # those that were just being requeued
        cluster.command("scancel", "--user", "root")
        wait_for("an empty queue", lambda: not cluster.command("squeue", "-h"), JOB_S)
