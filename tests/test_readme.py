"""The README's example runs as it stands there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_example_runs(digits, tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 15
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits").symlink_to(digits)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert 0 <= names["result"].error <= 100
    assert (tmp_path / "runs" / "mine" / "status.json").exists()
    assert names["model"].training and names["step"] == 2
