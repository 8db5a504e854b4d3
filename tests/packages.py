"""Packages that add to the harness, taken from the pages of docs/ and installed for a test."""

import re
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def package_of(page: str) -> dict[str, str]:
    """The files of a page's example package: name -> text. The page names each before its block."""
    text = (DOCS / page).read_text()
    return dict(
        re.findall(r"`(\S+\.(?:py|toml))`[^`]*(?:`[^`]+`[^`]*)?```\w+\n(.*?)```", text, re.S)
    )


def commands_of(page: str) -> list[list[str]]:
    """The `harness` command lines of a page, without the first word."""
    lines = (DOCS / page).read_text().splitlines()
    return [line.split()[1:] for line in lines if line.startswith("harness ")]


def install_page(page: str, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a page's package for this process, with the entry point of its pyproject.toml."""
    files = package_of(page)
    ((group, point, value),) = re.findall(
        r'entry-points\."(.*?)"\]\n(\w+) = "(.*?)"', files["pyproject.toml"]
    )
    ((name, module),) = [item for item in files.items() if item[0].endswith(".py")]
    install(site, monkeypatch, Path(name).stem, module, group, f"{point} = {value}")


def install(
    site: Path, monkeypatch: pytest.MonkeyPatch, module: str, code: str, group: str, point: str
) -> None:
    """Write a module and its entry point below `site`, as pip does, and let Python find them."""
    info = site / f"{module}-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (site / f"{module}.py").write_text(code)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{point}\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, module, raising=False)
