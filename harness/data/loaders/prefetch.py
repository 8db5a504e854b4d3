"""Prefetch batches in a background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

from harness.data.batch import Batch

DEPTH = 4  # batches that wait at most
POLL_S = 0.1  # how soon the thread notices that it is closed


class Prefetcher(Iterator[Batch]):
    """Iterates `batches` in a thread, up to DEPTH ahead; `pin` puts them into pinned memory.

    An error of `batches` is raised here, in its place in the order. `close` ends the thread.
    """

    def __init__(self, batches: Iterator[Batch], pin: bool) -> None:
        self._batches, self._pin = batches, pin
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(DEPTH)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)
        self._thread.start()

    def __next__(self) -> Batch:
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._queue.put(item)  # nothing else follows: later calls raise it again
            raise item
        return item

    def close(self) -> None:
        """End the thread and the iteration; drop the batches that wait."""
        self._closed.set()
        self._thread.join()
        while not self._queue.empty():
            self._queue.get()
        self._queue.put(StopIteration())

    def _fill(self) -> None:
        try:
            for batch in self._batches:
                self._put(batch.pin_memory() if self._pin else batch)
                if self._closed.is_set():
                    return
            self._put(StopIteration())
        except BaseException as error:
            self._put(error)

    def _put(self, item: Batch | BaseException) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=POLL_S)
            except queue.Full:
                continue
