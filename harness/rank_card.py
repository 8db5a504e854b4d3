"""The card of a rank: what the ranks of a launch must have in common."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from harness.config.errors import format_value
from harness.config.schema import Config
from harness.data.sources.digest import first_difference, first_differing_file
from harness.rendezvous import PROCESS

# Ranks may differ in these keys of run, which change neither results nor their cooperation.
OWN_KEYS = {
    *("data_root", "data_format", "stage_to", "loader_threads", "hang_timeout_s"),
    *("checkpoint_every_minutes", "keep_checkpoints"),  # rank 0's alone count
}
Ask = Callable[..., tuple[Any, Any] | None]


@dataclass(frozen=True)
class Card:
    """A rank's card.

    `data`: split -> digest. `out`: the run folder as given, the boot id of the machine, and the
    folder's absolute path there.
    """

    rank: int
    host: str
    process: str = PROCESS
    settings: dict[str, Any] = field(default_factory=dict)
    code: str = ""
    versions: dict[str, str | None] = field(default_factory=dict)
    out: tuple[str, str, str] | None = None
    data: dict[str, str] = field(default_factory=dict)
    exact: dict[str, Any] = field(default_factory=dict)  # the conditions of exact sums

    @property
    def name(self) -> str:
        """The rank and its host, for messages."""
        return f"rank {self.rank} on {self.host}"


def difference(ours: Card, theirs: Card, ask: Ask) -> str:
    """Return the first difference of a rank's card from rank 0's, with the remedy, or "".

    `ask(topic)` and `ask(topic, class)` return what the digests of both were computed from.
    """
    here = ours.name
    if theirs.code != ours.code:
        return f"{_code_difference(ask)} than on {here}; install the same harness for all ranks"
    for name, version in ours.versions.items():
        if theirs.versions.get(name) != version:
            return (
                f"{name} is {theirs.versions.get(name)}, {here} has {version}; install the same "
                "versions for all ranks"
            )
    for name, value in ours.exact.items():
        if theirs.exact.get(name, value) != value:
            return (
                f"{name}: {theirs.exact[name]}, {here} has {value}; exact sums need the same on "
                "all ranks: make them equal, or set run.sums=fast"
            )
    for key in dict.fromkeys([*ours.settings, *theirs.settings]):
        a, b = ours.settings.get(key), theirs.settings.get(key)
        if a != b:
            return (
                f"{key} is {format_value(b)}, {here} has {format_value(a)}; start all ranks with "
                "one config"
            )
    if ours.out and theirs.out and not _same_folder(ours.out, theirs.out):
        return (
            f"its run folder is {theirs.out[2]}, that of {here} is {ours.out[2]}; start all ranks "
            "with one --out, and each run at a MASTER_PORT of its own"
        )
    for split, digest in ours.data.items():
        if theirs.data.get(split) != digest:
            what = _data_difference(split, theirs.name, here, ask)
            return f"data: {split}: {what}; give all ranks the same images"
    return ""


def _code_difference(ask: Ask) -> str:
    answer = ask("code")
    ours, theirs = answer or ({}, {})
    files = sorted({*ours, *theirs})
    differing = [file for file in files if ours.get(file) != theirs.get(file)]
    return f"{differing[0]} is different" if differing else "the code is different"


def _data_difference(split: str, there: str, here: str, ask: Ask) -> str:
    if (answer := ask(split)) is None:
        return f"other images than on {here}"
    ours, theirs = answer
    what = first_difference(theirs, ours, there, here) or f"other images than on {here}"
    differing = [name for name in ours if name in theirs and ours[name] != theirs[name]]
    if list(ours) != list(theirs) or not differing or not (files := ask(split, differing[0])):
        return what
    our_files, their_files = files
    file = first_differing_file(their_files, our_files, there, here)
    return f"{what}: {file}" if file else what


def _same_folder(ours: tuple[str, str, str], theirs: tuple[str, str, str]) -> bool:
    """Return whether two ranks have the same folder; other machines may mount it elsewhere."""
    same_machine = ours[1] == theirs[1] != ""
    return ours[0] == theirs[0] and (ours[2] == theirs[2] or not same_machine)


def shared_settings(config: Config) -> dict[str, Any]:
    """Return {dotted key: value} of all keys in which the ranks must agree."""
    values: dict[str, Any] = {}
    shared = config.model_dump(mode="json", exclude={"expect": True, "run": OWN_KEYS})
    for name, section in shared.items():
        nested = isinstance(section, dict)
        values |= {f"{name}.{k}": v for k, v in section.items()} if nested else {name: section}
    return values


def read_card(text: str | bytes) -> Card:
    """Read a card from JSON."""
    mapping = json.loads(text)
    return Card(**mapping | {"out": mapping["out"] and tuple(mapping["out"])})
