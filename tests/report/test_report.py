"""`harness report` as a user calls it: what it writes, refuses and skips."""

import csv
import json
import re
from xml.etree import ElementTree

import pytest

from harness.commands.command_line import main
from harness.errors import FINISHED, USER_ERROR
from harness.report import read_runs
from harness.report.figures import sections
from harness.report.groups import group_runs
from harness.report.runs import read_run
from harness.report.scaling import read_scaling, scaling_section
from tests.report.test_runs import evaluation, start, train

MEASURED = {
    "cores": 2,
    "points": [
        {
            "scaling": "weak",
            "ranks": ranks,
            "images_per_s": speed,
            "efficiency": speed / ranks / 100,
            "step_s": {"median": 1.28, "quartile_1": 1.27, "quartile_3": 1.3},
        }
        for ranks, speed in ((1, 100.0), (2, 190.0))
    ],
    "hosts": [
        {
            "ranks": 4,
            "mbit_per_s": 10.0,
            "delay_ms": 5.0,
            "alone_s": {"median": 0.3},
            "step_s": {"median": 1.2, "quartile_1": 1.1, "quartile_3": 1.3},
        }
    ],
    "model": {
        "predictions": [
            {"ranks": 4, "mbit_per_s": 10.0, "delay_ms": 5.0, "predicted_step_s": 1.0},
            {"ranks": 8, "mbit_per_s": 10.0, "delay_ms": 5.0, "predicted_step_s": 2.0},
        ]
    },
}


def test_assets_are_the_figures_as_svg_with_their_data(study, tmp_path, capsys):
    to, assets = tmp_path / "report.html", tmp_path / "assets"
    assert main(["report", str(study), "--to", str(to), "--assets", str(assets)]) == FINISHED
    assert capsys.readouterr().out.startswith(f"report {to} (3 runs)\n")
    names = {path.stem for path in assets.iterdir()}
    assert {"training-error", "validation-error", "learning-rate", "warm-up"} <= names
    assert {path.name for path in assets.iterdir()} == {
        f"{name}.{end}" for name in names for end in ("svg", "csv")
    }
    for path in assets.glob("*.svg"):
        ElementTree.parse(path)
    with open(assets / "validation-error.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header[:3] == ["series", "epochs", "validation error (%)"] and len(rows) == 9
    log = (study / "none" / "1" / "log.jsonl").read_text().splitlines()
    last = [line for line in map(json.loads, log) if line["event"] == "evaluation"][-1]
    assert rows[-1] == ["none, seed 1", "3.0", str(last["error"]), "", ""]


def test_an_unfinished_run_is_shown_as_running_and_has_no_error_yet(written, tmp_path):
    lines = [start(0, 0), train(5, 1, 50.0, 100.0), evaluation(5, 2, 40.0)]
    status = {"step": 5, "total_steps": 15, "heartbeat": 0.0}
    run = written(lines, torn='{"event"', state="running", **status)
    assert main(["report", str(run), "--to", str(tmp_path / "r.html")]) == FINISHED
    page = (tmp_path / "r.html").read_text()
    assert "running at step 5 of 15, last heartbeat " in page and "1 run (1 running)" in page
    assert "0 of 1" in page and "40.00 %" in page  # seeds finished; the last evaluation


def test_the_page_says_rule_verdict_and_its_basis(written, tmp_path):
    """A run of 3 epochs whose lr falls at the end of the second: its error is 13 %."""
    lines = [start(0, 0), evaluation(5, 1, 90.0), evaluation(10, 2, 60.0), evaluation(15, 3, 13.0)]

    def page(**expect):
        run = written(lines, f"run{len(list(tmp_path.iterdir()))}", error=60.0, config=expect)
        assert main(["report", str(run), "--to", str(tmp_path / "r.html")]) == FINISHED
        return (tmp_path / "r.html").read_text()

    text = page(expect__std=1.0, expect__runs=5, expect__error=20.0)
    # 2.776 * 1 * sqrt(1.2) = 3.04
    assert "top-1 validation error, epoch 3<br>" in text and "13.00 %" in text
    assert "20.00 ± 1.00 % (a test, 5 runs): difference −7.00" in text
    assert '<span class="verdict lower">lower than expected</span>' in text
    assert "95 % prediction interval 16.96 to 23.04 %" in text and "one run gives a wide" in text
    text = page(expect__error=20.0)
    assert 'class="verdict ' not in text and "no verdict: expect has no std and no runs" in text


def test_a_page_without_any_expectation(written, tmp_path):
    run = written([start(0, 0), evaluation(5, 1, 90.0)], state="running", heartbeat=0.0)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"expect:\n(  .*\n)+", "", config))
    assert main(["report", str(run), "--to", str(tmp_path / "r.html")]) == FINISHED
    page = (tmp_path / "r.html").read_text()
    assert "no expectation for this recipe" in page and 'class="band"' not in page


def test_mistakes_are_one_line_and_nothing_is_written(study, tmp_path, monkeypatch, capsys):
    to = tmp_path / "r.html"
    (tmp_path / "no.json").write_text('{"points": 7}')
    for paths, message in [
        (["absent"], "absent: no such run folder or study"),
        ([str(tmp_path)], "no run folder, and none below it"),
        ([str(study), str(tmp_path / "no.json")], "no scaling results in it"),
        ([str(tmp_path / "no.json")], "give a RUN or STUDY too"),
    ]:
        assert main(["report", *paths, "--to", str(to)]) == USER_ERROR
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert main(["report", str(study), "--to", str(study / "none")]) == USER_ERROR
    assert f"error: --to {study / 'none'}: " in capsys.readouterr().err
    # before the runs are read, and with no folder made
    monkeypatch.setattr("harness.report.read_runs", lambda paths: pytest.fail("the work has begun"))
    (tmp_path / "file").touch()
    for words in (
        ["--to", str(tmp_path / "file" / "r.html")],
        ["--to", str(tmp_path / "r.html"), "--assets", str(tmp_path / "file" / "figures")],
        ["--to", "/proc/r.html"],
    ):
        assert main(["report", str(study), *words]) == USER_ERROR
        assert f"error: {words[-2]} {words[-1]}" in capsys.readouterr().err
    assert not to.exists()


def test_an_unreadable_run_is_reported_and_skipped(written, tmp_path, capsys):
    for name in ("a", "b"):
        written([start(0, 0), evaluation(5, 1, 9.0)], f"study/x/{name}", error=9.0)
    (tmp_path / "study" / "x" / "a" / "config.yaml").write_text("seed: [")
    to = tmp_path / "r.html"
    assert main(["report", str(tmp_path / "study"), "--to", str(to)]) == FINISHED
    seen = capsys.readouterr()
    assert "warning: run skipped: " in seen.err and "a/config.yaml" in seen.err
    assert "(1 run)" in seen.out


def test_two_studies_keep_their_names_apart_and_each_is_ordered_by_minibatch(written, tmp_path):
    for study in ("one", "two"):
        for variant, minibatch in (("1k", 1024), ("small", 256)):
            for seed in ("1", "2"):
                config = {"recipe__minibatch": minibatch}
                written([start(0, 0)], f"{study}/{variant}/{seed}", error=1.0, config=config)
    runs = read_runs([tmp_path / "two", tmp_path / "one", tmp_path / "one" / "1k" / "1"])
    labels = [group.label for group in group_runs(runs)]
    assert labels == ["two/small", "two/1k", "one/small", "one/1k"] and len(runs) == 8
    assert [group.label for group in group_runs(read_runs([tmp_path / "one"]))] == ["small", "1k"]


def test_a_student_is_drawn_beside_its_teacher(written):
    teacher = {"event": "teacher", "step": 0, "time": start(0, 0)["time"], "error": 1.25}
    lines = [start(0, 0), teacher, evaluation(5, 1, 9.0), evaluation(10, 2, 8.0)]
    groups = group_runs([read_run(written(lines, error=8.5))])
    (section,) = [s for s in sections(groups) if s.title == "Distillation"]
    whole, late = section.figures
    student, level = whole.series
    assert (student.x, student.y) == ((1.0, 2.0), (9.0, 8.0))
    assert level.shape == "dashes" and (level.x, level.y) == ((1.0, 3.0), (1.25, 1.25))
    assert (late.series[0].x, late.series[1].x) == ((2.0,), (2.0, 3.0))  # of 3 epochs


def test_the_warm_up_is_drawn_as_it_was_asked_for_and_logged(written):
    """0.1 to 0.8 over 5 steps, then 0.8; at epoch 2 a tenth. `constant` jumps upright."""
    lines = [start(0, 0), train(5, 1, 50.0, 9.0) | {"lr": 0.66}]
    gradual = written(lines, error=1.0)
    constant = written(lines, "constant", error=1.0, config={"recipe__warmup": "constant"})
    groups = group_runs([read_run(gradual), read_run(constant)])
    (section,) = [s for s in sections(groups) if s.title == "Learning rate"]
    whole, close = section.figures
    line, dots, upright, _ = close.series
    assert dict(zip(line.x, line.y, strict=True))[0.8] == pytest.approx(0.66)
    assert (dots.x, dots.y) == ((0.8,), (0.66,)) and close.x.high == pytest.approx(1.6)
    at_one = [y for x, y in zip(upright.x, upright.y, strict=True) if x == 1.0]
    assert at_one == pytest.approx([0.1, 0.8])
    at_two = [y for x, y in zip(whole.series[0].x, whole.series[0].y, strict=True) if x == 2.0]
    assert at_two == pytest.approx([0.8, 0.08])


def test_scaling_results_are_drawn(tmp_path):
    (tmp_path / "scaling.json").write_text(json.dumps(MEASURED))
    section = scaling_section(read_scaling(tmp_path / "scaling.json"))
    step, speed, share, hosts = section.figures
    assert (step.series[0].x, step.series[0].y) == ((1, 2), (1280.0, 1280.0))
    assert step.series[0].low == (1270.0, 1270.0) and step.series[0].high == (1300.0, 1300.0)
    assert [(s.name, s.y) for s in speed.series] == [
        ("weak scaling", (100.0, 190.0)),
        ("weak scaling, ideal", (100.0, 200.0)),
    ]
    assert share.series[0].y == pytest.approx((100.0, 95.0))
    measured, model = hosts.series  # 0.3 s of 1.2 s; the model's 0.3 of 1.0, where it was measured
    assert (measured.y, model.y) == ((25.0,), (30.0,)) and measured.name == "10 Mbit/s, 5 ms"
    assert "cores 2" in section.note
