"""Parsing of the command line, for the harness and the launcher."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from harness.errors import record_for_torchrun

if TYPE_CHECKING:  # argparse's class cannot be subscripted when the program runs
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Subparsers = argparse._SubParsersAction


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors torchrun shows too."""

    def error(self, message: str) -> NoReturn:
        record_for_torchrun(message)
        super().error(message)


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse `arguments`; key=value may stand anywhere, although argparse wants them in one piece.

    Exits with code 2 for a word that no command takes.
    """
    options, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if "=" not in word or word.startswith("-")]
    if unknown or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    if rest:
        options.overrides += rest
    return options


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add CONFIG and key=value … to a command."""
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as recipe.epochs=30"
    )
