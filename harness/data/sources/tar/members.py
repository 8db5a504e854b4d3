"""The members of a range of an archive, with the sizes of its images: one read for each."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import IO, NamedTuple

import numpy as np

from harness.data.sources.header import read_header
from harness.data.sources.listing import SUFFIXES
from harness.data.sources.tar.reader import Archive, ArchiveStream
from harness.errors import UserError

BLOCK = tarfile.BLOCKSIZE
HEAD = 8192  # bytes of an image that are read with its header; nearly all sizes are within them
BUFFER = 2 * HEAD  # holds a header, its extensions and the head of the image
LARGEST_LABEL = 2**20  # bytes of a .json
LARGEST_TRAILER = 2**20  # bytes of zeros that may follow the end of an archive
SEARCHED_AT_ONCE = 2**20
COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst")
LABEL_SUFFIXES = (".cls", ".json")
LABEL_KEYS = ("label", "cls", "class", "class_name")  # of a .json, in order of preference
LINKS = "a link; create the archive with `harness data pack`, or tar --dereference"


class Member(NamedTuple):
    """A regular file in an archive: an image, a label, or anything else.

    path: within the archive, behind the name of the nested archive that holds it.
    offset, size: of its content, in bytes.
    width, height: of an image, in pixels; 0 where the header cannot be read.
    header: the CRC-32 of the 512 bytes before the content, by which a later read recognizes it.
    label: the class that a .cls or .json states; "" where there is none.
    """

    path: str
    offset: int
    size: int
    width: int
    height: int
    header: int
    label: str


@dataclass(frozen=True)
class Span:
    """A range of an archive: the members whose headers begin in [start, stop).

    limit: the end of the archive, or of the nested one, that contains them.
    folder: what comes before the members' paths: the name of a nested archive and a slash.
    searched: `start` is no header, but where the search for the first one begins.
    """

    archive: Archive
    start: int
    stop: int
    limit: int
    folder: str = ""
    searched: bool = False

    def refusal(self, offset: int, name: str, why: str) -> UserError:
        """Return the error for a member, one line whatever its name contains."""
        shown = f"{self.folder}{name}"[:120]
        return UserError(f"{self.archive.path}: member {shown!a} at offset {offset} refused: {why}")


@dataclass(frozen=True)
class Listing:
    """The members of a span; the next one's header, or the archive's end, is at `stop`."""

    start: int
    stop: int
    ended: bool
    members: list[Member]


def list_span(span: Span) -> Listing:
    """List the members of a span. Raises UserError for a damaged archive or a refused member."""
    try:
        with io.BufferedReader(ArchiveStream(span.archive), BUFFER) as file:
            if not span.searched:
                return _list_from(file, span)
            start = _first_header(file, span.start, span.stop)
            if start is None:
                return Listing(span.stop, span.stop, ended=False, members=[])
            return _list_from(file, replace(span, start=start))
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{span.archive.path}: cannot be read: {why}; check it") from None


def _list_from(file: IO[bytes], span: Span) -> Listing:
    found: list[Member] = []
    position = span.start
    for member in tar_members(file, span):
        position = end_of(member)
        if member.isreg():
            found.append(_examined(file, span, member))
    ended = position < span.stop or span.stop == span.limit
    if ended:
        check_end(file, span, position)
    return Listing(span.start, position, ended, found)


def tar_members(file: IO[bytes], span: Span) -> Iterator[tarfile.TarInfo]:
    """Yield the files and folders of a span. Raises UserError as `list_span`."""
    if span.start >= span.stop:
        return
    try:
        file.seek(span.start)
        with tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape") as archive:
            while (member := archive.next()) is not None:
                _check(span, member)
                yield member
                if end_of(member) >= span.stop:
                    return
    except (tarfile.TarError, ValueError) as error:  # ValueError: a damaged extended header
        why = str(error).partition("\n")[0]
        raise UserError(
            f"{span.archive.path}: damaged or no tar archive: {why} before offset {file.tell()}; "
            "restore it"
        ) from None


def end_of(member: tarfile.TarInfo) -> int:
    """Return the offset of the header that follows a member."""
    return member.offset_data + (-(-member.size // BLOCK) * BLOCK if member.isreg() else 0)


def _check(span: Span, member: tarfile.TarInfo) -> None:
    name, path, offset = member.name, PurePosixPath(member.name), member.offset
    if member.islnk() or member.issym():
        raise span.refusal(offset, name, LINKS)
    if member.issparse():
        raise span.refusal(offset, name, "it is sparse; create the archive without --sparse")
    if not member.isdir() and not member.isreg():
        raise span.refusal(offset, name, "it is neither a plain file nor a folder")
    if path.is_absolute() or ".." in path.parts:
        raise span.refusal(offset, name, "it points outside the archive's folder")
    if not is_plain_name(name):
        raise span.refusal(offset, name, "its name contains a control character")
    if name.endswith(COMPRESSED):
        raise span.refusal(offset, name, "it is compressed; decompress it")
    if member.size < 0 or member.offset_data + member.size > span.limit:
        end = member.offset_data + member.size
        raise UserError(
            f"{span.archive.path}: truncated: member {f'{span.folder}{name}'[:120]!a} at offset "
            f"{offset} should end at {end}, but the archive ends at {span.limit}; restore it"
        )


def _examined(file: IO[bytes], span: Span, member: tarfile.TarInfo) -> Member:
    file.seek(member.offset_data - BLOCK)
    header = zlib.crc32(file.read(BLOCK))
    path, size = span.folder + str(PurePosixPath(member.name)), (0, 0)
    label = ""
    if is_image(path):
        size = _image_size(file, member)
    elif path.endswith(LABEL_SUFFIXES):
        label = _label(file, member)
    return Member(path, member.offset_data, member.size, *size, header, label)


def is_plain_name(name: str) -> bool:
    """Return whether a name is without control characters, so that it fits on one line."""
    return not any(ord(letter) < 32 or ord(letter) == 127 for letter in name)


def is_image(path: str) -> bool:
    """Return whether training reads a file of this name, as it does of folders."""
    return path.lower().endswith(SUFFIXES)


def _image_size(file: IO[bytes], member: tarfile.TarInfo) -> tuple[int, int]:
    head = file.read(min(member.size, HEAD))
    size, _ = read_header(io.BytesIO(head))
    if size == (0, 0) and len(head) < member.size:  # it may follow long metadata
        file.seek(member.offset_data)
        size, _ = read_header(io.BytesIO(file.read(member.size)))
    return size


def _label(file: IO[bytes], member: tarfile.TarInfo) -> str:
    if member.size > LARGEST_LABEL:
        return ""
    text = file.read(member.size).decode(errors="replace").strip()
    if member.name.endswith(".cls"):
        return text
    try:
        record = json.loads(text)
    except ValueError:
        return ""
    values = [record.get(key) for key in LABEL_KEYS] if isinstance(record, dict) else []
    return next((str(x) for x in values if type(x) in (int, str) and x != ""), "")


def check_end(file: IO[bytes], span: Span, position: int) -> None:
    """Raise UserError unless the archive ends here by its mark of zeros, and nothing follows.

    tarfile takes a header that it cannot read for the end.
    """
    file.seek(position)
    rest = file.read(max(min(span.limit - position, LARGEST_TRAILER), 0))
    if len(rest) < BLOCK:
        raise UserError(
            f"{span.archive.path}: truncated at offset {position}: {span.folder or 'the archive'} "
            "lacks its end mark; restore it"
        )
    if any(rest[:BLOCK]):
        raise UserError(
            f"{span.archive.path}: damaged: no header at offset {position}; restore the archive"
        )
    if any(rest) or span.limit - position > LARGEST_TRAILER:
        raise UserError(
            f"{span.archive.path}: data follows the end of the archive at offset {position}; "
            "join archives with tar --concatenate"
        )


def _first_header(file: IO[bytes], start: int, stop: int) -> int | None:
    """Return the offset of the first block in [start, stop) that looks like a header."""
    for piece in range(start, stop, SEARCHED_AT_ONCE):
        file.seek(piece)
        content = file.read(min(SEARCHED_AT_ONCE, stop - piece))
        blocks = np.frombuffer(content[: len(content) // BLOCK * BLOCK], np.uint8)
        magic = blocks.reshape(-1, BLOCK)[:, 257:262] == np.frombuffer(b"ustar", np.uint8)
        for place in np.flatnonzero(magic.all(axis=1)).tolist():
            block = content[place * BLOCK : (place + 1) * BLOCK]
            try:
                tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
                return piece + place * BLOCK
            except tarfile.HeaderError:
                continue
    return None
