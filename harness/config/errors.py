"""Errors of a config as one plain line: file, key, what is expected, what was found."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from harness.errors import UserError

EXPECTED = {  # by pydantic's type of error
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text",
    "tuple_type": "a list",
    "dict_type": "names and values",
    "too_long": "at most {max_length} items",
    "model_type": "a section of keys",
    "invalid_key": "a word as a key",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
}


class ConfigError(UserError):
    """A config file, key or value that cannot be used."""


def config_error(source: str | Path, problems: Sequence[str]) -> ConfigError:
    """Return an error of one line: the first problem, and how many more there are."""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return ConfigError("\\n".join(f"{source}: {problems[0]}{more}".splitlines()))


def explain(error: ValidationError, known: Sequence[str]) -> list[str]:
    """Return `key: what is wrong` for each wrong key; `known` holds all sections and keys."""
    problems: list[str] = []
    by_key: dict[str, list[ErrorDetails]] = {}
    # A misspelt required key is reported as missing, too: put the spelling first.
    for item in sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden"):
        if item["type"] == "default_factory_not_called":  # a consequence of another key's mistake
            continue
        if item["type"] == "value_error":  # from Section.problems, which names the keys
            problems += str(item["ctx"]["error"]).splitlines()
            continue
        # Sections are one level deep; below are list indices and the names of union members.
        places = "".join(f"[{part}]" for part in item["loc"][2:] if isinstance(part, int))
        by_key.setdefault(".".join(map(str, item["loc"][:2])) + places, []).append(item)
    return problems + [f"{key}: {_problem(key, items, known)}" for key, items in by_key.items()]


def format_value(value: object) -> str:
    """Format a value as its user wrote it, shortened to 80 characters."""
    if isinstance(value, dict):
        return "a section of keys" if value else "{}"
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _problem(key: str, items: list[ErrorDetails], known: Sequence[str]) -> str:
    kind, value = items[0]["type"], items[0]["input"]
    if kind == "extra_forbidden":
        return f"unknown key{nearest_key(key, known)}"
    if kind == "missing":
        return "missing, and has no default; add it"
    expected = " or ".join(_expected(item) for item in items)
    choices = [choice for item in items for choice in _choices(item)]
    close = get_close_matches(value.lower(), choices, 1) if isinstance(value, str) else []
    nearest = f", did you mean {close[0]}?" if close else ""
    return f"expected {expected}, found {format_value(value)}{nearest}"


def _expected(item: ErrorDetails) -> str:
    if item["type"] == "literal_error":
        return item["ctx"]["expected"].replace("'", "")
    limits = item.get("ctx", {}).items()
    plain = {name: f"{v:g}" if isinstance(v, float) else v for name, v in limits}
    return EXPECTED.get(item["type"], item["msg"]).format_map(plain)


def _choices(item: ErrorDetails) -> list[str]:
    return (
        re.findall(r"'(\w+)'", item["ctx"]["expected"]) if item["type"] == "literal_error" else []
    )


def nearest_key(key: str, known: Sequence[str]) -> str:
    """Suggest the nearest key of the same section, or of any: recipe.minibatch for `minibach`.

    Where none is near, list the keys of the section.
    """
    section, _, last = key.rpartition(".")
    siblings = [k for k in known if k.rpartition(".")[0] == section]
    for candidates in (siblings, known):
        names = {k.rpartition(".")[2]: k for k in candidates}
        if close := get_close_matches(last, names, 1):
            return f", did you mean {names[close[0]]}?"
    return f"; known here: {', '.join(k.rpartition('.')[2] for k in siblings)}"
