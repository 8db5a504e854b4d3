"""TensorBoard's scalars."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from harness.runs.logging.jsonl import Record

if TYPE_CHECKING:  # a log can be read without PyTorch
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardSink:
    """Writes TensorBoard's scalars; warns and gives up once they cannot be written."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self._folder = folder
        self._writer: SummaryWriter | None = None
        self._usual_hook = threading.excepthook
        self._hook = self._hush_writer  # one bound method, to find it again
        try:
            self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)
        except UnicodeEncodeError:  # TensorBoard takes no path that is not UTF-8
            print(f"warning: {str(folder)!a}: not written: the name is not UTF-8; continuing")
        threading.excepthook = self._hook

    def event(self, event: Record) -> None:
        """Write nothing: TensorBoard shows scalars."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._call("add_scalar", name, value, step)

    def flush(self) -> None:
        self._call("flush")

    def close(self) -> None:
        self._call("close")
        if threading.excepthook == self._hook:
            threading.excepthook = self._usual_hook

    def _call(self, method: str, *arguments: object) -> None:
        try:
            if self._writer is not None:
                getattr(self._writer, method)(*arguments)
        except OSError as error:
            self._writer = None
            print(f"warning: {self._folder}: no longer written: {error.strerror}; continuing")

    def _hush_writer(self, thread: threading.ExceptHookArgs) -> None:
        """Drop the stack of TensorBoard's thread, whose error its caller gets as well."""
        if "_AsyncWriterThread" not in type(thread.thread).__name__:
            self._usual_hook(thread)
