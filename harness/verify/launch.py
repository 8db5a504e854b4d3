"""Ranks as real processes: starting them, waiting for them, finding why they failed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from harness.compat import describe_peer_loss
from harness.config.loading import dump_config
from harness.errors import USER_ERROR, UserError
from harness.verify.results import Results
from harness.verify.setting import SHARED_GPU, Request, Setting

# python -m harness.verify.rank, but faster to start
RANK = """
import sys
from harness.startup import import_quickly
import_quickly("harness.verify.rank")
from harness.verify.rank import main
sys.exit(main(sys.argv[1:]))
"""
RANK_PROGRAM = (sys.executable, "-c", RANK)
POLL_S = 0.1
LAST_WORDS_S = 10.0  # time for the other ranks to report once one has failed


class Crashed(Exception):
    """The ranks failed; the message is one line, from the rank at fault."""


def launch_ranks(
    setting: Setting, where: str, world_size: int, tasks: list[str], micro_batch: int | None = None
) -> Results:
    """Let `world_size` ranks do `tasks`, methods of `rank.Rank`; return rank 0's results.

    `micro_batch` (images) replaces the config's. Raises Crashed, or a rank's UserError.
    """
    folder = Path(tempfile.mkdtemp(dir=setting.folder))
    config = setting.config
    if micro_batch is None and setting.shares_gpus(world_size) and not setting.exact:
        micro_batch = config.recipe.worker_batch  # the ranks also share a GPU's memory
    if micro_batch is not None:
        run = config.run.model_copy(update={"micro_batch": micro_batch})
        config = config.model_copy(update={"run": run})
    request = Request(
        tasks,
        setting.steps,
        setting.starts,
        setting.stop_at or 0,
        setting.val_images,
        str(setting.folder),
        setting.curve_precision,
    )
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "request.json").write_text(json.dumps(asdict(request)))
    with _ranks(setting, folder, world_size) as processes:
        _wait(processes, folder, where)
    results = torch.load(folder / "results.pt")
    shutil.rmtree(folder)
    return results


@contextmanager
def _ranks(
    setting: Setting, folder: Path, world_size: int
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start the processes, with output to files; kill those still alive at the end."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(world_size):
            out, err = folder / f"rank-{rank}.out", folder / f"rank-{rank}.err"
            with out.open("wb") as stdout, err.open("wb") as stderr:
                process = subprocess.Popen(
                    [*setting.rank_program, str(folder), str(os.getpid())],
                    env=_environment(setting, rank, world_size, port),
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                )
            processes.append(process)
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def _environment(setting: Setting, rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return torchrun's variables for this machine; surplus ranks are distributed over the GPUs."""
    shared = setting.shares_gpus(world_size)
    local_ranks = torch.cuda.device_count() if shared else world_size
    threads = max(len(os.sched_getaffinity(0)) // world_size, 1)
    own = {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank % local_ranks),
        "LOCAL_WORLD_SIZE": str(local_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return (
        {"OMP_NUM_THREADS": str(threads)} | os.environ | own | ({SHARED_GPU: "1"} if shared else {})
    )


def _wait(processes: list[subprocess.Popen[bytes]], folder: Path, where: str) -> None:
    """Wait for all ranks and show their progress. Raises Crashed or UserError."""
    progress, last_words_s = Progress(folder / "progress.txt", where), None
    while None in (codes := [process.poll() for process in processes]):
        if any(codes):
            last_words_s = last_words_s or time.monotonic()
            if time.monotonic() - last_words_s > LAST_WORDS_S:
                break
        progress.show()
        time.sleep(POLL_S)
    progress.clear()
    if any(codes):
        rank, why = _why_failed(codes, folder)
        if codes[rank] == USER_ERROR:
            raise UserError(why)
        raise Crashed(f"rank {rank}: {why}")


class Progress:
    """One line on standard error, overwritten; without a terminal, one line per launch."""

    def __init__(self, file: Path, where: str) -> None:
        self._file, self._where, self._terminal = file, where, sys.stderr.isatty()
        self._shown = ""
        if not self._terminal:
            print(f"{where} …", file=sys.stderr, flush=True)

    def show(self) -> None:
        text = self._file.read_text() if self._file.exists() else "starting"
        if self._terminal and text and text != self._shown:
            print(f"\r\x1b[K{self._where}: {text}", end="", file=sys.stderr, flush=True)
            self._shown = text

    def clear(self) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _why_failed(codes: list[int | None], folder: Path) -> tuple[int, str]:
    """Return the rank that failed first-hand, not one that only lost it, and its last line."""
    reasons = []
    for rank, code in enumerate(codes):
        if not code:
            continue
        errors = (folder / f"rank-{rank}.err").read_text(errors="replace").splitlines()
        lines = [line.strip() for line in errors if line.strip()]
        lines = [line for line in lines if line.startswith("error: ")] or lines[-1:]
        why = lines[0] if lines else f"exit code {code}"
        if code < 0:
            why = f"killed by {signal.Signals(-code).name}"
        reasons.append((bool(describe_peer_loss(RuntimeError(why))), rank, why))
    _, rank, why = min(reasons)
    return rank, why
