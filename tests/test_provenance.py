"""Which code ran: the digest of its files, and the commit where git knows one."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import harness
from benchmarks.conditions import write_results
from harness.provenance import code_digest, describe_environment, git_commit

HARNESS = Path(harness.__file__).parent


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes a package of these files into a folder of its own; returns its digest."""
    code_digest.cache_clear()
    number = iter(range(100))

    def write(files, name="plugged"):
        sys.modules.pop(name, None)
        parent = tmp_path / str(next(number))
        for file, content in files.items():
            path = parent / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        monkeypatch.setattr(sys, "path", [str(parent), *sys.path])
        code_digest.cache_clear()
        return code_digest((name,))

    yield write
    code_digest.cache_clear()


FILES = {"__init__.py": b"", "a.py": b"x = 1\n", "sub/b.py": b"y = 2\n"}


def test_the_digest_is_that_of_names_and_bytes(package):
    digest = hashlib.sha256()
    for name in sorted(FILES):
        content = hashlib.sha256(FILES[name]).hexdigest()
        digest.update(f"plugged/{name}\0{content}\n".encode())
    assert package(FILES) == digest.hexdigest()
    # nor do the folder, the order of writing and what cannot be imported change it
    other = {"page.html": b"<p>", ".#a.py": b"?", ".ipynb_checkpoints/a-checkpoint.py": b"?"}
    assert package(other | dict(reversed(FILES.items()))) == digest.hexdigest()


@pytest.mark.parametrize(
    "files",
    [
        FILES | {"a.py": b"x = 2\n"},
        FILES | {"c.py": b""},
        {"__init__.py": b"", "b.py": b"x = 1\n", "sub/b.py": b"y = 2\n"},  # renamed
        {"__init__.py": b"", "a.py": b"y = 2\n", "sub/b.py": b"x = 1\n"},  # swapped
        {"__init__.py": b"", "a.py": b"x = 1\n"},
    ],
)
def test_any_change_of_the_code_changes_the_digest(package, files):
    assert package(files) != package(FILES)


def test_plug_ins_count_beside_the_harness(package):
    package(FILES)
    assert len({code_digest(), code_digest(("harness", "plugged")), code_digest(("plugged",))}) == 3
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        code_digest(("no_such_package",))


def test_every_module_of_the_harness_is_in_its_digest():
    from harness.provenance import source_files

    names = {name for name, _ in source_files("harness")}
    assert names == {
        f"harness/{path.relative_to(HARNESS).as_posix()}" for path in HARNESS.rglob("*.py")
    }


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_that_of_the_code_and_not_of_a_project_around_it(tmp_path):
    assert git_commit(tmp_path) is None
    code = tmp_path / "code"
    code.mkdir()
    (code / "a.py").write_text("x = 1\n")
    git(tmp_path, "init", "-q")
    (tmp_path / "other").write_text("")
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "-qm", "without the code")
    assert git_commit(code) is None
    git(tmp_path, "add", "code")
    git(tmp_path, "commit", "-qm", "with the code")
    git(tmp_path, "tag", "-am", "a release", "v1")  # a name that can be moved to another commit
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_commit(code) == commit
    (code / "a.py").write_text("x = 2\n")
    assert git_commit(code) == f"{commit}-dirty"


def test_without_git_the_environment_is_described_without_a_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    environment = describe_environment(torch.device("cpu"), 3)
    assert environment["git_commit"] is None
    assert environment["code_digest"] == code_digest()
    assert environment["versions"]["torch"] == str(torch.__version__)
    assert environment["ranks"] == 3


def test_without_git_a_benchmark_writes_its_results_without_a_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    path = write_results("loaders", {"rows": []}, tmp_path)
    assert json.loads(path.read_text())["commit"] is None
