"""Hung, frozen and lost ranks: found within `run.hang_timeout_s`, named, and all ranks ended."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from enum import IntEnum
from typing import TypeVar

import torch.distributed as dist

from harness.compat import compiler_phases
from harness.distributed import Reductions, World
from harness.errors import FAILED, FINISHED, STOPPED, UserError, record_for_torchrun
from harness.rendezvous import generation
from harness.resilience.stopping import StopRequest

GRACE_S = 20.0  # torchrun kills 30 s after it has handed a signal on; last words take some
TABLES = 4  # a rank whose tick stands still over so many looks is frozen or gone
LAST_WORDS_S = 5.0  # for the status of a run that ends, on a disk that may hang too
T = TypeVar("T")


class Phase(IntEnum):
    """What a rank is at within a step, in the order of the loop."""

    STARTING = 0
    LOADING = 1
    COMPUTING = 2
    LOGGING = 3
    EVALUATING = 4
    SAVING = 5
    WAITING = 6  # done with its share: for the other ranks


@dataclass(frozen=True)
class RankState:
    """Where a rank stands; of two ranks the one with the lesser `key` keeps the other waiting.

    `reductions` counts the gradient buckets this rank has sent; `age_s` how long it stands here;
    `tick` grows as long as its process lives.
    """

    rank: int
    host: str
    pid: int
    tick: int
    age_s: float
    step: int
    reductions: int
    doing: int
    batch: int

    @property
    def key(self) -> tuple[int, int, int, int]:
        return self.step, self.reductions, self.doing, self.batch

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host} (pid {self.pid})"

    @property
    def text(self) -> str:
        return f"{self.name} at step {self.step}, {Phase(self.doing).name.lower()}"


class Watchdog:
    """Two threads beside the loop: one tells the other ranks where this one stands, one judges.

    The ranks talk over the rendezvous store, not over the process group, which hangs with them.
    A verdict is made once and read by all, so that whoever leaves first is not blamed by the rest.
    `record(state, reason)` is called before the process ends (rank 0's status).
    """

    def __init__(self, world: World, timeout_s: float, stop: StopRequest) -> None:
        self._world, self._timeout_s, self._stop = world, timeout_s, stop
        self._grace_s = grace_s()
        self._poll_s = min(1.0, timeout_s / 10)
        self.reductions = Reductions()  # the step's own, once there is one
        self.record: Callable[[str, str], object] = lambda state, reason: None
        self._where: tuple[int, Phase, int] = 0, Phase.STARTING, 0
        self._since: tuple[object, float] = None, time.monotonic()
        self._tick = 0
        self._tables: deque[list[RankState]] = deque(maxlen=TABLES)
        self._told_s = time.monotonic()  # when the store last answered
        self._store: dist.TCPStore | None = None
        self._verdict: tuple[int, str] | None = None  # exit code, reason
        self._ended, self._asked = threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=self._judge, name="watchdog", daemon=True)]

    def __enter__(self) -> Watchdog:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(self._poll_s * 2)

    def join_ranks(self) -> None:
        """Begins to talk to the other ranks; call it once the process group stands."""
        if self._world.world_size == 1:
            return
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # a connection of its own: one that is shared would be locked by a call that waits
        self._store = dist.TCPStore(
            address, port, timeout=timedelta(seconds=self._timeout_s), wait_for_workers=False
        )
        self._store.set(self._key(self._world.rank), json.dumps(asdict(self.place())))
        self._threads.append(threading.Thread(target=self._tell, name="whereabouts", daemon=True))
        self._threads[-1].start()

    def at(self, step: int, doing: Phase, batch: int = 0) -> None:
        """The loop says where it is; costs nothing."""
        self._where = step, doing, batch

    def watch(self, batches: Iterator[T], step: Callable[[], int], doing: Phase) -> Iterator[T]:
        """The same batches; on the way it notes whether they are waited for or worked on."""
        number = 0
        while True:
            self.at(step(), Phase.LOADING if doing == Phase.COMPUTING else doing, 2 * number)
            try:
                batch = next(batches)
            except StopIteration:
                return self.at(step(), Phase.WAITING)
            self.at(step(), doing, 2 * number + 1)
            number += 1
            yield batch

    def place(self) -> RankState:
        """Where this rank stands, and for how long."""
        now_s = time.monotonic()
        # compiling takes minutes, in phases of seconds: no rank hangs while they follow each other
        here = self._where, self.reductions.sent, compiler_phases()
        if here != self._since[0]:
            self._since = here, now_s
        (step, doing, batch), sent, _ = here
        age_s = now_s - self._since[1]
        host, pid = socket.gethostname(), os.getpid()
        return RankState(
            self._world.rank, host, pid, self._tick, age_s, step, sent, int(doing), batch
        )

    def explain(self, error: str) -> tuple[int, str]:
        """(exit code, reason) behind an `error` of the process group: asks the other ranks."""
        self._tables.clear()
        self._asked.set()
        deadline_s = time.monotonic() + (TABLES + 2) * self._poll_s
        while time.monotonic() < deadline_s and not self._verdict and self._telling():
            time.sleep(self._poll_s / 4)
            if silent := self._silent():
                self._pronounce(FAILED, f"lost {', '.join(place.name for place in silent)}")
        if self._verdict:
            return self._verdict
        if not self._telling():
            return FAILED, f"lost the process that keeps the ranks' store at {self._store_at()}"
        return FAILED, f"another rank was lost or is silent: {error}"

    def end(self, code: int, why: str) -> None:
        """Ends this process with its last words, whatever its main thread is doing."""
        me = f"rank {self._world.rank} on {socket.gethostname()}"
        if code != STOPPED:
            record_for_torchrun(why)
        print(f"error: {me}: {why}", file=sys.stderr, flush=True)
        if code == FAILED and f"{me} " in why:
            main = sys._current_frames().get(threading.main_thread().ident or 0)
            stack = "".join(traceback.format_stack(main)[-8:])
            print(f"{me} stands here:\n{stack}", file=sys.stderr, flush=True)
        state = "stopped" if code == STOPPED else "failed"
        last_words = threading.Thread(target=self.record, args=(state, why), daemon=True)
        last_words.start()
        last_words.join(LAST_WORDS_S)
        if self._telling():
            time.sleep(TABLES * self._poll_s)  # the others read the verdict from a store that lives
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        os._exit(FINISHED if code == STOPPED and under_torchrun else code)

    def _judge(self) -> None:
        while not self._ended.wait(self._poll_s):
            place = self.place()
            if self._grace_is_over(place):
                why = f"no step ended within {self._grace_s:g} s of the signal"
                self.end(*self._pronounce(STOPPED, f"{why}; the newest checkpoint stands"))
            if place.age_s > self._timeout_s and (verdict := self._diagnosis(place)):
                self.end(*verdict)

    def _grace_is_over(self, place: RankState) -> bool:
        asked_s = self._stop.asked_at_s
        if asked_s is None or place.doing == Phase.SAVING:  # a checkpoint on its way is let through
            return False
        return time.monotonic() - asked_s > self._grace_s

    def _diagnosis(self, place: RankState) -> tuple[int, str] | None:
        """Who keeps this rank waiting; None while the others still move, or nothing is known."""
        for_s = f"for {self._timeout_s:g} s (run.hang_timeout_s)"
        if self._verdict:
            return self._verdict
        if self._store is None and self._world.world_size > 1:
            return FAILED, f"not all ranks joined at {self._store_at()} {for_s}"
        if self._store is None:
            return self._pronounce(FAILED, f"{place.text}: stands still {for_s}")
        if time.monotonic() - self._told_s > TABLES * self._poll_s + 2.0:
            return FAILED, f"the ranks' store at {self._store_at()} does not answer {for_s}"
        if silent := self._silent():
            names = ", ".join(place.text for place in silent)
            return self._pronounce(FAILED, f"{names}: process frozen or gone {for_s}")
        if len(self._tables) < TABLES or min(p.age_s for p in self._tables[-1]) < self._timeout_s:
            return None
        places = self._tables[-1]
        behind = [p for p in places if p.key == min(q.key for q in places)]
        if len(behind) == len(places):
            return self._pronounce(FAILED, f"all ranks stand still {for_s}, as {behind[0].text}")
        return self._pronounce(FAILED, f"{', '.join(p.text for p in behind)}: stands still {for_s}")

    def _silent(self) -> list[RankState]:
        """Ranks whose process does not tick any more."""
        if len(self._tables) < TABLES:
            return []
        first, last = self._tables[0], self._tables[-1]
        return [new for old, new in zip(first, last, strict=True) if old.tick == new.tick]

    def _pronounce(self, code: int, why: str) -> tuple[int, str]:
        """The first verdict of any rank is that of all."""
        self._verdict = code, why
        if self._store is not None:
            try:
                kept = self._store.compare_set(self._key("verdict"), "", f"{code} {why}").decode()
                self._read_verdict(kept)
            except dist.DistError:
                pass  # the store is gone with its host: every rank says what it saw itself
        return self._verdict

    def _read_verdict(self, kept: str) -> None:
        code, _, why = kept.partition(" ")
        self._verdict = int(code), why

    def _telling(self) -> bool:
        return self._store is not None and self._threads[-1].is_alive()

    @staticmethod
    def _store_at() -> str:
        return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"

    def _tell(self) -> None:
        """Writes this rank's place; looks at all places once there is reason to."""
        assert self._store is not None
        keys = [self._key(rank) for rank in range(self._world.world_size)]
        while not self._ended.wait(self._poll_s):
            self._tick += 1
            place = self.place()
            try:
                self._store.set(self._key(self._world.rank), json.dumps(asdict(place)))
                if place.age_s > self._timeout_s / 2 or self._asked.is_set():
                    table = [RankState(**json.loads(text)) for text in self._store.multi_get(keys)]
                    if self._store.check([self._key("verdict")]):
                        self._read_verdict(self._store.get(self._key("verdict")).decode())
                    self._tables.append(table)
                else:
                    self._tables.clear()
            except dist.DistError:
                return  # the store is gone with its host; the judge says so when it matters
            self._told_s = time.monotonic()

    def _key(self, name: object) -> str:
        return f"watchdog/{generation(self._world)}/{name}"


def grace_s() -> float:
    """Seconds a rank may use after a stop signal: HARNESS_GRACE_S, which launchers may set."""
    text = os.environ.get("HARNESS_GRACE_S", str(GRACE_S))
    try:
        return float(text)
    except ValueError:
        raise UserError(f"HARNESS_GRACE_S={text}: give seconds, such as 20") from None
