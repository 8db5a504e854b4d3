"""Train a run to its end, and record how it ended."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from harness.compat import describe_peer_loss
from harness.config.schema import Config
from harness.distributed import World
from harness.errors import FAILED, STOPPED
from harness.outcome import Outcome, RunEnded, RunFailed, State, Stopped
from harness.resilience.stopping import StopRequest
from harness.resilience.watchdog import Watchdog
from harness.runs.headline import Headline, headline
from harness.runs.run_folder import Fenced, RunFolder
from harness.training.loop import run_steps
from harness.training.run import Run


@dataclass(frozen=True)
class Result:
    """The result of a finished run."""

    headline: Headline
    folder: Path
    config: Config
    weights_sha256: str  # of the final weights; "" where an older version trained them

    @property
    def error(self) -> float:
        """Top-1 validation error in %, by `headline.rule`."""
        return self.headline.error


def run_to_the_end(
    open_run: Callable[[], Run],
    world: World,
    folder: RunFolder,
    watchdog: Watchdog,
    stop: StopRequest,
    resume_command: str,
) -> Result:
    """Run the loop within its log and its status; rank 0 records how it ended."""
    with status_kept(world, folder, watchdog, stop, resume_command) as record:
        with closing(open_run()) as run:
            total_steps = run.config.total_steps
            record(State.RUNNING, step=run.first_step, total_steps=total_steps)
            run.evaluate_teacher()
            run.evaluate_if_missing()
            run_steps(run)
            result = headline(run.config, run.errors)
            if error := run.wait_for_checkpoint(total_steps):
                why = f"error {result.error:.2f} %, but {error}; make room and resume"
                raise RunFailed(why, step=total_steps)
            run.remove_surplus_checkpoints()
            digest = run.weights_digest()
            found = result.as_mapping() | {"weights_sha256": digest}
            run.logger.event("finish", total_steps, **found)
        expect = run.config.expect
        expected = None if expect is None else expect.error
        finished = Outcome(State.FINISHED, "", total_steps, True, True)
        record(State.FINISHED, **finished.as_status(), **found, expected=expected)
        return Result(result, folder.path, run.config, digest)


@contextmanager
def status_kept(
    world: World, folder: RunFolder, watchdog: Watchdog, stop: StopRequest, resume_command: str
) -> Iterator[Callable[..., object]]:
    """Keep the run's status fresh within; record an exception and raise what explains the end.

    Yields what writes the status, on rank 0 only.
    """
    record: Callable[..., object] = lambda state, **values: None  # noqa: E731
    heartbeat: AbstractContextManager[None] = nullcontext()
    last_words: Callable[[Outcome], object] = lambda outcome: None  # noqa: E731
    if world.rank == 0:
        record = folder.write_status
        last_words = partial(record_hang, folder, resume_command)
        heartbeat = folder.heartbeat(lambda why: watchdog.terminate(FAILED, why))
    with watchdog.recording(last_words), heartbeat:
        try:
            yield record
        except Fenced:
            raise  # the folder is another incarnation's
        except Exception as error:
            ended = why_it_ended(watchdog, stop, error)
            outcome = outcome_of(ended)
            record(outcome.state, **outcome.as_status())
            raise ended from (None if ended is error else error)


def outcome_of(error: Exception) -> Outcome:
    """Return the outcome that an exception carries; that of a bug is its first line."""
    if isinstance(error, RunEnded):
        return error.outcome
    return Outcome(State.FAILED, (str(error).splitlines() or [repr(error)])[0])


def record_hang(folder: RunFolder, resume_command: str, outcome: Outcome) -> None:
    """Record the status where the watchdog terminates rank 0, and say how to resume."""
    command = resume_command or "the same call with resume=True"
    print(f"resume with: {command}", file=sys.stderr, flush=True)
    with suppress(Fenced):  # a newer incarnation keeps the status
        folder.write_status(outcome.state, **outcome.as_status())


def why_it_ended(watchdog: Watchdog, stop: StopRequest, error: Exception) -> Exception:
    """Return the error, or what names the lost rank behind it; no failure if a stop was asked."""
    if not (lost := describe_peer_loss(error)):
        return error
    verdict = watchdog.diagnose(lost)
    if verdict.code == STOPPED:
        return Stopped(verdict.reason)
    if stop.signal is not None:
        return Stopped(
            f"{verdict.reason}, while the run was to stop; the newest checkpoint is kept"
        )
    return RunFailed(verdict.reason)
