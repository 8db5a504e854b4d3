"""A folder of images packed into tar archives, which hold the same data in fewer files."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO

from tqdm import tqdm

from harness.atomic_file import write_atomically
from harness.data.prepare.prepared_folder import SPLITS
from harness.data.sources.folder import FolderSource, open_folder
from harness.data.sources.tar.members import BLOCK, is_plain_name
from harness.errors import UserError

PARTIAL = ".harness-pack.partial"  # unfinished archives; removed from a finished folder
COMPARED_AT_ONCE = 1000  # images


@dataclass(frozen=True)
class Shard:
    """An archive to write: the images `first` to `last` - 1 of a split."""

    name: str
    images: FolderSource
    first: int
    last: int

    def members(self) -> Iterator[tuple[int, bytes, int]]:
        """Yield each image's id, its header and its size in bytes."""
        for image_id in range(self.first, self.last):
            member = tarfile.TarInfo(self._path(image_id))
            member.size = os.stat(self.images.name(image_id)).st_size
            yield image_id, member.tobuf(tarfile.GNU_FORMAT, errors="surrogateescape"), member.size

    def _path(self, image_id: int) -> str:
        return self.images.relative_path(image_id).removeprefix("unlabelled/")


def pack(folder: Path, out: Path, shards: int | None) -> str:
    """Write train.tar, val.tar and, if present, unlabelled.tar into `out`; return a line to print.

    With `shards`, so many archives of each split: train-00000.tar and so on. The archives appear
    once all of them are complete and every image was read back and compared. Continues where an
    earlier call stopped. Raises UserError for a folder that training would refuse, for one with
    other contents, and for errors of the system (disk full, no permission).
    """
    if shards is not None and shards < 1:
        raise UserError(f"--shards {shards}: at least 1 is needed")
    splits = {
        split: open_folder(folder, split)
        for split in SPLITS
        if split != "unlabelled" or (folder / split).is_dir()
    }
    plan = [shard for split, images in splits.items() for shard in _shards(split, images, shards)]
    try:
        out.mkdir(parents=True, exist_ok=True)
        before = _is_complete(out, plan)
        if not before:
            with _begun(out, {split: images.digest for split, images in splits.items()}, plan):
                _write(out, plan)
                _compare(out / PARTIAL, plan)
                for shard in plan:
                    if (out / PARTIAL / shard.name).exists():
                        (out / PARTIAL / shard.name).rename(out / shard.name)
            shutil.rmtree(out / PARTIAL)
        else:
            _compare(out, plan)
    except OSError as error:
        where = error.filename2 or error.filename or out
        why = error.strerror or error
        raise UserError(f"{where}: {why}; fix that and repeat the command") from None
    counts = ", ".join(f"{len(images):,} in {split}" for split, images in splits.items())
    return (
        f"{out}: {'packed before, ' if before else ''}{len(plan)} archives ({counts}), every image "
        f"compared; train with run.data_root={out} run.data_format=tar"
    )


def _shards(split: str, images: FolderSource, shards: int | None) -> Iterator[Shard]:
    for image_id in range(len(images)):
        if not is_plain_name(images.relative_path(image_id)):
            raise UserError(
                f"{images.name(image_id)!a}: its name contains a control character; rename it"
            )
    if shards is None:
        yield Shard(f"{split}.tar", images, 0, len(images))
        return
    count = min(shards, len(images))
    for number in range(count):
        bounds = (len(images) * number // count, len(images) * (number + 1) // count)
        yield Shard(f"{split}-{number:05}.tar", images, *bounds)


def _is_complete(out: Path, plan: list[Shard]) -> bool:
    """Return whether all archives are in place. Raises UserError for other archives."""
    planned = {shard.name for shard in plan}
    found = {path.name for path in out.iterdir() if path.name.endswith(".tar")}
    if strangers := sorted(found - planned):
        raise UserError(f"{out}: holds other archives ({strangers[0]}); name another folder")
    if found and not (out / PARTIAL).exists() and found != planned:
        missing = min(planned - found)
        raise UserError(f"{out}: {missing} is missing; delete the other archives, or restore it")
    return found == planned and not (out / PARTIAL).exists()


@contextmanager
def _begun(out: Path, digests: dict[str, str], plan: list[Shard]) -> Iterator[None]:
    """Hold the lock of a folder whose unfinished archives are of these images, or are new."""
    (out / PARTIAL).mkdir(exist_ok=True)
    record = {"digests": digests, "archives": [shard.name for shard in plan]}
    with open(out / PARTIAL / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another process is packing into it; wait for it") from None
        except OSError:
            pass  # a file system without locks
        begun = out / PARTIAL / "begun.json"
        if begun.exists() and begun.read_text() != json.dumps(record):
            raise UserError(
                f"{out}: was begun for other images or shards; delete {out / PARTIAL}, or name "
                "another folder"
            )
        write_atomically(begun, json.dumps(record).encode())
        yield


def _write(out: Path, plan: list[Shard]) -> None:
    """Write what is missing of each archive. Raises UserError where it does not fit the disk."""
    places = [out / PARTIAL / shard.name for shard in plan if not (out / shard.name).exists()]
    missing = [shard for shard in plan if not (out / shard.name).exists()]
    sizes = [_size(shard) for shard in missing]
    written = sum(place.stat().st_size for place in places if place.exists())
    free = shutil.disk_usage(out).free
    if sum(sizes) - written > free:
        raise UserError(
            f"{out}: needs {(sum(sizes) - written) / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free"
        )
    with tqdm(total=sum(sizes), desc="packing", unit="B", unit_scale=True, disable=None) as bar:
        for shard, place in zip(missing, places, strict=True):
            with open(place, "r+b" if place.exists() else "w+b") as archive:
                _write_shard(shard, archive, bar)
                archive.flush()
                os.fsync(archive.fileno())


def _padded(size: int, unit: int = BLOCK) -> int:
    return -(-size // unit) * unit


def _size(shard: Shard) -> int:
    members = sum(len(header) + _padded(size) for _, header, size in shard.members())
    return _padded(members + 2 * BLOCK, tarfile.RECORDSIZE)


def _write_shard(shard: Shard, archive: IO[bytes], bar: tqdm) -> None:
    """Write the members behind those that an earlier call completed, and the end."""
    written, position = archive.seek(0, os.SEEK_END), 0
    for image_id, header, size in shard.members():
        end = position + len(header) + _padded(size)
        if end > written:
            archive.seek(position)
            content = shard.images.read(image_id)
            if len(content) != size:
                raise UserError(f"{shard.images.name(image_id)}: has changed; repeat the command")
            archive.write(header + content + bytes(_padded(size) - size))
        bar.update(end - position)
        position = end
    archive.seek(position)
    archive.write(bytes(_padded(position + 2 * BLOCK, tarfile.RECORDSIZE) - position))
    archive.truncate()


def _compare(folder: Path, plan: list[Shard]) -> None:
    """Compare all archives in `folder` with the images, byte by byte, in threads."""
    total = sum(shard.last - shard.first for shard in plan)
    with (
        ThreadPoolExecutor(2 * len(os.sched_getaffinity(0))) as pool,
        tqdm(total=total, desc="comparing", unit=" images", disable=None) as bar,
    ):
        for shard in plan:
            place = folder / shard.name
            if not place.exists():  # moved into place by an earlier call, so compared
                continue
            with open(place, "rb") as archive:
                _compare_shard(shard, archive, pool, bar)


def _compare_shard(shard: Shard, archive: IO[bytes], pool: ThreadPoolExecutor, bar: tqdm) -> None:
    def differs(row: tuple[int, int, bytes, int]) -> bool:
        position, image_id, header, size = row
        stored = os.pread(archive.fileno(), len(header) + _padded(size), position)
        padding = bytes(_padded(size) - size)
        return stored != header + shard.images.read(image_id) + padding

    if os.fstat(archive.fileno()).st_size != _size(shard):
        raise UserError(
            f"{archive.name}: is not of the size that {shard.images.location} gives; delete it and "
            "repeat the command"
        )
    rows = _with_positions(shard)
    while some := list(islice(rows, COMPARED_AT_ONCE)):
        for row, wrong in zip(some, pool.map(differs, some), strict=True):
            if wrong:
                raise UserError(
                    f"{archive.name}: differs from {shard.images.name(row[1])} at offset {row[0]}; "
                    "delete the archive and repeat the command"
                )
        bar.update(len(some))


def _with_positions(shard: Shard) -> Iterator[tuple[int, int, bytes, int]]:
    position = 0
    for image_id, header, size in shard.members():
        yield position, image_id, header, size
        position += len(header) + _padded(size)
