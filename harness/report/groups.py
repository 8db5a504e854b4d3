"""Groups of runs that differ only by seed, and their error beside the expected one."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from harness.config.schema import Config, ExpectConfig
from harness.recipe.schedule import error_rule, final_epochs
from harness.report.runs import RecordedRun

SHORT = {"recipe.minibatch": "kn", "recipe.worker_batch": "n", "model.name": ""}


@dataclass(frozen=True)
class Group:
    """Runs of one config, one per seed. `numbers` are the runs' positions in the report."""

    label: str
    runs: tuple[RecordedRun, ...]
    numbers: tuple[int, ...]

    @property
    def config(self) -> Config:
        """The config of the first run; the others differ only by seed and machine."""
        return self.runs[0].config

    @property
    def expect(self) -> ExpectConfig | None:
        return self.config.expect

    @property
    def errors(self) -> list[float]:
        """Errors of the finished runs in %, in the order of the runs."""
        return [run.error for run in self.runs if run.error is not None]

    @property
    def mean(self) -> float | None:
        """Mean error in % over the finished seeds."""
        return statistics.fmean(self.errors) if self.errors else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation (n - 1) over the finished seeds; None for fewer than two."""
        return statistics.stdev(self.errors) if len(self.errors) > 1 else None

    @property
    def difference(self) -> float | None:
        """Mean error minus the expected error, in percentage points."""
        if self.mean is None or self.expect is None:
            return None
        return self.mean - self.expect.error

    @property
    def rule(self) -> str:
        """The rule for a run's error, such as `median of epochs 86 to 90`."""
        return error_rule(final_epochs(self.config))


def group_runs(runs: Sequence[RecordedRun]) -> list[Group]:
    """Group runs by variant and config, in the order of the runs, each with a unique label."""
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
        if labels[label] > 1:  # runs of one variant with different configs
            label = f"{label} ({labels[label]})"
        groups.append(Group(label, tuple(runs[i] for i in numbers), tuple(numbers)))
    return groups


def flat_config(config: Config) -> dict[str, object]:
    """Map each key, as section.key, to its value."""
    flat: dict[str, object] = {}
    for name, section in config.model_dump(mode="json").items():
        nested = isinstance(section, dict)
        flat |= {f"{name}.{k}": v for k, v in section.items()} if nested else {name: section}
    return flat


def curve_keys(config: Config) -> dict[str, object]:
    """Return the keys that determine the curve, without the seed."""
    flat = flat_config(config)
    return {k: v for k, v in flat.items() if k.partition(".")[0] not in ("seed", "expect", "run")}


def _place(run: RecordedRun, among: Sequence[RecordedRun]) -> str:
    """Name a run by its folder, with as much of the path as distinguishes it from the others."""
    folder = run.folder.resolve()
    above = os.path.commonpath([other.folder.resolve().parent for other in among])
    if len(among) == 1 and folder.name.isdigit():  # a bare seed number identifies nothing
        above = os.path.dirname(above)
    return folder.relative_to(above).as_posix()


def _label(config: Config, among: Sequence[RecordedRun]) -> str:
    """Name a config by the keys that differ among the runs, such as `kn 256, warmup none`."""
    keys, others = curve_keys(config), [curve_keys(other.config) for other in among]
    names = dict.fromkeys(key for other in [keys, *others] for key in other)
    differing = [k for k in names if any(other.get(k) != keys.get(k) for other in others)]
    differing = differing or ["model.name", "recipe.minibatch"]
    parts = [f"{SHORT.get(k, k.split('.')[-1])} {keys.get(k, '–')}".strip() for k in differing]
    return ", ".join(parts)


def sweeps(groups: Sequence[Group]) -> list[list[Group]]:
    """Find the series of groups that differ only by minibatch, each in rising order.

    Where kn is at most the reference there is nothing to warm up to, so the warm-up keys do not
    distinguish such a group; among several series it joins the longest.
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
