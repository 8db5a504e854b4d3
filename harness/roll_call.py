"""Before the first step, the ranks of a launch find out whether they belong together.

Each rank presents a card: its config, code, versions and data. Rank 0 compares them with its own.
A difference, or an error that any rank found before, ends all ranks with one and the same line.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from harness.config.errors import format_value
from harness.config.schema import Config
from harness.data.batch_plan import BatchPlan
from harness.data.sources.digest import first_difference, first_differing_file
from harness.data.sources.source import ImageSource
from harness.distributed import World, world_from_environment
from harness.errors import UserError
from harness.outcome import RunFailed, Stopped
from harness.plug_ins import modules_behind_results
from harness.rendezvous import PROCESS, patience, rendezvous
from harness.resilience.stopping import StopRequest
from harness.runs.environment import code_digest, package_files, versions
from harness.runs.process_identity import ProcessIdentity

# a rank may have values of its own of these keys of run, which change neither results nor what the
# ranks do together
OWN_KEYS = {
    *("data_root", "data_format", "loader_threads", "hang_timeout_s"),
    *("checkpoint_every_minutes", "keep_checkpoints"),  # rank 0's alone count
}
LAST_WORDS_S = 8.0  # an error waits this long for the other ranks to hear of it
LONGEST_ANSWER = 4_000_000  # bytes; the store takes twice as many
VERDICT = "verdict"  # its key: [kind of end, reason]; the first one of any rank is that of all
KINDS = {"mistake": UserError, "failure": RunFailed, "stop": Stopped}
LookUp = Callable[[str, str], Mapping[str, Any]]  # (topic, class) -> what a digest stands for


@dataclass(frozen=True)
class Card:
    """What a rank presents. `data`: split -> digest; `out`: the run folder as it was given, and
    its absolute path on the machine with this boot id."""

    rank: int
    host: str
    process: str = PROCESS
    settings: dict[str, Any] = field(default_factory=dict)
    code: str = ""
    versions: dict[str, str | None] = field(default_factory=dict)
    out: tuple[str, str, str] | None = None
    data: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host}"


class RollCall:
    """This rank's part. After the roll call, `store` is where the ranks met (None: one rank)."""

    def __init__(self, hang_timeout_s: float, stop: StopRequest) -> None:
        self._world = world_from_environment("cpu")  # to meet, a rank needs no device yet
        self._hang_timeout_s, self._stop = hang_timeout_s, stop
        self._card = Card(
            self._world.rank,
            socket.gethostname(),
            settings={"WORLD_SIZE": self._world.world_size},
        )
        self._indices: dict[str, ImageSource] = {}
        self._packages: tuple[str, ...] = ("harness",)
        self.store: dist.Store | None = None

    def present(
        self,
        config: Config,
        world: World,
        feed: BatchPlan,
        out: Path | None = None,
        teacher: str | None = None,
    ) -> None:
        """Fills in the card. `config` as the user gave it; `teacher` the digest of its weights."""
        if world.world_size == 1:
            return
        loader, boot_id = feed.config.run.loader, ProcessIdentity.of(os.getpid()).boot_id or ""
        settings = self._card.settings | _settings(config)
        settings |= {"run.device": world.device.type, "run.loader": loader}
        if teacher is not None:
            settings["the digest of the teacher's weights"] = teacher[:16]
        used = ("torch", "torchvision", "pillow", *(["dali"] if loader == "dali" else []))
        self._indices = {"train": feed.train, "val": feed.val}
        self._packages = ("harness", *modules_behind_results(config))
        self._card = replace(
            self._card,
            settings=settings,
            code=code_digest(self._packages),
            versions={name: versions()[name] for name in used},
            out=None if out is None else (str(out), boot_id, str(out.absolute())),
            data={split: index.digest for split, index in self._indices.items()},
        )

    def hold(self) -> None:
        """Meets the other ranks and compares. Raises UserError, RunFailed and Stopped alike on all
        of them; UserError on a rank of another launch alone."""
        store = rendezvous(self._world, self._hang_timeout_s, self._patience(self._hang_timeout_s))
        if store is None:
            return
        pause = self._patience(self._hang_timeout_s)
        attend(store, self._card, self._world.world_size, self._look_up, pause)
        self.store = store

    def fail(self, error: Exception) -> None:
        """Tells the other ranks of this rank's error, if they can be reached."""
        pause = patience(LAST_WORDS_S)
        with suppress(UserError, RunFailed, dist.DistError):
            if store := rendezvous(self._world, LAST_WORDS_S, pause):
                pronounce(store, kind_of(error), f"{self._card.name}: {_first_line(error)}")
                leave(store, self._world.rank, self._world.world_size)

    def _patience(self, timeout_s: float) -> Callable[[], None]:
        wait = patience(timeout_s)

        def pause() -> None:
            if self._stop.signal is not None:
                raise Stopped("stopped before the first step of this start")
            wait()

        return pause

    def _look_up(self, topic: str, of_class: str) -> Mapping[str, Any]:
        if topic == "code":
            files = [pair for package in self._packages for pair in package_files(package)]
            sources = [pair for pair in files if pair[0].endswith(".py")]
            return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sources}
        index = self._indices[topic]
        return index.sizes_of(of_class) if of_class else index.class_digests()


@contextmanager
def roll_call(hang_timeout_s: float, stop: StopRequest) -> Iterator[RollCall]:
    """Within, a rank prepares its run and presents its card; at the end the ranks meet.

    An error within reaches all ranks: it is theirs too, with the name of the rank that found it.
    Raises as RollCall.hold.
    """
    call = RollCall(hang_timeout_s, stop)
    try:
        yield call
    except Exception as error:
        call.fail(error)
        raise
    call.hold()


def attend(
    store: dist.Store, card: Card, world_size: int, look_up: LookUp, pause: Callable[[], object]
) -> None:
    """Presents `card` and waits for the verdict. Raises it, and UserError where the place of this
    rank is taken by another process, which the other ranks do not notice."""
    own = json.dumps(asdict(card))
    if (holder := store.compare_set(f"card-{card.rank}", "", own).decode()) != own:
        raise UserError(
            f"{card.name}: the place of rank {card.rank} is taken, by a process on "
            f"{_card(holder).host}; start this run at another MASTER_PORT"
        )
    try:
        if card.rank == 0:
            _compare_all(store, card, world_size, look_up, pause)
        else:
            _wait_for_verdict(store, card.rank, look_up, pause)
    except (RunFailed, Stopped) as error:
        pronounce(store, kind_of(error), f"{card.name}: {error}")
    kind, why = json.loads(store.get(VERDICT))
    leave(store, card.rank, world_size)
    if kind:
        raise KINDS[kind](why)


def pronounce(store: dist.Store, kind: str = "", why: str = "") -> None:
    """How the roll call ends for all ranks, unless one has said so before; no kind: all is well."""
    store.compare_set(VERDICT, "", json.dumps([kind, why]))


def kind_of(error: Exception) -> str:
    kinds = (name for name, kind in KINDS.items() if isinstance(error, kind))
    return next(kinds, "failure")


def leave(store: dist.Store, rank: int, world_size: int) -> None:
    """Rank 0, which may keep the store, leaves last: when all have read the verdict."""
    read = store.add("read", int(rank > 0))
    deadline_s = time.monotonic() + LAST_WORDS_S
    while rank == 0 and read < world_size - 1 and time.monotonic() < deadline_s:
        time.sleep(0.01)
        read = store.add("read", 0)


def _compare_all(
    store: dist.Store, card: Card, world_size: int, look_up: LookUp, pause: Callable[[], object]
) -> None:
    """Rank 0: compares the cards as they come, until all are there or there is a verdict."""
    missing = list(range(1, world_size))
    try:
        while missing and not store.check([VERDICT]):
            for rank in [rank for rank in missing if store.check([f"card-{rank}"])]:
                theirs = _card(store.get(f"card-{rank}"))
                ask = Question(store, rank, look_up, pause)
                if why := difference(card, theirs, ask):
                    return pronounce(store, "mistake", f"{theirs.name}: {why}")
                missing.remove(rank)
            pause()
    except RunFailed as error:
        few = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
        raise RunFailed(f"{error}; missing: rank {few}") from None
    pronounce(store)


def _wait_for_verdict(
    store: dist.Store, rank: int, look_up: LookUp, pause: Callable[[], object]
) -> None:
    """Another rank than 0: until there is a verdict; on the way it answers rank 0's questions."""
    answered = 0
    while not store.check([VERDICT]):
        if store.check([f"question-{rank}-{answered}"]):
            question = json.loads(store.get(f"question-{rank}-{answered}"))
            answer = json.dumps(dict(look_up(*question)))
            fits = len(answer) <= LONGEST_ANSWER
            store.set(f"answer-{rank}-{answered}", answer if fits else "null")
            answered += 1
        pause()


@dataclass
class Question:
    """Rank 0 asks a rank what a digest stands for; returns (ours, theirs), None where too long."""

    store: dist.Store
    rank: int
    look_up: LookUp
    pause: Callable[[], object]
    asked: int = 0

    def __call__(self, topic: str, name: str = "") -> tuple[Any, Any] | None:
        number = f"{self.rank}-{self.asked}"
        self.asked += 1
        self.store.set(f"question-{number}", json.dumps([topic, name]))
        ours = self.look_up(topic, name)
        while not self.store.check([f"answer-{number}"]):
            self.pause()
        theirs = json.loads(self.store.get(f"answer-{number}"))
        return None if theirs is None else (ours, theirs)


Ask = Callable[..., tuple[Any, Any] | None]


def difference(ours: Card, theirs: Card, ask: Ask) -> str:
    """The first difference of a rank's card from rank 0's, and the remedy; "" where there is none.

    `ask(topic)` and `ask(topic, class)` give what the digests of both stand for.
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
    """Machines may have other paths to a folder, but not one machine."""
    same_machine = ours[1] == theirs[1] != ""
    return ours[0] == theirs[0] and (ours[2] == theirs[2] or not same_machine)


def _settings(config: Config) -> dict[str, Any]:
    """Dotted key -> value, of all keys that the ranks must have in common."""
    values: dict[str, Any] = {}
    shared = config.model_dump(mode="json", exclude={"expect": True, "run": OWN_KEYS})
    for name, section in shared.items():
        nested = isinstance(section, dict)
        values |= {f"{name}.{k}": v for k, v in section.items()} if nested else {name: section}
    return values


def _card(text: str | bytes) -> Card:
    mapping = json.loads(text)
    return Card(**mapping | {"out": mapping["out"] and tuple(mapping["out"])})


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0]
