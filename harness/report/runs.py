"""Run folders as a report reads them, also while a run is in progress."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from harness.config.loading import load_config
from harness.config.schema import Config
from harness.errors import UserError
from harness.outcome import Outcome, State, recorded_state
from harness.recipe.schedule import final_epochs
from harness.runs.headline import Headline, recorded_headline
from harness.runs.logging.jsonl import read_lines, standing_lines

# a line of log.jsonl, or environment.json, or status.json, whose keys depend on event and version
JsonObject = dict[str, Any]


@dataclass(frozen=True)
class Epoch:
    """Means over the steps of an epoch. `position` counts the epochs completed at its end."""

    position: float
    train_error: float | None  # in %
    images_per_s: float
    data_wait: float  # share of the time, 0 to 1


@dataclass(frozen=True)
class Evaluated:
    """A validation result, with errors in %."""

    epoch: int
    error: float
    top5_error: float
    loss: float | None


@dataclass(frozen=True)
class Launch:
    """A start or a resume: its line in the log, and how far it got."""

    line: JsonObject
    begun: datetime
    ended: datetime
    last_step: int

    @property
    def first_step(self) -> int:
        """The number of steps done before it."""
        return self.line["step"]


@dataclass(frozen=True)
class RecordedRun:
    """The contents of a run folder. `variant` is "" for a run that is not part of a study."""

    folder: Path
    variant: str
    config: Config
    environment: JsonObject
    status: JsonObject
    launches: list[Launch] = field(repr=False)
    events: list[JsonObject] = field(repr=False)  # not superseded; without train and evaluation
    epochs: list[Epoch] = field(repr=False)
    evaluations: list[Evaluated] = field(repr=False)
    lr: list[tuple[int, float]] = field(repr=False)  # logged (step, lr of its update)
    overflows: int

    @property
    def state(self) -> State | None:
        """The state in its status.json; None before it was started."""
        return recorded_state(self.status)

    @property
    def outcome(self) -> Outcome | None:
        """How the run ended; None where it has not."""
        return Outcome.from_status(self.status)

    @property
    def error(self) -> float | None:
        """A finished run's error in %, the median over its final epochs.

        Also None if an older version counted other epochs and the log lacks an evaluation.
        """
        found = self.headline
        final = tuple(final_epochs(self.config))
        return found.error if found is not None and found.epochs == final else None

    @property
    def headline(self) -> Headline | None:
        """A finished run's headline: the recorded one or, for older versions, one from the log."""
        if self.state is not State.FINISHED:
            return None
        errors = {one.epoch: one.error for one in self.evaluations}
        return recorded_headline(self.config, self.status, errors)

    @property
    def world_sizes(self) -> list[int]:
        """W of each launch, without consecutive repetitions."""
        sizes = [launch.line["world_size"] for launch in self.launches]
        return [size for i, size in enumerate(sizes) if i == 0 or size != sizes[i - 1]]

    @property
    def hardware(self) -> str:
        """The name of the last launch's GPU or, without one, of its CPU."""
        found = self.environment.get("hardware", {})
        if found.get("gpu"):
            return str(found["gpu"])
        return f"{found.get('cpus', '?')} CPU cores, {found.get('cpu', '')}" if found else "unknown"

    @property
    def wall_s(self) -> float:
        """Seconds within launches, each from its first log line to its last."""
        return sum((launch.ended - launch.begun).total_seconds() for launch in self.launches)

    @property
    def images_per_s(self) -> float | None:
        """Training images per second of all ranks together, over the whole run."""
        seconds = [1 / epoch.images_per_s for epoch in self.epochs if epoch.images_per_s]
        return len(seconds) / sum(seconds) if seconds else None

    @property
    def teacher_error(self) -> float | None:
        """The teacher's validation error in %; None without a teacher."""
        errors = [line["error"] for line in self.events if line["event"] == "teacher"]
        return errors[-1] if errors else None


def _launches(lines: Sequence[JsonObject]) -> Iterator[Launch]:
    starts = [i for i, line in enumerate(lines) if line["event"] in ("start", "resume")]
    for start, end in zip(starts, [*starts, len(lines)][1:], strict=True):
        begun, ended = (datetime.fromisoformat(lines[i]["time"]) for i in (start, end - 1))
        yield Launch(lines[start], begun, ended, lines[end - 1]["step"])


def _epochs(train: Sequence[JsonObject], steps_per_epoch: int) -> Iterator[Epoch]:
    """Average train lines over epochs. Each line covers the steps since the one before."""
    done = 0
    steps, errors, labelled, seconds, waited = 0, 0.0, 0, 0.0, 0.0
    for line in train:
        here = line["step"] - done
        steps, done = steps + here, line["step"]
        if line["error"] is not None:
            errors, labelled = errors + here * line["error"], labelled + here
        if line["images_per_s"]:
            seconds += here / line["images_per_s"]  # as if a step had one image
            waited += line["data_wait"] * here / line["images_per_s"]
        if done % steps_per_epoch == 0:
            error = errors / labelled if labelled else None
            speed, wait = (steps / seconds, waited / seconds) if seconds else (0.0, 0.0)
            yield Epoch(done / steps_per_epoch, error, speed, wait)
            steps, errors, labelled, seconds, waited = 0, 0.0, 0, 0.0, 0.0


def find_run_folders(path: Path) -> list[tuple[Path, str]]:
    """Find the run folders of RUN or STUDY, each with its variant.

    The variant is that of STUDY/VARIANT/SEED, or "" if the folder's name is not a seed.
    Raises UserError if there is none.
    """
    if not path.exists():
        raise UserError(f"{path}: no such run folder or study")
    if _is_run_folder(path):
        return [(path, "")]
    found = []
    for folder, names, _ in os.walk(path):
        if _is_run_folder(Path(folder)):
            names.clear()
            variant = Path(folder).relative_to(path).parent.as_posix()
            seed = Path(folder).name.isdigit() and variant != "."
            found.append((Path(folder), variant if seed else ""))
        names.sort(key=_natural)
    if not found:
        raise UserError(f"{path}: no run folder, and none below it (a run has a config.yaml)")
    return found


def _natural(name: str) -> tuple[int, int, str]:
    return (0, int(name), "") if name.isascii() and name.isdigit() else (1, 0, name)


def _is_run_folder(path: Path) -> bool:
    return (path / "config.yaml").is_file() and (
        (path / "log.jsonl").exists() or (path / "status.json").exists()
    )


def read_run(folder: Path, variant: str = "") -> RecordedRun:
    """Read a run folder; raise UserError if that is impossible."""
    config = load_config(folder / "config.yaml")
    environment, status = (
        _read_json(folder / f"{name}.json") for name in ("environment", "status")
    )
    try:
        lines = read_lines(folder / "log.jsonl")
    except OSError as error:
        raise UserError(f"{folder}/log.jsonl: {error.strerror}") from None
    standing = standing_lines(lines)
    train = [line for line in standing if line["event"] == "train"]
    return RecordedRun(
        folder,
        variant,
        config,
        environment,
        status,
        list(_launches(lines)),
        [line for line in standing if line["event"] not in ("train", "evaluation")],
        list(_epochs(train, config.steps_per_epoch)),
        [
            Evaluated(line["epoch"], line["error"], line["top5_error"], line["loss"])
            for line in standing
            if line["event"] == "evaluation"
        ],
        [(line["step"], line["lr"]) for line in train],
        sum(line.get("overflows", 0) for line in train),
    )


def _read_json(path: Path) -> JsonObject:
    try:
        found = json.loads(path.read_text(errors="replace"))
    except FileNotFoundError:
        return {}
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    return found if isinstance(found, dict) else {}
