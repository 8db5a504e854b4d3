import json
import re

import pytest

from harness.report.events import LOGGED, run_events
from harness.report.runs import read_run
from tests.report.test_runs import evaluation, start, train


def events_of(folder) -> list[tuple[str, str]]:
    return [(one.kind, one.text) for one in run_events(read_run(folder))]


def test_a_run_that_went_straight_through_has_nothing_to_tell(study):
    found = [text for _, text in events_of(study / "gradual" / "1") if "working tree" not in text]
    assert found == []


def test_a_kill_another_number_of_ranks_and_a_damaged_image(harmed):
    found = dict(events_of(harmed))
    assert re.fullmatch(
        r"resumed at step 5 after a pause of \d+ s; [3-9] steps repeated", found["restart"]
    )
    assert found["ranks"] == "W 1 → 2 from step 5 on"
    (changed,) = (text for kind, text in events_of(harmed) if kind == "warning" and "→" in text)
    start = json.loads((harmed / "log.jsonl").read_text().splitlines()[0])
    assert set(LOGGED) <= start.keys()
    assert "gradient_precision float32 → bfloat16" in changed and changed.endswith("from step 5 on")
    assert re.fullmatch(r"skipped 1 damaged image, \d+ times \(ids \d+\)", found["images"])


def test_divergence_names_step_and_images(diverged):
    kinds = events_of(diverged)
    assert kinds[0][0] == "divergence" and "not finite at step 1" in kinds[0][1]
    assert re.match(r"diverged at step 1: the loss is not finite \(image ids \d+, ", kinds[1][1])


def test_other_rounding_a_lost_checkpoint_overflows_and_a_wrong_lr(written):
    lines = [start(0, 0), train(5, 1, 50.0, 9.0) | {"overflows": 3}, evaluation(5, 2, 1.0)]
    lines += [{"event": "checkpoint_failed", "step": 5, "time": lines[1]["time"], "why": "full"}]
    lines += [start(5, 62, "resume") | {"precision": "tf32", "loader": "dali"}]
    found = events_of(written(lines, state="stopped", step=5, total_steps=15, reason="asked to"))
    assert found == [
        ("state", "stopped at step 5 of 15: asked to"),
        ("restart", "resumed at step 5 after a pause of 61 s"),
        ("warning", "precision float32 → tf32, loader memory → dali from step 5 on"),
        ("warning", "checkpoint of step 5 not written: full"),
        ("warning", "float16 overflowed: 3 updates skipped"),
        # gradual warm-up over 5 steps from 0.1 to 0.8: step 4 has 0.1 + 0.7 * 4 / 5
        ("warning", "lr 0.1 at step 4, where the config says 0.66"),
    ]


@pytest.mark.parametrize("key", ["compile", "gradient_precision", "micro_batch", "device"])
def test_every_key_that_changes_rounding_is_shown_when_a_resume_changes_it(written, key):
    lines = [start(0, 0) | {key: "old"}, start(5, 62, "resume") | {key: "new"}]
    found = events_of(written(lines, state="stopped", step=5, total_steps=15, reason="asked to"))
    assert ("warning", f"{key} old → new from step 5 on") in found


def test_a_log_from_before_a_key_was_logged_shows_no_change_of_it(written):
    lines = [start(0, 0), start(5, 62, "resume") | {"compile": True}]
    found = events_of(written(lines, state="stopped", step=5, total_steps=15, reason="asked to"))
    assert [kind for kind, _ in found] == ["state", "restart"]
