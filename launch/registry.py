"""Launchers by name: SLURM, this machine, and those of installed packages."""

from __future__ import annotations

import difflib
from typing import cast

from harness.errors import UserError
from harness.installed import installed, load
from launch.backend import Backend
from launch.records import LOCAL

GROUP = "launch.backends"  # where packages register a class that fulfils `Backend`


def find_backend(name: str) -> Backend:
    """Return the launcher `name`. Raises UserError for an unknown one or a broken package."""
    if name == "slurm":
        from launch.slurm.backend import SlurmBackend

        return SlurmBackend()
    if name == LOCAL:
        from launch.local.backend import LocalBackend

        return LocalBackend()
    points = installed(GROUP)
    if name not in points:
        nearest = difflib.get_close_matches(name, ["slurm", *points], n=1, cutoff=0.0)[0]
        raise UserError(
            f"backend: no launcher {name!r}; did you mean {nearest!r}? Others need their package "
            "installed"
        )
    make = cast(type[Backend], load(points[name], "backend"))
    try:
        return make()
    except Exception as error:  # the code of another may raise anything
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"backend: {points[name].value} cannot be used: {why}") from error
