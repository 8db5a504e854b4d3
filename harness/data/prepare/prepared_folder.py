"""A folder of images in the making: nothing shows in it before all of it is there."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

from harness.data.sources.listing import image_names, is_class_name
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
    `finish` moves them into place; a folder that has lost files gets those back. Names are
    relative to the data folder and must be the caller's own, never an archive's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.partial = folder / PARTIAL

    def holds(self, name: str, size: int | None = None) -> bool:
        """Whether the file is in place or gathered, with `size` bytes where that is known."""
        for root in (self.folder, self.partial):
            with suppress(FileNotFoundError, NotADirectoryError):
                if (root / name).stat().st_size == size or size is None:
                    return True
        return False

    def write(self, name: str, content: bytes) -> None:
        """The file appears under its name whole or not at all."""
        if self.holds(name, len(content)):
            return
        half = self.partial / "half"
        half.write_bytes(content)
        half.replace(self._gathered(name))

    def link(self, name: str, file: Path) -> None:
        """The file `file` under another name: a hard link, or a copy where there can be none."""
        if self.holds(name, file.stat().st_size):
            return
        half = self.partial / "half"
        half.unlink(missing_ok=True)
        try:
            os.link(file.resolve(), half)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(file, half)
        half.replace(self._gathered(name))

    def _gathered(self, name: str) -> Path:
        place = self.partial / name
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

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
        train, val = self.class_sizes("train"), self.class_sizes("val")
        if train.keys() != val.keys():
            odd = ", ".join(sorted(train.keys() ^ val.keys())[:5])
            raise UserError(
                f"{self.folder}: in one of train and val only: {odd}; what they are made from "
                "does not belong together or is not complete"
            )
        counts = self.count()
        if counts != expected:
            raise UserError(
                f"{self.folder}: {source} should have {expected}, but {counts} came out: "
                "give the complete source to the same command, or delete the folder"
            )
        for split in SPLITS:
            if (self.partial / split).exists():
                self._publish(split)
        _write_json(self.folder / MARKER, {"source": source, **asdict(counts)}, self.partial)
        shutil.rmtree(self.partial, ignore_errors=True)
        return counts

    def _publish(self, split: str) -> None:
        """Moves what was gathered into place: the whole split, or what the folder lacks of it."""
        if not (self.folder / split).exists():
            (self.partial / split).rename(self.folder / split)
            return
        for file in sorted((self.partial / split).rglob("*")):
            if file.is_file():
                place = self.folder / file.relative_to(self.partial)
                place.parent.mkdir(parents=True, exist_ok=True)
                file.replace(place)

    def count(self, gathered: bool = True) -> Counts:
        """Images in place and, with `gathered`, those that `finish` would move there."""
        train, val = (self.class_sizes(split, gathered) for split in ("train", "val"))
        flat = self.images("unlabelled", gathered)
        return Counts(sum(train.values()), sum(val.values()), len(train.keys() & val.keys()), flat)

    def class_sizes(self, split: str, gathered: bool = True) -> dict[str, int]:
        """Images by class."""
        places = [self.folder / split, *([self.partial / split] if gathered else [])]
        classes = {
            name
            for place in places
            if place.is_dir()
            for name in os.listdir(place)
            if is_class_name(name) and (place / name).is_dir()
        }
        return {name: self.images(f"{split}/{name}", gathered) for name in classes}

    def images(self, name: str, gathered: bool = True) -> int:
        """Images in the folder `name` itself."""
        places = [self.folder / name, *([self.partial / name] if gathered else [])]
        return len({image for p in places if p.is_dir() for image in image_names(p)})


def prepare(folder: Path, source: str, fill: Callable[[PreparedFolder], Counts]) -> str:
    """Fills the folder, or completes one that has lost files; returns what to print.

    fill: gathers the images and returns the counts that should have come out.
    UserError: a folder of anything else, another process at work in it, other counts, or what
    the system refuses (disk full, no permission).
    """
    prepared, loss = PreparedFolder(folder), ""
    try:
        if counts := _complete(prepared, source):
            shutil.rmtree(prepared.partial, ignore_errors=True)  # killed while removing it
            return f"{folder}: {source}, prepared before: {counts}"
        loss = _loss(prepared, source)
        prepared.partial.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            # another process may have finished between the look above and the lock
            counts = _complete(prepared, source) or _fill(prepared, source, fill)
    except OSError as error:
        where = error.filename2 or error.filename or folder
        reason = f"{where}: {error.strerror or error}; mend that and give the same command again"
        raise UserError(loss + reason) from error
    except UserError as error:
        raise UserError(f"{loss}{error}") from error
    return f"{loss and f'{loss}completed; '}{folder}: {source}: {counts}"


def _complete(prepared: PreparedFolder, source: str) -> Counts | None:
    """What a finished folder holds, counted; None where it is not finished or has lost files.

    UserError: files were added.
    """
    recorded = _finished(prepared.folder, source)
    if recorded is None:
        return None
    found = prepared.count(gathered=False)
    if any(here > before for here, before in zip(astuple(found), astuple(recorded), strict=True)):
        raise UserError(
            f"{prepared.folder}: holds {found}, but {source} has {recorded}: files were added; "
            "take them out, or name another folder"
        )
    return recorded if found == recorded else None


def _loss(prepared: PreparedFolder, source: str) -> str:
    """What a finished folder lacks, to begin a message with; "" where it is not finished."""
    recorded = _finished(prepared.folder, source)
    if recorded is None:
        return ""
    found = prepared.count(gathered=False)
    return f"{prepared.folder}: has lost files: holds {found} of {recorded}; "


def _fill(
    prepared: PreparedFolder, source: str, fill: Callable[[PreparedFolder], Counts]
) -> Counts:
    folder, partial = prepared.folder, prepared.partial
    _write_json(partial / "source.json", {"source": source}, partial)
    try:
        return prepared.finish(source, fill(prepared))
    except UserError:
        # a mistake found before anything was gathered does not bind the folder to its source
        untouched = set(os.listdir(partial)) <= {"lock", "source.json", "half"}
        if untouched or (folder / MARKER).exists():
            shutil.rmtree(partial)
            with suppress(OSError):  # not empty, or a mount point
                folder.rmdir()
        raise


def _finished(folder: Path, source: str) -> Counts | None:
    """What a finished folder's marker says; None where it is new, empty or only begun."""
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
