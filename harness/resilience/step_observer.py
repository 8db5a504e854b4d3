"""The interface of a step's observers, such as the watchdog and the profiler."""

from __future__ import annotations

from typing import Literal

StepPhase = Literal["data wait", "forward", "backward", "metrics", "optimizer"]


class StepObserver:
    """Base class of observers; override what you need, as each method does nothing here.

    The step calls the methods in its own thread, `on_bucket_sent` in autograd's. They must not
    wait for the device or for other ranks.
    """

    def on_phase(self, phase: StepPhase) -> None:
        """Enter `phase`, which lasts until the next call or the end of the step."""

    def on_bucket_sent(self, last: bool) -> None:
        """Record that a bucket of gradients is on its way; `last`: it was the step's last one."""

    def on_step_end(self) -> None:
        """Record that the weights have been updated."""
