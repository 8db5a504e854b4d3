"""The study files of configs/studies/, row by row."""

from pathlib import Path

import pytest

from harness.planning.plan import make_plan
from harness.recipe.schedule import peak_lr
from launch.study import study_runs

# of each row its peak lr, its warm-up (none where the peak is not above the reference) and, of the
# ImageNet files, the paper's error and spread
PAPERS = {
    "warmup": {
        "baseline": (0.1, 0, 23.60, 0.12),
        "none": (3.2, 0, 24.84, 0.37),
        "constant": (3.2, 5, 25.88, 0.56),
        "gradual": (3.2, 5, 23.74, 0.09),
    },
    "learning_rate": {
        "kn256_lr0.05": (0.05, 0, 23.92, 0.10),
        "kn256_lr0.1": (0.1, 0, 23.60, 0.12),
        "kn256_lr0.2": (0.2, 0, 23.68, 0.09),
        "kn8192_lr0.05x32": (1.6, 5, 24.27, 0.08),
        "kn8192_lr0.1x32": (3.2, 5, 23.74, 0.09),
        "kn8192_lr0.2x32": (6.4, 5, 24.05, 0.18),
        "kn8192_lr0.1": (0.1, 0, 41.67, 0.10),
        "kn8192_lr0.1xsqrt32": (0.5657, 5, 26.22, 0.03),  # .1 * 5.657
    },
    "last_gamma": {
        "kn256_gamma1": (0.1, 0, 23.84, 0.18),
        "kn256_gamma0": (0.1, 0, 23.60, 0.12),
        "kn8192_gamma1": (3.2, 5, 24.11, 0.07),
        "kn8192_gamma0": (3.2, 5, 23.74, 0.09),
    },
    "resnet101": {"kn256": (0.1, 0, 22.08, 0.06), "kn8192": (3.2, 5, 22.36, 0.09)},
    "minibatch": {
        "kn64": (0.025, 0, 23.60, None),
        "kn128": (0.05, 0, 23.49, 0.12),
        "kn256": (0.1, 0, 23.60, 0.12),
        "kn512": (0.2, 5, 23.48, 0.09),
        "kn1024": (0.4, 5, 23.53, 0.08),
        "kn2048": (0.8, 5, 23.49, 0.11),
        "kn4096": (1.6, 5, 23.56, 0.12),
        "kn8192": (3.2, 5, 23.74, 0.09),
        "kn16384": (6.4, 5, 24.79, 0.27),
        "kn32768": (12.8, 5, 27.55, 0.28),
        "kn65536": (25.6, 5, 33.96, 0.80),
    },
    "cifar10_warmup": {
        "baseline": (0.1, 0),
        "none": (3.2, 0),
        "constant": (3.2, 5),
        "gradual": (3.2, 5),
    },
    "cifar10_learning_rate": {
        "kn128_lr0.05": (0.05, 0),
        "kn128_lr0.1": (0.1, 0),
        "kn128_lr0.2": (0.2, 0),
        "kn4096_lr0.05x32": (1.6, 5),
        "kn4096_lr0.1x32": (3.2, 5),
        "kn4096_lr0.2x32": (6.4, 5),
        "kn4096_lr0.1": (0.1, 0),
        "kn4096_lr0.1xsqrt32": (0.5657, 5),
    },
    "cifar10_last_gamma": {
        "kn128_gamma1": (0.1, 0),
        "kn128_gamma0": (0.1, 0),
        "kn4096_gamma1": (3.2, 5),
        "kn4096_gamma0": (3.2, 5),
    },
    "cifar10_resnet56": {"kn128": (0.1, 0), "kn4096": (3.2, 5)},
    "cifar10_minibatch": {
        "kn32": (0.025, 0),
        "kn64": (0.05, 0),
        "kn128": (0.1, 0),
        "kn256": (0.2, 5),
        "kn512": (0.4, 5),
        "kn1024": (0.8, 5),
        "kn2048": (1.6, 5),
        "kn4096": (3.2, 5),
        "kn8192": (6.4, 5),
    },
    "one_machine": {
        "kn128": (0.1, 0),
        "kn256": (0.2, 2),
        "kn512": (0.4, 2),
        "kn1024": (0.8, 2),
        "kn2048": (1.6, 2),
        "kn1024_no_warmup": (0.8, 0),
        "kn1024_constant_warmup": (0.8, 2),
        "kn128_lr0.05": (0.05, 0),
        "kn128_lr0.2": (0.2, 0),
        "kn1024_lr0.05x8": (0.4, 2),
        "kn1024_lr0.2x8": (1.6, 2),
        "kn1024_lr0.1": (0.1, 0),
        "kn1024_lr0.1xsqrt8": (0.2828, 2),  # .1 * 2.828
        "kn128_gamma1": (0.1, 0),
        "kn1024_gamma1": (0.8, 2),
    },
    # 0.1 * kn/256
    "one_machine_minibatch": {
        "minibatch-32": (0.0125, 0),
        "minibatch-64": (0.025, 0),
        "minibatch-128": (0.05, 0),
        "minibatch-256": (0.1, 0),
        "minibatch-512": (0.2, 2),
        "minibatch-1024": (0.4, 2),
        "minibatch-2048": (0.8, 2),
    },
    "one_machine_scaling": {
        "scaling-sqrt_minibatch-32": (0.0354, 0),  # .1 / 2.828
        "scaling-sqrt_minibatch-64": (0.05, 0),
        "scaling-sqrt_minibatch-128": (0.0707, 0),
        "scaling-sqrt_minibatch-512": (0.1414, 2),
        "scaling-sqrt_minibatch-1024": (0.2, 2),
        "scaling-sqrt_minibatch-2048": (0.2828, 2),
        **{f"scaling-none_minibatch-{kn}": (0.1, 0) for kn in (32, 64, 128, 512, 1024, 2048)},
    },
    "one_machine_whole_batch": {
        f"kn{kn}_whole{end}": (peak, warmup)
        for end in ("", "_recalibrated")
        for kn, peak, warmup in (
            *((128, 0.05, 0), (256, 0.1, 0), (512, 0.2, 2)),
            *((1024, 0.4, 2), (2048, 0.8, 2)),
        )
    },
    "one_machine_epochs": {
        f"{prefix}{kn}": (peak, warmup)
        for prefix, peaks in {
            "epochs12_at128_kn": (0.1, 0.4, 0.8, 1.6),
            "epochs12_at256_kn": (0.05, 0.2, 0.4, 0.8),
            "reference_minibatch-128_minibatch-": (0.1, 0.4, 0.8, 1.6),
            "reference_minibatch-256_minibatch-": (0.05, 0.2, 0.4, 0.8),
        }.items()
        for kn, peak, warmup in zip((128, 512, 1024, 2048), peaks, (0, 2, 2, 2), strict=True)
    },
    # 0.2 * kn/256, and the shallow network's 0.1 * 1024/256
    "one_machine_warmup": {
        "kn256_gamma0": (0.2, 0),
        "kn256_gamma1": (0.2, 0),
        "kn512_none_gamma0": (0.4, 0),
        "kn512_none_gamma1": (0.4, 0),
        "kn512_constant_gamma0": (0.4, 2),
        "kn512_constant_gamma1": (0.4, 2),
        "kn512_gradual_gamma0": (0.4, 2),
        "kn512_gradual_gamma1": (0.4, 2),
        "kn1024_gradual_gamma0": (0.8, 2),
        "resnet8_kn1024_none": (0.4, 0),
        "resnet8_kn1024_constant": (0.4, 2),
    },
    "one_machine_lars": {
        f"minibatch-{kn}_reference_lr-{lr}_trust_coefficient-{trust}": (peak, 2)
        for kn, peaks in {1024: (0.25, 0.5, 1.0, 2.0), 2048: (0.5, 1.0, 2.0, 4.0)}.items()
        for lr, peak in zip((0.0625, 0.125, 0.25, 0.5), peaks, strict=True)
        for trust in (0.005, 0.02)
    },
    "one_machine_lars_control": {
        f"minibatch-{kn}_reference_lr-{lr}": (peak, 2)
        for kn, peaks in {
            1024: (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4),
            2048: (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8),
        }.items()
        for lr, peak in zip((0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6), peaks, strict=True)
    },
}
WHOLE_BATCH = "one_machine_whole_batch"  # batch norm over the minibatch


def test_every_shipped_study_is_above():
    assert {path.stem for path in Path("configs/studies").glob("*.yaml")} == PAPERS.keys()


@pytest.mark.parametrize("name", PAPERS)
def test_every_variant_of_a_shipped_study_is_its_row(name):
    runs = study_runs(f"configs/studies/{name}.yaml", Path("runs"))
    first_seed = [run for run in runs if run.name.endswith("-1")]
    assert [run.run.parent.name for run in first_seed] == [*PAPERS[name]]
    for run in {str(run.config.model): run for run in first_seed}.values():
        make_plan(run.config, ranks=1)
    for run in first_seed:
        config, (peak, warmup_epochs, *paper) = run.config, PAPERS[name][run.run.parent.name]
        assert peak_lr(config.recipe) == pytest.approx(peak, abs=5e-5), run.name
        assert config.recipe.warmup_end == warmup_epochs, run.name
        n = config.recipe.minibatch if name == WHOLE_BATCH else 32
        assert config.steps_per_epoch >= 5 and config.recipe.worker_batch == n
        if paper:
            assert [config.expect.error, config.expect.std] == paper, run.name
            assert config.expect.runs == (None if config.expect.std is None else 5)
        if "gamma" in run.name or name in ("last_gamma", "cifar10_last_gamma"):
            assert config.model.last_gamma == int(run.run.parent.name.endswith("gamma1"))


def test_lars_and_its_control_have_the_same_schedule_and_as_many_trials():
    lars, control = (
        [run.config.recipe for run in study_runs(f"configs/studies/{name}.yaml", Path("runs"))]
        for name in ("one_machine_lars", "one_machine_lars_control")
    )
    assert len(lars) == len(control) == 16
    assert {r.optimizer for r in lars} == {"lars"} and {r.optimizer for r in control} == {"sgd"}
    keys = ("decay", "decay_power", "warmup", "warmup_epochs", "epochs", "weight_decay", "momentum")
    (schedule,) = {tuple(getattr(r, key) for key in keys) for r in [*lars, *control]}
    assert schedule[:2] == ("polynomial", 2.0)


def test_whole_batch_statistics_are_compared_with_and_without_recalibration():
    runs = study_runs(f"configs/studies/{WHOLE_BATCH}.yaml", Path("runs"))
    for run in runs:
        recalibrated = run.config.run.recalibrate_images
        assert recalibrated == (10240 if "recalibrated" in run.name else 0), run.name
