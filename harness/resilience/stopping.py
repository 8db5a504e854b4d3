"""The request to stop, by a signal."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
FORWARDED_S = 2.0  # torchrun forwards a terminal's Ctrl-C, so one key press arrives as two signals


class StopRequest:
    """The stop signal that this process has received, if any; the handler only notes it.

    A second Ctrl-C calls `on_second_interrupt`, or ends the process where that is None.
    """

    def __init__(self, on_second_interrupt: Callable[[], object] | None = None) -> None:
        self._on_second_interrupt = on_second_interrupt
        self.signal: signal.Signals | None = None
        self.asked_at_s: float | None = None  # on the monotonic clock

    @contextmanager
    def listen(self) -> Iterator[StopRequest]:
        """Handle the signals within; restore the previous handlers afterwards.

        SIGHUP (a closed terminal, a dropped ssh) stays ignored where nohup or a launcher that
        decides for its runs has ignored it. The other signals are handled even then: launchers
        ignore those only until this process is ready for them.
        """
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        numbers = [number for number in SIGNALS if not (ignored and number == signal.SIGHUP)]
        previous = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if self.signal is None:
            self.signal, self.asked_at_s = signal.Signals(number), now_s
        elif number != signal.SIGINT:
            return
        elif self._on_second_interrupt is not None:
            self._on_second_interrupt()
        elif now_s - (self.asked_at_s or now_s) > FORWARDED_S:
            os._exit(128 + number)
