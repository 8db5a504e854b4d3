"""The stages of a run: where a student's teacher is a config, that is trained first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.config.loading import default_run_folder, load_config
from harness.config.schema import Config
from harness.errors import UserError

TEACHERS = "teacher."  # prefix of overrides for the teacher


@dataclass(frozen=True)
class Stage:
    """A config with the command line overrides that apply to it."""

    path: str
    config: Config
    overrides: tuple[str, ...]

    @property
    def cli_overrides(self) -> set[str]:
        """Dotted names of the overridden keys."""
        return set(map(_key, self.overrides))

    @property
    def folder(self) -> Path:
        """Default run folder."""
        return default_run_folder(self.path)


def load_stages(
    path: str | Path, overrides: Sequence[str] = (), students: Sequence[Path] = ()
) -> list[Stage]:
    """Load the config at `path`, preceded by its teacher, preceded by the teacher's teacher.

    Overrides of `run.*` apply to every stage. `teacher.section.key=value` applies to the teacher
    (and `teacher.teacher.…` to its teacher), where it takes precedence; all others apply to the
    last stage. `students` are the configs of later stages. Raises UserError, also for a teacher
    that is its own student.
    """
    if Path(path).resolve() in students:
        raise UserError(f"distill.teacher: {path} is its own student; name another teacher")
    own = [override for override in overrides if not override.startswith(TEACHERS)]
    theirs = [o.removeprefix(TEACHERS) for o in overrides if o.startswith(TEACHERS)]
    config = load_config(path, own)
    if changes_teacher(theirs) and not any(o.startswith("expect") for o in own):
        # The student's expected error holds for the teacher that its file names.
        config = config.model_copy(update={"expect": None})
    stage = Stage(str(path), config, tuple(own))
    teacher = config.distill.teacher_config if config.distill else None
    if teacher is None:
        if theirs:
            raise UserError(f"{TEACHERS}{theirs[0]}: {path} has no teacher that is a config")
        return [stage]
    overridden = set(map(_key, theirs))
    shared = [o for o in own if o.startswith("run.") and _key(o) not in overridden]
    return [*load_stages(teacher, shared + theirs, [*students, Path(path).resolve()]), stage]


def changes_teacher(overrides: Sequence[str]) -> bool:
    """Return whether any of a teacher's `overrides` changes its recipe.

    They may have the prefix `teacher.`.
    """
    keys = [_key(override).split(".") for override in overrides]
    sections = {next((part for part in parts if part != "teacher"), "") for parts in keys}
    return not sections <= {"run", "seed", "expect"}


def _key(override: str) -> str:
    return override.partition("=")[0]
