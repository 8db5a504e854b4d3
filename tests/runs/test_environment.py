"""Which code ran: the digest of its files, its commit, and what a change of it in mid-run says."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import harness
from benchmarks.conditions import write_results
from harness import load_config
from harness.report.events import run_events
from harness.report.runs import read_run
from harness.runs.checkpoint import list_checkpoints, load_checkpoint
from harness.runs.environment import (
    code_changes,
    code_digest,
    describe_environment,
    git_commit,
    package_files,
    recorded_code_changes,
)
from harness.runs.logging.jsonl import read_lines
from harness.training.run import Run
from harness.training.setup import train
from launch.records import Record, records_folder, write_records
from launch.status import table

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
    other["__pycache__/a.cpython-311.pyc"] = b"?"
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


def test_a_package_may_be_one_file(tmp_path, monkeypatch):
    (tmp_path / "one_file.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    content = hashlib.sha256(b"x = 1\n").hexdigest()
    expected = hashlib.sha256(f"one_file.py\0{content}\n".encode()).hexdigest()
    assert code_digest(("one_file",)) == expected


def test_every_module_of_the_harness_is_in_its_digest():
    names = {name for name, path in package_files("harness") if path.suffix == ".py"}
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


A, B = "a" * 40, "b" * 40
TORCH = {"harness": "0.1.0", "torch": "2.14.1+cpu", "numpy": "2.4.6", "dali": None}


@pytest.mark.parametrize(
    ("before", "after", "changes"),
    [
        ({"code_digest": A, "git_commit": A}, {"code_digest": A, "git_commit": A}, ""),
        # a commit of documents only is no other code
        ({"code_digest": A, "git_commit": A}, {"code_digest": A, "git_commit": B}, ""),
        (
            {"code_digest": A, "git_commit": A},
            {"code_digest": B, "git_commit": f"{B}-dirty"},
            "commit aaaaaaaaa → bbbbbbbbb-dirty",
        ),
        # a file edited, twice, without a commit
        (
            {"code_digest": A, "git_commit": f"{A}-dirty"},
            {"code_digest": B, "git_commit": f"{A}-dirty"},
            "code aaaaaaaaa → bbbbbbbbb",
        ),
        (
            {"code_digest": A, "git_commit": None},
            {"code_digest": B, "git_commit": B},
            "code aaaaaaaaa → bbbbbbbbb",
        ),
        # of a version that recorded no digest
        ({"git_commit": A}, {"code_digest": B, "git_commit": B}, "commit aaaaaaaaa → bbbbbbbbb"),
        ({}, {"code_digest": B, "git_commit": B, "versions": TORCH}, ""),
        (
            {"code_digest": A, "versions": TORCH},
            {"code_digest": A, "versions": TORCH | {"torch": "2.15.0+cpu", "dali": "2.4.0"}},
            "torch 2.14.1+cpu → 2.15.0+cpu",
        ),
        (
            {"code_digest": A, "versions": TORCH},
            {"code_digest": B, "versions": TORCH | {"torch": "2.15.0", "numpy": "2.5"}},
            "code aaaaaaaaa → bbbbbbbbb, torch 2.14.1+cpu → 2.15.0, numpy 2.4.6 → 2.5",
        ),
    ],
)
def test_what_differs_between_two_records_of_the_code(before, after, changes):
    assert code_changes(before, after) == changes


def resume(step):
    return {"event": "resume", "step": step}


def changed(step, changes):
    return {"event": "code_changed", "step": step, "changes": changes}


@pytest.mark.parametrize(
    ("lines", "standing"),
    [
        ([resume(5), changed(5, "a → b"), resume(8)], {5: "a → b"}),
        (
            [resume(5), changed(5, "a → b"), resume(8), changed(8, "b → c")],
            {5: "a → b", 8: "b → c"},
        ),
        ([resume(8), changed(8, "a → b"), resume(5), changed(5, "a → b")], {5: "a → b"}),
        ([resume(8), changed(8, "a → b"), resume(8)], {}),  # by the code of before again
        ([resume(8), changed(8, "a → b"), resume(0)], {}),  # started over
    ],
)
def test_steps_that_were_repeated_under_other_code_are_not_of_the_curve(lines, standing):
    assert recorded_code_changes(lines) == standing


START_A = {"event": "start", "step": 0, "time": "", "code_digest": A}
RESUME_B = {"event": "resume", "step": 5, "time": "", "code_digest": B}
OLD_START = {"event": "start", "step": 0, "time": ""}


@pytest.mark.parametrize(
    ("lines", "first_step", "changes"),
    [
        ([START_A], 5, "code aaaaaaaaa → bbbbbbbbb"),
        ([START_A], 0, ""),  # every step is trained again
        ([START_A, RESUME_B], 8, ""),
        ([START_A, RESUME_B], 5, "code aaaaaaaaa → bbbbbbbbb"),  # what was resumed left no steps
        ([OLD_START], 5, "commit ccccccccc → bbbbbbbbb"),  # by environment.json
        ([], 5, "commit ccccccccc → bbbbbbbbb"),  # the log was lost
    ],
)
def test_a_resume_is_compared_with_the_code_of_the_steps_before(
    lines, first_step, changes, tmp_path
):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    now, before = {"code_digest": B, "git_commit": B}, {"git_commit": "c" * 40}
    folder = SimpleNamespace(log=log, environment=now, previous_environment=before)
    world = SimpleNamespace(rank=0)
    run = SimpleNamespace(world=world, folder=folder, first_step=first_step)
    assert Run._code_changes(run) == changes


def cut_back(run, step):
    """The run as if it had been stopped after `step`."""
    for path in list_checkpoints(run / "checkpoints"):
        if load_checkpoint(path)["step"] > step:
            path.unlink()
    status = run / "status.json"
    status.write_text(status.read_text().replace("finished", "stopped"))


def test_a_run_resumed_under_other_code_says_so_everywhere(small, tmp_path, monkeypatch, capsys):
    config, run, described = load_config(small()), tmp_path / "run", {}
    monkeypatch.setattr(
        "harness.training.setup.describe_environment",
        lambda *arguments: describe_environment(*arguments) | described,
    )

    def resume_at(step, **code):
        cut_back(run, step)
        described.update(code)
        train(config, run, resume=True)
        return [line for line in capsys.readouterr().out.splitlines() if "warning" in line]

    described.update(code_digest=A, git_commit=A)
    train(config, run)
    warning = "warning: resumed at step 5 under other conditions: commit aaaaaaaaa → bbbbbbbbb"
    assert resume_at(5, code_digest=B, git_commit=B) == [warning]
    assert resume_at(10) == []  # by the code that wrote this checkpoint
    lines = read_lines(run / "log.jsonl")
    (event,) = [line for line in lines if line["event"] == "code_changed"]
    assert (event["step"], event["changes"]) == (5, "commit aaaaaaaaa → bbbbbbbbb")
    assert [line["code_digest"] for line in lines if "code_digest" in line] == [A, B, B]
    assert lines[0]["versions"]["torch"] == str(torch.__version__)
    told = [(one.kind, one.text) for one in run_events(read_run(run))]
    said = "other code from step 5 on: commit aaaaaaaaa → bbbbbbbbb"
    assert ("warning", said) in told
    records_folder(run, "local").mkdir()
    write_records(
        run,
        [Record("run", str(run), "c.yaml", "run.log", "1", 0, host="n1", backend="local")],
        "local",
    )
    assert table(run).splitlines()[-1] == f"warning: run: {said}"
