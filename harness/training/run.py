"""A run on one rank: what the loop works with, its log lines, evaluations and checkpoints."""

from __future__ import annotations

import hashlib
import itertools
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from harness.config.schema import Config
from harness.data.batch import Batch, Loader
from harness.data.batch_plan import BatchPlan
from harness.data.sources.digest import first_difference
from harness.distillation.teacher import AnyTeacher
from harness.distributed import World, broadcast_from_rank0, first_reason
from harness.errors import RunFailed, UserError
from harness.execution.evaluation import evaluate
from harness.models.running_statistics import global_running_statistics
from harness.recipe.schedule import final_epochs, lr_at
from harness.resilience.stopping import ASK_EVERY_S, StopRequest
from harness.resilience.watchdog import Phase, Watchdog
from harness.runs.checkpoint import (
    CheckpointWriter,
    DamagedCheckpoint,
    checkpoint_path,
    copy_to_host,
    load_checkpoint,
    newest_checkpoint,
)
from harness.runs.environment import code_changes, code_record
from harness.runs.logging.jsonl import read_lines
from harness.runs.run_folder import RunFolder
from harness.training.profiling import Profile
from harness.training.run_logger import RunLogger
from harness.training.step import Step

OVERFLOWS_IN_ROW = 20  # float16: from 65536 the scale has then fallen below 1


class Diverged(RunFailed):
    """The loss or the weights are not finite; the last good checkpoint is kept."""


@dataclass
class Run:
    """`control` is the process group of small CPU messages."""

    config: Config
    world: World
    folder: RunFolder
    step: Step
    feed: BatchPlan
    loader: Loader
    control: dist.ProcessGroup | None
    stop: StopRequest
    watchdog: Watchdog
    teacher: AnyTeacher | None = None
    ask_every_s: float = ASK_EVERY_S  # seconds of steps between two messages of the agreement
    journal: RunLogger = field(init=False)
    profile: Profile = field(init=False)
    writer: CheckpointWriter = field(init=False)
    first_step: int = 0
    done: int = 0  # steps
    not_written: str = ""  # why the last checkpoint is not on the disk
    errors: dict[int, float] = field(default_factory=dict)  # epoch -> validation error in %
    saved_at_s: float = field(default_factory=time.monotonic)

    def open_journal(self) -> None:
        """Rank 0's log begins, or goes on after the checkpoint that was restored."""
        self.done = self.first_step
        self.writer = CheckpointWriter(
            self.folder.checkpoints, self.config.run.keep_checkpoints, self._before_write
        )
        changes = self._code_changes()
        path = self.folder.path if self.world.rank == 0 else None
        self.journal = RunLogger(path, self.config, self.first_step)
        self.profile = Profile(
            self.config.run.profile_steps,
            self.first_step,
            self.step,
            self.world,
            self.control,
            self.folder.path,
            self.journal,
        )
        self.journal.event(
            # also from step 0: what an incarnation without a checkpoint logged is superseded
            "start" if self.folder.incarnation <= 1 else "resume",
            self.first_step,
            incarnation=self.folder.incarnation,
            world_size=self.world.world_size,
            device=self.world.device.type,
            precision=self.config.run.precision,
            compile=self.config.run.compile,
            graphs=self.step.graphs,
            gradient_precision=self.config.run.gradient_precision,
            loader=self.loader.name,
            micro_batch=self.feed.micro_batch,
            **code_record(self.folder.environment),
        )
        if changes:
            self.journal.event("code_changed", self.first_step, changes=changes)
            self.journal.say(
                f"warning: resumed at step {self.first_step} under other code: {changes}"
            )

    def _code_changes(self) -> str:
        """How the code differs from the one that trained the steps before `first_step`."""
        if self.world.rank > 0 or self.first_step == 0:
            return ""
        launches = [
            line
            for line in read_lines(self.folder.log)
            if line["event"] in ("start", "resume") and line["step"] < self.first_step
        ]
        before = launches[-1] if launches else {}
        if "code_digest" not in before:  # the log is lost, or an older version's
            before = self.folder.previous_environment
        return code_changes(before, self.folder.environment)

    def close(self) -> None:
        """Waits for the checkpoint that is being written; closes the log."""
        self.writer.close()
        self.journal.close()

    def batches(self) -> Iterator[Batch]:
        """This rank's micro-batches from the first step on, under the watchdog's eyes."""
        batches = self.loader.train(self.first_step)
        return self.watchdog.watch(batches, lambda: self.done, Phase.COMPUTING)

    def log_line(self, done: int) -> None:
        """Reads the metrics since the last line. Synchronises. Raises Diverged, on all ranks."""
        self.watchdog.enter_phase(done, Phase.LOGGING)
        self._report_checkpoints()
        reading = self.step.metrics.read(len(self.step.replaced))
        if reading.replaced:
            self._log_replaced()
        self.journal.train_line(done, reading, lr_at(self.config, done - 1), self.step.data_wait_s)
        self.step.data_wait_s = 0.0
        if reading.overflows_in_row >= OVERFLOWS_IN_ROW:
            raise self._diverged(done - 1, f"float16 overflowed {OVERFLOWS_IN_ROW} times in a row")
        if reading.first_bad_step is not None:
            raise self._diverged(reading.first_bad_step, "the loss is not finite")
        if self.world.rank == 0:
            self.folder.report(step=done, total_steps=self.config.total_steps)

    def _diverged(self, step: int, why: str) -> Diverged:
        ids = self.feed.step_ids(step).tolist()
        self.journal.event("diverged", step + 1, why=why, image_ids=ids)
        return Diverged(
            f"{why} at step {step} (lr {lr_at(self.config, step):.4g}); its images: ids "
            f"{', '.join(map(str, ids[:8]))}, … (all {len(ids)} in {self.folder.log}); "
            "the last good checkpoint is kept"
        )

    def _log_replaced(self) -> None:
        """Images that could not be decoded, of all ranks, each with the one in its place."""
        everywhere: list[list[tuple[int, int, int]]] = [self.step.replaced]
        if self.control is not None:
            everywhere = [[] for _ in range(self.world.world_size)]
            dist.all_gather_object(everywhere, self.step.replaced, group=self.control)
        for step, bad, other in sorted(itertools.chain.from_iterable(everywhere)):
            self.journal.event("replaced", step + 1, bad_image_id=bad, by_image_id=other)
        self.step.replaced = []

    def evaluation_is_due(self, done: int) -> bool:
        """After every `evaluate_every_epochs`, and after each epoch that the error is made of."""
        epoch = done // self.config.steps_per_epoch
        every = self.config.run.evaluate_every_epochs
        return epoch in final_epochs(self.config) or epoch % every == 0

    def evaluate(self, done: int) -> None:
        """Evaluates with the running statistics of all workers. Synchronises."""
        network = self.step.network
        batches = self.watchdog.watch(self.loader.evaluate(), lambda: done, Phase.EVALUATING)
        with global_running_statistics(network, self.feed.share):
            evaluation = evaluate(self.config, network, batches, self.step.pixels)
        self.errors[done // self.config.steps_per_epoch] = evaluation.error
        self.journal.evaluation_line(done, evaluation)
        self.journal.restart_clock()

    def evaluate_teacher(self) -> None:
        """Logged before the first step, so that a bad teacher is seen at once. Synchronises."""
        if self.teacher is None or self.first_step > 0:
            return
        evaluation = self.teacher.evaluate(
            lambda: self.watchdog.watch(self.loader.evaluate(), lambda: 0, Phase.EVALUATING)
        )
        self.journal.teacher_line(evaluation, self.teacher.identity)
        self.journal.restart_clock()

    def evaluate_if_missing(self) -> None:
        """Makes up the evaluation of the epoch that the restored checkpoint ended."""
        epoch, rest = divmod(self.first_step, self.config.steps_per_epoch)
        missing = epoch > 0 and rest == 0 and epoch not in self.errors
        if missing and self.evaluation_is_due(self.first_step):
            self.evaluate(self.first_step)

    def checkpoint_is_due(self) -> bool:
        """Rank 0's clock decides; the ranks agree on it."""
        minutes = (time.monotonic() - self.saved_at_s) / 60
        return self.world.rank == 0 and minutes >= self.config.run.checkpoint_every_minutes

    def save(self, done: int) -> None:
        """Hands a copy of finite weights to the thread that writes checkpoints. Synchronises."""
        self.watchdog.enter_phase(done, Phase.SAVING)
        network = self.step.network
        if not bool(torch.stack([torch.isfinite(p).all() for p in network.parameters()]).all()):
            raise self._diverged(done - 1, "the weights are not finite")
        self.saved_at_s = time.monotonic()
        with global_running_statistics(network, self.feed.share):
            if self.world.rank == 0:
                path = checkpoint_path(self.folder.checkpoints, self.folder.incarnation, done)
                self.writer.submit(path, self._payload(done), self._best_step())
        self.journal.restart_clock()

    def saved(self, done: int) -> str:
        """What became of the checkpoint of step `done`, once the disk has it or refused it."""
        self.watchdog.enter_phase(done, Phase.SAVING)
        self._report_checkpoints(finish=True)
        if not self.not_written:
            return "checkpoint written"
        return f"its checkpoint could not be written ({self.not_written}), an older one may stand"

    def _payload(self, done: int) -> dict[str, Any]:
        return copy_to_host(self.step.state_dict()) | {
            "step": done,
            "incarnation": self.folder.incarnation,
            "config": self.config.model_dump(mode="json"),
            "seed": self.config.seed,
            "world_size": self.world.world_size,
            "errors": dict(self.errors),
            "class_names": list(self.feed.train.classes),
            "class_digests": {
                "train": self.feed.train.class_digests(),
                "val": self.feed.val.class_digests(),
            },
            "teacher": self.teacher.identity if self.teacher else None,
            "versions": {"torch": str(torch.__version__)},
        }

    def _before_write(self) -> None:
        self.folder.check_current()
        self.journal.flush()  # the log is never behind a checkpoint

    def _report_checkpoints(self, finish: bool = False) -> None:
        for outcome in self.writer.outcomes(finish):
            values = {"file": outcome.path.name, "seconds": round(outcome.seconds, 3)}
            if outcome.error is None:
                self.not_written = ""
                self.journal.event("checkpoint", outcome.step, **values)
            elif isinstance(outcome.error, OSError):
                self.not_written = outcome.error.strerror or str(outcome.error)
                self.journal.say(
                    f"warning: {outcome.path}: not written: {self.not_written}; going on"
                )
                values["why"] = str(outcome.error)
                self.journal.event("checkpoint_failed", outcome.step, **values)
            else:
                raise outcome.error

    def remove_surplus_checkpoints(self) -> None:
        """At the end, when the best epoch is known."""
        if self.world.rank == 0:
            self.writer.prune(self._best_step())

    def _best_step(self) -> int | None:
        if not self.errors:
            return None
        return min(self.errors, key=lambda epoch: self.errors[epoch]) * self.config.steps_per_epoch

    def restore(self, path: Path) -> None:
        """Takes over a checkpoint written on any number of ranks.

        Raises UserError where the data or the teacher are not those that the run began with,
        and as `load_alike`.
        """
        payload = load_alike(path, self.control)
        self._check_data(payload)
        if self.teacher and self.teacher.identity != payload["teacher"]:
            raise UserError(
                f"{self.folder.path}: distill.teacher or its cache is another one than at the "
                "start; restore it, or start anew with another --out"
            )
        self.step.load_state_dict(payload)
        self.first_step, self.errors = payload["step"], dict(payload["errors"])

    def _check_data(self, payload: dict[str, Any]) -> None:
        """Labels and image ids are positions in the index: other data would permute them."""
        indices = {"train": self.feed.train, "val": self.feed.val}
        here = {split: index.class_digests() for split, index in indices.items()}
        then = payload.get("class_digests")
        if then is None:  # written by an older harness, which kept the names alone
            then = {"train": dict.fromkeys(payload.get("class_names", self.feed.train.classes), "")}
            here = {"train": dict.fromkeys(self.feed.train.classes, "")}
            if self.world.rank == 0:
                print(
                    f"warning: {self.folder.path}: its checkpoint has no digest of the data, so "
                    "nothing but the class names was compared",
                    flush=True,
                )
        for split, digests in then.items():
            place = str(indices[split].folder)
            if difference := first_difference(digests, here[split], "the checkpoint", place):
                raise UserError(
                    f"{self.folder.path}: was trained on other data: {difference}; restore the "
                    "data, or start a new run with another --out"
                )


def load_alike(path: Path, control: dist.ProcessGroup | None) -> dict[str, Any]:
    """Load a checkpoint that every rank reads by itself, from a file that must be the same.

    No weights are sent once they are restored, so ranks whose nodes do not share the run folder
    would train apart. Raises UserError, on all ranks, where one cannot read the file or finds
    another one under its name.
    """
    payload: dict[str, Any] = {}
    digest = reason = ""
    try:
        payload = load_checkpoint(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except (DamagedCheckpoint, OSError) as error:
        reason = f"{error} (on {socket.gethostname()})"
    if digest != broadcast_from_rank0(digest, control) and not reason:
        reason = f"{path}: is another file on {socket.gethostname()} than for rank 0"
    if reason := first_reason(reason, control):
        raise UserError(f"{reason}; keep the run folder where all ranks share it")
    return payload


def choose_checkpoint(folder: RunFolder) -> Path | None:
    """Return the newest valid checkpoint of a run that resumes; report damaged ones.

    None where the run ended before its first checkpoint. Raises UserError where none is valid.
    """
    found = newest_checkpoint(folder.checkpoints, lambda text: print(f"warning: {text}"))
    if found is None:
        print(f"warning: {folder.path}: holds no checkpoint; starting from step 0", flush=True)
        return None
    return found[0]
