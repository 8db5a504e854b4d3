"""The check of a data folder: what training refuses, skips or fails on, and the reading speed."""

from __future__ import annotations

import hashlib
import os
import textwrap
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from tqdm import tqdm

from harness.data.check.archives import is_archived, survey_archives
from harness.data.check.duplicates import find_duplicates
from harness.data.check.examine import examine
from harness.data.check.findings import (
    DAMAGED,
    KINDS,
    LEAKED,
    LEFT_OUT,
    NOTED,
    OTHER_FORMAT,
    REFUSED,
    UNDECODABLE,
    Finding,
)
from harness.data.check.survey import Stored, survey
from harness.data.loaders.child_process import worker_processes
from harness.data.prepare.layouts import SPLIT_BY_CLASS, Layout, recognise

CHUNK = 8  # files that a process reads per task
LISTED = 20  # paths shown for each kind
WIDTH = 100  # characters shown of a path's detail


@dataclass(frozen=True)
class Report:
    """Images by split and class, all findings, and the speed of reading and decoding."""

    folder: Path
    classes: dict[str, dict[str, int]]  # split -> class -> images; unlabelled: class ""
    bytes: int
    seconds: float
    processes: int
    findings: dict[str, list[Finding]]
    archived: bool  # in tar archives
    layout: Layout | None = None  # the folder's layout, if it is not ours

    @property
    def images(self) -> dict[str, int]:
        """Number of images by split."""
        return {split: sum(sizes.values()) for split, sizes in self.classes.items()}

    @property
    def counts(self) -> Counter[str]:
        """Number of findings by severity: damaged, left out, refused by training, noted."""
        return Counter(KINDS[k].counts_as for k, found in self.findings.items() for _ in found)

    @property
    def damaged(self) -> int:
        """Number of files with damaged pixels."""
        return self.counts[DAMAGED]

    @property
    def failed(self) -> bool:
        """True if anything is damaged or left out, or makes training refuse the folder."""
        return any(count for name, count in self.counts.items() if name != NOTED)

    @property
    def config(self) -> dict[str, int] | None:
        """Keys of `data:` that count images and classes; None if training refuses the folder."""
        if self.counts[REFUSED]:
            return None
        keys = {f"{split}_images": count for split, count in self.images.items()}
        keys["classes"] = len(self.classes["train"])
        return keys

    def as_json(self) -> dict[str, object]:
        """Return the whole report as a JSON object."""
        total = sum(self.images.values())
        return {
            "folder": str(self.folder),
            "images": self.images,
            "classes": {split: n for split, n in self.classes.items() if split != "unlabelled"},
            "config": self.config,
            "failed": self.failed,
            "refused": self.counts[REFUSED],
            "left_out": self.counts[LEFT_OUT],
            "damaged": self.damaged,
            "layout": self.layout.name if self.layout else None,
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
        for split in ("train", "val"):
            if sizes := self.classes[split].values():
                spread = f"{min(sizes):,}, {median(sizes):,.0f} and {max(sizes):,}"
                lines.append(
                    f"{split}: {len(sizes):,} classes of {spread} images (least, median, most)"
                )
        for kind, found in self.findings.items():
            lines += _lines_on(kind, found)
        if self.config is not None:
            keys = [f"  {key}: {count}" for key, count in self.config.items()]
            lines += ["for the config:", "data:", *keys]
            lines += ["run:", "  data_format: tar"] if self.archived else []
        if self.layout is not None:
            lines.append(self.layout.advice(self.folder))
        return "\n".join([*lines, self._verdict()])

    def _verdict(self) -> str:
        if self.failed:
            parts = [
                f"{n:,} {name}" for name in (REFUSED, LEFT_OUT, DAMAGED) if (n := self.counts[name])
            ]
            return f"FAILED: {', '.join(parts)}"
        leaked = len(self.findings[LEAKED])
        warning = f", but val shares {leaked:,} images with the training data" if leaked else ""
        return f"nothing is damaged or left out{warning}"


def _lines_on(kind: str, found: list[Finding]) -> list[str]:
    lines = [f"{kind}: {len(found):,} ({KINDS[kind].meaning})"] if found else []
    for finding in found[:LISTED]:
        detail = f": {finding.detail}" if finding.detail else ""
        path = finding.path if finding.path.isprintable() else ascii(finding.path)
        lines.append(f"  {path}{textwrap.shorten(detail, WIDTH, placeholder=' …')}")
    if len(found) > LISTED:
        lines.append(f"  and {len(found) - LISTED:,} more; --json lists all")
    return lines


def check_folder(folder: Path) -> Report:
    """Read and decode every image in train, val and, if present, unlabelled: folders or archives.

    Uses all cores and shows a progress bar on a terminal. Raises UserError if train or val is
    missing, and for archives that training refuses.
    """
    archived = is_archived(folder)
    surveyed = survey_archives(folder) if archived else survey(folder)
    images = surveyed.images
    chunks = [images[start : start + CHUNK] for start in range(0, len(images), CHUNK)]
    processes = len(os.sched_getaffinity(0))
    size, findings, digests = 0, surveyed.findings, []
    start_s = time.monotonic()
    with (
        worker_processes(processes) as workers,
        tqdm(total=len(images), desc=f"checking {folder}", unit=" images", disable=None) as bar,
    ):
        for chunk, examined in zip(chunks, workers.map(_examine_chunk, chunks), strict=True):
            size += examined.size
            findings += examined.findings
            digests += examined.digests
            bar.update(len(chunk))
    seconds = time.monotonic() - start_s
    findings += find_duplicates(digests)
    by_kind: dict[str, list[Finding]] = {kind: [] for kind in KINDS}
    for finding in findings:
        by_kind[finding.kind].append(finding)
    report = Report(folder, surveyed.classes, size, seconds, processes, by_kind, archived)
    layout = recognise(folder) if report.failed and not archived else None
    is_ours = layout is SPLIT_BY_CLASS and not by_kind[OTHER_FORMAT]
    return report if is_ours else replace(report, layout=layout)


@dataclass(frozen=True)
class _Examined:
    """The result of one chunk; `digests` are (path, SHA-256) of the files that decode."""

    size: int  # in bytes
    findings: list[Finding]
    digests: list[tuple[str, bytes]]


def _examine_chunk(chunk: list[Stored]) -> _Examined:
    size, findings, digests = 0, [], []
    for stored in chunk:
        try:
            content = stored.read()
        except OSError as error:
            why = f"cannot be read: {error.strerror}"
            findings.append(Finding(UNDECODABLE, stored.path, why))
            continue
        size += len(content)
        found = [
            Finding(kind, stored.path, why) for kind, why in examine(Path(stored.path), content)
        ]
        findings += found
        if not any(finding.kind == UNDECODABLE for finding in found):
            digests.append((stored.path, hashlib.sha256(content).digest()))
    return _Examined(size, findings, digests)
