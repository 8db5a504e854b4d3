import json

import pytest

from harness.errors import UserError
from harness.report.events import run_events
from harness.report.runs import find_run_folders, read_run
from harness.runs.logging.jsonl import read_lines, read_log


def at(second: int) -> str:
    return f"2026-01-01T10:{second // 60:02}:{second % 60:02}.000+00:00"


def start(step: int, second: int, event: str = "start", world_size: int = 1) -> dict:
    how = {"device": "cpu", "precision": "float32", "loader": "memory", "micro_batch": 256}
    return {"event": event, "step": step, "time": at(second), "world_size": world_size} | how


def train(step: int, second: int, error: float, speed: float, wait: float = 0.0) -> dict:
    values = {"error": error, "lr": 0.1, "images_per_s": speed, "data_wait": wait}
    return {"event": "train", "step": step, "time": at(second), "loss": 1.0} | values


def evaluation(step: int, second: int, error: float) -> dict:
    values = {"epoch": step // 5, "error": error, "top5_error": error / 2, "loss": 1.0}
    return {"event": "evaluation", "step": step, "time": at(second)} | values


def test_an_epoch_is_the_mean_over_its_steps(written):
    lines = [start(0, 0), train(2, 1, 80.0, 100.0, 0.5), train(4, 2, 60.0, 200.0)]
    lines += [train(5, 3, 10.0, 50.0), evaluation(5, 4, 33.0), train(6, 5, 9.0, 100.0)]
    run = read_run(written(lines, state="running", heartbeat=0.0))
    (epoch,) = run.epochs  # the second has only begun
    assert epoch.train_error == pytest.approx((2 * 80 + 2 * 60 + 1 * 10) / 5)
    # 2 steps at 100, 2 at 200, 1 at 50 images/s: 5 / (2/100 + 2/200 + 1/50)
    assert epoch.images_per_s == pytest.approx(5 / 0.05)
    assert epoch.data_wait == pytest.approx(0.5 * 0.02 / 0.05)
    assert [(e.epoch, e.error) for e in run.evaluations] == [(1, 33.0)]
    assert run.error is None  # it is not finished


def test_what_was_superseded_is_no_result_but_took_its_time(written):
    lines = [start(0, 0), train(5, 10, 50.0, 100.0), evaluation(5, 11, 40.0)]
    lines += [train(8, 17, 99.0, 100.0), start(5, 77, "resume", 2), train(10, 90, 20.0, 100.0)]
    lines += [evaluation(10, 92, 30.0)]
    run = read_run(written(lines, torn='{"event": "tra', error=30.0))
    assert [e.train_error for e in run.epochs] == [50.0, 20.0]
    assert [e.error for e in run.evaluations] == [40.0, 30.0]
    assert run.wall_s == 17 + 15 and run.world_sizes == [1, 2]
    assert [launch.last_step for launch in run.launches] == [8, 10]


def test_the_error_of_an_older_versions_run_is_computed_from_its_log(written):
    """3 epochs, the lr falls at the end of the second; it recorded the median of them all."""
    lines = [start(0, 0), evaluation(5, 1, 90.0), evaluation(10, 2, 60.0), evaluation(15, 3, 13.0)]
    run = read_run(written(lines, error=60.0))
    assert run.error == 13.0 and run.headline.epochs == (3,)
    lost = read_run(written(lines[:-1], "lost", error=60.0))
    assert lost.error is None and lost.headline.error == 60.0
    (warning,) = [h for h in run_events(lost) if h.kind == "warning"]
    assert "60.00 % (median of epochs 1 to 3), covers other epochs" in warning.text


def test_a_line_torn_within_the_log_is_passed_over(tmp_path):
    log = tmp_path / "log.jsonl"
    whole = json.dumps(start(0, 0))
    log.write_text(f'{whole}\n{{"event": "train", "st\n{json.dumps(evaluation(5, 1, 2.0))}\n7\n')
    assert [line["event"] for line in read_lines(log)] == ["start", "evaluation"]
    assert read_log(log) == read_lines(log)


def test_a_study_is_read_as_variant_and_seed_in_the_order_of_numbers(written, tmp_path):
    for name in ("256/10", "256/9", "1024/1", "plain"):
        written([start(0, 0)], f"study/{name}", state="running", heartbeat=0.0)
    (tmp_path / "study" / "study.yaml").write_text("base: x\n")  # as a study may keep
    found = [(folder.name, variant) for folder, variant in find_run_folders(tmp_path / "study")]
    assert found == [("9", "256"), ("10", "256"), ("1", "1024"), ("plain", "")]
    assert find_run_folders(tmp_path / "study" / "plain") == [(tmp_path / "study" / "plain", "")]


def test_a_path_without_runs_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        find_run_folders(tmp_path / "absent")
    with pytest.raises(UserError, match="no run folder, and none below it"):
        find_run_folders(tmp_path)
