"""The last line of a command that fails, on standard error."""

from __future__ import annotations

import os
import sys
import time

from harness.errors import UserError, record_for_torchrun
from harness.outcome import RunFailed, Stopped

TORCHRUN_ENDS_OTHERS_S = 2.0


def is_first_rank() -> bool:
    """Return whether this process is rank 0, by the variables of torchrun or srun."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0


def failure(error: Exception) -> str | None:
    """Return the line that explains a failed run or a lost rank; None for any other error."""
    from harness.compat import describe_peer_loss

    if isinstance(error, RunFailed):
        return str(error)
    if isinstance(error, UserError | Stopped) or not (lost := describe_peer_loss(error)):
        return None
    return f"another rank ended or is silent: {lost}"


def complain(message: str) -> None:
    """Print an error as one line.

    Local ranks fail alike: the first one prints, and the launcher ends the others before they
    would. A rank that fails alone is still heard.
    """
    record_for_torchrun(message)
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    prefix = "error: "
    if local_rank > 0:
        time.sleep(TORCHRUN_ENDS_OTHERS_S)
        prefix = f"error: rank {os.environ.get('RANK', os.environ.get('SLURM_PROCID'))}: "
    print(prefix + " ".join(message.split()), file=sys.stderr, flush=True)
