"""The logs and the list of what was started, of records and logs that are written here."""

import json
from dataclasses import asdict

import pytest

from launch.__main__ import main
from launch.records import Record


@pytest.fixture
def started(tmp_path):
    """Returns a function that records a run below a folder, by the launcher of another machine."""

    def start(name, log=""):
        run = tmp_path / "runs" / name
        records = run.with_name(f"{run.name}.local")
        records.mkdir(parents=True)
        files = str(run), "c.yaml", str(records / f"{run.name}.log")
        record = Record(run.name, *files, "", 0, host="elsewhere", backend="local")
        (records / "job.json").write_text(json.dumps({run.name: asdict(record)}))
        if log:
            (records / f"{run.name}.log").write_text(log)
        return run

    return start


def test_the_list_has_all_runs_below_a_folder_by_their_paths(started, tmp_path, capsys):
    started("small")
    started("imagenet/small")
    run = started("hidden")
    (run / "x.local").mkdir(parents=True)
    (run / "config.yaml").touch()  # a run folder is not searched
    (run / "x.local" / "job.json").write_text("broken")
    assert main(["list", str(tmp_path / "runs")]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0][:3] == ["run", "job", "state"]
    assert [row[0] for row in rows[1:]] == ["hidden", "imagenet/small", "small"]


def test_the_list_of_a_folder_without_runs(tmp_path, capsys):
    assert main(["list", str(tmp_path)]) == 2
    assert "nothing was submitted below it" in capsys.readouterr().err


def test_logs_are_printed_whole(started, capsys):
    run = started("small", "epoch 1\nepoch 2\n")
    assert main(["logs", str(run)]) == 0
    assert capsys.readouterr().out == "epoch 1\nepoch 2\n"


def test_a_run_without_a_log_says_so(started, capsys):
    assert main(["logs", str(started("small"))]) == 0
    assert capsys.readouterr().out == "small: queued, and there is no log yet\n"


def test_logs_of_nothing(tmp_path, capsys):
    assert main(["logs", str(tmp_path / "run"), "-f"]) == 2
    assert "nothing was submitted for it" in capsys.readouterr().err
