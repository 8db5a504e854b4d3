"""What is wrong with a config, in one plain line: file, key, what was found, what is expected."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness.errors import UserError

EXPECTED = {  # by pydantic's error types
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text",
    "tuple_type": "a list",
    "too_long": "at most {max_length} items",
    "model_type": "a section of keys",
    "invalid_key": "a word as a key",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
}


class ConfigError(UserError):
    """A config that cannot be used."""


def config_error(source: str | Path, problems: Sequence[str]) -> ConfigError:
    """The first problem and the number of the others."""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return ConfigError("\\n".join(f"{source}: {problems[0]}{more}".splitlines()))


def explain(error: ValidationError, known: Sequence[str]) -> list[str]:
    """`key: what is wrong` for every key with a mistake; `known` holds all sections and keys."""
    problems: list[str] = []
    by_key: dict[str, list[Any]] = {}
    # a misspelt key is often missing too: the spelling first
    for item in sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden"):
        if item["type"] == "default_factory_not_called":  # follows from another key's mistake
            continue
        if item["type"] == "value_error":  # an impossible combination, which names its keys itself
            problems += str(item["ctx"]["error"]).splitlines()
            continue
        # sections are one deep; below are places of a list, and names of a union's members
        places = "".join(f"[{part}]" for part in item["loc"][2:] if isinstance(part, int))
        by_key.setdefault(".".join(map(str, item["loc"][:2])) + places, []).append(item)
    return problems + [f"{key}: {_problem(key, items, known)}" for key, items in by_key.items()]


def found(value: Any) -> str:
    """A value as its user wrote it, kept short."""
    if isinstance(value, dict):
        return "a section of keys" if value else "{}"
    words = {True: "true", False: "false", None: "null"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _problem(key: str, items: list[Any], known: Sequence[str]) -> str:
    kind, value = items[0]["type"], items[0]["input"]
    if kind == "extra_forbidden":
        return f"unknown key{nearest_key(key, known)}"
    if kind == "missing":
        return "missing, and has no default; add it"
    expected = " or ".join(_expected(item) for item in items)
    choices = [choice for item in items for choice in _choices(item)]
    close = get_close_matches(value.lower(), choices, 1) if isinstance(value, str) else []
    nearest = f", did you mean {close[0]}?" if close else ""
    return f"expected {expected}, found {found(value)}{nearest}"


def _expected(item: Any) -> str:
    if item["type"] == "literal_error":
        return item["ctx"]["expected"].replace("'", "")
    limits = item.get("ctx", {}).items()
    plain = {name: f"{v:g}" if isinstance(v, float) else v for name, v in limits}
    return EXPECTED.get(item["type"], item["msg"]).format_map(plain)


def _choices(item: Any) -> list[str]:
    return (
        re.findall(r"'(\w+)'", item["ctx"]["expected"]) if item["type"] == "literal_error" else []
    )


def nearest_key(key: str, known: Sequence[str]) -> str:
    """In the same section first, then anywhere: `minibach` is nearest to recipe.minibatch."""
    section, _, last = key.rpartition(".")
    siblings = [k for k in known if k.rpartition(".")[0] == section]
    for candidates in (siblings, known):
        names = {k.rpartition(".")[2]: k for k in candidates}
        if close := get_close_matches(last, names, 1):
            return f", did you mean {names[close[0]]}?"
    return f"; known here: {', '.join(k.rpartition('.')[2] for k in siblings)}"
