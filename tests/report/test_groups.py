from pathlib import Path

import pytest

from harness.config import config_from_mapping
from harness.report.groups import group_runs, sweeps
from harness.report.runs import RecordedRun


def run(
    error: float | None,
    seed: int = 1,
    variant: str = "",
    std: float | None = 0.09,
    folder: str = "",
    **recipe,
):
    """A run of the paper's 8192 that ended with `error`."""
    expect = {"error": 23.74, "source": "table 1"} | ({} if std is None else {"std": std})
    mapping = {
        "seed": seed,
        "expect": expect,
        "data": {"train_images": 1281167, "val_images": 50000, "classes": 1000},
        "model": {"name": "resnet50"},
        "recipe": {"minibatch": 8192, "epochs": 90} | recipe,
    }
    status = {"state": "running"} if error is None else {"state": "finished", "error": error}
    config = config_from_mapping(mapping, "test")
    return RecordedRun(
        Path("runs") / (folder or str(seed)), variant, config, {}, status, [], [], [], [], [], 0
    )


def test_mean_and_spread_by_hand():
    (group,) = group_runs([run(23.6, 1), run(23.8, 2), run(24.0, 3), run(None, 4)])
    assert group.errors == [23.6, 23.8, 24.0] and group.numbers == (0, 1, 2, 3)
    assert group.mean == pytest.approx(23.8) and group.std == pytest.approx(0.2)
    assert group.difference == pytest.approx(0.06)
    assert group.spread == pytest.approx(0.29) and group.verdict == "within"


@pytest.mark.parametrize(
    ("errors", "std", "verdict"),
    [
        ([23.83], 0.09, "within"),  # one run: the expected spread alone
        ([23.84], 0.09, "higher"),
        ([23.64], 0.09, "lower"),
        ([24.0, 24.2], 0.09, "higher"),  # +0.36 against 0.1414 + 0.09
        ([23.74], None, ""),  # no spread is known
        ([23.7, 23.9], None, "within"),
        ([], 0.09, ""),
    ],
)
def test_verdicts(errors, std, verdict):
    runs = [run(error, seed, std=std) for seed, error in enumerate(errors)] or [run(None, std=std)]
    assert group_runs(runs)[0].verdict == verdict


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
