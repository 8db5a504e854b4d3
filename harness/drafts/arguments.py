"""The recorded arguments of timm's and torchvision's training scripts."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.config.errors import ConfigError
from harness.config.yaml import read_yaml
from harness.errors import UserError

Arguments = Mapping[str, object]

SHORT = {"b": "batch_size", "j": "workers"}  # torchvision's options of one letter
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Recorded:
    """Arguments by their names in Python; `program` is "timm" or "torchvision"."""

    program: str
    values: Arguments

    @property
    def name(self) -> str:
        """Name of the file, for people."""
        return {"timm": "timm's args.yaml", "torchvision": "torchvision's train.py"}[self.program]


def read_arguments(file: Path) -> Recorded:
    """Read timm's args.yaml, or a file with the command line of torchvision's train.py.

    Raises UserError for any other file.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"--from {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--from {file}: not a text file") from None
    if re.search(r"(^|\s)--?[a-z]", text):
        return Recorded("torchvision", _command_line(text, file))
    try:
        values = read_yaml(text, str(file))
    except ConfigError as error:
        raise UserError(f"--from {error}") from None
    if not isinstance(values, dict) or not {"model", "batch_size"} <= values.keys():
        raise UserError(
            f"--from {file}: neither an args.yaml of timm (with model and batch_size) nor a "
            "command line of torchvision's train.py (--model resnet50 --lr 0.1 …)"
        )
    return Recorded("timm", values)


def _command_line(text: str, file: Path) -> Arguments:
    """Parse `--lr 0.5 --model=resnet50 -b 32 --sync-bn`, whatever command stands before it."""
    try:
        words = shlex.split(text.replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise UserError(f"--from {file}: {str(error).lower()}") from None
    scripts = [place for place, word in enumerate(words) if word.endswith(".py")]
    values: dict[str, object] = {}
    name = ""
    for word in words[scripts[-1] + 1 if scripts else 0 :]:
        if word.startswith("-") and not NUMBER.fullmatch(word):
            option, equals, given = word.lstrip("-").partition("=")
            name = SHORT.get(option, option).replace("-", "_")
            values[name] = _value(given) if equals else True  # a flag, until a value follows
        elif name:
            values[name] = _value(word)
            name = ""
        else:
            raise UserError(f"--from {file}: {word!r} follows no option")
    return values


def _value(text: str) -> object:
    if not NUMBER.fullmatch(text):
        return text
    return int(text) if text.lstrip("+-").isdigit() else float(text)


def getter(values: Arguments) -> Callable[[str, float], float]:
    """Return a function of an argument's name and default that returns its number."""

    def number(name: str, default: float) -> float:
        value = values.get(name)
        if value is None or isinstance(value, bool):
            return default
        if not isinstance(value, int | float):
            raise UserError(f"--from: {name} is {value!r}, not a number")
        return value

    return number
