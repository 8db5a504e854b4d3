"""Objects that installed packages add through entry points."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from harness.config.errors import ConfigError
from harness.errors import UserError


def installed(group: str) -> dict[str, EntryPoint]:
    """Return the entry points of `group` by name, without importing their packages."""
    return {point.name: point for point in entry_points(group=group)}


def load(point: EntryPoint, key: str) -> object:
    """Import the object that `point` names. Raises UserError for the config key `key`."""
    try:
        return point.load()
    except Exception as error:  # the module of another may raise anything
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{key}: {point.value} cannot be imported: {why}; repair or uninstall its package"
        ) from error


def find(group: str, name: str, key: str, kind: str, built_in: str) -> object:
    """Import the object that a package registers in `group` under `name`.

    Raises ConfigError, which lists the known names, where no package does, and UserError as `load`.
    """
    points = installed(group)
    if name not in points:
        known = ", ".join([built_in, *sorted(points)])
        raise ConfigError(f"{key}: no {kind} {name!r}; take one of {known}, or install its package")
    return load(points[name], key)
