"""Studies: many runs from one file."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, Strict

from harness.config.errors import config_error, format_value
from harness.config.loading import keep_expectation, load_config, read_mapping
from harness.config.schema import Config, ExpectConfig
from harness.config.section import Section, Text
from harness.config.stages import TEACHERS, changes_teacher
from launch.cluster_file import Cluster, Whole, validate, with_cluster
from launch.run_spec import RunSpec, with_teachers

LONGEST_NAME = 200  # bytes of a variant's name, which seeds and file endings lengthen to 255

Seed = Annotated[int, Field(ge=0, lt=2**63)]
Seeds = Annotated[tuple[Seed, ...], Strict(False)]


class Variant(Section):
    """Keys of the base config set to other values, and the error that is then expected."""

    set: dict[str, Any] = Field(default={})
    expect: ExpectConfig | None = None

    def overrides(self) -> list[str]:
        changed = [f"{key}={json.dumps(value)}" for key, value in self.set.items()]
        if self.expect is not None:
            changed.append(f"expect={json.dumps(self.expect.model_dump(mode='json'))}")
        return changed


class Study(Whole):
    """Each variant of the base config, named or of the grid, with each seed.

    `grid` maps keys to lists of values; each combination of them is a variant.
    """

    base: Text
    seeds: Seeds
    variants: dict[str, Any] = Field(default={})
    grid: dict[str, Any] = Field(default={})

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            yield f"seeds: expected one or more different ones, found {[*self.seeds]}"
        if not self.variants and not self.grid:
            yield (
                "variants: there is none; `base: {set: {}}` is the base config itself, and a grid "
                "has variants, too"
            )
        for name, values in self.grid.items():
            texts = [*map(json.dumps, values)] if isinstance(values, list) else []
            if not texts or len(set(texts)) < len(texts):
                yield f"grid.{name}: expected a list of different values, found {values!r}"


def load_study(path: str | Path) -> tuple[Study, dict[str, Variant]]:
    """Read a study and its variants: those that it names, then those of its grid.

    Raises ConfigError.
    """
    study = validate(Study, read_mapping(path), str(path), list(Study.model_fields))
    variants = {}
    for name, mapping in study.variants.items():
        source = f"{path}: variants.{name}"
        if not isinstance(mapping, dict):
            raise config_error(source, [f"expected set and expect, found {format_value(mapping)}"])
        if "/" in name or name.startswith("."):
            raise config_error(source, ["a variant's name becomes a folder's; take another"])
        known = [*Variant.model_fields, *(f"expect.{key}" for key in ExpectConfig.model_fields)]
        variants[name] = validate(Variant, mapping, source, known)
    for name, combination in _combinations(study.grid):
        if name in variants:
            raise config_error(path, [f"grid: there are two variants {name}; name them yourself"])
        if len(name.encode()) > LONGEST_NAME:
            raise config_error(path, [f"grid: {name} is too long for a folder; name it yourself"])
        variants[name] = Variant(set=combination)
    return study, variants


def _combinations(grid: Mapping[str, list[Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each combination of a grid's values and its name, which becomes a folder's.

    The name holds the last part of each key with its value: minibatch-512_warmup-none. Keys with
    one value are left out where others have several.
    """
    varied = {key for key, values in grid.items() if len(values) > 1} or {*grid}
    for values in itertools.product(*grid.values()) if grid else ():
        combination = dict(zip(grid, values, strict=True))
        named = {key: value for key, value in combination.items() if key in varied}
        parts = [f"{key.rpartition('.')[2]}-{_word(value)}" for key, value in named.items()]
        yield "_".join(parts), combination


def _word(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^\w.+-]+", "-", text).strip("-") or "empty"


def study_folder(path: str | Path, root: str | Path = "runs") -> Path:
    """Return the folder of a study: configs/studies/warmup.yaml -> ROOT/studies/warmup."""
    return Path(root) / "studies" / Path(path).stem


def _expecting(run: RunSpec, base: str, variant: Variant, cli_overrides: Sequence[str]) -> Config:
    """Return the run's config, without `expect` where `cli_overrides` change its recipe."""
    theirs = [override for override in cli_overrides if override.startswith(TEACHERS)]
    own = [override for override in cli_overrides if override not in theirs]
    if changes_teacher(theirs) and not any(override.startswith("expect") for override in own):
        return run.config.model_copy(update={"expect": None})
    stated = variant.overrides()
    if run.teacher is not None:
        stated.append(f"distill.teacher={run.teacher.run}")
    return keep_expectation(run.config, own, lambda machine: load_config(base, [*stated, *machine]))


def study_runs(
    path: str | Path,
    folder: Path,
    cli_overrides: Sequence[str] = (),
    cluster: Cluster | None = None,
) -> list[RunSpec]:
    """Return the runs of a study, seed by seed; their folders are FOLDER/VARIANT/SEED.

    The `run:` keys of `cluster` hold for them. Teachers that are configs lie beside other runs,
    below the cluster's folder or runs/, and have the seeds of their configs. Raises UserError.
    """
    study, variants = load_study(path)
    load = load_config if cluster is None else partial(with_cluster, cluster)
    root = Path("runs") if cluster is None else Path(cluster.folder).absolute()
    own = tuple(override for override in cli_overrides if not override.startswith(TEACHERS))
    runs = []
    for seed in study.seeds:
        for name, variant in variants.items():
            overrides = (f"seed={seed}", *variant.overrides(), *cli_overrides)
            run = with_teachers(study.base, overrides, root, load)
            config = _expecting(run, study.base, variant, cli_overrides)
            place = folder / name / f"{seed}"
            runs.append(
                replace(run, name=f"{name}-{seed}", run=place, config=config, cli_overrides=own)
            )
    return runs
