"""Runs that differ by their seed only, and their error beside the expected one."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness.config.schema import Config, ExpectConfig
from harness.recipe.schedule import error_rule, final_epochs
from harness.report.runs import RecordedRun

SHORT = {"recipe.minibatch": "kn", "recipe.worker_batch": "n", "model.name": ""}


@dataclass(frozen=True)
class Group:
    """Runs of one config, one for each seed. `numbers` are the runs' places in the report."""

    label: str
    runs: tuple[RecordedRun, ...]
    numbers: tuple[int, ...]

    @property
    def config(self) -> Config:
        """Of its first run; the others differ by their seed and machine only."""
        return self.runs[0].config

    @property
    def expect(self) -> ExpectConfig | None:
        return self.config.expect

    @property
    def errors(self) -> list[float]:
        """Of the finished runs, in %, in the order of the runs."""
        return [run.error for run in self.runs if run.error is not None]

    @property
    def mean(self) -> float | None:
        """Mean error in % over the seeds that finished."""
        return statistics.fmean(self.errors) if self.errors else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation (n - 1) over the seeds, where two or more finished."""
        return statistics.stdev(self.errors) if len(self.errors) > 1 else None

    @property
    def difference(self) -> float | None:
        """Mean error less the expected one, in points."""
        if self.mean is None or self.expect is None:
            return None
        return self.mean - self.expect.error

    @property
    def rule(self) -> str:
        """Which epochs a run's error is of, such as `median of epochs 86 to 90`."""
        return error_rule(final_epochs(self.config))


def group_runs(runs: Sequence[RecordedRun]) -> list[Group]:
    """In the order of the runs; a label each, all different."""
    members: dict[tuple[str, str], list[int]] = {}
    for number, run in enumerate(runs):
        key = run.variant, json.dumps(curve_keys(run.config), sort_keys=True)
        members.setdefault(key, []).append(number)
    loose = [runs[numbers[0]] for (variant, _), numbers in members.items() if not variant]
    labels: dict[str, int] = {}
    groups = []
    for (variant, _), numbers in members.items():
        first = runs[numbers[0]]
        label = variant or (
            _label(first.config, loose) if len(numbers) > 1 else _place(first, loose)
        )
        labels[label] = labels.get(label, 0) + 1
        if labels[label] > 1:  # one variant, but its runs have different configs
            label = f"{label} ({labels[label]})"
        groups.append(Group(label, tuple(runs[i] for i in numbers), tuple(numbers)))
    return groups


def flat_config(config: Config) -> dict[str, Any]:
    """section.key -> value, of all keys."""
    flat: dict[str, Any] = {}
    for name, section in config.model_dump(mode="json").items():
        nested = isinstance(section, dict)
        flat |= {f"{name}.{k}": v for k, v in section.items()} if nested else {name: section}
    return flat


def curve_keys(config: Config) -> dict[str, Any]:
    """The keys that fix the curve, the seed left out."""
    flat = flat_config(config)
    return {k: v for k, v in flat.items() if k.partition(".")[0] not in ("seed", "expect", "run")}


def _place(run: RecordedRun, among: Sequence[RecordedRun]) -> str:
    """Its folder's name, with as much of the path as tells it from the others."""
    folder = run.folder.resolve()
    above = os.path.commonpath([other.folder.resolve().parent for other in among])
    if len(among) == 1 and folder.name.isdigit():  # a seed's number says nothing by itself
        above = os.path.dirname(above)
    return folder.relative_to(above).as_posix()


def _label(config: Config, among: Sequence[RecordedRun]) -> str:
    """What tells a config from the others, such as `kn 256, warmup none`."""
    keys, others = curve_keys(config), [curve_keys(other.config) for other in among]
    names = dict.fromkeys(key for other in [keys, *others] for key in other)
    differing = [k for k in names if any(other.get(k) != keys.get(k) for other in others)]
    differing = differing or ["model.name", "recipe.minibatch"]
    parts = [f"{SHORT.get(k, k.split('.')[-1])} {keys.get(k, '–')}".strip() for k in differing]
    return ", ".join(parts)


def sweeps(groups: Sequence[Group]) -> list[list[Group]]:
    """The series of groups that differ by their minibatch only, each by rising minibatch.

    Where kn is at most the reference there is nothing to warm up to, so that its warm-up tells such
    a group from no other; of several series it belongs to the longest.
    """
    series: dict[str, list[Group]] = {}
    unwarmed: list[tuple[str, Group]] = []
    for group in groups:
        config = group.config
        keys = curve_keys(config)
        keys.pop("recipe.minibatch")
        warmup = {k: keys.pop(k, None) for k in ("recipe.warmup", "recipe.warmup_epochs")}
        rest = json.dumps(keys, sort_keys=True)
        if config.recipe.minibatch <= config.recipe.reference_minibatch:
            unwarmed.append((rest, group))
        else:
            series.setdefault(rest + json.dumps(warmup, sort_keys=True), []).append(group)
    for rest, group in unwarmed:
        fitting = [key for key in series if key.startswith(rest)] or [rest]
        series.setdefault(max(fitting, key=lambda key: len(series.get(key, []))), []).append(group)
    found = [sorted(s, key=lambda g: g.config.recipe.minibatch) for s in series.values()]
    return [s for s in found if len({g.config.recipe.minibatch for g in s}) > 1]
