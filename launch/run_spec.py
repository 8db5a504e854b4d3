"""The specification of a run: a config, a folder, and the teacher that comes before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.atomic_file import write_atomically
from harness.config.loading import curve_differences, dump_config, load_config
from harness.config.schema import Config
from harness.config.stages import load_stages
from harness.errors import UserError
from launch.records import is_finished, records_folder


@dataclass(frozen=True)
class FrozenRun:
    """A run as it was started: its config in a file that no later edit reaches, and its log."""

    config: Path
    log: Path
    arguments: tuple[str, ...]  # of `harness train`


@dataclass(frozen=True)
class RunSpec:
    """A run to be started.

    `name` is unique within its records. `cli_overrides` are those of the command line. `teacher` is
    the run that has to be finished first, where the teacher is a config.
    """

    name: str
    run: Path
    config: Config
    cli_overrides: tuple[str, ...] = ()
    teacher: RunSpec | None = None

    def has_checkpoint(self) -> bool:
        """Return whether the run would resume from a checkpoint, without its start weights."""
        return any((self.run / "checkpoints").glob("checkpoint-*.pt"))

    def is_finished(self) -> bool:
        """Return whether the run has finished. Raises UserError for a folder of another config."""
        if not (self.run / "config.yaml").exists():
            return False
        if differences := curve_differences(load_config(self.run / "config.yaml"), self.config):
            raise UserError(
                f"{self.run}: was run with another config ({'; '.join(differences)}); "
                "give the same values or choose another --out"
            )
        return is_finished(self.run)

    def freeze(self, target: Path, backend: str, config: Config | None = None) -> FrozenRun:
        """Write the run's config, or `config`, beside its log to a launcher's records of `target`.

        Raises UserError where the folder cannot be written.
        """
        folder = records_folder(target, backend).absolute()
        frozen = folder / f"{self.name}.yaml"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(frozen, dump_config(config or self.config).encode())
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be written: {error.strerror}; take another folder"
            ) from None
        to = "--out", str(self.run.absolute()), "--resume"
        return FrozenRun(
            frozen, folder / f"{self.name}.log", (str(frozen), *self.cli_overrides, *to)
        )


def with_teachers(
    path: str | Path,
    overrides: Sequence[str],
    root: Path,
    load: Callable[[str, Sequence[str]], Config],
) -> RunSpec:
    """Return the run of the config at `path`, linked through `teacher` to those of its teachers.

    Run folders have the same places below `root` as below runs/. A student's `distill.teacher` is
    the folder of its teacher's run. `load` loads a config from its path and overrides. Raises
    UserError.
    """
    last: RunSpec | None = None
    for stage in load_stages(path, overrides):
        run, overrides = root / stage.folder.relative_to("runs"), stage.overrides
        if last is not None:
            overrides = (*overrides, f"distill.teacher={last.run}")
        config = load(stage.path, overrides)
        # the teacher is still the same, now named by its folder, so the expectation holds
        config = config.model_copy(update={"expect": stage.config.expect})
        last = RunSpec(run.name, run, config, tuple(overrides), last)
    assert last is not None  # a config is a stage
    return last


def teachers_of(runs: Iterable[RunSpec]) -> list[RunSpec]:
    """Return the runs that must finish before one of these, each once, teachers first.

    Raises UserError where two of them would train different configs in one folder.
    """
    found: dict[Path, RunSpec] = {}

    def add(teacher: RunSpec) -> None:
        if teacher.teacher is not None:
            add(teacher.teacher)
        other = found.setdefault(teacher.run, teacher)
        if differences := curve_differences(other.config, teacher.config):
            raise UserError(
                f"{teacher.run}: two teachers would be trained in it ({'; '.join(differences)}); "
                "give each a config of its own"
            )

    for run in runs:
        if run.teacher is not None:
            add(run.teacher)
    return list(found.values())
