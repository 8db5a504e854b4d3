"""Images with identical files: within train or, worse, shared by train and val."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from harness.data.check.findings import LEAKED, SAME_BYTES, TWO_CLASSES, Finding


def find_duplicates(digests: Iterable[tuple[str, bytes]]) -> Iterator[Finding]:
    """Yield a finding for each group of identical files among (path, SHA-256 of the file).

    Paths are SPLIT/CLASS/NAME, or unlabelled/NAME.
    """
    groups: dict[bytes, list[str]] = defaultdict(list)
    for path, digest in digests:
        groups[digest].append(path)
    for group in groups.values():
        if len(group) > 1:
            yield Finding(_kind(group), group[0], f"also {', '.join(group[1:])}")


def _kind(paths: list[str]) -> str:
    splits = {path.split("/")[0] for path in paths}
    if "val" in splits and len(splits) > 1:
        return LEAKED
    classes = {path.split("/")[1] for path in paths if not path.startswith("unlabelled/")}
    return TWO_CLASSES if len(classes) > 1 else SAME_BYTES
