"""Lustre's striping of archives: with one stripe, a single server answers all reads."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence

from harness.data.sources.tar.reader import Archive

LFS_TIMEOUT_S = 10


def warn_of_one_stripe(archives: Sequence[Archive]) -> None:
    """Print a warning for the first archive that Lustre keeps in one stripe.

    Asks `lfs`, which fails on other file systems. Has been tried with a stub only.
    """
    lfs = shutil.which("lfs")
    for archive in archives if lfs else []:
        command = [str(lfs), "getstripe", "-c", str(archive.path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LFS_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired):
            return
        if done.returncode != 0:
            return
        if done.stdout.strip() == "1":
            print(
                f"warning: {archive.path}: lies in one stripe, so one server of Lustre answers all "
                f"reads; spread it: lfs migrate -c -1 {archive.path}",
                file=sys.stderr,
            )
            return
