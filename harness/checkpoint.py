"""Checkpoints: atomic, checksummed, the newest valid one wins."""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.atomic_file import write_atomically
from harness.errors import UserError

NAME = re.compile(r"checkpoint-(\d{3,})-(\d{8,})\.pt")  # incarnation, step


class DamagedCheckpoint(Exception):
    """A checkpoint that cannot be read whole; the message says why, in one line."""


def checkpoint_path(folder: Path, incarnation: int, step: int) -> Path:
    """`step` is the number of steps done. Newest is the greatest (incarnation, step)."""
    return folder / f"checkpoint-{incarnation:03d}-{step:08d}.pt"


def checkpoint_key(path: Path) -> tuple[int, int]:
    """(incarnation, step) of a checkpoint's name."""
    match = NAME.fullmatch(path.name)
    if match is None:
        raise UserError(f"{path}: not a checkpoint's name (checkpoint-INCARNATION-STEP.pt)")
    return int(match[1]), int(match[2])


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, newest first."""
    found = [path for path in folder.glob("checkpoint-*.pt") if NAME.fullmatch(path.name)]
    return sorted(found, key=checkpoint_key, reverse=True)


def _checksum_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def save_checkpoint(path: Path, payload: dict[str, Any]) -> None:
    """Writes `payload` and, first, its SHA-256 beside it, so that a checkpoint is never without.

    Raises OSError where the disk is full or the folder is gone; older checkpoints stay intact.
    """
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    content = buffer.getvalue()
    checksum = hashlib.sha256(content).hexdigest()
    write_atomically(_checksum_path(path), f"{checksum}  {path.name}\n".encode())
    write_atomically(path, content)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint to the CPU; never executes what the file contains.

    Raises DamagedCheckpoint where it is empty, torn, altered or carries code.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: {error.strerror}") from error
    checksum = _checksum_path(path)
    if not checksum.exists():
        raise DamagedCheckpoint(f"{path}: its checksum {checksum.name} is missing")
    if checksum.read_text().split()[:1] != [hashlib.sha256(content).hexdigest()]:
        raise DamagedCheckpoint(f"{path}: does not match its checksum")
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise DamagedCheckpoint(f"{path}: {str(error).splitlines()[0]}") from error


def newest_checkpoint(folder: Path, report: Callable[[str], None]) -> tuple[Path, dict] | None:
    """The newest valid checkpoint; damaged ones on the way are reported and passed over."""
    for path in list_checkpoints(folder):
        try:
            return path, load_checkpoint(path)
        except DamagedCheckpoint as error:
            report(f"damaged checkpoint passed over: {error}")
    return None


def _surplus(folder: Path, keep: int, best_step: int | None) -> Iterator[Path]:
    best = [path for path in list_checkpoints(folder) if checkpoint_key(path)[1] == best_step]
    for path in list_checkpoints(folder)[keep:]:
        if path not in best[:1]:
            yield path


def prune_checkpoints(folder: Path, keep: int, best_step: int | None) -> None:
    """Keeps the newest `keep` checkpoints and the one of `best_step`."""
    for path in list(_surplus(folder, keep, best_step)):
        path.unlink(missing_ok=True)
        _checksum_path(path).unlink(missing_ok=True)


def copy_to_host(value: Any) -> Any:
    """A copy of nested dicts and lists with all tensors in host memory, which training leaves."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)((key, copy_to_host(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value)(copy_to_host(item) for item in value)
    return value


@dataclass(frozen=True)
class Outcome:
    """How a checkpoint of `step` ended: `error` is None where it was written, in `seconds`."""

    path: Path
    step: int
    seconds: float
    error: Exception | None


class CheckpointWriter:
    """Writes checkpoints in a thread, one after the other, and removes surplus ones.

    `before_write` is called in the thread: what it raises (a newer incarnation) is the outcome.
    """

    def __init__(self, folder: Path, keep: int, before_write: Callable[[], None]) -> None:
        self._folder, self._keep, self._before_write = folder, keep, before_write
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: list[Future[Outcome]] = []

    def submit(self, path: Path, payload: dict[str, Any], best_step: int | None) -> None:
        """Takes over `payload`, which nobody else may change; waits for the checkpoint before."""
        wait(self._writing)
        self._writing.append(self._thread.submit(self._write, path, payload, best_step))

    def outcomes(self, finish: bool = False) -> list[Outcome]:
        """What became of the checkpoints since the last call; `finish` waits for the last one."""
        if finish:
            wait(self._writing)
        ended = [writing for writing in self._writing if writing.done()]
        self._writing = [writing for writing in self._writing if writing not in ended]
        return [writing.result() for writing in ended]

    def prune(self, best_step: int | None) -> None:
        """Keeps the newest few and the one of `best_step`."""
        prune_checkpoints(self._folder, self._keep, best_step)

    def close(self) -> None:
        """Waits for what is being written."""
        self._thread.shutdown()

    def _write(self, path: Path, payload: dict[str, Any], best_step: int | None) -> Outcome:
        begun_s = time.monotonic()
        error = None
        try:
            self._before_write()
            save_checkpoint(path, payload)
            self.prune(best_step)
        except Exception as raised:
            error = raised
        return Outcome(path, payload["step"], time.monotonic() - begun_s, error)
