"""Images that are being read in the background, until they are asked for."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

THREADS = 32  # reads under way; they wait for the storage, so they need no core each
MOST_KEPT = 2048  # images; the oldest are forgotten, when a loader ends before it has taken them


class BackgroundReader:
    """Calls `read` for ids ahead of time, in threads of its own.

    A forked process has none of its parent's threads, so it starts its own.
    """

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._process = 0
        self._renew()

    def _renew(self) -> None:
        if self._process != os.getpid():
            self._pending: OrderedDict[int, Future[bytes]] = OrderedDict()
            self._pool = ThreadPoolExecutor(THREADS, "read archives")
            self._process = os.getpid()

    def start(self, ids: Iterable[int]) -> None:
        """Begin to read these images."""
        self._renew()
        for image_id in ids:
            self._pending[image_id] = self._pool.submit(self._read, image_id)
        while len(self._pending) > MOST_KEPT:
            _, oldest = self._pending.popitem(last=False)
            oldest.cancel()

    def take(self, image_id: int) -> bytes:
        """Return an image, read now unless it was begun. Raises as `read`."""
        if self._process != os.getpid() or not self._pending:
            return self._read(image_id)
        pending = self._pending.pop(image_id, None)
        return self._read(image_id) if pending is None else pending.result()
