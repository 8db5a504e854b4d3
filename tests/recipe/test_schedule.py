"""The learning rate by hand, for ImageNet: 1,281,167 images."""

import math
from itertools import pairwise

import pytest

from harness.config.loading import config_from_mapping
from harness.recipe.schedule import error_rule, final_epochs, lr_at, peak_lr

IMAGENET = {"train_images": 1281167, "val_images": 50000, "classes": 1000}


def imagenet(minibatch=8192, **recipe):
    return config_from_mapping(
        {
            "expect": {"error": 23.74, "source": "table 1"},
            "data": IMAGENET,
            "model": {"name": "resnet50"},
            "recipe": {"minibatch": minibatch, "epochs": 90, **recipe},
        },
        "test",
    )


def test_steps_an_epoch():
    # 1281167 / 8192 = 156.4 -> 156; 156 * 90 = 14040
    config = imagenet()
    assert (config.steps_per_epoch, config.total_steps) == (156, 14040)
    assert config.warmup_steps == 780  # 5 * 156


@pytest.mark.parametrize(
    ("step", "lr"),
    [
        (0, 0.1),  # section 2.2: starts at eta, not at 0
        (1, 0.1 + 3.1 / 780),  # a constant amount every iteration, not every epoch
        (156, 0.1 + 3.1 / 5),
        (390, 1.65),  # 0.1 + 3.1 * 390/780
        (779, 3.2 - 3.1 / 780),
        (780, 3.2),  # 0.1 * 8192/256, after 5 epochs
        (781, 3.2),
        (4679, 3.2),
        (4680, 0.32),  # epoch 30 = 30 * 156, warm-up included
        (4681, 0.32),
        (9359, 0.32),
        (9360, 0.032),  # epoch 60
        (9361, 0.032),
        (12479, 0.032),
        (12480, 0.0032),  # epoch 80
        (12481, 0.0032),
        (14039, 0.0032),
    ],
)
def test_the_paper_at_8192(step, lr):
    assert lr_at(imagenet(), step) == pytest.approx(lr, rel=1e-12)


@pytest.mark.parametrize("step", [-1, 14040])
def test_a_step_outside_the_run_is_a_mistake(step):
    with pytest.raises(ValueError, match=rf"step {step} is not in \[0, 14040\)"):
        lr_at(imagenet(), step)


def test_constant_warmup_jumps():
    # section 2.2, "Constant warmup": 0.1 for 5 epochs, then the jump
    config = imagenet(warmup="constant")
    assert [lr_at(config, step) for step in (0, 1, 390, 779)] == [0.1] * 4
    assert [lr_at(config, step) for step in (780, 781)] == pytest.approx([3.2] * 2)
    assert lr_at(config, 4680) == pytest.approx(0.32)


def test_no_warmup_starts_at_the_peak():
    config = imagenet(warmup="none")
    assert config.warmup_steps == 0
    assert [lr_at(config, step) for step in (0, 779, 780)] == pytest.approx([3.2] * 3)


@pytest.mark.parametrize("warmup", ["gradual", "constant"])
@pytest.mark.parametrize(("minibatch", "peak"), [(128, 0.05), (256, 0.1)])
def test_no_ramp_where_the_peak_is_not_above_the_reference(warmup, minibatch, peak):
    # section 5.1: warm-up is for kn > 256
    config = imagenet(minibatch, warmup=warmup)
    steps = config.steps_per_epoch
    assert config.warmup_steps == 0
    assert [lr_at(config, step) for step in (0, 1, 5 * steps)] == pytest.approx([peak] * 3)


def test_cosine_runs_from_the_end_of_warmup_to_the_last_step():
    # w = 780, S = 14040, so the middle is 780 + 13260/2 = 7410 and a third 780 + 4420 = 5200
    config = imagenet(decay="cosine")
    assert lr_at(config, 390) == pytest.approx(1.65)
    assert lr_at(config, 780) == pytest.approx(3.2)
    assert lr_at(config, 5200) == pytest.approx(2.4)  # cos(60 degrees) = 1/2: 3.2 * 1.5/2
    assert lr_at(config, 7410) == pytest.approx(1.6)  # cos(90 degrees) = 0
    # the last update, one step before S: 3.2 * (pi/13260)^2 / 4 = 4.4906e-8
    assert lr_at(config, 14039) == pytest.approx(4.4906e-8, rel=1e-4)


@pytest.mark.parametrize(
    ("power", "third", "middle", "last"),
    [
        # 3.2 * 2/3, 3.2 * 1/2, 3.2 / 13260
        (1.0, 2.1333333, 1.6, 2.413273e-4),
        # squared: 3.2 * 4/9, 3.2 * 1/4, 3.2 / 13260^2
        (2.0, 1.4222222, 0.8, 1.819964e-8),
        # 3.2 * sqrt(2/3), 3.2 * sqrt(1/2), 3.2 / sqrt(13260)
        (0.5, 2.6127891, 2.2627417, 0.02778934),
    ],
)
def test_polynomial_decay_by_hand(power, third, middle, last):
    # as with the cosine: 780 warm-up steps, a third at 5200, the middle at 7410
    config = imagenet(decay="polynomial", decay_power=power)
    assert lr_at(config, 390) == pytest.approx(1.65)
    assert lr_at(config, 780) == pytest.approx(3.2)
    assert lr_at(config, 5200) == pytest.approx(third)
    assert lr_at(config, 7410) == pytest.approx(middle)
    assert lr_at(config, 14039) == pytest.approx(last)


def test_polynomial_decay_without_warmup_has_the_power_2_by_default():
    config = imagenet(256, decay="polynomial")
    assert lr_at(config, 0) == pytest.approx(0.1)
    assert lr_at(config, 45 * 5004) == pytest.approx(0.025)  # half of the steps are left


def test_cosine_without_warmup():
    config = imagenet(256, decay="cosine")
    # 1281167 / 256 = 5004.6 -> 5004 steps an epoch; the middle is 45 * 5004
    assert lr_at(config, 0) == pytest.approx(0.1)
    assert lr_at(config, 45 * 5004) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("minibatch", "recipe", "first", "peak"),
    [
        # table 1
        (8192, {"warmup": "none"}, 3.2, 3.2),
        (8192, {"warmup": "constant"}, 0.1, 3.2),
        (8192, {"warmup": "gradual"}, 0.1, 3.2),
        (256, {}, 0.1, 0.1),
        # table 2a, kn = 256
        (256, {"reference_lr": 0.05}, 0.05, 0.05),
        (256, {"reference_lr": 0.1}, 0.1, 0.1),
        (256, {"reference_lr": 0.2}, 0.2, 0.2),
        # table 2a, kn = 8192: .05*32 (starts at .05), .1*32, .2*32, .1, .1*sqrt(32)
        (8192, {"reference_lr": 0.05}, 0.05, 1.6),
        (8192, {"reference_lr": 0.1}, 0.1, 3.2),
        (8192, {"reference_lr": 0.2}, 0.2, 6.4),
        (8192, {"scaling": "none"}, 0.1, 0.1),
        (8192, {"scaling": "sqrt"}, 0.1, 0.5656854249492381),  # 0.1 * 5.656854
    ],
)
def test_every_row_of_tables_1_and_2a(minibatch, recipe, first, peak):
    config = imagenet(minibatch, **recipe)
    after_warmup = 5 * config.steps_per_epoch
    assert peak_lr(config.recipe) == pytest.approx(peak, rel=1e-12)
    assert lr_at(config, 0) == pytest.approx(first, rel=1e-12)
    assert lr_at(config, after_warmup) == pytest.approx(peak, rel=1e-12)
    assert lr_at(config, 30 * config.steps_per_epoch) == pytest.approx(peak / 10, rel=1e-12)


def test_the_reference_is_a_setting():
    # quickstart: 0.1 at 32 images, kn = 256: 0.1 * 256/32 = 0.8
    config = imagenet(256, reference_minibatch=32)
    assert peak_lr(config.recipe) == pytest.approx(0.8)
    assert lr_at(config, 0) == pytest.approx(0.1)


def test_the_ramp_is_strictly_rising_by_equal_amounts():
    config = imagenet()
    ramp = [lr_at(config, step) for step in range(781)]
    amounts = {round(b - a, 12) for a, b in pairwise(ramp)}
    assert amounts == {round(3.1 / 780, 12)}
    assert math.isclose(sum(ramp[:780]), 780 * (0.1 + 3.2) / 2 - (3.2 - 0.1) / 2)


def short(epochs, **recipe):
    """Two steps an epoch; the peak is 8 times the reference lr."""
    data = {"train_images": 20, "val_images": 10, "classes": 10}
    kn = {"minibatch": 8, "worker_batch": 1, "reference_minibatch": 1}
    mapping = {"data": data, "model": {"name": "resnet8"}}
    mapping["recipe"] = kn | {"epochs": epochs, "milestones": [], "warmup": "none"} | recipe
    if "decay" in recipe:
        del mapping["recipe"]["milestones"]
    return config_from_mapping(mapping, "test")


FINAL_EPOCHS = [
    (short(90, milestones=[30, 60, 80]), [86, 87, 88, 89, 90]),  # the paper's
    (short(6, milestones=[5]), [6]),  # ends at 13.06 %, the median of its last 5 was 86.39 %
    (short(30, milestones=[15, 22, 27]), [28, 29, 30]),
    (short(12, milestones=[6, 9, 11]), [12]),
    (short(60, milestones=[30, 45, 55]), [56, 57, 58, 59, 60]),
    (short(60, milestones=[30, 45, 56]), [57, 58, 59, 60]),
    (short(10, milestones=[5, 9], decay_factor=1.0), [6, 7, 8, 9, 10]),  # nothing changes
    (short(10, milestones=[5, 9], decay_factor=0.5), [10]),
    (short(3), [1, 2, 3]),
    (short(1), [1]),
    (short(90, decay="cosine"), [90]),
    (short(1, decay="cosine"), [1]),
    (short(90, decay="polynomial"), [90]),
    (short(6, warmup="gradual", warmup_epochs=3), [4, 5, 6]),
    (short(6, warmup="constant", warmup_epochs=5), [6]),
    (short(6, warmup="gradual", warmup_epochs=6), [6]),  # the warm-up is the whole run
    (short(6, warmup="constant", warmup_epochs=3, milestones=[3]), [4, 5, 6]),
    # back at the reference lr, but not throughout
    (short(4, warmup="constant", warmup_epochs=1, milestones=[3], decay_factor=0.125), [4]),
    (short(4, warmup="gradual", warmup_epochs=3, scaling="none"), [1, 2, 3, 4]),  # no warm-up
]


@pytest.mark.parametrize(("config", "epochs"), FINAL_EPOCHS)
def test_the_error_is_of_the_epochs_at_the_final_learning_rate(config, epochs):
    assert [*final_epochs(config)] == epochs
    # the same from every step's learning rate: the longest end of whole epochs at one of them
    steps = config.steps_per_epoch
    rates = [
        {lr_at(config, step) for step in range(e * steps, (e + 1) * steps)}
        for e in range(config.recipe.epochs)
    ]
    last, settled = {lr_at(config, config.total_steps - 1)}, 0
    while settled < min(len(rates), 5) and rates[-1 - settled] == last:
        settled += 1
    assert len(epochs) == max(settled, 1)


def test_the_rule_in_words():
    assert error_rule(range(86, 91)) == "median of epochs 86 to 90"
    assert error_rule([12]) == "epoch 12"
