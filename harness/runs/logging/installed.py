"""Loggers of installed packages, which `run.loggers` names."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points

from harness.errors import UserError
from harness.runs.logging.sink import OpenSink

GROUP = "harness.loggers"


def load_loggers(names: Sequence[str]) -> dict[str, OpenSink]:
    """Import the loggers that installed packages register under `names`. Raises UserError."""
    installed = {point.name: point for point in entry_points(group=GROUP)} if names else {}
    loaded: dict[str, OpenSink] = {}
    for name in names:
        if name not in installed:
            known = ", ".join(sorted(installed)) or "none"
            raise UserError(
                f"run.loggers: {name} is not installed (found: {known}); install a package with "
                f"an entry point of that name in the group {GROUP}, or remove it"
            )
        try:
            loaded[name] = installed[name].load()
        except Exception as error:  # another's module may raise anything
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"run.loggers: {name} cannot be imported: {why}") from error
    return loaded
