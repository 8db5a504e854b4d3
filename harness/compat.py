"""Private parts of dependencies that the harness reads, each with its reason."""

from __future__ import annotations

import sys


def compiler_phases() -> int:
    """Return how many phases of compilation this process has begun, forward and backward.

    The number grows every few seconds while graphs are compiled, which may take many minutes.
    """
    utils = sys.modules.get("torch._dynamo.utils")  # nothing is compiled before its import
    return sum(map(len, list(utils.compilation_time_metrics.values()))) if utils else 0
