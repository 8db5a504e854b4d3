"""All members of archives, listed by all cores; an interrupted scan continues."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from harness.data.loaders.child_process import worker_processes
from harness.data.sources.partial import PartialResults
from harness.data.sources.tar.members import (
    Listing,
    Member,
    Span,
    check_end,
    end_of,
    list_span,
    tar_members,
)
from harness.data.sources.tar.reader import Archive, ArchiveStream
from harness.errors import UserError

SEGMENT = 16 * 2**20  # bytes of an archive that a process lists at a time
PARALLEL_FROM = 8  # segments; below, starting processes takes longer than listing

# start, stop, ended and members of a listing, as JSON holds them
Record = tuple[int, int, bool, list[list]]


def scan(
    archives: Sequence[Archive], title: Path, partial: PartialResults[Record]
) -> list[list[Member]]:
    """Return the members of each archive, those of nested archives in the place of these.

    `title` is for the progress bar. Raises UserError for a damaged archive or a refused member.
    """
    chains = [chain for archive in archives for chain in _chains(archive)]
    spans = [span for chain in chains for span in chain]
    listings = iter(_list_all(spans, title, partial))
    members: dict[Path, list[Member]] = {archive.path: [] for archive in archives}
    for chain in chains:
        found = members[chain[0].archive.path]
        for listing in _joined(chain, [next(listings) for _ in chain]):
            found += listing.members
    return list(members.values())


def _chains(archive: Archive) -> Iterator[list[Span]]:
    """Yield the spans of an archive or, one after the other, of the archives nested in it."""
    whole = Span(archive, 0, archive.size, archive.size)
    with io.BufferedReader(ArchiveStream(archive)) as file:
        nested, position = False, 0
        for member in tar_members(file, whole):
            position = end_of(member)
            if member.isdir():
                continue
            is_archive = member.name.endswith(".tar")
            if is_archive != nested and nested:
                raise whole.refusal(member.offset, member.name, "it is no archive as the others")
            if not is_archive:
                break
            nested = True
            start, stop = member.offset_data, member.offset_data + member.size
            folder = f"{member.name.removesuffix('.tar')}/"
            yield _segments(Span(archive, start, stop, stop, folder))
        if nested:
            check_end(file, whole, position)
        else:
            yield _segments(whole)


def _segments(span: Span) -> list[Span]:
    starts = range(span.start, span.stop, SEGMENT) or [span.start]
    return [
        replace(
            span, start=start, stop=min(start + SEGMENT, span.stop), searched=start > span.start
        )
        for start in starts
    ]


def _list_all(
    spans: Sequence[Span], title: Path, partial: PartialResults[Record]
) -> list[Listing | UserError]:
    if len(spans) < PARALLEL_FROM:
        return [_list_or_error(span) for span in spans]
    kept = partial.read()
    keys = [_key(span) for span in spans]
    listings: dict[int, Listing | UserError]
    listings = {place: _listing(kept[key]) for place, key in enumerate(keys) if key in kept}
    missing = [place for place in range(len(spans)) if place not in listings]
    size = sum(span.stop - span.start for span in spans)
    # twice as many processes as cores, since they wait for the disk part of the time
    with (
        worker_processes(2 * len(os.sched_getaffinity(0))) as workers,
        tqdm(total=size, desc=f"index of {title}", unit="B", unit_scale=True, disable=None) as bar,
    ):
        bar.update(sum(spans[place].stop - spans[place].start for place in listings))
        parts = workers.map(_list_or_error, [spans[place] for place in missing])
        for place, part in zip(missing, parts, strict=True):
            if isinstance(part, Listing):
                members = [list(member) for member in part.members]
                partial.add(keys[place], (part.start, part.stop, part.ended, members))
            listings[place] = part
            bar.update(spans[place].stop - spans[place].start)
    return [listings[place] for place in range(len(spans))]


def _key(span: Span) -> str:
    """Return the key of a span in the partial file; it changes when the archive does."""
    archive = span.archive
    about = (archive.size, archive.changed_ns, span.start, span.stop, span.limit, span.folder)
    return hashlib.sha256(f"{os.fsencode(archive.path)!r} {about}".encode()).hexdigest()


def _listing(record: Record) -> Listing:
    start, stop, ended, members = record
    return Listing(start, stop, ended, [Member(*member) for member in members])


def _joined(chain: Sequence[Span], listings: Sequence[Listing | UserError]) -> Iterator[Listing]:
    """Yield the listings of an archive's spans such that each begins where the last one stopped.

    A process that begins in the middle of an archive searches for a header, and may take an image's
    bytes for one. Then, or where its listing failed, the span is listed again from the right place.
    """
    position, ended = chain[0].start, False
    for span, listing in zip(chain, listings, strict=True):
        if ended or position >= span.stop > span.start:
            continue  # a member fills the whole span
        if isinstance(listing, UserError) or listing.start != position:
            listing = list_span(replace(span, start=position, searched=False))
        position, ended = listing.stop, listing.ended
        yield listing
    if not ended:  # the last member reaches to the end: raise what is wrong with that
        yield list_span(replace(chain[-1], start=position, searched=False))


def _list_or_error(span: Span) -> Listing | UserError:
    try:
        return list_span(span)
    except UserError as error:  # perhaps only because the search found no real header
        return error
