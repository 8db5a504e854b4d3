"""TensorBoard's scalars."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a log can be read without PyTorch
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardSink:
    """TensorBoard's scalars; given up, with a warning, once they cannot be written."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self._folder = folder
        self._writer: SummaryWriter | None = None
        try:
            self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)
        except UnicodeEncodeError:  # TensorBoard takes no path that is not UTF-8
            print(f"warning: {str(folder)!a}: not written: the name is not UTF-8; going on")
        _hush_tensorboard()

    def add(self, values: dict[str, float], step: int) -> None:
        """Values by their name, such as train/loss."""
        for name, value in values.items():
            self._call("add_scalar", name, value, step)

    def flush(self) -> None:
        self._call("flush")

    def close(self) -> None:
        self._call("close")

    def _call(self, method: str, *arguments: object) -> None:
        try:
            if self._writer is not None:
                getattr(self._writer, method)(*arguments)
        except OSError as error:
            self._writer = None
            print(f"warning: {self._folder}: not written any more: {error.strerror}; going on")


def _hush_tensorboard() -> None:
    """Its writing thread reports an error to its caller, and then to the terminal, with a stack."""
    usual = threading.excepthook

    def hook(thread: threading.ExceptHookArgs) -> None:
        if "_AsyncWriterThread" not in type(thread.thread).__name__:
            usual(thread)

    threading.excepthook = hook
