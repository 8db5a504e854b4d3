"""Limits follow the machine's load, and a hang is found nevertheless."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import limits


def test_seconds_pass_more_slowly_where_processes_share_a_core(monkeypatch):
    clock, load = {"s": 0.0}, {"average": 1.0}
    monkeypatch.setattr(limits.time, "monotonic", lambda: clock["s"])
    monkeypatch.setattr(limits.os, "getloadavg", lambda: (load["average"], 0.0, 0.0))
    monkeypatch.setattr(limits.os, "sched_getaffinity", lambda pid: {0, 1})
    limit = limits.Limit(10)
    clock["s"] = 6.0  # one process on two cores: 6 seconds are 6
    assert not limit.is_over()
    load["average"] = 16.0  # 8 a core: 32 seconds are 4
    clock["s"] = 38.0
    assert not limit.is_over()
    clock["s"] = 39.0
    assert limit.is_over()


@pytest.mark.parametrize("where", ["the test", "its fixture"])
def test_a_hang_is_found(tmp_path, where):
    waits = "subprocess.run(['sleep', '1000'])"
    in_fixture, in_test = ("pass", waits) if where == "the test" else (waits, "pass")
    (tmp_path / "test_hang.py").write_text(f"""
import pytest, subprocess
@pytest.fixture(scope="module")
def made():
    {in_fixture}
@pytest.mark.timeout(0.5)
def test_hangs(made):
    {in_test}
def test_after():
    pass
""")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.limits", "-p", "no:cacheprovider"]
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)}
    out = subprocess.run([*command, tmp_path], env=environment, capture_output=True, text=True)
    assert out.returncode == 1, out.stdout
    assert "Timeout (>0.5s) from pytest-timeout" in out.stdout
    assert "1 passed" in out.stdout
