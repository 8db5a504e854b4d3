"""The headline of a run: the median error of its final epochs, with the last and the best."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.config.loading import load_config
from harness.config.schema import Config
from harness.recipe.schedule import FINAL_EPOCHS, error_rule, final_epochs
from harness.runs.logging.jsonl import Record, read_log


@dataclass(frozen=True)
class Headline:
    """Validation errors in %: the median over `epochs`, the last epoch's, the best epoch's.

    `last` and `best` are None where an old run folder no longer holds them.
    """

    error: float
    epochs: tuple[int, ...]
    last: float | None
    best: float | None

    @property
    def rule(self) -> str:
        """Return the rule in words, such as `median of epochs 28 to 30`, or `epoch 12`."""
        return error_rule(self.epochs)

    def as_mapping(self) -> dict[str, object]:
        """Return the values for status.json and the log's last line."""
        return {
            "error": self.error,
            "final_epochs": [*self.epochs],
            "last_error": self.last,
            "best_error": self.best,
        }

    def __str__(self) -> str:
        known = self.last is not None and self.best is not None
        beside = f"; last {self.last:.2f} %, best {self.best:.2f} %" if known else ""
        return f"{self.error:.2f} % ({self.rule}{beside})"


def headline(config: Config, errors: Mapping[int, float]) -> Headline:
    """Compute the headline of a run; `errors`: epoch, counted from 1 -> validation error in %.

    Raises KeyError where a final epoch was not evaluated.
    """
    epochs = final_epochs(config)
    error = statistics.median(errors[epoch] for epoch in epochs)
    return Headline(error, tuple(epochs), errors[epochs[-1]], min(errors.values()))


def recorded_headline(config: Config, status: Record, errors: Mapping[int, float]) -> Headline:
    """Return the headline of a finished run from its status and its log's evaluations.

    An old version recorded the median of the final 5 epochs whatever the learning rate, and no
    `final_epochs`: such a run's headline is computed from `errors`. Where the log lacks an
    evaluation, it is the recorded figure, with the epochs that figure was made of.
    """
    epochs = [*final_epochs(config)]
    if status.get("final_epochs") != epochs and errors.keys() >= set(epochs):
        return headline(config, errors)
    last = config.recipe.epochs
    recorded = status.get("final_epochs") or range(max(last - FINAL_EPOCHS, 0) + 1, last + 1)
    beside = status.get("last_error"), status.get("best_error")
    return Headline(status["error"], tuple(recorded), *beside)


def read_headline(run: Path, status: Record) -> Headline:
    """Read the headline of the finished run in the folder `run`. Raises UserError."""
    config = load_config(run / "config.yaml")
    errors = {} if "final_epochs" in status else logged_errors(run / "log.jsonl")
    return recorded_headline(config, status, errors)


def logged_errors(log: Path) -> dict[int, float]:
    """Return {epoch: validation error in %} from the evaluations of a log.jsonl that count."""
    lines = read_log(log)
    return {line["epoch"]: line["error"] for line in lines if line["event"] == "evaluation"}
