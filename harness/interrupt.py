"""Stopping a run: signals set a flag, and the ranks agree to stop after the same step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
FORWARDED_S = 2.0  # torchrun hands a terminal's Ctrl-C on, so one key press comes as two signals


class Stopped(Exception):
    """The run was asked to stop and can be gone on with (exit code 75)."""


class StopRequest:
    """Whether this rank was asked to stop. Only a flag is set within a signal handler."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.asked_at_s: float | None = None  # on the monotonic clock

    @contextmanager
    def listen(self) -> Iterator[StopRequest]:
        """Handles the signals within; the previous handlers are restored after."""
        previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if self.signal is None:
            self.signal, self.asked_at_s = signal.Signals(number), now_s
        elif number == signal.SIGINT and now_s - (self.asked_at_s or now_s) > FORWARDED_S:
            os._exit(128 + number)  # a second Ctrl-C ends at once


class Agreement:
    """What all ranks do after a step: stop, write a checkpoint, or neither.

    Each step sends this rank's wishes on their way and reads the answer to those of the step
    before, which has long arrived: no rank waits, and all ranks read the same answer at the
    same step.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._wishes = [torch.zeros(2, dtype=torch.int32) for _ in range(2)]
        self._sent: dist.Work | None = None
        self._turn = 0

    def after_step(self, stop: bool, checkpoint: bool) -> tuple[bool, bool]:
        """Returns (stop, checkpoint) as agreed; one step late where there are several ranks."""
        if self._group is None:
            return stop, checkpoint
        answer = (False, False)
        if self._sent is not None:
            self._sent.wait()
            agreed = self._wishes[1 - self._turn].tolist()
            answer = bool(agreed[0]), bool(agreed[1])
        wishes = self._wishes[self._turn]
        # what was just agreed is done now, and not asked for again
        wishes[0], wishes[1] = int(stop and not answer[0]), int(checkpoint and not answer[1])
        self._sent = dist.all_reduce(wishes, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._turn = 1 - self._turn
        return answer

    def close(self) -> None:
        """Takes in the last message, so that no rank leaves while another still sends."""
        if self._sent is not None:
            self._sent.wait()
            self._sent = None
