"""A folder of images in the making: nothing shows in it before all of it is there."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.errors import UserError

MARKER = ".harness-data.json"  # written last: what a finished folder holds
PARTIAL = ".harness-data.partial"  # all that is unfinished; gone from a finished folder
SPLITS = ("train", "val", "unlabelled")


@dataclass(frozen=True)
class Counts:
    """Images of each split, and classes."""

    train: int
    val: int
    classes: int
    unlabelled: int = 0

    def __str__(self) -> str:
        unlabelled = f", {self.unlabelled:,} unlabelled" if self.unlabelled else ""
        images = f"{self.train:,} training{unlabelled} and {self.val:,} validation images"
        return f"{images} of {self.classes:,} classes"


class PreparedFolder:
    """Takes files for `train/CLASS/`, `val/CLASS/` and `unlabelled/` of one data folder.

    They gather under PARTIAL, a finished file or class kept through any interruption, until
    `finish` moves them into place. Names are relative to the data folder and must be the
    caller's own, never an archive's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.partial = folder / PARTIAL

    def place(self, name: str) -> Path:
        """Where the file or folder `name` is now, or is to be gathered."""
        published = self.folder / name.split("/")[0]
        return (self.folder if published.exists() else self.partial) / name

    def holds(self, name: str, size: int) -> bool:
        """Whether the file is there with all its bytes."""
        try:
            return self.place(name).stat().st_size == size
        except FileNotFoundError:
            return False

    def write(self, name: str, content: bytes) -> None:
        """The file appears under its name whole or not at all."""
        if self.holds(name, len(content)):
            return
        place, half = self.place(name), self.partial / "half"
        half.write_bytes(content)
        place.parent.mkdir(parents=True, exist_ok=True)
        half.replace(place)

    def rename(self, name: str, new_name: str) -> None:
        """Renames a folder that is still gathered, making the new one's parents."""
        new = self.partial / new_name
        new.parent.mkdir(parents=True, exist_ok=True)
        (self.partial / name).rename(new)

    def discard(self) -> None:
        """Begins anew (a small data set, or one whose archive may have changed)."""
        for split in SPLITS:
            if (self.partial / split).exists():
                shutil.rmtree(self.partial / split)

    def finish(self, source: str, expected: Counts) -> Counts:
        """Checks the counts, moves the splits into place and writes the marker.

        UserError: other counts than expected, or other classes in val than in train.
        """
        counts = self._counts()
        if counts != expected:
            raise UserError(
                f"{self.folder}: {source} should have {expected}, but {counts} came out: "
                "give the complete archives to the same command, or delete the folder"
            )
        for split in SPLITS:
            if (self.partial / split).exists():
                (self.partial / split).rename(self.folder / split)
        _write_json(self.folder / MARKER, {"source": source, **asdict(counts)}, self.partial)
        shutil.rmtree(self.partial, ignore_errors=True)
        return counts

    def _counts(self) -> Counts:
        train, val = self._class_sizes("train"), self._class_sizes("val")
        if train.keys() != val.keys():
            odd = ", ".join(sorted(train.keys() ^ val.keys())[:5])
            raise UserError(
                f"{self.folder}: in one of train and val only: {odd}; the archives do not belong "
                "together or are not complete"
            )
        unlabelled = self.place("unlabelled")
        flat = len(os.listdir(unlabelled)) if unlabelled.exists() else 0
        return Counts(sum(train.values()), sum(val.values()), len(train), flat)

    def _class_sizes(self, split: str) -> dict[str, int]:
        place = self.place(split)
        classes = os.listdir(place) if place.exists() else []
        return {name: len(os.listdir(place / name)) for name in classes}


def prepare(folder: Path, source: str, fill: Callable[[PreparedFolder], Counts]) -> str:
    """Fills the folder unless that was done before; returns what to print.

    fill: gathers the images and returns the counts that should have come out.
    UserError: a folder of anything else, another process at work in it, other counts, or what
    the system refuses (disk full, no permission).
    """
    try:
        counts = _finished(folder, source)
        if counts is not None:
            shutil.rmtree(folder / PARTIAL, ignore_errors=True)  # killed while removing it
            return f"{folder}: {source}, prepared before: {counts}"
        (folder / PARTIAL).mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            # another process may have finished between the look above and the lock
            counts = _finished(folder, source)
            if counts is None:
                counts = _fill(PreparedFolder(folder), source, fill)
        return f"{folder}: {source}: {counts}"
    except OSError as error:
        where = error.filename2 or error.filename or folder
        raise UserError(
            f"{where}: {error.strerror or error}; mend that and give the same command again"
        ) from error


def _fill(
    prepared: PreparedFolder, source: str, fill: Callable[[PreparedFolder], Counts]
) -> Counts:
    partial = prepared.partial
    _write_json(partial / "source.json", {"source": source}, partial)
    try:
        return prepared.finish(source, fill(prepared))
    except UserError:
        # a mistake found before anything was gathered does not bind the folder to its source
        if set(os.listdir(partial)) <= {"lock", "source.json", "half"}:
            shutil.rmtree(partial)
            with suppress(OSError):  # not empty, or a mount point
                prepared.folder.rmdir()
        raise


def _finished(folder: Path, source: str) -> Counts | None:
    """What a finished folder holds; None where it is new, empty or begun by the same source."""
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder; name another one")
    finished = _read_json(folder / MARKER)
    record = finished or _read_json(folder / PARTIAL / "source.json")
    if record is None and (strangers := sorted(set(os.listdir(folder)) - {PARTIAL})):
        raise UserError(
            f"{folder}: not empty ({', '.join(map(ascii, strangers[:3]))}) and not begun by "
            "harness data; name a new folder"
        )
    if record is not None and record.get("source") != source:
        raise UserError(
            f"{folder}: holds {record.get('source')}, not {source}; name another folder, "
            "or delete this one"
        )
    try:
        counts = {key: value for key, value in (finished or {}).items() if key != "source"}
        return Counts(**counts) if finished else None
    except TypeError:
        raise UserError(f"{folder / MARKER}: damaged; delete the folder {folder}") from None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with open(folder / PARTIAL / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is preparing it; wait for it") from None
        except OSError:
            pass  # a file system without locks
        yield


def _read_json(path: Path) -> dict | None:
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise UserError(f"{path}: damaged; delete the folder that it is in")
    return record


def _write_json(path: Path, record: dict, partial: Path) -> None:
    half = partial / "half"
    with open(half, "w") as file:
        json.dump(record, file)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)
