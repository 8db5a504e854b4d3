from pathlib import Path

import pytest

from harness.config.loading import config_from_mapping
from harness.recipe.schedule import final_epochs
from harness.report.groups import group_runs, sweeps
from harness.report.runs import RecordedRun

TABLE_1 = {"error": 23.74, "std": 0.09, "runs": 5, "source": "table 1"}


def run(
    error: float | None,
    seed: int = 1,
    variant: str = "",
    expect: dict | None = TABLE_1,
    folder: str = "",
    val_images: int = 50000,
    **recipe,
):
    """A run of the paper's 8192 that ended with `error`."""
    mapping = {
        "seed": seed,
        "expect": expect,
        "data": {"train_images": 1281167, "val_images": val_images, "classes": 1000},
        "model": {"name": "resnet50"},
        "recipe": {"minibatch": 8192, "epochs": 90} | recipe,
    }
    config = config_from_mapping(mapping, "test")
    final = {"error": error, "final_epochs": [*final_epochs(config)]}
    status = {"state": "running"} if error is None else {"state": "finished"} | final
    return RecordedRun(
        Path("runs") / (folder or str(seed)), variant, config, {}, status, [], [], [], [], [], 0
    )


def test_mean_and_spread_by_hand():
    (group,) = group_runs([run(23.6, 1), run(23.8, 2), run(24.0, 3), run(None, 4)])
    assert group.errors == [23.6, 23.8, 24.0] and group.numbers == (0, 1, 2, 3)
    assert group.mean == pytest.approx(23.8) and group.std == pytest.approx(0.2)
    assert group.difference == pytest.approx(0.06)
    assert group.rule == "median of epochs 86 to 90"
    (group,) = group_runs([run(None)])
    assert (group.errors, group.mean, group.std, group.difference) == ([], None, None, None)
    (group,) = group_runs([run(23.6, expect=None)])
    assert (group.mean, group.difference) == (23.6, None)


def test_runs_without_a_variant_are_named_by_what_tells_them_apart():
    runs = [run(1.0), run(1.0, 2), run(2.0, folder="small/none"), run(3.0, minibatch=4096)]
    assert len(group_runs(runs)) == 2  # the seeds of one config, whatever their folders are called
    runs = [run(1.0), run(1.0, 2), run(2.0, folder="a/x", minibatch=4096)]
    runs += [run(3.0, folder="b/x", warmup="none")]
    assert [group.label for group in group_runs(runs)] == [
        "kn 8192, warmup gradual, warmup_epochs 5",
        "a/x",
        "b/x",
    ]
    assert group_runs([run(1.0, folder="quick")])[0].label == "quick"
    assert group_runs([run(1.0, folder="none/1")])[0].label == "none/1"
    assert group_runs([run(1.0), run(1.0, 2)])[0].label == "resnet50, kn 8192"


def test_a_variant_whose_runs_have_different_configs_is_two_groups():
    groups = group_runs([run(1.0, 1, "a"), run(1.0, 2, "a", epochs=91)])
    assert [group.label for group in groups] == ["a", "a (2)"]


def test_the_sweep_has_the_small_minibatch_whatever_its_warm_up_says():
    runs = [
        run(4.0, variant="16k", minibatch=16384),
        run(1.0, variant="256", minibatch=256, warmup="none"),
        run(3.0, variant="8k"),
        run(5.0, variant="other lr", reference_lr=0.2),
        run(6.0, variant="8k, none", warmup="none"),
    ]
    (sweep,) = sweeps(group_runs(runs))
    assert [group.label for group in sweep] == ["256", "8k", "16k"]
