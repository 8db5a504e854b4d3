"""Reading a config from YAML and the command line, writing it, and comparing two of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from harness.config.errors import ConfigError, config_error, explain, format_value
from harness.config.reference import key_names, sections
from harness.config.schema import Config
from harness.config.section import Effect
from harness.config.yaml import read_yaml, write_yaml


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load the config at `path`, with `section.key=value` overrides.

    The file's `expect` belongs to the file's recipe, so the config has none where the overrides
    change the recipe and do not override `expect`, too. Raises ConfigError for a file that cannot
    be read, for broken YAML and for every broken rule.
    """
    mapping = read_mapping(path, expected="sections of keys (expect, data, …)")
    if len(keys := [override.partition("=")[0] for override in overrides]) != len(set(keys)):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise config_error("command line", [f"{twice}: given twice; give it once"])
    source = f"{path} + command line" if overrides else str(path)
    config = config_from_mapping(mapping, source, overrides)
    return keep_expectation(config, overrides, partial(config_from_mapping, mapping, source))


def read_mapping(path: str | Path, expected: str = "keys") -> dict[str, object]:
    """Read a YAML file that holds a mapping.

    `expected` describes it to the user. Raises ConfigError where the file cannot be read or holds
    anything else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise config_error(path, [f"cannot be read: {error.strerror or error}"]) from None
    except UnicodeDecodeError:
        raise config_error(path, ["cannot be read: not a text file in UTF-8"]) from None
    mapping = read_yaml(text, str(path))
    if not isinstance(mapping, dict):
        what = "an empty file" if mapping is None else format_value(mapping)
        raise config_error(path, [f"expected {expected}, found {what}"])
    return mapping


def keep_expectation(
    config: Config, overrides: Sequence[str], stated: Callable[[Sequence[str]], Config]
) -> Config:
    """Return `config`, without its `expect` where `overrides` change the recipe.

    `stated` loads the config as its file states it, with the overrides of `run:` that it is given.
    Overrides of the seed and of `run:` change no recipe. An override of `expect` itself is for the
    overridden recipe.
    """
    changed = {override.partition("=")[0].partition(".")[0] for override in overrides}
    if "expect" in changed or changed <= {"seed", "run"}:
        return config
    try:
        before = stated([override for override in overrides if override.startswith("run.")])
    except ConfigError:
        before = None  # the file is incomplete, so the overrides are part of the recipe
    if before is None or curve_differences(before, config.model_copy(update={"seed": before.seed})):
        return config.model_copy(update={"expect": None})
    return config


def config_from_mapping(
    mapping: dict[str, object], source: str, overrides: Sequence[str] = ()
) -> Config:
    """Check a mapping, from a file or from a checkpoint, and return its config.

    Raises ConfigError, which names `source` and the key.
    """
    for override in overrides:
        mapping = _with_override(mapping, override)
    try:
        return Config.model_validate(mapping)
    except ValidationError as error:
        raise config_error(source, explain(error, key_names())) from None


def dump_config(config: Config) -> str:
    """Return the YAML of all resolved keys, without those that another value makes meaningless."""
    return write_yaml(config.model_dump(mode="json"))


def curve_differences(a: Config, b: Config) -> list[str]:
    """Return `key: value in a -> value in b` for every key of the curve that differs."""
    old, new = _curve_values(a), _curve_values(b)
    return [
        f"{key}: {format_value(old.get(key))} -> {format_value(new.get(key))}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]


def curve_digest(config: Config) -> str:
    """Return the SHA-256 (hex) of the keys of the curve that differ from their defaults.

    A later version that adds keys gives the same digest.
    """
    values = dict(sorted(_curve_values(config, exclude_defaults=True).items()))
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _curve_values(config: Config, exclude_defaults: bool = False) -> dict[str, object]:
    beside = {name for name, section in sections().items() if section.effect is not Effect.CURVE}
    values = config.model_dump(mode="json", exclude=beside, exclude_defaults=exclude_defaults)
    return dict(_leaves(values))


def _leaves(values: dict[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield (dotted name, value), of sections and of options within them."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def default_run_folder(path: str | Path) -> Path:
    """Map configs/imagenet/x.yaml to runs/imagenet/x, and x.yaml of any other folder to runs/x."""
    plain = Path(os.path.normpath(path)).with_suffix("")  # has no ".." that would leave runs/
    folders = plain.parts[:-1]
    below = folders[len(folders) - folders[::-1].index("configs") :] if "configs" in folders else ()
    return Path("runs", *below, plain.name)


def _with_override(mapping: dict[str, object], override: str) -> dict[str, object]:
    """Return a copy of `mapping` with `section.key=value` applied."""
    key, equals, text = override.partition("=")
    *sections, last = key.split(".")
    if not (equals and last and all(sections)):
        raise config_error("command line", [f"{override!r}: expected section.key=value"])
    mapping = inner = dict(mapping)
    for depth, name in enumerate(sections, 1):
        below = {} if inner.get(name) is None else inner[name]
        if not isinstance(below, dict):
            name = ".".join(sections[:depth])
            raise config_error(
                "command line", [f"{key}: {name} is {format_value(below)} and has no keys"]
            )
        inner[name] = copy = dict(below)
        inner = copy
    value = read_yaml(text, f"command line: {key}")
    if value is None and last in inner:
        del inner[last]  # null removes the file's value, so the key has its default
    else:
        inner[last] = value
    return mapping
