"""What a run tells: the progress line, log.jsonl, TensorBoard."""

from __future__ import annotations

import math
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from harness.config.schema import Config
from harness.runs.logging.jsonl import JsonlSink
from harness.runs.logging.tensorboard import TensorBoardSink

if TYPE_CHECKING:  # a log can be read without PyTorch
    from harness.execution.evaluation import Evaluation
    from harness.training.metrics import TrainMetrics


class RunLogger:
    """Rank 0's record of the run; on the other ranks (`folder` None) every call does nothing."""

    def __init__(self, folder: Path | None, config: Config, first_step: int) -> None:
        self.config = config
        self._file: JsonlSink | None = None
        self._bar: tqdm | None = None
        self._first_step, self._logged_step = first_step, first_step
        self._begun_s = self._mark_s = time.monotonic()
        if folder is None:
            return
        self._file = JsonlSink(folder / "log.jsonl")
        self._curves = TensorBoardSink(folder / "tensorboard", first_step)
        if sys.stderr.isatty():
            self._bar = tqdm(total=config.total_steps, initial=first_step, unit="step", leave=False)

    def event(self, name: str, step: int, **values: Any) -> None:
        """One line of log.jsonl. `step` is the number of steps done."""
        if self._file is None:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = {"event": name, "step": step, "time": now} | values
        for key, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                line[key] = None  # JSON knows neither NaN nor infinity
        self._file.write(line)

    def say(self, text: str) -> None:
        """A plain line on standard output, above the bar where there is one."""
        if self._file is not None:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def train_line(self, step: int, reading: TrainMetrics, lr: float, data_wait_s: float) -> None:
        """The line of the steps since the last one: log, TensorBoard and progress."""
        if self._file is None:
            return
        elapsed_s = max(time.monotonic() - self._mark_s, 1e-9)
        # images of skipped float16 updates were trained on too
        images = (step - self._logged_step) * self.config.recipe.minibatch
        values = {
            "loss": reading.loss,
            "error": reading.error,
            **({} if reading.kl is None else {"kl": reading.kl}),
            "lr": lr,
            "images_per_s": images / elapsed_s,
            "data_wait": min(data_wait_s / elapsed_s, 1.0),
        }
        for name in ("overflows", "replaced"):
            if count := getattr(reading, name):
                values[name] = count
        epoch = (step - 1) // self.config.steps_per_epoch + 1
        shares = {"labelled_shares": reading.labelled_shares}  # step by step
        shares = shares if self.config.data.unlabelled_images else {}
        self.event("train", step, epoch=epoch, **values, **shares)
        self._curves.add({f"train/{name}": value for name, value in values.items()}, step)
        self._progress(step, epoch, values)
        self._logged_step = step
        self._mark_s = time.monotonic()

    def _progress(self, step: int, epoch: int, values: dict[str, float]) -> None:
        total = self.config.total_steps
        trained_s = time.monotonic() - self._begun_s
        left_s = round(trained_s / (step - self._first_step) * (total - step))
        text = (
            f"epoch {epoch}/{self.config.recipe.epochs}  step {step}/{total}  "
            f"loss {values['loss']:.4f}  train error {values['error']:.2f} %  "
            f"lr {values['lr']:.4g}  {values['images_per_s']:.0f} images/s  "
            f"data {100 * values['data_wait']:.0f} %  left {timedelta(seconds=left_s)}"
        )
        for name in ("overflows", "replaced"):
            if name in values:
                text += f"  {name} {values[name]:.0f}"
        if self._bar is None:
            self.say(text)
        else:
            self._bar.bar_format = "{percentage:3.0f}%|{bar:20}| {desc}"
            self._bar.set_description_str(text, refresh=False)
            self._bar.update(step - self._bar.n)

    def evaluation_line(self, step: int, evaluation: Evaluation) -> None:
        """The validation result after `step` steps; its time counts in no image rate."""
        epoch = step // self.config.steps_per_epoch
        self.event(
            "evaluation",
            step,
            epoch=epoch,
            error=evaluation.error,
            top5_error=evaluation.top5_error,
            loss=evaluation.loss,
            correct=evaluation.correct,
            total=evaluation.total,
        )
        if self._file is not None:
            names = ("error", "top5_error", "loss")
            self._curves.add({f"validation/{n}": getattr(evaluation, n) for n in names}, step)
        self.say(
            f"epoch {epoch}/{self.config.recipe.epochs}  error {evaluation.error:.2f} %  "
            f"top-5 error {evaluation.top5_error:.2f} %  loss {evaluation.loss:.4f}  "
            f"({evaluation.total} of {self.config.data.val_images} images counted)"
        )

    def teacher_line(self, evaluation: Evaluation, identity: str) -> None:
        """The teacher's own validation result, before the student's first step."""
        values = {name: getattr(evaluation, name) for name in ("error", "top5_error", "loss")}
        self.event("teacher", 0, total=evaluation.total, sha256=identity, **values)
        self.say(
            f"teacher  error {evaluation.error:.2f} %  top-5 error {evaluation.top5_error:.2f} %  "
            f"({evaluation.total} validation images)"
        )

    def restart_clock(self) -> None:
        """After evaluation and checkpoints, whose time counts in no image rate."""
        self._mark_s = time.monotonic()

    def flush(self) -> None:
        """Brings the log to the disk: before a checkpoint, so that it is never behind one."""
        if self._file is not None:
            self._file.flush()
            self._curves.flush()

    def close(self) -> None:
        """Ends the bar and closes the files."""
        if self._file is not None:
            if self._bar is not None:
                self._bar.close()
            self._file.close()
            self._curves.close()
            self._file = None
