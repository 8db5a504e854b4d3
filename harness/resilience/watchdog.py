"""The watchdog: finds hung, frozen and lost ranks within `run.hang_timeout_s` and ends all ranks.

Two threads run beside the loop. One publishes this rank's state to the other ranks, the other
monitors. Ranks communicate over the rendezvous store, as the process group hangs with them.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from enum import IntEnum
from typing import NamedTuple, TypeVar

import torch.distributed as dist

from harness.compat import compiler_phases, main_thread_stack
from harness.distributed import World
from harness.errors import FAILED, FINISHED, STOPPED, record_for_torchrun
from harness.outcome import Outcome, State
from harness.rendezvous import generation
from harness.resilience.grace import grace_s
from harness.resilience.step_observer import StepObserver
from harness.resilience.stopping import StopRequest

TABLES = 4  # a rank whose tick is unchanged in so many consecutive tables is frozen or lost
LAST_WORDS_S = 5.0  # limit for writing the status at the end, as the disk may hang too
T = TypeVar("T")


class Phase(IntEnum):
    """A rank's activity within a step, in the order of the loop."""

    STARTING = 0
    LOADING = 1
    COMPUTING = 2
    LOGGING = 3
    EVALUATING = 4
    SAVING = 5
    WAITING = 6  # its own share is done; waits for the other ranks


@dataclass(frozen=True)
class RankState:
    """A rank's position in the run; of two ranks, the one with the lesser `key` is behind.

    `reductions` counts the gradient buckets that this rank has sent, `age_s` the seconds since the
    position last changed; `tick` grows as long as the process lives.
    """

    rank: int
    host: str
    pid: int
    tick: int
    age_s: float
    step: int
    reductions: int
    phase: int
    batch: int

    @property
    def key(self) -> tuple[int, int, int, int]:
        return self.step, self.reductions, self.phase, self.batch

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host} (pid {self.pid})"

    @property
    def text(self) -> str:
        return f"{self.name} at step {self.step}, {Phase(self.phase).name.lower()}"


class Verdict(NamedTuple):
    """Why all ranks must end. `culprits`: the ranks that the others waited for."""

    code: int  # exit code
    reason: str
    culprits: Sequence[int] = ()


class Watchdog(StepObserver):
    """Follows this rank's steps and, in threads, the other ranks.

    The first verdict of any rank becomes that of all, so that the rank that leaves first is not
    blamed by the others.
    """

    def __init__(self, world: World, timeout_s: float, stop: StopRequest) -> None:
        self._world, self._timeout_s, self._stop = world, timeout_s, stop
        self._grace_s = grace_s()
        self._poll_s = min(1.0, timeout_s / 10)
        self._record: Callable[[Outcome], object] = lambda outcome: None
        self._reductions = 0
        self._where: tuple[int, Phase, int] = 0, Phase.STARTING, 0
        self._since: tuple[object, float] = None, time.monotonic()
        self._tick = 0
        self._tables: deque[list[RankState]] = deque(maxlen=TABLES)
        self._answered_s = time.monotonic()  # when the store last answered
        self._store: dist.TCPStore | None = None
        self._verdict: Verdict | None = None
        self._ended, self._asked = threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=self._monitor, name="watchdog", daemon=True)]

    def __enter__(self) -> Watchdog:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(self._poll_s * 2)

    def join_ranks(self) -> None:
        """Start publishing to the other ranks; call it once the process group exists."""
        if self._world.world_size == 1:
            return
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # a connection of its own, as a blocking call on a shared one would lock it
        self._store = dist.TCPStore(
            address, port, timeout=timedelta(seconds=self._timeout_s), wait_for_workers=False
        )
        self._store.set(self._key(self._world.rank), json.dumps(asdict(self.place())))
        self._threads.append(
            threading.Thread(target=self._publish, name="whereabouts", daemon=True)
        )
        self._threads[-1].start()

    @contextmanager
    def recording(self, record: Callable[[Outcome], object]) -> Iterator[None]:
        """Within, call `record` with the outcome before the process is terminated."""
        before, self._record = self._record, record
        try:
            yield
        finally:
            self._record = before

    def enter_phase(self, step: int, phase: Phase, batch: int = 0) -> None:
        """Note this rank's position; only an assignment, so that the loop may call it often."""
        self._where = step, phase, batch

    def on_bucket_sent(self, last: bool) -> None:
        self._reductions += 1

    def watch(self, batches: Iterator[T], step: Callable[[], int], phase: Phase) -> Iterator[T]:
        """Yield `batches` unchanged, noting whether this rank waits for one or works on it."""
        number = 0
        while True:
            loading = Phase.LOADING if phase == Phase.COMPUTING else phase
            self.enter_phase(step(), loading, 2 * number)
            try:
                batch = next(batches)
            except StopIteration:
                return self.enter_phase(step(), Phase.WAITING)
            self.enter_phase(step(), phase, 2 * number + 1)
            number += 1
            yield batch

    def place(self) -> RankState:
        """Return this rank's position, and for how long it has been there."""
        now_s = time.monotonic()
        # compiling takes minutes, in phases of seconds: a rank that begins them does not hang
        here = self._where, self._reductions, compiler_phases()
        if here != self._since[0]:
            self._since = here, now_s
        (step, phase, batch), sent, _ = here
        age_s = now_s - self._since[1]
        host, pid = socket.gethostname(), os.getpid()
        return RankState(
            self._world.rank, host, pid, self._tick, age_s, step, sent, int(phase), batch
        )

    def diagnose(self, error: str) -> Verdict:
        """Ask the other ranks what is behind an `error` of the process group."""
        self._tables.clear()
        self._asked.set()
        deadline_s = time.monotonic() + (TABLES + 2) * self._poll_s
        while time.monotonic() < deadline_s and not self._verdict and self._is_publishing():
            time.sleep(self._poll_s / 4)
            if silent := self._silent():
                names = ", ".join(place.name for place in silent)
                self._publish_verdict(Verdict(FAILED, f"lost {names}"))
        if self._verdict:
            return self._verdict
        if not self._is_publishing():
            lost = f"lost the process that keeps the ranks' store at {self._store_at()}"
            return Verdict(FAILED, lost)
        return Verdict(FAILED, f"another rank was lost or is silent: {error}")

    def terminate(self, code: int, why: str, culprits: Sequence[int] = ()) -> None:
        """Report why, record it and end this process, whatever its main thread is doing."""
        me = f"rank {self._world.rank} on {socket.gethostname()}"
        if code != STOPPED:
            record_for_torchrun(why)
        print(f"error: {me}: {why}", file=sys.stderr, flush=True)
        if code == FAILED and self._world.rank in culprits:
            stack = main_thread_stack()
            print(f"{me}: stack of its main thread:\n{stack}", file=sys.stderr, flush=True)
        outcome = Outcome(State.STOPPED if code == STOPPED else State.FAILED, why)
        last_words = threading.Thread(target=self._record, args=(outcome,), daemon=True)
        last_words.start()
        last_words.join(LAST_WORDS_S)
        if self._is_publishing():
            time.sleep(
                TABLES * self._poll_s
            )  # the store may live here; let others read the verdict
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        os._exit(FINISHED if code == STOPPED and under_torchrun else code)

    def _monitor(self) -> None:
        while not self._ended.wait(self._poll_s):
            place = self.place()
            if self._grace_is_over(place):
                why = f"no step ended within {self._grace_s:g} s of the signal"
                verdict = Verdict(STOPPED, f"{why}; the newest checkpoint is kept")
                self.terminate(*self._publish_verdict(verdict))
            if place.age_s > self._timeout_s and (cause := self._find_cause(place)):
                self.terminate(*cause)

    def _grace_is_over(self, place: RankState) -> bool:
        asked_s = self._stop.asked_at_s
        if asked_s is None or place.phase == Phase.SAVING:  # let it finish its checkpoint
            return False
        return time.monotonic() - asked_s > self._grace_s

    def _find_cause(self, place: RankState) -> Verdict | None:
        """Return what keeps this rank waiting; None while others still move, or it is unknown."""
        for_s = f"for {self._timeout_s:g} s (run.hang_timeout_s)"
        if self._verdict:
            return self._verdict
        if self._store is None and self._world.world_size > 1:
            return Verdict(FAILED, f"not all ranks joined at {self._store_at()} {for_s}")
        if self._store is None:
            return self._blame([place], f"not responding {for_s}")
        if time.monotonic() - self._answered_s > TABLES * self._poll_s + 2.0:
            why = f"the ranks' store at {self._store_at()} does not answer {for_s}"
            return Verdict(FAILED, why)
        if silent := self._silent():
            return self._blame(silent, f"process frozen or lost {for_s}")
        if len(self._tables) < TABLES or min(p.age_s for p in self._tables[-1]) < self._timeout_s:
            return None
        places = self._tables[-1]
        behind = [p for p in places if p.key == min(q.key for q in places)]
        if len(behind) == len(places):
            why = f"no rank is responding {for_s}; the first is {behind[0].text}"
            return self._publish_verdict(Verdict(FAILED, why, [behind[0].rank]))
        return self._blame(behind, f"not responding {for_s}")

    def _blame(self, places: Sequence[RankState], why: str) -> Verdict:
        names = ", ".join(place.text for place in places)
        ranks = [place.rank for place in places]
        return self._publish_verdict(Verdict(FAILED, f"{names}: {why}", ranks))

    def _silent(self) -> list[RankState]:
        """Return the ranks whose tick no longer grows."""
        if len(self._tables) < TABLES:
            return []
        first, last = self._tables[0], self._tables[-1]
        return [new for old, new in zip(first, last, strict=True) if old.tick == new.tick]

    def _publish_verdict(self, verdict: Verdict) -> Verdict:
        """Propose a verdict and return the one that holds: the first that any rank proposed."""
        self._verdict = verdict
        if self._store is not None:
            try:
                kept = self._store.compare_set(self._key("verdict"), "", json.dumps(verdict))
                self._verdict = Verdict(*json.loads(kept))
            except dist.DistError:
                pass  # the store is lost with its host: every rank reports what it saw itself
        return self._verdict

    def _is_publishing(self) -> bool:
        return self._store is not None and self._threads[-1].is_alive()

    @staticmethod
    def _store_at() -> str:
        return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"

    def _publish(self) -> None:
        """Write this rank's state; read all states once there is reason to."""
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
                        kept = self._store.get(self._key("verdict"))
                        self._verdict = Verdict(*json.loads(kept))
                    self._tables.append(table)
                else:
                    self._tables.clear()
            except dist.DistError:
                return  # the store is lost with its host; the monitor reports it when it matters
            self._answered_s = time.monotonic()

    def _key(self, name: object) -> str:
        return f"watchdog/{generation(self._world)}/{name}"
