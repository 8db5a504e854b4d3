"""How long a test may take: seconds of a machine with a core for every process that wants one.

On a busier machine they pass more slowly. Each test has one limit, pytest's `timeout` (in
pyproject.toml, or by a marker where it starts many processes). Tests wait for processes without
limits of their own: what hangs is found by the test's.
"""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import pytest_timeout

PROCESS_S = 30.0  # to start Python, PyTorch and a small run, with a margin of about 4
LOOK_S = 1.0


class Limit:
    """So many seconds, of which fewer pass where the machine is busy."""

    def __init__(self, seconds: float) -> None:
        self._left_s, self._seen_s = seconds, time.monotonic()

    def is_over(self) -> bool:
        """To be asked often: the seconds since the last time count by how busy it is now."""
        now_s = time.monotonic()
        self._left_s -= (now_s - self._seen_s) / processes_per_core()
        self._seen_s = now_s
        return self._left_s < 0


def processes_per_core() -> float:
    """How many processes share a core (the average of a minute); at least 1."""
    return max(os.getloadavg()[0] / len(os.sched_getaffinity(0)), 1.0)


def starting(processes: int) -> pytest.MarkDecorator:
    """Marks tests whose fixtures start so many processes, one after another at worst."""
    return pytest.mark.timeout(processes * PROCESS_S)


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: pytest_timeout.Settings) -> bool | None:
    """pytest-timeout's timer, by a `Limit`."""
    if settings.method != "signal" or threading.current_thread() is not threading.main_thread():
        return None  # pytest-timeout's own
    limit, ended = Limit(settings.timeout), threading.Event()

    def watch() -> None:
        while not ended.wait(LOOK_S):
            if limit.is_over():
                return signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)

    def fail(*_: object) -> None:
        __tracebackhide__ = True
        pytest_timeout.timeout_sigalrm(item, settings)

    def cancel() -> None:
        ended.set()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)

    item.cancel_timeout = cancel
    signal.signal(signal.SIGALRM, fail)
    threading.Thread(target=watch, name="limit", daemon=True).start()
    return True
