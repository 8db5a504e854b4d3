"""The roll call: before the first step, the ranks of a launch check that they belong together.

Each rank presents a card with its config, code, versions and data. Rank 0 compares the cards with
its own. A difference, or an error that any rank has found, ends all ranks with the same line.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from harness.config.schema import Config
from harness.data.batch_plan import BatchPlan
from harness.data.sources.source import ImageSource
from harness.distributed import World, world_from_environment
from harness.errors import UserError
from harness.outcome import RunFailed, Stopped
from harness.plug_ins import modules_behind_results
from harness.rank_card import Card, difference, read_card, shared_settings
from harness.rendezvous import patience, rendezvous
from harness.resilience.stopping import StopRequest
from harness.runs.environment import code_digest, package_files, versions
from harness.runs.exact_conditions import exact_conditions
from harness.runs.process_identity import ProcessIdentity

LAST_WORDS_S = 8.0  # an error waits this long for the other ranks to hear of it
LONGEST_ANSWER = 4_000_000  # bytes; the store takes twice as many
VERDICT = "verdict"  # its key: [kind of end, reason]; the first one of any rank is that of all
KINDS = {"mistake": UserError, "failure": RunFailed, "stop": Stopped}
LookUp = Callable[
    [str, str], Mapping[str, Any]
]  # (topic, class) -> what a digest was computed from


class RollCall:
    """One rank's part in the roll call; afterwards `store` is where they met (None: one rank)."""

    def __init__(self, hang_timeout_s: float, stop: StopRequest) -> None:
        self._world = world_from_environment("cpu")  # to meet, a rank needs no device yet
        self._hang_timeout_s, self._stop = hang_timeout_s, stop
        self._card = Card(
            self._world.rank,
            socket.gethostname(),
            settings={"WORLD_SIZE": self._world.world_size},
        )
        self._sources: dict[str, ImageSource] = {}
        self._packages: tuple[str, ...] = ("harness",)
        self.store: dist.Store | None = None

    def present(
        self,
        config: Config,
        world: World,
        batch_plan: BatchPlan,
        out: Path | None = None,
        teacher: str | None = None,
    ) -> None:
        """Fill in the card: `config` as the user gave it, `teacher` the digest of its weights."""
        if world.world_size == 1:
            return
        loader, boot_id = (
            batch_plan.config.run.loader,
            ProcessIdentity.of(os.getpid()).boot_id or "",
        )
        settings = self._card.settings | shared_settings(config)
        settings |= {"run.device": world.device.type, "run.loader": loader}
        if teacher is not None:
            settings["the digest of the teacher's weights"] = teacher[:16]
        used = ("torch", "torchvision", "pillow", *(["dali"] if loader == "dali" else []))
        self._sources = {"train": batch_plan.train, "val": batch_plan.val}
        self._packages = ("harness", *modules_behind_results(config))
        self._card = replace(
            self._card,
            settings=settings,
            code=code_digest(self._packages),
            versions={name: versions()[name] for name in used},
            out=None if out is None else (str(out), boot_id, str(out.absolute())),
            data={split: index.digest for split, index in self._sources.items()},
            exact=exact_conditions(config.run, world.device),
        )

    def hold(self) -> None:
        """Meet the other ranks and compare the cards.

        Raises UserError, RunFailed or Stopped, the same on all ranks; a rank of another launch
        alone gets a UserError.
        """
        store = rendezvous(self._world, self._hang_timeout_s, self._patience(self._hang_timeout_s))
        if store is None:
            return
        pause = self._patience(self._hang_timeout_s)
        attend(store, self._card, self._world.world_size, self._look_up, pause)
        self.store = store

    def fail(self, error: Exception) -> None:
        """Report this rank's error to the other ranks, if they can be reached."""
        pause = patience(LAST_WORDS_S)
        with suppress(UserError, RunFailed, dist.DistError):
            if store := rendezvous(self._world, LAST_WORDS_S, pause):
                publish_verdict(store, kind_of(error), f"{self._card.name}: {_first_line(error)}")
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
        index = self._sources[topic]
        return index.sizes_of(of_class) if of_class else index.class_digests()


@contextmanager
def roll_call(hang_timeout_s: float, stop: StopRequest) -> Iterator[RollCall]:
    """Within, a rank prepares its run and presents its card; at the end the ranks meet.

    An error within ends all ranks, with the name of the rank that found it. Raises as
    `RollCall.hold`.
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
    """Present `card`, wait for the verdict and raise it.

    Raises UserError where another process has taken this rank's place, which the other ranks do
    not notice.
    """
    own = json.dumps(asdict(card))
    if (holder := store.compare_set(f"card-{card.rank}", "", own).decode()) != own:
        raise UserError(
            f"{card.name}: the place of rank {card.rank} is taken, by a process on "
            f"{read_card(holder).host}; start this run at another MASTER_PORT"
        )
    try:
        if card.rank == 0:
            _compare_all(store, card, world_size, look_up, pause)
        else:
            _wait_for_verdict(store, card.rank, look_up, pause)
    except (RunFailed, Stopped) as error:
        publish_verdict(store, kind_of(error), f"{card.name}: {error}")
    kind, why = json.loads(store.get(VERDICT))
    leave(store, card.rank, world_size)
    if kind:
        raise KINDS[kind](why)


def publish_verdict(store: dist.Store, kind: str = "", why: str = "") -> None:
    """End the roll call for all ranks, unless a rank has done so before; no kind: all is well."""
    store.compare_set(VERDICT, "", json.dumps([kind, why]))


def kind_of(error: Exception) -> str:
    """Return the kind of end that an error is, a key of `KINDS`."""
    kinds = (name for name, kind in KINDS.items() if isinstance(error, kind))
    return next(kinds, "failure")


def leave(store: dist.Store, rank: int, world_size: int) -> None:
    """Leave the store; rank 0, which may keep it, does so once all have read the verdict."""
    read = store.add("read", int(rank > 0))
    deadline_s = time.monotonic() + LAST_WORDS_S
    while rank == 0 and read < world_size - 1 and time.monotonic() < deadline_s:
        time.sleep(0.01)
        read = store.add("read", 0)


def _compare_all(
    store: dist.Store, card: Card, world_size: int, look_up: LookUp, pause: Callable[[], object]
) -> None:
    """Compare the cards as they arrive, on rank 0, until all are there or there is a verdict."""
    missing = list(range(1, world_size))
    try:
        while missing and not store.check([VERDICT]):
            for rank in [rank for rank in missing if store.check([f"card-{rank}"])]:
                theirs = read_card(store.get(f"card-{rank}"))
                ask = Question(store, rank, look_up, pause)
                if why := difference(card, theirs, ask):
                    return publish_verdict(store, "mistake", f"{theirs.name}: {why}")
                missing.remove(rank)
            pause()
    except RunFailed as error:
        few = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
        raise RunFailed(f"{error}; missing: rank {few}") from None
    publish_verdict(store)


def _wait_for_verdict(
    store: dist.Store, rank: int, look_up: LookUp, pause: Callable[[], object]
) -> None:
    """Answer rank 0's questions, on another rank, until there is a verdict."""
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
    """Asks a rank what a digest was computed from: (rank 0's, theirs); None if it is too long."""

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


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0]
