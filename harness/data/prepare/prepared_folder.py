"""A folder of images under construction: nothing appears in it before it is complete."""

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

MARKER = ".harness-data.json"  # written last: the contents of a finished folder
PARTIAL = ".harness-data.partial"  # all unfinished files; removed from a finished folder
SPLITS = ("train", "val", "unlabelled")


@dataclass(frozen=True)
class Counts:
    """Numbers of images in each split, and of classes."""

    train: int
    val: int
    classes: int
    unlabelled: int = 0

    def __str__(self) -> str:
        unlabelled = f", {self.unlabelled:,} unlabelled" if self.unlabelled else ""
        images = f"{self.train:,} training{unlabelled} and {self.val:,} validation images"
        return f"{images} of {self.classes:,} classes"


class PreparedFolder:
    """Collects files for `train/CLASS/`, `val/CLASS/` and `unlabelled/` of one data folder.

    They are gathered under PARTIAL, where finished files and classes survive any interruption,
    until `finish` moves them into place. A folder that has lost files is completed. Names are
    relative to the data folder and must come from the caller, never from an archive.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.partial = folder / PARTIAL

    def holds(self, name: str, size: int | None = None) -> bool:
        """Return True if the file is in place or gathered, with `size` bytes if that is given."""
        for root in (self.folder, self.partial):
            with suppress(FileNotFoundError, NotADirectoryError):
                if (root / name).stat().st_size == size or size is None:
                    return True
        return False

    def write(self, name: str, content: bytes) -> None:
        """Write a file, which appears under its name completely or not at all."""
        if self.holds(name, len(content)):
            return
        half = self.partial / "half"
        half.write_bytes(content)
        half.replace(self._gathered(name))

    def link(self, name: str, file: Path) -> None:
        """Add `file` under another name: as a hard link or, where that is impossible, a copy."""
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
        """Rename a folder that is still being gathered, creating the new parents."""
        new = self.partial / new_name
        new.parent.mkdir(parents=True, exist_ok=True)
        (self.partial / name).rename(new)

    def discard(self) -> None:
        """Discard gathered files (of a small data set, or one whose archive may have changed)."""
        for split in SPLITS:
            if (self.partial / split).exists():
                shutil.rmtree(self.partial / split)

    def finish(self, source: str, expected: Counts) -> Counts:
        """Check the counts, move the splits into place and write the marker.

        Raises UserError for unexpected counts, or if train and val have different classes.
        """
        train, val = self.class_sizes("train"), self.class_sizes("val")
        if train.keys() != val.keys():
            odd = ", ".join(sorted(train.keys() ^ val.keys())[:5])
            raise UserError(
                f"{self.folder}: in only one of train and val: {odd}; their sources "
                "do not belong together or are incomplete"
            )
        counts = self.count()
        if counts != expected:
            raise UserError(
                f"{self.folder}: {source} should have {expected}, but has {counts}: "
                "give the complete source to the same command, or delete the folder"
            )
        for split in SPLITS:
            if (self.partial / split).exists():
                self._publish(split)
        _write_json(self.folder / MARKER, {"source": source, **asdict(counts)}, self.partial)
        shutil.rmtree(self.partial, ignore_errors=True)
        return counts

    def _publish(self, split: str) -> None:
        """Move gathered files into place: the whole split, or the files that the folder lacks."""
        if not (self.folder / split).exists():
            (self.partial / split).rename(self.folder / split)
            return
        for file in sorted((self.partial / split).rglob("*")):
            if file.is_file():
                place = self.folder / file.relative_to(self.partial)
                place.parent.mkdir(parents=True, exist_ok=True)
                file.replace(place)

    def count(self, gathered: bool = True) -> Counts:
        """Count the images in place and, with `gathered`, those that `finish` would move there."""
        train, val = (self.class_sizes(split, gathered) for split in ("train", "val"))
        flat = self.images("unlabelled", gathered)
        return Counts(sum(train.values()), sum(val.values()), len(train.keys() & val.keys()), flat)

    def class_sizes(self, split: str, gathered: bool = True) -> dict[str, int]:
        """Count images by class."""
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
        """Count the images directly in the folder `name`."""
        places = [self.folder / name, *([self.partial / name] if gathered else [])]
        return len({image for p in places if p.is_dir() for image in image_names(p)})


def prepare(folder: Path, source: str, fill: Callable[[PreparedFolder], Counts]) -> str:
    """Fill the folder, or complete one that has lost files; return the line to print.

    fill: gathers the images and returns the expected counts.
    Raises UserError for a folder with other contents, another process at work in it, unexpected
    counts, and errors of the system (disk full, no permission).
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
        reason = f"{where}: {error.strerror or error}; fix that and repeat the command"
        raise UserError(loss + reason) from error
    except UserError as error:
        raise UserError(f"{loss}{error}") from error
    return f"{loss and f'{loss}completed; '}{folder}: {source}: {counts}"


def _complete(prepared: PreparedFolder, source: str) -> Counts | None:
    """Count the contents of a finished folder; None if it is unfinished or has lost files.

    Raises UserError if files were added.
    """
    recorded = _finished(prepared.folder, source)
    if recorded is None:
        return None
    found = prepared.count(gathered=False)
    if any(here > before for here, before in zip(astuple(found), astuple(recorded), strict=True)):
        raise UserError(
            f"{prepared.folder}: has {found}, but {source} has {recorded}: files were added; "
            "remove them, or name another folder"
        )
    return recorded if found == recorded else None


def _loss(prepared: PreparedFolder, source: str) -> str:
    """Return the start of a message on the files that a finished folder lacks; "" if unfinished."""
    recorded = _finished(prepared.folder, source)
    if recorded is None:
        return ""
    found = prepared.count(gathered=False)
    return f"{prepared.folder}: has lost files: {found} left of {recorded}; "


def _fill(
    prepared: PreparedFolder, source: str, fill: Callable[[PreparedFolder], Counts]
) -> Counts:
    folder, partial = prepared.folder, prepared.partial
    _write_json(partial / "source.json", {"source": source}, partial)
    try:
        return prepared.finish(source, fill(prepared))
    except UserError:
        # an error before anything was gathered does not bind the folder to its source
        untouched = set(os.listdir(partial)) <= {"lock", "source.json", "half"}
        if untouched or (folder / MARKER).exists():
            shutil.rmtree(partial)
            with suppress(OSError):  # not empty, or a mount point
                folder.rmdir()
        raise


def _finished(folder: Path, source: str) -> Counts | None:
    """Return the counts in a finished folder's marker; None if it is new, empty or unfinished."""
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder; name another one")
    finished = _read_json(folder / MARKER)
    record = finished or _read_json(folder / PARTIAL / "source.json")
    if record is None and (strangers := sorted(set(os.listdir(folder)) - {PARTIAL})):
        raise UserError(
            f"{folder}: not empty ({', '.join(map(ascii, strangers[:3]))}) and not created by "
            "harness data; name a new folder"
        )
    if record is not None and record.get("source") != source:
        raise UserError(
            f"{folder}: contains {record.get('source')}, not {source}; name another folder, "
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
        raise UserError(f"{path}: damaged; delete the folder it is in")
    return record


def _write_json(path: Path, record: dict, partial: Path) -> None:
    half = partial / "half"
    with open(half, "w") as file:
        json.dump(record, file)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)
