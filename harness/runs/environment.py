"""The environment of a result: code, libraries and hardware."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from harness.runs.logging.jsonl import Record

if TYPE_CHECKING:  # the launcher computes the digest of the code without PyTorch
    import torch

COMMIT = "COMMIT"  # in a copy of the harness: the commit that it was made from, "" where unknown
DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")  # the distributions that have it


@cache
def code_digest(packages: tuple[str, ...] = ("harness",)) -> str:
    """Return the SHA-256 (hex) of the .py files of `packages`: their relative names and bytes.

    It does not depend on where the packages are, on compiled or hidden files, or on templates,
    which change no result. Computed once per process. Raises ModuleNotFoundError.
    """
    digest = hashlib.sha256()
    for package in packages:
        for name, path in sorted(package_files(package)):
            if path.suffix == ".py":
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                digest.update(f"{name}\0{content}\n".encode())
    return digest.hexdigest()


def package_files(package: str) -> Iterator[tuple[str, Path]]:
    """Yield (name relative to the package's parent, path) of each file of an importable package.

    Hidden and compiled files are left out. Raises ModuleNotFoundError where there is no such
    package, or it has no files.
    """
    spec = find_spec(package)
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    found = False
    if not folders and spec and spec.has_location:  # a package of one file
        found = True
        yield Path(str(spec.origin)).name, Path(str(spec.origin))
    for folder in folders:
        for path in folder.rglob("*"):
            parts = path.relative_to(folder).parts
            left_out = "__pycache__" in parts or any(part.startswith(".") for part in parts)
            if path.is_file() and not left_out:
                found = True
                yield "/".join((package, *parts)), path
    if not found:
        raise ModuleNotFoundError(f"No files of a package named {package!r}", name=package)


def code_commit() -> str | None:
    """Return the commit of this harness: git's, or the one that a copy was made from."""
    package = Path(__file__).parents[1]
    try:
        return (package / COMMIT).read_text().strip() or None
    except FileNotFoundError:
        return git_commit(package)


def git_commit(folder: Path) -> str | None:
    """Return the 40 digits of the commit that `folder` belongs to, with -dirty after changes.

    None where git does not track `folder`, as in an installed package, or git is not installed.
    """
    # without the first, an installed package would get the commit of a project around its .venv
    if _git(folder, "ls-files", "--error-unmatch", ".") is None:
        return None
    return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *words: str) -> str | None:
    """Return what git prints; None where it fails or is not installed."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *words]  # every rank runs it
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return None if done.returncode else done.stdout.strip()


def versions() -> dict[str, str | None]:
    """Return the versions of the harness, Python and the libraries that a result depends on.

    None means that a library is not installed.
    """
    import numpy
    import PIL
    import torch
    import torchvision

    from harness import __version__

    return {
        "harness": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "dali": _dali_version(),
    }


def _dali_version() -> str | None:
    """Read it from the metadata, as importing DALI takes a second and few processes need it."""
    for distribution in DALI:
        with suppress(PackageNotFoundError):
            return version(distribution)
    return None


def describe_environment(
    device: torch.device, ranks: int, plug_ins: tuple[str, ...] = (), exact: Record | None = None
) -> Record:
    """Describe versions, hardware, code, commit and command of this process, one of `ranks`.

    `plug_ins` are the modules of installed packages that count as code of the run, `exact` the
    conditions of exact sums.
    """
    import torch

    cuda = device.type == "cuda"
    return {
        "versions": versions() | {"cuda": torch.version.cuda if cuda else None},
        "hardware": {
            "host": socket.gethostname(),
            "cpus": os.cpu_count(),
            "cpu": platform.processor() or platform.machine(),
            "gpu": torch.cuda.get_device_name(device) if cuda else None,
            "gpus": torch.cuda.device_count() if cuda else 0,
        },
        "ranks": ranks,
        "git_commit": code_commit(),
        "code_digest": code_digest(("harness", *plug_ins)),
        "command": sys.argv,
        "exact": exact or {},
    }


def code_record(environment: Record) -> Record:
    """Return the part of a described environment that each start and resume logs."""
    keys = ("code_digest", "git_commit", "versions", "exact")
    return {key: environment.get(key) for key in keys}


def code_changes(before: Record, after: Record) -> str:
    """Describe how code, versions and exact sums' conditions differ: "torch 2.14.1 → 2.15.0".

    "" where they are equal. What one of the records lacks, as older ones lack the digest, is not
    compared.
    """
    changes = []
    digests = [record.get("code_digest") for record in (before, after)]
    commits = [record.get("git_commit") for record in (before, after)]
    # a commit that changes only documents does not change the code
    if _differ(*digests) if all(digests) else _differ(*commits):
        name, names = ("commit", commits) if _differ(*commits) else ("code", digests)
        changes.append(f"{name} {' → '.join(_short(str(digits)) for digits in names)}")
    for key in ("versions", "exact"):
        old, new = (record.get(key) or {} for record in (before, after))
        for name, value_before in old.items():
            if _differ(value_before, new.get(name)):
                changes.append(f"{name} {value_before} → {new[name]}")
    return ", ".join(changes)


def _differ(before: object, after: object) -> bool:
    return before is not None and after is not None and before != after


def _short(digits: str) -> str:
    return digits[:9] + ("-dirty" if digits.endswith("-dirty") else "")


def recorded_code_changes(lines: Iterable[Record]) -> dict[int, str]:
    """Return {step: how the code changed there} from a log's lines, in the order of writing.

    A run resumed at an earlier step repeats the steps that ran under the changed code.
    """
    changes: dict[int, str] = {}
    for line in lines:
        if line["event"] == "resume":
            changes = {step: text for step, text in changes.items() if step < line["step"]}
        elif line["event"] == "code_changed":
            changes[line["step"]] = line["changes"]
    return changes
