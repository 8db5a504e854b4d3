"""Checkpoints: written atomically, with a checksum; a resume takes the newest valid one."""

from __future__ import annotations

import hashlib
import io
import os
import re
import time
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.atomic_file import write_atomically
from harness.errors import UserError
from harness.outcome import RunFailed

Payload = dict[str, Any]  # what a checkpoint holds, by key
NAME = re.compile(r"checkpoint-(\d{3,})-(\d{8,})\.pt")  # incarnation, step
SHA256 = re.compile(r"[0-9a-f]{64}(?=\s|$)")


def _ignore(text: str) -> None:
    """Drop a report."""


class DamagedCheckpoint(RunFailed):
    """A checkpoint that cannot be read whole; the message says why, in one line."""


def checkpoint_path(folder: Path, incarnation: int, step: int) -> Path:
    """Name a checkpoint after `step` steps; the greatest (incarnation, step) is the newest."""
    return folder / f"checkpoint-{incarnation:03d}-{step:08d}.pt"


def checkpoint_key(path: Path) -> tuple[int, int]:
    """Parse a checkpoint's name: (incarnation, step). Raises UserError."""
    match = NAME.fullmatch(path.name)
    if match is None:
        raise UserError(f"{path}: not a checkpoint's name (checkpoint-INCARNATION-STEP.pt)")
    return int(match[1]), int(match[2])


def list_checkpoints(folder: Path) -> list[Path]:
    """Return a folder's checkpoints, newest first; [] where there is no such folder.

    Raises UserError where the folder cannot be read, which must not pass for an empty one.
    """
    found = [folder / name for name in _visible_files(folder) if NAME.fullmatch(name)]
    return sorted(found, key=checkpoint_key, reverse=True)


def _visible_files(folder: Path) -> list[str]:
    try:
        return [name for name in os.listdir(folder) if not name.startswith(".")]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from error


def _checksum_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def save_checkpoint(path: Path, payload: Payload) -> None:
    """Write `payload` and, before it, its SHA-256 beside it, so that no checkpoint lacks one.

    Raises OSError where the disk is full or the folder is missing; older checkpoints stay intact.
    """
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    content = buffer.getvalue()
    checksum = hashlib.sha256(content).hexdigest()
    write_atomically(_checksum_path(path), f"{checksum}  {path.name}\n".encode())
    write_atomically(path, content)


def load_checkpoint(path: Path, report: Callable[[str], None] = _ignore) -> Payload:
    """Read a checkpoint to the CPU; never execute what the file contains.

    A checkpoint without a checksum beside it (a copy of the .pt alone, a purge of small files) is
    verified by the CRC-32 of each record of its zip archive, which torch.load itself ignores, and
    `report` receives a line that says so.
    Raises DamagedCheckpoint where it is unreadable, empty, torn, altered, carries code or is none.
    """
    return read_checkpoint(path, report)[0]


def read_checkpoint(path: Path, report: Callable[[str], None] = _ignore) -> tuple[Payload, str]:
    """Read a checkpoint as `load_checkpoint`; return it with the SHA-256 (hex) of its file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: {error.strerror}") from error
    digest = hashlib.sha256(content).hexdigest()
    expected, why = _recorded_checksum(path)
    if expected is None:
        _verify_archive(path, content)
    elif expected != digest:
        raise DamagedCheckpoint(f"{path}: does not match its checksum {_checksum_path(path).name}")
    try:
        payload = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile file may raise anything
        raise DamagedCheckpoint(f"{path}: {_first_line(error)}") from error
    if not isinstance(payload, dict) or "step" not in payload:
        raise DamagedCheckpoint(f"{path}: no checkpoint of a run (it records no step)")
    if expected is None:
        report(f"{path}: {why}; verified by the archive's CRC only")
    return payload, digest


def _recorded_checksum(path: Path) -> tuple[str | None, str]:
    """Return the SHA-256 beside a checkpoint; else None, and why there is none."""
    file = _checksum_path(path)
    try:
        found = SHA256.match(file.read_text(errors="replace"))
    except FileNotFoundError:
        return None, f"its checksum {file.name} is missing"
    except OSError as error:
        return None, f"its checksum {file.name} cannot be read ({error.strerror})"
    return (found[0], "") if found else (None, f"{file.name} holds no checksum")


def _verify_archive(path: Path, content: bytes) -> None:
    try:
        damaged = zipfile.ZipFile(io.BytesIO(content)).testzip()
    except Exception as error:  # a torn or altered archive may raise anything
        raise DamagedCheckpoint(f"{path}: {_first_line(error)}") from error
    if damaged is not None:
        raise DamagedCheckpoint(f"{path}: its record {damaged} does not match its CRC")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def newest_checkpoint(folder: Path, report: Callable[[str], None]) -> tuple[Path, Payload] | None:
    """Return the newest valid checkpoint; report the damaged ones that are passed over.

    Returns None where the folder holds no checkpoint at all. Raises UserError where it holds some
    but no valid one: a run that started over would bury, and in time remove, what may be repaired.
    """
    damaged: list[str] = []
    for path in list_checkpoints(folder):
        try:
            payload = load_checkpoint(path, report)
        except DamagedCheckpoint as error:
            damaged.append(str(error))
            continue
        for why in damaged:
            report(f"damaged checkpoint passed over: {why}")
        return path, payload
    others = [name for name in _visible_files(folder) if not name.endswith(".sha256")]
    if damaged:
        raise UserError(
            f"{folder}: none of its {len(damaged)} checkpoints is valid (newest: {damaged[0]}); "
            "restore one; to start over, choose another --out"
        )
    if others:
        raise UserError(
            f"{folder}: holds {min(others)}, which is no checkpoint's name "
            "(checkpoint-INCARNATION-STEP.pt); rename it; to start over, choose another --out"
        )
    return None


def surplus_checkpoints(folder: Path, keep: int, best_step: int | None) -> list[Path]:
    """Return the checkpoints that may be removed, given that the newest one is valid.

    Kept are the newest `keep`, that of `best_step`, and, beside them, those of older incarnations
    that are as far as the newest or further. The run resumed before them, perhaps because they
    could not be read for a while; until it has passed them they may be all that is left of it.
    One without its checksum was copied, restored or stripped by a person, who decides about it.
    """
    found = list_checkpoints(folder)
    best = [path for path in found if checkpoint_key(path)[1] == best_step][:1]
    if not found:
        return []
    incarnation, step = checkpoint_key(found[0])
    passed = [
        path
        for path, (its_incarnation, its_step) in zip(found, map(checkpoint_key, found), strict=True)
        if its_incarnation == incarnation or its_step < step
    ]
    surplus = [path for path in passed[keep:] if path not in best]
    return [path for path in surplus if _checksum_path(path).exists()]


def prune_checkpoints(folder: Path, keep: int, best_step: int | None) -> None:
    """Remove the surplus checkpoints; call it once the newest one has been written whole."""
    for path in surplus_checkpoints(folder, keep, best_step):
        path.unlink(missing_ok=True)
        _checksum_path(path).unlink(missing_ok=True)


def copy_to_host(state: Mapping[str, object]) -> Payload:
    """Copy nested dicts and lists with all tensors to host memory, which training never changes."""
    return {key: _copy(value) for key, value in state.items()}


def _copy(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)((key, _copy(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value)(_copy(item) for item in value)
    return value


@dataclass(frozen=True)
class WriteOutcome:
    """The end of writing a checkpoint of `step`: `error` is None where it was written."""

    path: Path
    step: int
    seconds: float
    error: Exception | None


class CheckpointWriter:
    """Writes checkpoints in a thread, one after another, and removes surplus ones.

    `before_write` is called in the thread; an error of it (a newer incarnation) is the outcome.
    """

    def __init__(self, folder: Path, keep: int, before_write: Callable[[], None]) -> None:
        self._folder, self._keep, self._before_write = folder, keep, before_write
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: list[Future[WriteOutcome]] = []

    def submit(self, path: Path, payload: Payload, best_step: int | None) -> None:
        """Write `payload`, which nobody else may change; wait for the previous checkpoint first."""
        wait(self._writing)
        self._writing.append(self._thread.submit(self._write, path, payload, best_step))

    def outcomes(self, finish: bool = False) -> list[WriteOutcome]:
        """Return the outcomes since the last call; `finish` waits for the last one."""
        if finish:
            wait(self._writing)
        ended = [writing for writing in self._writing if writing.done()]
        self._writing = [writing for writing in self._writing if writing not in ended]
        return [writing.result() for writing in ended]

    def prune(self, best_step: int | None) -> None:
        """Remove checkpoints but the newest few and the one of `best_step`."""
        prune_checkpoints(self._folder, self._keep, best_step)

    def close(self) -> None:
        """Wait for what is being written."""
        self._thread.shutdown()

    def _write(self, path: Path, payload: Payload, best_step: int | None) -> WriteOutcome:
        begun_s = time.monotonic()
        error = None
        try:
            self._before_write()
            save_checkpoint(path, payload)
            self.prune(best_step)
        except Exception as raised:
            error = raised
        return WriteOutcome(path, payload["step"], time.monotonic() - begun_s, error)
