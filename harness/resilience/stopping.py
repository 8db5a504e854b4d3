"""Stopping a run: signals set a flag, and the ranks agree to stop after the same step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
FORWARDED_S = 2.0  # torchrun hands a terminal's Ctrl-C on, so one key press comes as two signals
# a message costs a millisecond or two of a core: little beside what is done in a second
ASK_EVERY_S = 1.0
MOST_STEPS = 20  # also where the next steps take much longer than the last ones


class Stopped(Exception):
    """The run was asked to stop and can be gone on with (exit code 75)."""


class StopRequest:
    """Whether this rank was asked to stop. Only a flag is set within a signal handler."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.asked_at_s: float | None = None  # on the monotonic clock

    @contextmanager
    def listen(self) -> Iterator[StopRequest]:
        """Handles the signals within; the previous handlers are restored after.

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
        elif number == signal.SIGINT and now_s - (self.asked_at_s or now_s) > FORWARDED_S:
            os._exit(128 + number)  # a second Ctrl-C ends at once


class Agreement:
    """What all ranks do after a step: stop, write a checkpoint, or neither.

    Every so many steps, `every_s` seconds of them, each rank sends its wishes on their way and
    reads the answer to those it sent before, which has long arrived: no rank waits, and all ranks
    read the same answer at the same step. The slowest rank's steps say how many that are.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        every_s: float = ASK_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._group, self._every_s, self._clock = group, every_s, clock
        # stop, checkpoint, - steps to the next message: the most of each is what is agreed
        self._wishes = [torch.zeros(3, dtype=torch.int32) for _ in range(2)]
        self._sent: dist.Work | None = None
        self._turn = 0
        self._steps, self._left = 1, 1  # from one message to the next; to go
        self._sent_at_s: float | None = None

    def after_step(self, stop: bool, checkpoint: bool) -> tuple[bool, bool]:
        """Returns (stop, checkpoint) as agreed: at once where there is one rank, else late by one
        or two times `every_s` (one step, where that takes longer)."""
        if self._group is None:
            return stop, checkpoint
        self._left -= 1
        if self._left > 0:
            return False, False
        wanted_steps = self._wanted_steps()
        answer = (False, False)
        if self._sent is not None:
            self._sent.wait()
            stops, saves, steps = self._wishes[1 - self._turn].tolist()
            answer, self._steps = (bool(stops), bool(saves)), -steps
        # what was just agreed is done now, and not asked for again
        wishes = [stop and not answer[0], checkpoint and not answer[1], -wanted_steps]
        message = self._wishes[self._turn].copy_(torch.tensor(wishes))
        self._sent = dist.all_reduce(message, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._turn, self._left = 1 - self._turn, self._steps
        return answer

    def _wanted_steps(self) -> int:
        """How many steps this rank takes in `every_s`, as it has found since the last message."""
        now_s, sent_at_s = self._clock(), self._sent_at_s
        self._sent_at_s = now_s
        if sent_at_s is None:
            return 1
        step_s = max((now_s - sent_at_s) / self._steps, 1e-9)
        return min(max(int(self._every_s / step_s), 1), MOST_STEPS)

    def close(self) -> None:
        """Takes in the last message, so that no rank leaves while another still sends."""
        if self._sent is not None:
            self._sent.wait()
            self._sent = None
