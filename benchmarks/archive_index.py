"""How long the index of ImageNet's training archive takes, on one that is made up.

    python -m benchmarks.archive_index FOLDER IMAGES [--members 1281167] [--plain]

IMAGES is a folder of JPEGs. Their headers, in turn, are written into an archive of ImageNet's size
in FOLDER, as 1000 nested archives or, with --plain, as one; what follows an image's header is a
hole, so the archive takes a few GB of disk. The index is built, read again, and built once more
after the process that builds it was killed half-way. --write stores the figures.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import IO

from benchmarks.conditions import benchmark_parser, write_results
from benchmarks.loaders import find_images
from harness.data.sources.tar.members import BLOCK

CLASSES = 1000
START_OF_SCAN = 0xDA  # PIL reads the markers of a JPEG up to it
BUILD = """
import sys
from pathlib import Path
from harness.data.sources.tar.source import open_tar
print(len(open_tar(Path(sys.argv[1]), "train")))
"""


def head_and_size(path: Path) -> tuple[bytes, int]:
    """An image up to its first scan, and its size in bytes."""
    content = path.read_bytes()
    position = 2
    while content[position + 1] != START_OF_SCAN:
        position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
    end = position + 2 + int.from_bytes(content[position + 2 : position + 4], "big")
    return content[:end], len(content)


def padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT)


def write_members(
    archive: IO[bytes], names: Sequence[str], images: Iterator[tuple[bytes, int]]
) -> int:
    """Writes members from the current position on, and the end mark; returns the size of all."""
    start = position = archive.tell()
    for name, (head, size) in zip(names, images, strict=False):
        archive.seek(position)
        archive.write(header(name, size) + head)
        position += BLOCK + padded(size)
    archive.seek(position)
    archive.write(bytes(2 * BLOCK))
    return archive.tell() - start


def make_up(path: Path, members: int, heads: Sequence[tuple[bytes, int]], plain: bool) -> None:
    """Writes the archive, sparse."""
    images = cycle(heads)
    per_class = [members * (i + 1) // CLASSES - members * i // CLASSES for i in range(CLASSES)]
    with open(path, "wb") as archive:
        if plain:
            paths = [f"{c:04}/{c:04}_{i}.JPEG" for c, n in enumerate(per_class) for i in range(n)]
            write_members(archive, paths, images)
            return
        position = 0
        for number, count in enumerate(per_class):
            archive.seek(position + BLOCK)
            names = [f"{number:04}_{i}.JPEG" for i in range(count)]
            size = write_members(archive, names, islice(images, count))
            archive.seek(position)
            archive.write(header(f"{number:04}.tar", size))
            position += BLOCK + size
        archive.seek(position)
        archive.write(bytes(2 * BLOCK))


def build(folder: Path, cache: Path, stop_after_s: float | None = None) -> tuple[float, int]:
    """Opens the archive in a process; returns the seconds and the index's length (0: killed)."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    start_s = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD, str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=stop_after_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        output = "0"
    return time.monotonic() - start_s, int(output)


def main() -> None:
    parser = benchmark_parser(__doc__, repetitions=2)  # one run, however many are named
    parser.add_argument("folder", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--members", type=int, default=1_281_167)
    parser.add_argument("--plain", action="store_true")
    options = parser.parse_args()
    folder, cache = options.folder / "archive", options.folder / "cache"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ILSVRC2012_img_train.tar"
    if not path.exists():
        make_up(
            path,
            options.members,
            [head_and_size(p) for p in find_images(options.images)],
            options.plain,
        )
    found = path.stat()
    built_s, length = build(folder, cache / "1")
    assert length == options.members, length
    read_s, _ = build(folder, cache / "1")
    killed_s, _ = build(folder, cache / "2", built_s / 2)
    rest_s, length = build(folder, cache / "2")
    assert length == options.members, length
    figures = {
        "members": length,
        "layout": "plain" if options.plain else "nested",
        "archive_gb": found.st_size / 1e9,
        "on_disk_gb": found.st_blocks * 512 / 1e9,
        "index_mb": sum(p.stat().st_size for p in cache.glob("1/*/*.npz")) / 1e6,
        "build_s": built_s,
        "read_s": read_s,
        "killed_after_s": killed_s,
        "rest_s": rest_s,
        "peak_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3,
    }
    for name, value in figures.items():
        print(f"{name:16}{value:,.1f}" if isinstance(value, float) else f"{name:16}{value}")
    if options.write:
        print(write_results("archive_index", figures, options.write))


if __name__ == "__main__":
    main()
