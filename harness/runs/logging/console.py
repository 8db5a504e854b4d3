"""Standard output: progress lines, or a bar on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import timedelta

from tqdm import tqdm

from harness.config.schema import Config
from harness.runs.logging.jsonl import Record


class ConsoleSink:
    """Shows training, evaluations and the teacher; other events are not for the console."""

    def __init__(self, config: Config, first_step: int) -> None:
        self._config, self._first_step = config, first_step
        self._begun_s = time.monotonic()
        self._bar: tqdm | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=config.total_steps,
                initial=first_step,
                unit="step",
                leave=False,
                bar_format="{percentage:3.0f}%|{bar:20}| {desc}",
            )

    def say(self, text: str) -> None:
        """Print a plain line, above the bar where there is one."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def event(self, event: Record) -> None:
        if event["event"] == "train":
            self._show_progress(event)
        elif event["event"] == "evaluation":
            self.say(
                f"epoch {event['epoch']}/{self._config.recipe.epochs}  {_errors(event)}  "
                f"loss {event['loss']:.4f}  "
                f"({event['total']} of {self._config.data.val_images} images counted)"
            )
        elif event["event"] == "teacher":
            self.say(f"teacher  {_errors(event)}  ({event['total']} validation images)")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Show nothing: events hold the same numbers."""

    def flush(self) -> None:
        """Do nothing, as lines are printed immediately."""

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _show_progress(self, event: Record) -> None:
        step, total = event["step"], self._config.total_steps
        trained_s = time.monotonic() - self._begun_s
        left_s = round(trained_s / (step - self._first_step) * (total - step))
        text = (
            f"epoch {event['epoch']}/{self._config.recipe.epochs}  step {step}/{total}  "
            f"loss {event['loss']:.4f}  train error {event['error']:.2f} %  "
            f"lr {event['lr']:.4g}  {event['images_per_s']:.0f} images/s  "
            f"data {100 * event['data_wait']:.0f} %  left {timedelta(seconds=left_s)}"
        )
        for name in ("overflows", "replaced"):
            if name in event:
                text += f"  {name} {event[name]}"
        if self._bar is None:
            self.say(text)
        else:
            self._bar.set_description_str(text, refresh=False)
            self._bar.update(step - self._bar.n)


def _errors(event: Record) -> str:
    return f"error {event['error']:.2f} %  top-5 error {event['top5_error']:.2f} %"
