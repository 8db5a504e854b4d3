"""Loggers of installed packages: the example of docs/loggers.md, and loggers that fail."""

import re
import sys
import textwrap
from pathlib import Path

import pytest

from harness import UserError, load_config
from harness.runs.logging.installed import load_loggers
from harness.runs.logging.jsonl import read_log
from harness.training.run_logger import RunLogger
from harness.training.setup import train
from tests.training.test_run_logger import READING

PAGE = (Path(__file__).parents[2] / "docs" / "loggers.md").read_text()
(MODULE,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(PROJECT,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a package of one module, as pip leaves it: the module and its entry points."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(site)

    def installed(module, text, entry_points):
        info = site / f"{module}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"{module}.py").write_text(text)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[harness.loggers]\n{entry_points}\n")
        monkeypatch.delitem(sys.modules, module, raising=False)

    return installed


def test_the_example_of_the_page_logs_a_run_and_its_resume(small, tmp_path, install):
    (entry,) = re.findall(r'\[project.entry-points."harness.loggers"\]\n(\w+ = )"(.*)"', PROJECT)
    install("csv_logger", MODULE, "".join(entry))
    (command,) = re.findall(r"'(run\.loggers=.*)'", PAGE)
    config, out = load_config(small(), [command]), tmp_path / "run"
    train(config, out)
    rows = (out / "scalars.csv").read_text().splitlines()
    logged = {(line["event"], line["step"]): line for line in read_log(out / "log.jsonl")}
    assert f"15,train/loss,{logged['train', 15]['loss']!r}" in rows
    assert f"10,validation/error,{logged['evaluation', 10]['error']!r}" in rows
    # resumed from step 10: the steps after it are logged once
    status = out / "status.json"
    status.write_text(status.read_text().replace("finished", "stopped"))
    (out / "checkpoints" / "checkpoint-001-00000015.pt").unlink()
    train(config, out, resume=True)
    again = (out / "scalars.csv").read_text().splitlines()
    names = [row.rpartition(",")[0] for row in again]
    assert set(names) == {row.rpartition(",")[0] for row in rows}
    assert {name for name in names if names.count(name) > 1} == {
        f"10,validation/{name}"
        for name in ("error", "top5_error", "loss")  # made up for
    }


FAILING = textwrap.dedent("""
    class Failing:
        fails_in = "{fails_in}"
        def __init__(self, *_):
            self.call("open")
        def call(self, name):
            if name == self.fails_in:
                raise OSError("the server is away\\nmore")
        def event(self, event):
            self.call("event")
        def scalars(self, values, step):
            self.call("scalars")
        def flush(self):
            self.call("flush")
        def close(self):
            self.call("close")
""")


@pytest.mark.parametrize(
    ("fails_in", "step"), [("open", 0), ("event", 0), ("scalars", 2), ("flush", 2), ("close", 4)]
)
def test_a_logger_that_fails_is_reported_and_left_out(
    small, tmp_path, install, capsys, fails_in, step
):
    install("failing", FAILING.format(fails_in=fails_in), "failing = failing:Failing")
    loggers = load_loggers(["failing"])
    logger = RunLogger(tmp_path, load_config(small()), 0, loggers)
    logger.event("start", 0)
    for done in (2, 4):
        logger.train_line(done, READING, lr=0.1, data_wait_s=0.0)
        logger.flush()
    logger.close()
    lines = read_log(tmp_path / "log.jsonl")
    (failed,) = [line for line in lines if line["event"] == "logger_failed"]
    assert (failed["logger"], failed["step"]) == ("failing", step)
    assert re.fullmatch(r"OSError: the server is away \(failing\.py:\d+\)", failed["why"])
    assert [line["step"] for line in lines if line["event"] in ("start", "train")] == [0, 2, 4]
    warning = "warning: logger failing failed and is left out: OSError: the server is away"
    assert capsys.readouterr().out.count(warning) == 1


def test_a_run_survives_a_logger_that_fails_in_the_thread_of_checkpoints(small, tmp_path, install):
    install("failing", FAILING.format(fails_in="flush"), "failing = failing:Failing")
    path = small(recipe__epochs=1, recipe__milestones=[], recipe__warmup_epochs=1)
    result = train(load_config(path, ["run.loggers=[failing]"]), tmp_path / "run")
    events = [line["event"] for line in read_log(tmp_path / "run" / "log.jsonl")]
    assert events.count("logger_failed") == 1 and events.count("checkpoint") == 1
    assert events.count("finish") == 1 and 0 <= result.error <= 100


def test_an_unknown_logger_and_one_that_cannot_be_imported_end_the_launch(small, tmp_path, install):
    install("broken", "import no_such_module", "broken = broken:Logger")
    with pytest.raises(UserError, match=r"run\.loggers: wandb is not installed \(found: broken\)"):
        train(load_config(small(), ["run.loggers=[wandb]"]), tmp_path / "run")
    with pytest.raises(
        UserError, match=r"broken:Logger cannot be imported: No module named 'no_such"
    ):
        train(load_config(small(), ["run.loggers=[broken]"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
