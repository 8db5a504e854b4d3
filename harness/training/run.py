"""A run on one rank: its steps, log lines, evaluations and checkpoints."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist

from harness.config.reference import names_with, value_of
from harness.config.schema import Config
from harness.config.section import Effect
from harness.data.batch import Batch, Loader
from harness.data.batch_plan import BatchPlan
from harness.distillation.teacher import AnyTeacher
from harness.distributed import World, broadcast_from_rank0
from harness.execution.evaluation import evaluate
from harness.execution.recalibration import evaluation_statistics
from harness.models.running_statistics import global_running_statistics
from harness.models.weights import weights_digest
from harness.outcome import RunFailed, Stopped
from harness.recipe.schedule import final_epochs, lr_at
from harness.resilience.agreement import ASK_EVERY_S
from harness.resilience.stopping import StopRequest
from harness.resilience.watchdog import Phase, Watchdog
from harness.runs.checkpoint import CheckpointWriter, checkpoint_path, copy_to_host
from harness.runs.environment import code_changes, code_record
from harness.runs.logging.jsonl import read_lines
from harness.runs.logging.sink import OpenSink
from harness.runs.run_folder import RunFolder
from harness.training.profiling import Profile
from harness.training.resume import START, Start
from harness.training.run_logger import RunLogger
from harness.training.step import Step
from harness.training.tuning.cuda_graphs import NO_TRIAL, GraphTrial

OVERFLOWS_IN_ROW = 20  # float16: from 65536 the scale has then fallen below 1


class Diverged(RunFailed):
    """The loss or the weights are not finite; the last good checkpoint is kept."""


@dataclass
class Run:
    """One rank's run, from its first step of this start; constructing it opens rank 0's log.

    `control` is the process group of small CPU messages. `start`: where this start begins.
    `graphs`: what the trial of CUDA graphs found. `loggers`: further loggers by name.
    """

    config: Config
    world: World
    folder: RunFolder
    step: Step
    batch_plan: BatchPlan
    loader: Loader
    control: dist.ProcessGroup | None
    stop: StopRequest
    watchdog: Watchdog
    profile: Profile
    start: Start = START
    graphs: GraphTrial = NO_TRIAL
    teacher: AnyTeacher | None = None
    loggers: Mapping[str, OpenSink] = field(default_factory=dict)
    ask_every_s: float = ASK_EVERY_S  # seconds of steps between two messages of the agreement

    def __post_init__(self) -> None:
        self.first_step = self.done = self.start.step  # steps
        self.errors = dict(self.start.errors)  # epoch -> validation error in %
        self._write_error: str | None = None  # why the last checkpoint is not on the disk
        self._saved_at_s = time.monotonic()
        self._writer = CheckpointWriter(
            self.folder.checkpoints, self.config.run.keep_checkpoints, self._before_write
        )
        changes = self._code_changes()  # before this start is logged
        path = self.folder.path if self.world.rank == 0 else None
        self.logger = RunLogger(path, self.config, self.first_step, self.loggers)
        self._log_start(changes)

    def _log_start(self, changes: str) -> None:
        names = names_with(Effect.ROUNDING, Effect.HARDWARE, Effect.EVALUATION)
        rounding = {name.removeprefix("run."): value_of(self.config, name) for name in names} | {
            "device": self.world.device.type,
            "loader": self.loader.name,
            "micro_batch": self.batch_plan.micro_batch,
        }
        self.logger.event(
            # also from step 0: a resume supersedes what a start without a checkpoint logged
            "start" if self.folder.incarnation <= 1 else "resume",
            self.first_step,
            incarnation=self.folder.incarnation,
            world_size=self.world.world_size,
            graphs=str(self.graphs),
            **rounding,
            **code_record(self.folder.environment),
        )
        if weights := self.start.weights:
            self.logger.event("weights", 0, loaded=str(weights))
            self.logger.say(f"start weights  {weights}")
        if changes:
            self.logger.event("code_changed", self.first_step, changes=changes)
            self.logger.say(
                f"warning: resumed at step {self.first_step} under other conditions: {changes}"
            )

    def _code_changes(self) -> str:
        """Compare the code with the one that trained the steps before; "" where it is equal."""
        if self.world.rank > 0 or self.first_step == 0:
            return ""
        launches = [
            line
            for line in read_lines(self.folder.log)
            if line["event"] in ("start", "resume") and line["step"] < self.first_step
        ]
        before = launches[-1] if launches else {}
        if "code_digest" not in before:  # the log is lost, or an older version wrote it
            before = self.folder.previous_environment
        return code_changes(before, self.folder.environment)

    def close(self) -> None:
        """Wait for the checkpoint that is being written; close the log."""
        self._writer.close()
        self.logger.close()

    def batches(self) -> Iterator[Batch]:
        """Yield this rank's micro-batches from the first step on, followed by the watchdog."""
        batches = self.loader.train(self.first_step)
        return self.watchdog.watch(batches, lambda: self.done, Phase.COMPUTING)

    def take_step(self, step: int, batches: Iterator[Batch]) -> int:
        """Run one step; return the number of steps done."""
        self.watchdog.enter_phase(step, Phase.LOADING)
        self.step(step, batches)
        self.done = step + 1
        return self.done

    def profile_step(self, done: int) -> None:
        """Measure and report what `run.profile_steps` asks for. Synchronises in a few steps."""
        if report := self.profile.after_step(done):
            self.logger.say(report.text)
            straggler = report.straggling_rank
            self.logger.event("profile", done, ranks=report.ranks, straggling_rank=straggler)

    def log_line(self, done: int) -> None:
        """Log the metrics since the last line. Synchronises. Raises Diverged, on all ranks."""
        self.watchdog.enter_phase(done, Phase.LOGGING)
        self._report_checkpoints()
        local_replaced = self.step.take_replaced()
        metrics = self.step.metrics.read(len(local_replaced))
        if metrics.replaced:
            self._log_replaced(local_replaced)
        lr = lr_at(self.config, done - 1)
        self.logger.train_line(done, metrics, lr, self.step.take_data_wait_s())
        if metrics.overflows_in_row >= OVERFLOWS_IN_ROW:
            raise self._diverged(done - 1, f"float16 overflowed {OVERFLOWS_IN_ROW} times in a row")
        for step, norms in self.step.noise.read():
            self.logger.noise_line(step + 1, norms)
        if beyond := self.step.replica.sums.take_beyond_range():
            step, name = beyond
            raise self._diverged(step, f"the gradient of {name} is beyond the range of exact sums")
        if metrics.first_bad_step is not None:
            raise self._diverged(metrics.first_bad_step, "the loss is not finite")
        if self.world.rank == 0:
            self.folder.report(step=done, total_steps=self.config.total_steps)

    def _diverged(self, step: int, why: str) -> Diverged:
        ids = self.batch_plan.step_ids(step).tolist()
        self.logger.event("diverged", step + 1, why=why, image_ids=ids)
        return Diverged(
            f"{why} at step {step} (lr {lr_at(self.config, step):.4g}); its images: ids "
            f"{', '.join(map(str, ids[:8]))}, … (all {len(ids)} in {self.folder.log}); "
            "the last good checkpoint is kept",
            step=step + 1,
        )

    def _log_replaced(self, local: list[tuple[int, int, int]]) -> None:
        """Log the images of all ranks that could not be decoded, each with its replacement."""
        everywhere = [local]
        if self.control is not None:
            everywhere = [[] for _ in range(self.world.world_size)]
            dist.all_gather_object(everywhere, local, group=self.control)
        for step, bad, other in sorted(itertools.chain.from_iterable(everywhere)):
            self.logger.event("replaced", step + 1, bad_image_id=bad, by_image_id=other)

    def evaluation_is_due(self, done: int) -> bool:
        """Return True every `evaluate_every_epochs` and in the epochs that make up the error."""
        epoch = done // self.config.steps_per_epoch
        every = self.config.run.evaluate_every_epochs
        return epoch in final_epochs(self.config) or epoch % every == 0

    def evaluate(self, done: int) -> None:
        """Evaluate with the running statistics of all workers. Synchronises."""
        network, preprocess = self.step.network, self.step.replica.preprocess
        watch = partial(self.watchdog.watch, step=lambda: done, phase=Phase.EVALUATING)
        training_images = lambda: watch(self.loader.recalibrate())  # noqa: E731
        parts = self.config, network, self.batch_plan.statistics_share, training_images, preprocess
        with evaluation_statistics(*parts):
            batches = watch(self.loader.evaluate())
            evaluation = evaluate(self.config, network, batches, preprocess)
        self.errors[done // self.config.steps_per_epoch] = evaluation.error
        self.logger.evaluation_line(done, evaluation)
        self.logger.restart_clock()

    def evaluate_teacher(self) -> None:
        """Log the teacher's error before the first step, to show a bad teacher. Synchronises."""
        if self.teacher is None or self.first_step > 0:
            return
        evaluation = self.teacher.evaluate(
            lambda: self.watchdog.watch(self.loader.evaluate(), lambda: 0, Phase.EVALUATING)
        )
        self.logger.teacher_line(evaluation, self.teacher.identity)
        self.logger.restart_clock()

    def evaluate_if_missing(self) -> None:
        """Make up for the evaluation of the epoch that the restored checkpoint ended."""
        epoch, rest = divmod(self.first_step, self.config.steps_per_epoch)
        missing = epoch > 0 and rest == 0 and epoch not in self.errors
        if missing and self.evaluation_is_due(self.first_step):
            self.evaluate(self.first_step)

    def checkpoint_is_due(self) -> bool:
        """Return True on rank 0 when its clock says so; the ranks then agree on it."""
        minutes = (time.monotonic() - self._saved_at_s) / 60
        return self.world.rank == 0 and minutes >= self.config.run.checkpoint_every_minutes

    def save(self, done: int) -> None:
        """Hand a copy of finite weights to the thread that writes checkpoints. Synchronises."""
        self.watchdog.enter_phase(done, Phase.SAVING)
        network = self.step.network
        if not bool(torch.stack([torch.isfinite(p).all() for p in network.parameters()]).all()):
            raise self._diverged(done - 1, "the weights are not finite")
        self._saved_at_s = time.monotonic()
        with global_running_statistics(network, self.batch_plan.statistics_share):
            if self.world.rank == 0:
                path = checkpoint_path(self.folder.checkpoints, self.folder.incarnation, done)
                self._writer.submit(path, self._payload(done), self._best_step())
        self.logger.restart_clock()

    def stopped(self, done: int) -> Stopped:
        """Return what ends the loop after a stop that all ranks agreed on."""
        reason = f"stopped after step {done} of {self.config.total_steps}"
        error = self.wait_for_checkpoint(done)
        return Stopped(
            f"{reason}, {'checkpoint written' if error is None else error}",
            step=done,
            checkpoint_written=error is None,
            agreed_by_all_ranks=True,
        )

    def weights_digest(self) -> str:
        """Return the SHA-256 of the weights and of all workers' statistics. Synchronises."""
        with global_running_statistics(self.step.network, self.batch_plan.statistics_share):
            return weights_digest(self.step.network.state_dict())

    def wait_for_checkpoint(self, done: int) -> str | None:
        """Wait until rank 0's disk has the checkpoint of step `done`, or has refused it.

        Return the reason of a refusal, on all ranks.
        """
        self.watchdog.enter_phase(done, Phase.SAVING)
        self._report_checkpoints(finish=True)
        error = broadcast_from_rank0(self._write_error, self.control)
        if error is None:
            return None
        return f"its checkpoint could not be written ({error}), an older one may remain"

    def _payload(self, done: int) -> dict[str, object]:
        return copy_to_host(self.step.state_dict()) | {
            "step": done,
            "incarnation": self.folder.incarnation,
            "config": self.config.model_dump(mode="json"),
            "seed": self.config.seed,
            "world_size": self.world.world_size,
            "errors": dict(self.errors),
            "class_names": list(self.batch_plan.train.classes),
            "class_digests": {
                "train": self.batch_plan.train.class_digests(),
                "val": self.batch_plan.val.class_digests(),
            },
            "teacher": self.teacher.identity if self.teacher else None,
            "versions": {"torch": str(torch.__version__)},
        }

    def _before_write(self) -> None:
        self.folder.check_current()
        self.logger.flush()

    def _report_checkpoints(self, finish: bool = False) -> None:
        for outcome in self._writer.outcomes(finish):
            values = {"file": outcome.path.name, "seconds": round(outcome.seconds, 3)}
            if outcome.error is None:
                self._write_error = None
                self.logger.event("checkpoint", outcome.step, **values)
            elif isinstance(outcome.error, OSError):
                self._write_error = outcome.error.strerror or str(outcome.error)
                self.logger.say(
                    f"warning: {outcome.path}: not written: {self._write_error}; continuing"
                )
                values["why"] = str(outcome.error)
                self.logger.event("checkpoint_failed", outcome.step, **values)
            else:
                raise outcome.error

    def remove_surplus_checkpoints(self) -> None:
        """Remove them at the end of the run, when the best epoch is known."""
        if self.world.rank == 0:
            self._writer.prune(self._best_step())

    def _best_step(self) -> int | None:
        if not self.errors:
            return None
        return min(self.errors, key=lambda epoch: self.errors[epoch]) * self.config.steps_per_epoch
