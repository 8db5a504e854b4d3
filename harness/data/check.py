"""Reads every image of a data set: what is damaged, huge, odd or named twice, and how fast."""

from __future__ import annotations

import io
import os
import tempfile
import textwrap
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.io import decode_jpeg
from tqdm import tqdm

from harness.data.child_process import worker_processes
from harness.data.index import class_folders, image_names
from harness.data.reference import decode
from harness.data.scan import FORMATS
from harness.errors import UserError

CHUNK = 8  # files that a process reads at a time
HUGE_BYTES = 64 * 2**20  # of the decoded RGB image: 22.4 million pixels
LISTED = 20  # paths of a kind that a person is shown
WIDTH = 100  # characters of a path's detail that a person is shown
ORIENTATION = 0x0112  # EXIF's tag; 1 is upright

UNDECODABLE = "cannot be decoded"
DAMAGED_INSIDE = "damaged inside, though it decodes"
SAME_NAME = "same name in several places"
SAME_BUT_CASE = "names equal but for case"
# every kind of finding and what it means for training, in the order of the report
KINDS = {
    UNDECODABLE: "training stops there, or takes another image with data.on_bad_image=skip",
    DAMAGED_INSIDE: "trained on as it is: fetch it again",
    "huge": f"more than {HUGE_BYTES // 2**20} MiB as RGB: takes memory",
    "PNG by content, JPEG by name": "trained on",
    "JPEG by content, PNG by name": "trained on",
    "CMYK": "converted to RGB",
    "gray": "repeated as RGB",
    "palette": "converted to RGB",
    "with alpha": "alpha is dropped",
    "16-bit": "the upper 8 bits are taken",
    "EXIF-rotated": "not rotated, as in PIL",
    SAME_NAME: "perhaps the same image",
    SAME_BUT_CASE: "one file on systems that do not tell case apart",
}
DAMAGED = (UNDECODABLE, DAMAGED_INSIDE)
# what libjpeg says of damaged pixels; its other warnings are about headers
COMPLAINTS = ("Corrupt JPEG data", "Premature end", "Inconsistent progression")
MODES = {"CMYK": "CMYK", "L": "gray", "LA": "gray", "1": "gray", "P": "palette"}


@dataclass(frozen=True)
class Finding:
    """`path` within the data folder; `detail` may be empty."""

    kind: str
    path: str
    detail: str


@dataclass(frozen=True)
class Report:
    """Images by split, what was found, and the speed of reading and decoding."""

    folder: Path
    images: dict[str, int]
    bytes: int
    seconds: float
    processes: int
    findings: dict[str, list[Finding]]

    @property
    def damaged(self) -> int:
        """Files whose pixels are not what they should be."""
        return sum(len(self.findings[kind]) for kind in DAMAGED)

    def as_json(self) -> dict[str, Any]:
        """Everything found, under plain keys."""
        total = sum(self.images.values())
        return {
            "folder": str(self.folder),
            "images": self.images,
            "damaged": self.damaged,
            "bytes": self.bytes,
            "seconds": self.seconds,
            "processes": self.processes,
            "images_per_s": total / self.seconds,
            "mb_per_s": self.bytes / 1e6 / self.seconds,
            "findings": {
                kind: [{"path": finding.path, "detail": finding.detail} for finding in found]
                for kind, found in self.findings.items()
            },
        }

    def __str__(self) -> str:
        total = sum(self.images.values())
        splits = ", ".join(f"{images:,} in {split}" for split, images in self.images.items())
        lines = [
            f"{self.folder}: {total:,} images ({splits}), {self.bytes / 1e6:,.0f} MB, read and "
            f"decoded twice in {self.seconds:.1f} s: {total / self.seconds:,.0f} images/s, "
            f"{self.bytes / 1e6 / self.seconds:,.0f} MB/s, {self.processes} processes"
        ]
        for kind, meaning in KINDS.items():
            found = self.findings[kind]
            if found:
                lines.append(f"{kind}: {len(found):,} ({meaning})")
            for finding in found[:LISTED]:
                detail = f": {finding.detail}" if finding.detail else ""
                lines.append(f"  {finding.path}{textwrap.shorten(detail, WIDTH, placeholder=' …')}")
            if len(found) > LISTED:
                lines.append(f"  and {len(found) - LISTED:,} more; --json lists all")
        verdict = f"FAILED: {self.damaged:,} damaged" if self.damaged else "nothing is damaged"
        return "\n".join([*lines, verdict])


def check_folder(folder: Path) -> Report:
    """Reads and decodes every image below train/, val/ and, if it is there, unlabelled/.

    With all cores, and a progress bar on a terminal. Raises UserError for a missing or empty
    folder.
    """
    paths = {split: _paths(folder, split) for split in ("train", "val")}
    if (folder / "unlabelled").exists():  # flat: without classes
        paths["unlabelled"] = [f"unlabelled/{name}" for name in image_names(folder / "unlabelled")]
    flat = [path for found in paths.values() for path in found]
    chunks = [(folder, flat[start : start + CHUNK]) for start in range(0, len(flat), CHUNK)]
    processes = len(os.sched_getaffinity(0))
    size, findings = 0, list(_namesakes(flat))
    start_s = time.monotonic()
    with (
        worker_processes(processes) as workers,
        tqdm(total=len(flat), desc=f"checking {folder}", unit=" images", disable=None) as bar,
    ):
        for (_, names), (chunk_size, found) in zip(
            chunks, workers.map(_examine_chunk, chunks), strict=True
        ):
            size += chunk_size
            findings += found
            bar.update(len(names))
    seconds = time.monotonic() - start_s
    by_kind: dict[str, list[Finding]] = {kind: [] for kind in KINDS}
    for finding in findings:
        by_kind[finding.kind].append(finding)
    images = {split: len(found) for split, found in paths.items()}
    return Report(folder, images, size, seconds, processes, by_kind)


def _paths(folder: Path, split: str) -> list[str]:
    """The images in the class folders of a split, relative to `folder`."""
    place = folder / split
    if not place.is_dir():
        raise UserError(f"{place}: no such folder; give the folder that holds train/ and val/")
    return [
        f"{split}/{class_name}/{name}"
        for class_name in class_folders(place)
        for name in image_names(place / class_name)
    ]


def _namesakes(paths: Sequence[str]) -> Iterator[Finding]:
    """Files whose names are equal, or would be on a system that does not tell case apart."""
    groups: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        groups[path.rsplit("/", 1)[1].casefold()].append(path)
    for group in groups.values():
        if len(group) > 1:
            names = {path.rsplit("/", 1)[1] for path in group}
            kind = SAME_NAME if len(names) < len(group) else SAME_BUT_CASE
            yield Finding(kind, group[0], f"also {', '.join(group[1:])}")


def _examine_chunk(chunk: tuple[Path, list[str]]) -> tuple[int, list[Finding]]:
    """Bytes read, and what was found."""
    folder, paths = chunk
    size, findings = 0, []
    for path in paths:
        try:
            content = (folder / path).read_bytes()
        except OSError as error:
            findings.append(Finding(UNDECODABLE, path, f"cannot be read: {error.strerror}"))
            continue
        size += len(content)
        findings += [Finding(kind, path, why) for kind, why in _examine(folder / path, content)]
    return size, findings


def _examine(path: Path, content: bytes) -> Iterator[tuple[str, str]]:
    """Kinds of what is wrong or odd with an image file, each with its detail."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about size and metadata
        try:
            decode(path)  # as training does
        except UserError as error:
            yield UNDECODABLE, str(error).split(f"{UNDECODABLE}: ")[-1]
            return
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            yield from _oddities(image, path.suffix.lower(), content)
        if complaint := _complaint(content):
            yield DAMAGED_INSIDE, complaint


def _oddities(image: Image.Image, suffix: str, content: bytes) -> Iterator[tuple[str, str]]:
    """From the header alone."""
    decoded_bytes = image.width * image.height * 3
    if decoded_bytes > HUGE_BYTES:
        mebibytes = decoded_bytes / 2**20
        yield "huge", f"{image.width} x {image.height} pixels, {mebibytes:.0f} MiB as RGB"
    is_png = image.format == "PNG"
    if is_png and suffix != ".png":
        yield "PNG by content, JPEG by name", ""
    if not is_png and suffix == ".png":
        yield "JPEG by content, PNG by name", ""
    if image.mode.startswith("I") or (is_png and content[24] == 16):  # the header's bit depth
        yield "16-bit", image.mode
    if image.mode in MODES:
        yield MODES[image.mode], ""
    if image.mode in ("LA", "RGBA") or "transparency" in image.info:
        yield "with alpha", ""
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # PIL raises many kinds for what broken metadata contains
        return
    if orientation in range(2, 9):
        yield "EXIF-rotated", f"orientation {orientation}"


def _complaint(content: bytes) -> str:
    """What a strict reading of an image that PIL decodes says against it; "" if nothing."""
    try:
        if not content.startswith(b"\xff\xd8"):
            Image.open(io.BytesIO(content)).verify()  # the checksums of a PNG
            return ""
        with _standard_error() as said:
            decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    except RuntimeError as error:
        return str(error).splitlines()[0].rsplit(": ", 1)[-1]
    except (OSError, SyntaxError) as error:
        return str(error)
    return next((line for line in said if line.startswith(COMPLAINTS)), "")


@contextmanager
def _standard_error() -> Iterator[list[str]]:
    """The lines written to standard error within, filled in at the end.

    libjpeg decodes damaged data to wrong pixels; PIL silences its warnings, torchvision lets it
    print them, and that is the only trace.
    """
    lines: list[str] = []
    log, saved = _diversion()
    os.ftruncate(log, 0)
    os.lseek(log, 0, os.SEEK_SET)
    os.dup2(log, 2)
    try:
        yield lines
    finally:
        os.dup2(saved, 2)
        os.lseek(log, 0, os.SEEK_SET)
        lines += os.read(log, 4096).decode(errors="replace").splitlines()


@cache
def _diversion() -> tuple[int, int]:
    """Descriptors of a temporary file, and of the standard error of this process."""
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno()), os.dup(2)
