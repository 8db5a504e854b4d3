"""The reference of the config's keys, generated from the facts on each key in the schema."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from harness.config.errors import config_error, format_value, nearest_key
from harness.config.schema import Config
from harness.config.section import Effect, Section

TYPES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
    "object": "names and values",
}
BOUNDS = {
    "minimum": "at least {:g}",
    "exclusiveMinimum": "more than {:g}",
    "maximum": "at most {:g}",
    "exclusiveMaximum": "less than {:g}",
}
NO_VALUE = REQUIRED, DERIVED = "required", "derived"
WORTH_A_WORD = 1e5  # larger bounds only keep numbers within the types of PyTorch
LINE = 100  # characters
Schema = dict[str, Any]  # as pydantic types it


@dataclass(frozen=True)
class Key:
    """A config key. `name` is dotted; `values` and `default` are words for people."""

    name: str
    values: str
    default: str
    unit: str
    effect: Effect
    description: str

    @property
    def section(self) -> str:
        """Name of its section; "" at the top level."""
        return self.name.rpartition(".")[0]


def sections() -> dict[str, type[Section]]:
    """Return the sections of a config by name, in the order of the schema."""
    found = {}
    for name, field in Config.model_fields.items():
        if section := _section_of(field):
            found[name] = section
    return found


def key_names() -> list[str]:
    """Return all sections, and all keys as section.key."""
    keys = [f"{name}.{key}" for name, section in sections().items() for key in section.model_fields]
    return [*Config.model_fields, *keys]


@cache
def keys() -> tuple[Key, ...]:
    """Return all keys in the order of the schema."""
    schema = Config.model_json_schema()
    top = {name: f for name, f in Config.model_fields.items() if not _section_of(f)}
    found = [_key(name, field, Config, schema) for name, field in top.items()]
    for name, section in sections().items():
        own = schema["$defs"][section.__name__]
        found += [_key(f"{name}.{k}", f, section, own) for k, f in section.model_fields.items()]
    return tuple(found)


@cache
def names_with(*effects: Effect) -> tuple[str, ...]:
    """Return the dotted names of the keys that have one of these effects."""
    return tuple(key.name for key in keys() if key.effect in effects)


def value_of(config: Config, name: str) -> object:
    """Return the value of the key with this dotted name; None where its section is missing."""
    value: object = config
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


def json_schema() -> str:
    """Return the JSON schema of config files, for editors."""
    schema = Config.model_json_schema()
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "harness config"}
    return json.dumps(head | {k: v for k, v in schema.items() if k != "title"}, indent=2) + "\n"


def render_reference(name: str = "") -> str:
    """Return the reference of all keys, of a section, or in full of one key, for a terminal.

    Raises ConfigError for an unknown name.
    """
    by_name = {key.name: key for key in keys()}
    if name in by_name:
        return "\n".join(_in_full(by_name[name]))
    if name and name not in sections():
        section = name.partition(".")[0]
        unknown = name if section in sections() else section
        problem = f"{unknown}: unknown key{nearest_key(unknown, key_names())}"
        raise config_error("harness config", [problem])
    blocks = []
    for section, heading in _headings():
        if name in ("", section):
            shown = [key for key in keys() if key.section == section]
            blocks.append("\n".join([heading, *(line for key in shown for line in _briefly(key))]))
    return "\n\n".join(blocks)


def render_markdown() -> str:
    """Return docs/config.md."""
    lines = [
        "# Config keys",
        "",
        "`harness config` prints this reference, and `harness config KEY` one key. This page and",
        "`configs/schema.json` are generated from the schema by `make reference`. An editor with a",
        "YAML language server completes and checks the keys of a config that begins with",
        "`# yaml-language-server: $schema=PATH/TO/configs/schema.json`.",
        "",
        "Each key has one effect:",
        "",
        *(f"- **{effect.value}**: {effect.explanation}" for effect in Effect),
    ]
    for section, heading in _headings():
        lines += ["", f"## {heading}", ""]
        lines += ["| key | value | default | unit | effect | meaning |", "| - " * 6 + "|"]
        for key in keys():
            if key.section == section:
                default = key.default if key.default in NO_VALUE else f"`{key.default}`"
                cells = f"`{key.name}`", key.values, default, key.unit, key.effect.value
                lines.append("| " + " | ".join((*cells, key.description)) + " |")
    return "\n".join(lines) + "\n"


def _headings() -> Iterator[tuple[str, str]]:
    yield "", "Top level"
    for name, section in sections().items():
        yield name, f"{name}: {(section.__doc__ or '').splitlines()[0]}"


def _briefly(key: Key) -> list[str]:
    description = textwrap.fill(
        key.description, LINE, initial_indent=" " * 6, subsequent_indent=" " * 6
    )
    facts = [key.values, key.default if key.default in NO_VALUE else f"default {key.default}"]
    facts += [key.unit] * bool(key.unit) + [key.effect.value]
    return [f"  {key.name}  ({'; '.join(facts)})", description]


def _in_full(key: Key) -> list[str]:
    return [
        key.name,
        f"  {key.description}",
        f"  value    {key.values}",
        f"  default  {key.default}",
        *[f"  unit     {key.unit}"] * bool(key.unit),
        f"  effect   {key.effect.value}: {key.effect.explanation}",
    ]


def _section_of(field: FieldInfo) -> type[Section] | None:
    """Return the section that a field of the config holds, also where it is optional."""
    union = get_origin(field.annotation) in (Union, UnionType)
    for kind in get_args(field.annotation) if union else (field.annotation,):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def _key(name: str, field: FieldInfo, section: type[Section], schema: Schema) -> Key:
    extra = field.json_schema_extra
    assert isinstance(extra, dict)  # made by `key`
    own = schema["properties"][name.rpartition(".")[2]]
    if field.is_required():
        default = REQUIRED
    elif field.default_factory is not None:
        default = DERIVED
    else:
        text = list(field.default) if isinstance(field.default, tuple) else field.default
        default = text if isinstance(text, str) else format_value(text)
    effect = Effect(extra["effect"]) if "effect" in extra else section.effect
    description = field.description or ""
    return Key(name, _values(own), default, str(extra.get("unit", "")), effect, description)


def _values(schema: Schema) -> str:
    """Describe the values that a key's JSON schema admits."""
    if "anyOf" in schema:
        return " or ".join(map(_values, schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        *others, last = map(str, schema.get("enum", [schema.get("const")]))
        return f"{', '.join(others)} or {last}" if others else last
    if schema["type"] == "array":
        items = schema.get("prefixItems") or [schema["items"]]
        count = f"{len(items)} values" if "prefixItems" in schema else "list"
        return f"{count}, each a {_values(items[0])}"
    bounds = {b: schema[b] for b in BOUNDS if b in schema and abs(schema[b]) <= WORTH_A_WORD}
    if {"minimum", "maximum"} <= bounds.keys():
        return f"{TYPES[schema['type']]} from {bounds['minimum']:g} to {bounds['maximum']:g}"
    return ", ".join([TYPES[schema["type"]], *(BOUNDS[b].format(v) for b, v in bounds.items())])
