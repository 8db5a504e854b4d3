"""The agreement of all ranks on the step after which they stop or write a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

# A message costs a millisecond or two of a core, which is little beside a second of training.
ASK_EVERY_S = 1.0
MOST_STEPS = 20  # between two messages, as later steps may take far longer than the last ones


class Agreement:
    """Lets all ranks stop, or write a checkpoint, after the same step.

    About every `every_s` seconds each rank sends its wishes and reads the answer to those it sent
    before. That answer arrived long ago, so no rank waits, and all ranks read the same answer at
    the same step. The slowest rank determines how many steps lie between two messages.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        every_s: float = ASK_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._group, self._every_s, self._clock = group, every_s, clock
        # stop, checkpoint, minus the steps to the next message; the maximum of each is agreed
        self._wishes = [torch.zeros(3, dtype=torch.int32) for _ in range(2)]
        self._sent: dist.Work | None = None
        self._turn = 0
        self._steps, self._left = 1, 1  # from one message to the next; until the next
        self._sent_at_s: float | None = None

    def after_step(self, stop: bool, checkpoint: bool) -> tuple[bool, bool]:
        """Return (stop, checkpoint) as agreed by all ranks.

        A single rank's wish holds immediately, others one or two times `every_s` later (one step
        later where a step takes longer).
        """
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
        # the ranks are about to do what they have just agreed on
        wishes = [stop and not answer[0], checkpoint and not answer[1], -wanted_steps]
        message = self._wishes[self._turn].copy_(torch.tensor(wishes))
        self._sent = dist.all_reduce(message, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._turn, self._left = 1 - self._turn, self._steps
        return answer

    def _wanted_steps(self) -> int:
        """Return how many steps this rank takes in `every_s`, measured since the last message."""
        now_s, sent_at_s = self._clock(), self._sent_at_s
        self._sent_at_s = now_s
        if sent_at_s is None:
            return 1
        step_s = max((now_s - sent_at_s) / self._steps, 1e-9)
        return min(max(int(self._every_s / step_s), 1), MOST_STEPS)

    def close(self) -> None:
        """Wait for the last message, so that no rank leaves while another still sends."""
        if self._sent is not None:
            self._sent.wait()
            self._sent = None
