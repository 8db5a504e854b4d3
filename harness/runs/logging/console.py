"""Standard output: progress lines, or a bar on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta

from tqdm import tqdm

from harness.config.schema import Config


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

    def event(self, event: Mapping[str, object]) -> None:
        if event["event"] == "train":
            self._progress(**event)  # type: ignore[arg-type]
        elif render := RENDER.get(str(event["event"])):
            self.say(render(event, self._config))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Show nothing: events hold the same numbers."""

    def flush(self) -> None:
        """Do nothing, as lines are printed immediately."""

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _progress(
        self,
        *,
        step: int,
        epoch: int,
        loss: float,
        error: float,
        lr: float,
        images_per_s: float,
        data_wait: float,
        overflows: int = 0,
        replaced: int = 0,
        **other: object,
    ) -> None:
        total = self._config.total_steps
        trained_s = time.monotonic() - self._begun_s
        left_s = round(trained_s / (step - self._first_step) * (total - step))
        text = (
            f"epoch {epoch}/{self._config.recipe.epochs}  step {step}/{total}  "
            f"loss {loss:.4f}  train error {error:.2f} %  lr {lr:.4g}  "
            f"{images_per_s:.0f} images/s  data {100 * data_wait:.0f} %  "
            f"left {timedelta(seconds=left_s)}"
        )
        text += f"  overflows {overflows}" if overflows else ""
        text += f"  replaced {replaced}" if replaced else ""
        if self._bar is None:
            self.say(text)
        else:
            self._bar.set_description_str(text, refresh=False)
            self._bar.update(step - self._bar.n)


def _evaluation(event: Mapping[str, object], config: Config) -> str:
    return (
        f"epoch {event['epoch']}/{config.recipe.epochs}  error {event['error']:.2f} %  "
        f"top-5 error {event['top5_error']:.2f} %  loss {event['loss']:.4f}  "
        f"({event['total']} of {config.data.val_images} images counted)"
    )


def _teacher(event: Mapping[str, object], config: Config) -> str:
    return (
        f"teacher  error {event['error']:.2f} %  top-5 error {event['top5_error']:.2f} %  "
        f"({event['total']} validation images)"
    )


RENDER: dict[str, Callable[[Mapping[str, object], Config], str]] = {
    "evaluation": _evaluation,
    "teacher": _teacher,
}
