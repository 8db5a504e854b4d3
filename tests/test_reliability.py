"""docs/reliability.md and the tests it names belong together."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "reliability.md").read_text()


def test_each_promise_names_tests_that_exist_and_run():
    promised = TEXT.partition("## What it costs")[0]
    rows = [row for row in promised.splitlines() if row.startswith("| ") and " --- " not in row]
    promises = [row for row in rows if not row.startswith("| promise ")]
    assert len(promises) >= 25
    for row in promises:
        assert "`tests/" in row, row
    for file, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", TEXT):
        tree = ast.parse((ROOT / file).read_text())
        tests = {n.name: n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
        if name:
            marks = " ".join(map(ast.unparse, tests[name].decorator_list))
            assert "skip" not in marks and "xfail" not in marks, name
        assert any(test.startswith("test_") for test in tests), file


def test_each_test_of_a_fault_stands_in_the_list():
    for file in ("test_faults.py", "resilience/test_watchdog.py", "test_elastic.py"):
        tree = ast.parse((ROOT / "tests" / file).read_text())
        names = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
        for name in (name for name in names if name.startswith("test_")):
            assert f"`tests/{file}::{name}`" in TEXT, name
