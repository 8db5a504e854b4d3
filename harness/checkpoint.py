"""Checkpoints: atomic, checksummed, the newest valid one wins."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

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


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a temporary file, flushes it to the disk and renames it: whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def save_checkpoint(path: Path, payload: dict[str, Any]) -> None:
    """Writes `payload` and, first, its SHA-256 beside it, so that a checkpoint is never without.

    Raises OSError where the disk is full or the folder is gone; older checkpoints stay intact.
    """
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    content = buffer.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
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
