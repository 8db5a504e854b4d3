"""Loggers of installed packages, which `run.loggers` names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from harness.errors import UserError
from harness.installed import installed, load
from harness.runs.logging.sink import OpenSink

GROUP = "harness.loggers"


def load_loggers(names: Sequence[str]) -> dict[str, OpenSink]:
    """Import the loggers that installed packages register under `names`. Raises UserError."""
    points = installed(GROUP) if names else {}
    loaded: dict[str, OpenSink] = {}
    for name in names:
        if name not in points:
            known = ", ".join(sorted(points)) or "none"
            raise UserError(
                f"run.loggers: {name} is not installed (found: {known}); install a package with "
                f"an entry point of that name in the group {GROUP}, or remove it"
            )
        loaded[name] = cast(OpenSink, load(points[name], "run.loggers"))
    return loaded
