"""The stages of a run: a student whose teacher is a config comes after it, as one thing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.config.loading import default_run_folder, load_config
from harness.config.schema import Config
from harness.errors import UserError

TEACHERS = "teacher."  # begins the overrides that are a teacher's


@dataclass(frozen=True)
class Stage:
    """A config, the overrides typed for it, their dotted keys, and its default run folder."""

    path: str
    config: Config
    overrides: tuple[str, ...]

    @property
    def typed(self) -> set[str]:
        return set(map(_key, self.overrides))

    @property
    def folder(self) -> Path:
        return default_run_folder(self.path)


def load_stages(
    path: str | Path, overrides: Sequence[str] = (), students: Sequence[Path] = ()
) -> list[Stage]:
    """The config at `path`, after its teacher, after its teacher's teacher.

    Overrides of `run.*` reach every stage, `teacher.section.key=value` the teacher (and
    `teacher.teacher.…` its teacher), where it prevails, all others the last stage. `students` are
    the configs that come after. Raises UserError, also where a teacher is its own student.
    """
    if Path(path).resolve() in students:
        raise UserError(f"distill.teacher: {path} is its own student; name another teacher")
    own = [override for override in overrides if not override.startswith(TEACHERS)]
    theirs = [o.removeprefix(TEACHERS) for o in overrides if o.startswith(TEACHERS)]
    config = load_config(path, own)
    if changes_teacher(theirs) and not any(o.startswith("expect") for o in own):
        # a student's expected error is for the teacher that its file names
        config = config.model_copy(update={"expect": None})
    stage = Stage(str(path), config, tuple(own))
    teacher = config.distill.teacher_config if config.distill else None
    if teacher is None:
        if theirs:
            raise UserError(f"{TEACHERS}{theirs[0]}: {path} has no teacher that is a config")
        return [stage]
    typed = set(map(_key, theirs))
    machine = [o for o in own if o.startswith("run.") and _key(o) not in typed]
    return [*load_stages(teacher, machine + theirs, [*students, Path(path).resolve()]), stage]


def changes_teacher(overrides: Sequence[str]) -> bool:
    """Whether any of `overrides`, with or without `teacher.`, is one of a teacher's recipe."""
    keys = [_key(override).split(".") for override in overrides]
    sections = {next((part for part in parts if part != "teacher"), "") for parts in keys}
    return not sections <= {"run", "seed", "expect"}


def _key(override: str) -> str:
    return override.partition("=")[0]
