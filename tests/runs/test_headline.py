"""A run's error from its evaluations, and from folders of older versions."""

import json

import pytest

from harness.commands.command_line import main
from harness.config.loading import load_config
from harness.runs.headline import Headline, headline, read_headline, recorded_headline
from harness.training.setup import train
from launch.run_output import finished_error

SIX = {1: 90.0, 2: 88.0, 3: 86.39, 4: 86.5, 5: 80.0, 6: 13.06}


@pytest.fixture
def config(small):
    """Six epochs, the lr falls at the end of the fifth."""
    return load_config(small(recipe__epochs=6, recipe__milestones=[5]))


def test_a_short_run_is_reported_as_it_ends(config):
    found = headline(config, SIX)
    assert found == Headline(13.06, (6,), 13.06, 13.06)
    assert str(found) == "13.06 % (epoch 6; last 13.06 %, best 13.06 %)"


def test_the_median_with_last_and_best_beside_it(small):
    config = load_config(small(recipe__epochs=6, recipe__milestones=[2]))
    found = headline(config, {1: 9.0, 2: 1.0, 3: 7.0, 4: 3.0, 5: 2.0, 6: 4.0})
    assert found == Headline(3.5, (3, 4, 5, 6), 4.0, 1.0)  # (3 + 4) / 2
    assert str(found) == "3.50 % (median of epochs 3 to 6; last 4.00 %, best 1.00 %)"
    with pytest.raises(KeyError):
        headline(config, {6: 4.0})


def test_an_older_versions_figure_is_not_taken_for_this_rules(config):
    old = {"state": "finished", "error": 86.39}  # the median of epochs 2 to 6
    assert recorded_headline(config, old, SIX).error == 13.06
    kept = recorded_headline(config, old, {6: 13.06} | {1: 90.0})
    assert kept.error == 13.06  # what counts was logged
    lost = recorded_headline(config, old, {1: 90.0, 2: 88.0})
    assert str(lost) == "86.39 % (median of epochs 2 to 6)"
    new = {"error": 13.0, "final_epochs": [6], "last_error": 13.0, "best_error": 12.0}
    assert recorded_headline(config, new, {}) == Headline(13.0, (6,), 13.0, 12.0)


def test_a_run_folder_of_an_older_version(small, tmp_path, capsys):
    """Its result is that of its log, for train, study and status alike."""
    path, run = small(recipe__epochs=6, recipe__milestones=[5]), tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(path.read_text())
    lines = [
        {"event": "evaluation", "step": 5 * epoch, "epoch": epoch, "error": error}
        for epoch, error in SIX.items()
    ]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status = {"state": "finished", "step": 30, "error": 86.39, "expected": 50.0}
    (run / "status.json").write_text(json.dumps(status))
    assert train(load_config(path), run, resume=True).error == 13.06
    assert main(["train", str(path), "--out", str(run), "--resume"]) == 0
    said = "error 13.06 % (epoch 6; last 13.06 %, best 13.06 %)"
    assert capsys.readouterr().out.splitlines()[-3:-1] == [said, "expected 50.00 % (a test)"]
    main(["train", str(path), "--out", str(run), "--resume", "expect=null"])
    assert capsys.readouterr().out.splitlines()[-2] == "no expectation for this recipe"
    assert read_headline(run, status).epochs == (6,)
    assert finished_error(run, status) == f"{said}, expected 50.00 %"
    no_longer = status | {"expected": None}
    assert finished_error(run, no_longer) == f"{said}, no expectation for this recipe"
