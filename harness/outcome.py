"""The outcome of a run, or of one start of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class State(Enum):
    """The state of a run in status.json."""

    STARTING = "starting"
    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


def recorded_state(status: Mapping[str, object]) -> State | None:
    """Return the state that a status.json holds; None where it holds none, as before a start."""
    try:
        return State(status.get("state"))
    except ValueError:
        return None


@dataclass(frozen=True)
class Outcome:
    """The end of a start of a run: values to decide by, and `reason`, which is for people.

    `step` is the number of steps done, None where the end came too suddenly to know it.
    `checkpoint_written` says whether the disk holds the checkpoint of that step, and
    `agreed_by_all_ranks` whether the ranks ended together after it.
    """

    state: State
    reason: str = ""
    step: int | None = None
    checkpoint_written: bool = False
    agreed_by_all_ranks: bool = False

    @classmethod
    def from_status(cls, status: Mapping[str, object]) -> Outcome | None:
        """Return the outcome that a status.json holds; None where the run has not ended."""
        state = recorded_state(status)
        if state in (None, State.STARTING, State.RUNNING):
            return None
        step = status.get("step")
        return cls(
            state,
            str(status.get("reason", "")),
            step if isinstance(step, int) else None,
            # older versions did not write these two
            status.get("checkpoint_written", state is State.FINISHED) is True,
            status.get("agreed_by_all_ranks", state is State.FINISHED) is True,
        )

    def as_status(self) -> dict[str, object]:
        """Return the values for status.json besides the state; an unknown step is left as it is."""
        step = {} if self.step is None else {"step": self.step}
        return step | {
            "reason": self.reason,
            "checkpoint_written": self.checkpoint_written,
            "agreed_by_all_ranks": self.agreed_by_all_ranks,
        }


class RunEnded(Exception):
    """The end of a run before its last step."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.reason)
        self.outcome = outcome


class Stopped(RunEnded):
    """The run was asked to stop and can be resumed (exit code 75)."""

    def __init__(
        self,
        reason: str,
        *,
        step: int | None = None,
        checkpoint_written: bool = False,
        agreed_by_all_ranks: bool = False,
    ) -> None:
        super().__init__(
            Outcome(State.STOPPED, reason, step, checkpoint_written, agreed_by_all_ranks)
        )


class RunFailed(RunEnded):
    """The run cannot continue, for a reason that one line explains (exit code 1)."""

    def __init__(self, reason: str, *, step: int | None = None) -> None:
        super().__init__(Outcome(State.FAILED, reason, step))
