"""The loops that are compared do the same training, and the benchmark counts their steps."""

import itertools
import json
import sys

import pytest
import torch

from benchmarks import conditions, step
from benchmarks.loops import BARE, LOOPS, OURS, Runner, Unavailable, build, make_batches
from benchmarks.step import Case, case_config

CASE = Case("resnet8", 16, 8, 1, 1)
CPU = torch.device("cpu")


def without_decay(case: Case):
    """The harness decays no batch norm, the others everything."""
    config = case_config(*case)
    recipe = config.recipe.model_copy(update={"weight_decay": 0.0})
    return config.model_copy(update={"recipe": recipe})


@pytest.mark.parametrize("name", [name for name in LOOPS if name != BARE])
def test_every_loop_trains_as_the_bare_loop(name):
    config = without_decay(CASE)
    models = {}
    for each in (name, BARE):
        models[each] = build(each, config, CPU)
        batches = itertools.islice(itertools.cycle(make_batches(config)), 3)
        try:
            LOOPS[each](config, models[each], batches, CPU)
        except Unavailable as error:
            pytest.skip(str(error))
    started = build(BARE, config, CPU).state_dict()
    states = [model.state_dict() for model in models.values()]
    for key, value in states[1].items():
        torch.testing.assert_close(states[0][key], value, rtol=1e-4, atol=1e-5)
        assert key.endswith("num_batches_tracked") or not torch.equal(value, started[key]), key


def test_a_block_is_so_many_steps():
    runner = Runner(OURS, case_config(*CASE))
    for steps in (2, 3):
        seconds, processor_s = runner.run(steps)
        assert seconds > 0 and processor_s > 0
    assert runner.end() == 5


def test_a_loop_that_fails_says_so_here():
    runner = Runner(OURS, case_config(*CASE))
    runner._process.kill()
    with pytest.raises((EOFError, OSError)):
        runner.run(2)
    with pytest.raises(KeyError, match="nobody"):
        Runner("nobody", case_config(*CASE))


def test_the_file_of_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(conditions, "RESULTS", tmp_path)
    monkeypatch.setattr(step, "CPU_CASES", [CASE])
    monkeypatch.setattr(step, "GPU_CASES", [CASE])
    two = {name: LOOPS[name] for name in (OURS, BARE)}  # the others take seconds to import
    monkeypatch.setattr(step, "LOOPS", two)
    words = ["--starts", "1", "--repetitions", "2", "--block-seconds", "0.01"]
    words += ["--write", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["step", *words])
    step.main()
    (case,) = json.loads((tmp_path / "step.json").read_text())["cases"]
    rows = {row["loop"]: row for row in case["loops"]}
    assert rows.keys() == two.keys() and not case["not_run"]
    assert {row["ratio"]["repetitions"] for row in rows.values()} == {2}
    assert rows[OURS]["ratio"]["median"] == 1.0 and rows[BARE]["ratio"]["median"] > 0
    assert all(row["images_per_s"] > 0 for row in rows.values())
    assert f"  {BARE}" in capsys.readouterr().out
