"""Rank 0's logger: builds events and scalars, and passes them to all sinks."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path

from harness.config.schema import Config
from harness.execution.evaluation import Evaluation
from harness.recipe.noise_scale import SquaredNorms, signal_and_noise
from harness.runs.logging.console import ConsoleSink
from harness.runs.logging.jsonl import JsonlSink
from harness.runs.logging.sink import OpenSink, Sink
from harness.runs.logging.tensorboard import TensorBoardSink
from harness.training.metrics import TrainMetrics


class RunLogger:
    """Rank 0's record of the run; on the other ranks (`folder` None) every call does nothing.

    `loggers`: further loggers by name. One that raises is left out from then on, with a
    warning and an event in log.jsonl; the run continues.
    """

    def __init__(
        self,
        folder: Path | None,
        config: Config,
        first_step: int,
        loggers: Mapping[str, OpenSink] | None = None,
    ) -> None:
        self._config = config
        self._logged_step, self._mark_s = first_step, time.monotonic()
        self._sinks: list[Sink] = []
        self._console: ConsoleSink | None = None
        self._installed: dict[str, Sink] = {}
        if folder is None:
            return
        self._console = ConsoleSink(config, first_step)
        curves = TensorBoardSink(folder / "tensorboard", first_step)
        self._sinks = [JsonlSink(folder / "log.jsonl"), curves, self._console]
        for name, open_sink in (loggers or {}).items():
            try:
                self._installed[name] = open_sink(folder, config, first_step)
            except Exception as error:  # another's code may raise anything
                self._leave_out(name, error, first_step)

    def event(self, name: str, step: int, **values: object) -> None:
        """Log one event. `step` is the number of steps done."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        event = {"event": name, "step": step, "time": now, **values}
        self._send(lambda sink: sink.event(event), step)

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        self._send(lambda sink: sink.scalars(values, step), step)

    def _send(self, call: Callable[[Sink], object], step: int) -> None:
        for sink in self._sinks:  # log.jsonl comes first
            call(sink)
        self._send_installed(call, step)

    def _send_installed(self, call: Callable[[Sink], object], step: int) -> None:
        for name, sink in list(self._installed.items()):
            try:
                call(sink)
            except Exception as error:  # another's code may raise anything
                self._leave_out(name, error, step)

    def _leave_out(self, name: str, error: Exception, step: int) -> None:
        self._installed.pop(name, None)
        place = traceback.extract_tb(error.__traceback__)[-1]
        why = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
        why += f" ({Path(place.filename).name}:{place.lineno})"
        self.say(f"warning: logger {name} failed and is left out: {why}; the run continues")
        self.event("logger_failed", step, logger=name, why=why)

    def say(self, text: str) -> None:
        """Print a plain line on standard output, above the bar where there is one."""
        if self._console is not None:
            self._console.say(text)

    def train_line(self, step: int, metrics: TrainMetrics, lr: float, data_wait_s: float) -> None:
        """Log the steps since the last line."""
        elapsed_s = max(time.monotonic() - self._mark_s, 1e-9)
        # images of skipped float16 updates were trained on too
        images = (step - self._logged_step) * self._config.recipe.minibatch
        values: dict[str, float] = {
            "loss": metrics.loss,
            "error": metrics.error,
            **({} if metrics.kl is None else {"kl": metrics.kl}),
            "lr": lr,
            "images_per_s": images / elapsed_s,
            "data_wait": min(data_wait_s / elapsed_s, 1.0),
        }
        counts = {"overflows": metrics.overflows, "replaced": metrics.replaced}
        values |= {name: count for name, count in counts.items() if count}
        epoch = (step - 1) // self._config.steps_per_epoch + 1
        shares: dict[str, object] = {}
        if self._config.data.unlabelled_images:
            shares = {"labelled_shares": metrics.labelled_shares}  # one per step
        self.event("train", step, epoch=epoch, **values, **shares)
        self._scalars({f"train/{name}": value for name, value in values.items()}, step)
        self._logged_step = step
        self._mark_s = time.monotonic()

    def noise_line(self, step: int, norms: SquaredNorms) -> None:
        """Log what a step says of the gradient noise scale, a noisy estimate each."""
        recipe = self._config.recipe
        signal, noise = signal_and_noise(norms, recipe.worker_batch, recipe.minibatch)
        self.event("noise_scale", step, worker=norms.worker, minibatch=norms.minibatch)
        self._scalars({"noise_scale/signal": signal, "noise_scale/noise": noise}, step)

    def evaluation_line(self, step: int, evaluation: Evaluation) -> None:
        """Log the validation result after `step` steps."""
        errors = _errors(evaluation)
        counts = {"correct": evaluation.correct, "total": evaluation.total}
        if recalibrated := self._config.run.recalibrate_images:
            counts["recalibrate_images"] = recalibrated
        epoch = step // self._config.steps_per_epoch
        self.event("evaluation", step, epoch=epoch, **errors, **counts)
        self._scalars({f"validation/{name}": value for name, value in errors.items()}, step)

    def teacher_line(self, evaluation: Evaluation, identity: str) -> None:
        """Log the teacher's own validation result, before the student's first step."""
        values = _errors(evaluation)
        self.event("teacher", 0, total=evaluation.total, sha256=identity, **values)

    def restart_clock(self) -> None:
        """Leave evaluations and checkpoints, which have just ended, out of the image rate."""
        self._mark_s = time.monotonic()

    def flush(self) -> None:
        """Flush to disk. Called before each checkpoint, so the log never lags behind it."""
        self._send(lambda sink: sink.flush(), self._logged_step)

    def close(self) -> None:
        """Close all loggers."""
        # log.jsonl is still open for their failures
        self._send_installed(lambda sink: sink.close(), self._logged_step)
        for sink in self._sinks:
            sink.close()
        self._sinks, self._installed, self._console = [], {}, None


def _errors(evaluation: Evaluation) -> dict[str, float]:
    return {
        "error": evaluation.error,
        "top5_error": evaluation.top5_error,
        "loss": evaluation.loss,
    }
