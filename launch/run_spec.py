"""A run that is wanted: of a config, in a folder, after its teacher's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.config.loading import curve_differences, load_config
from harness.config.schema import Config
from harness.config.stages import load_stages
from harness.errors import UserError
from launch.records import is_finished


@dataclass(frozen=True)
class RunSpec:
    """`name`: within its records; `typed`: the command line's overrides; `teacher`: the run that
    has to be finished first, where the teacher is a config."""

    name: str
    run: Path
    config: Config
    typed: tuple[str, ...] = ()
    teacher: RunSpec | None = None

    def has_checkpoint(self) -> bool:
        """Return whether the run would resume from a checkpoint, without its start weights."""
        return any((self.run / "checkpoints").glob("checkpoint-*.pt"))

    def is_finished(self) -> bool:
        """Raises UserError where the run folder holds another config's run."""
        if not (self.run / "config.yaml").exists():
            return False
        if differences := curve_differences(load_config(self.run / "config.yaml"), self.config):
            raise UserError(
                f"{self.run}: was run with another config ({'; '.join(differences)}); "
                "give the same values or choose another --out"
            )
        return is_finished(self.run)


def with_teachers(
    path: str | Path,
    overrides: Sequence[str],
    root: Path,
    load: Callable[[str, Sequence[str]], Config],
) -> RunSpec:
    """The run of the config at `path`, and through `teacher` those of its teachers.

    Run folders stand below `root` as they do below runs/; a student's teacher is the folder in
    which the teacher's run is. `load`: a config's path and its overrides -> the config. Raises
    UserError.
    """
    last: RunSpec | None = None
    for stage in load_stages(path, overrides):
        run, typed = root / stage.folder.relative_to("runs"), stage.overrides
        if last is not None:
            typed = (*typed, f"distill.teacher={last.run}")
        config = load(stage.path, typed)
        # the teacher is the stage's own, now by its folder: what is expected stays
        config = config.model_copy(update={"expect": stage.config.expect})
        last = RunSpec(run.name, run, config, typed, last)
    assert last is not None  # a config is a stage
    return last


def teachers_of(runs: Iterable[RunSpec]) -> list[RunSpec]:
    """Each run that must be finished before one of these, once, a teacher before its student.

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
