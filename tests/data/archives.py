"""Archives for tests: the same images in every layout that the format "tar" reads."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

from harness.config.schema import Config
from tests.data.making import tar


def files_of(split: Path) -> dict[str, bytes]:
    """CLASS/NAME -> content, in an order that is not sorted."""
    found = sorted(split.glob("*/*"), key=lambda path: path.name[::-1] + path.parent.name)
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in found}


def class_folders(files: dict[str, bytes]) -> list[bytes]:
    return [tar(*files.items())]


def with_prefix(files: dict[str, bytes]) -> list[bytes]:
    """As by `tar -C split -cf … .`, in pax format, with files that are not read."""
    strange = [("./._cat", b""), ("./cat/._0.jpg", b"x"), ("./cat/readme.txt", b"read me")]
    return [pax([(f"./{name}", content) for name, content in files.items()] + strange)]


def shards(files: dict[str, bytes]) -> list[bytes]:
    rows = list(files.items())
    return [tar(*rows[number::3]) for number in range(3)]


def nested(files: dict[str, bytes]) -> list[bytes]:
    """As ImageNet's training images: an archive for each class."""
    classes: dict[str, list[tuple[str, bytes]]] = {}
    for path, content in files.items():
        name, _, file = path.partition("/")
        classes.setdefault(name, []).append((file, content))
    return [tar(*((f"{name}.tar", tar(*found)) for name, found in classes.items()))]


def webdataset(files: dict[str, bytes]) -> list[bytes]:
    """KEY.SUFFIX with KEY.cls in one shard, with KEY.json in the other."""
    parts: tuple[list, list] = ([], [])
    for number, (path, content) in enumerate(files.items()):
        name, _, file = path.partition("/")
        key = f"{name}{number % 2}/{file.partition('.')[0]}"
        record = {"label": name, "n": number}
        label = (
            ("json", json.dumps(record).encode()) if number % 2 else ("cls", f"{name}\n".encode())
        )
        image = (f"{key}.{file.partition('.')[2]}", content)
        parts[number % 2].extend(
            [image, (f"{key}.{label[0]}", label[1])][:: -1 if number % 3 else 1]
        )
    return [pax(part) for part in parts]


LAYOUTS: dict[str, Callable[[dict[str, bytes]], list[bytes]]] = {
    function.__name__: function
    for function in (class_folders, with_prefix, shards, nested, webdataset)
}


def pax(files: list[tuple[str, bytes]]) -> bytes:
    """An archive whose members have extended headers, as by Python's writers of shards."""
    headers = []
    for name, content in files:
        header = tarfile.TarInfo(name)
        header.mtime = 1.5  # type: ignore[assignment]  # needs an extended header
        headers.append((header, content))
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for header, content in headers:
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return stream.getvalue()


def write_layout(folder: Path, split: str, archives: list[bytes]) -> list[Path]:
    """SPLIT.tar, or SPLIT-00000.tar and so on."""
    folder.mkdir(exist_ok=True)
    names = [split] if len(archives) == 1 else [f"{split}-{i:05}" for i in range(len(archives))]
    paths = [folder / f"{name}.tar" for name in names]
    for path, content in zip(paths, archives, strict=True):
        path.write_bytes(content)
    return paths


def archived(root: Path, layout: str = "class_folders") -> Path:
    """The splits of a folder as archives, in a new folder beside it."""
    folder = root.parent / f"{root.name}-{layout}"
    for split in ("train", "val"):
        write_layout(folder, split, LAYOUTS[layout](files_of(root / split)))
    return folder


def tar_config(config: Config, root: Path) -> Config:
    run = config.run.model_copy(update={"data_root": str(root), "data_format": "tar"})
    return config.model_copy(update={"run": run})
