"""YAML without PyYAML's traps: safe, no silent duplicates, 1e-4 is a number."""

from __future__ import annotations

import re
from typing import Any

import yaml

from harness.config.errors import config_error

FLOAT, INT = "tag:yaml.org,2002:float", "tag:yaml.org,2002:int"
REPLACED = (FLOAT, INT, "tag:yaml.org,2002:timestamp")
OTHER_RESOLVERS = {
    first: [pair for pair in pairs if pair[0] not in REPLACED]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
DIGITS = r"[0-9][0-9_]*"
NUMBER = rf"[-+]?(?:(?:{DIGITS}\.[0-9_]*|\.{DIGITS})(?:e[-+]?[0-9]+)?|{DIGITS}e[-+]?[0-9]+)"
FLOAT_PATTERN = re.compile(rf"^(?:{NUMBER}|[-+]?\.inf|\.nan)$", re.IGNORECASE)
INT_PATTERN = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$")


class _Loader(yaml.SafeLoader):
    """A loader of plain values only.

    1e-4 is a number. 4:00:00, 010 and dates are text, and so refused where a number is expected.
    A key that is written twice is an error.
    """

    yaml_implicit_resolvers = OTHER_RESOLVERS

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (first := lines.get((key.tag, key.value))) is not None:
                problem = f"key {key.value!r} is written twice (first on line {first + 1})"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            lines[key.tag, key.value] = key.start_mark.line
        return node


class _Dumper(yaml.SafeDumper):
    """A dumper of lists on one line, which quotes text that any YAML reader takes for a number."""


_Loader.add_implicit_resolver(FLOAT, FLOAT_PATTERN, list("-+.0123456789"))
_Loader.add_implicit_resolver(INT, INT_PATTERN, list("-+0123456789"))
_Dumper.add_implicit_resolver(FLOAT, FLOAT_PATTERN, list("-+.0123456789"))
_Dumper.add_representer(
    list, lambda self, data: self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
)


def read_yaml(text: str, source: str) -> object:
    """Return the value of the one document in `text`.

    Raises ConfigError, which names `source` and, where it is known, the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise config_error(source, [f"{line}{error.problem}"]) from None
    except (yaml.YAMLError, ValueError, LookupError, RecursionError) as error:
        raise config_error(source, [f"broken YAML: {str(error).splitlines()[0]}"]) from None


def write_yaml(mapping: dict[str, object]) -> str:
    """Write a mapping in block style, keys in their order; `read_yaml` returns it unchanged."""
    return yaml.dump(mapping, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
