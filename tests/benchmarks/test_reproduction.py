"""The table of docs/reproduction.md, from run folders written by hand."""

import json
import statistics
from pathlib import Path

import pytest
import yaml

from benchmarks.conditions import RESULTS
from benchmarks.reproduction import recomputed, stored_groups, table, variants, write_figures
from harness.config.loading import dump_config, load_config
from harness.report import read_runs
from harness.report.groups import group_runs
from launch.study import study_runs

ROOT = Path(__file__).parents[2]


def test_errors_by_variant_with_mean_and_spread(tmp_path):
    """Errors 30, 31 and 35: mean 32, std sqrt((4 + 1 + 9) / 2) = 2.6458; one run has stopped."""
    study = tmp_path / "study.yaml"
    base = {"base": "configs/cifar10/resnet8_16px_128.yaml", "seeds": [1, 2, 3]}
    large = {"set": {"recipe.minibatch": 1024}}
    study.write_text(yaml.safe_dump(base | {"variants": {"large": large, "small": {"set": {}}}}))
    folder = tmp_path / "mine"
    errors = {"small-1": 30.0, "small-2": 31.0, "small-3": 35.0, "large-1": 40.0}
    for run in study_runs(study, folder):
        run.run.mkdir(parents=True)
        (run.run / "config.yaml").write_text(dump_config(run.config))
        status = {"state": "stopped", "step": 7}
        if run.name in errors:
            final = {"error": errors[run.name], "final_epochs": [12]}
            status = {"state": "finished", "step": 960} | final
        (run.run / "status.json").write_text(json.dumps(status))
        (run.run / "log.jsonl").write_text("")
    small, large = variants(group_runs(read_runs([folder])))
    assert (small["variant"], large["variant"]) == ("small", "large")
    assert (small["mean_error"], small["std_error"]) == (32.0, pytest.approx(2.6458, abs=1e-4))
    assert (large["mean_error"], large["std_error"]) == (40.0, None)
    assert [run["state"] for run in large["runs"]] == ["finished", "stopped", "stopped"]
    assert table([small, large]).splitlines()[2:] == [
        "| small | 128 | 0.1 | 32.00 ± 2.65 | 30.00, 31.00, 35.00 |",
        "| large | 1024 | 0.8 | 40.00 | 40.00, stopped, stopped |",
    ]
    assert load_config(folder / "large/1/config.yaml").recipe.minibatch == 1024


def test_what_is_committed_follows_from_the_validation_errors(tmp_path):
    """All are of epoch 12: the lr falls last at the end of epoch 11."""
    stored = json.loads((RESULTS / "reproduction.json").read_text())
    groups = stored_groups(stored, ROOT / "configs/studies/one_machine.yaml")
    assert recomputed(stored, groups) == stored
    text = (ROOT / "docs/reproduction.md").read_text()
    for row, group in zip(stored["variants"], groups, strict=True):
        errors = [run["validation_errors"]["12"] for run in row["runs"]]
        assert [run["error"] for run in row["runs"]] == errors
        mean, std = statistics.fmean(errors), statistics.stdev(errors)
        assert (row["mean_error"], row["std_error"]) == pytest.approx((mean, std))
        assert f"{mean:.2f} ± {std:.2f}" in text
        expect = group.expect
        assert (expect.error, expect.std, expect.runs) == (round(mean, 2), round(std, 2), 3)
    for path in write_figures(groups, tmp_path):
        assert path.read_bytes() == (ROOT / "docs/reproduction" / path.name).read_bytes(), path
