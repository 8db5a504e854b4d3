"""What a run tells: the progress line, log.jsonl, TensorBoard."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import threading
import time
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from harness.config.schema import Config

if TYPE_CHECKING:  # a log can be read without PyTorch
    from torch.utils.tensorboard import SummaryWriter

    from harness.evaluate import Evaluation
    from harness.metrics import Reading


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log that stand: a torn one is ignored, superseded ones are left out."""
    return standing_lines(read_lines(path))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All lines of a log, in the order of writing; one that a crash cut off is ignored."""
    if not path.exists():
        return []
    texts = path.read_text(errors="replace").splitlines()
    try:
        return json.loads(f"[{','.join(texts)}]")  # at once: twice as fast as line by line
    except json.JSONDecodeError:
        return [line for text in texts if (line := _parse_line(text))]


def _parse_line(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except json.JSONDecodeError:
        return None
    return line if isinstance(line, dict) else None


def standing_lines(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the superseded ones.

    A run resumed at step s goes on from there, so what was logged after s before is superseded.
    """
    standing: list[dict[str, Any]] = []
    for line in lines:
        if line["event"] == "resume":
            standing = [kept for kept in standing if kept["step"] <= line["step"]]
        standing.append(line)
    return standing


class LogFile:
    """log.jsonl, a line a write. A disk that is full or gone is told once, and the run goes on."""

    def __init__(self, path: Path) -> None:
        self._path, self._warned = path, False
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        # a torn last line is ended, so that the next one stands by itself
        self._torn = path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"

    def write(self, line: dict[str, Any]) -> None:
        """Appends a line of JSON."""
        content = (json.dumps(line, allow_nan=False) + "\n").encode()
        if self._torn:
            content = b"\n" + content
        try:
            if os.write(self._file, content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._torn = self._warned = False
        except OSError as error:
            self._torn = True
            if not self._warned:
                print(f"warning: {self._path}: not written: {error.strerror}; going on")
            self._warned = True

    def flush(self) -> None:
        """To the disk."""
        with suppress(OSError):  # a full disk was told when the line was written
            os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


class Curves:
    """TensorBoard's scalars; given up, with a warning, once they cannot be written."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self._folder = folder
        self._writer: SummaryWriter | None = None
        try:
            self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)
        except UnicodeEncodeError:  # TensorBoard takes no path that is not UTF-8
            print(f"warning: {str(folder)!a}: not written: the name is not UTF-8; going on")
        _hush_tensorboard()

    def add(self, values: dict[str, float], step: int) -> None:
        """Values by their name, such as train/loss."""
        for name, value in values.items():
            self._call("add_scalar", name, value, step)

    def flush(self) -> None:
        self._call("flush")

    def close(self) -> None:
        self._call("close")

    def _call(self, method: str, *arguments: object) -> None:
        try:
            if self._writer is not None:
                getattr(self._writer, method)(*arguments)
        except OSError as error:
            self._writer = None
            print(f"warning: {self._folder}: not written any more: {error.strerror}; going on")


def _hush_tensorboard() -> None:
    """Its writing thread reports an error to its caller, and then to the terminal, with a stack."""
    usual = threading.excepthook

    def hook(thread: threading.ExceptHookArgs) -> None:
        if "_AsyncWriterThread" not in type(thread.thread).__name__:
            usual(thread)

    threading.excepthook = hook


class Journal:
    """Rank 0's record of the run; on the other ranks (`folder` None) every call does nothing."""

    def __init__(self, folder: Path | None, config: Config, first_step: int) -> None:
        self.config = config
        self._file: LogFile | None = None
        self._bar: tqdm | None = None
        self._first_step, self._logged_step = first_step, first_step
        self._begun_s = self._mark_s = time.monotonic()
        if folder is None:
            return
        self._file = LogFile(folder / "log.jsonl")
        self._curves = Curves(folder / "tensorboard", first_step)
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

    def train_line(self, step: int, reading: Reading, lr: float, data_wait_s: float) -> None:
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
