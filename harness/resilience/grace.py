"""The time that a run has between a stop signal and its end, stated once for ranks and launchers.

SLURM kills a job 30 s after TERM (KillWait), and torchrun its ranks as long after a signal. A
rank gives the step under way `grace_s` seconds; then the watchdog ends it. Writing the status and
letting the other ranks read the verdict takes up to `SPARE_S` more. After that a launcher kills
the rank, and still has time to requeue the job.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from harness.errors import UserError

KILL_WAIT_S = 30.0  # SLURM's and torchrun's default
GRACE_S = 20.0
SPARE_S = 7.0


def grace_s(environment: Mapping[str, str] = os.environ) -> float:
    """Return the seconds a rank may take after a stop signal: HARNESS_GRACE_S, if it is set.

    Raises UserError where that is not a number above 0.
    """
    text = environment.get("HARNESS_GRACE_S", str(GRACE_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"HARNESS_GRACE_S={text}: give seconds, such as 20")
    return seconds


def kill_after_s(environment: Mapping[str, str] = os.environ) -> float:
    """Return the seconds after a stop signal at which a launcher kills its rank.

    Raises UserError as `grace_s`.
    """
    return grace_s(environment) + SPARE_S
