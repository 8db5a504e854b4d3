"""What `pip install` takes along."""

import sys
from pathlib import Path

import setuptools.dist  # noqa: F401 (from Python 3.12 on, distutils is setuptools' own)

from distutils.core import run_setup  # isort: skip


ROOT = Path(__file__).parents[1]


def test_an_installation_has_every_package(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["setup.py"])
    packages = run_setup("setup.py", stop_after="init").packages
    there = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for package in ("harness", "launch")
        for path in (ROOT / package).rglob("*.py")
    }
    assert set(packages) == there
