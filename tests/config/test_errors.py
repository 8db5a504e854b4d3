"""What a config is refused for, and the line that says so."""

from pathlib import Path

import pytest

from harness.config.errors import ConfigError
from harness.config.loading import load_config

# kn = 8192 is 32 times the reference of 256, 90 epochs, resnet50: 5 epochs of warm-up are at work
RESNET50_8192 = Path(__file__).parents[2] / "configs" / "imagenet" / "resnet50_8192.yaml"


def refusal(*overrides):
    """The one-line message with which overrides of resnet50_8192.yaml are refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(RESNET50_8192, overrides)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message.removeprefix(f"{RESNET50_8192} + command line: ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("recipe.warmup_epoch=3", "recipe.warmup_epoch: unknown key, did you mean recipe.warmup_e"),
        ("model.minibatch=64", "model.minibatch: unknown key, did you mean recipe.minibatch?"),
        ("minibatch=64", "minibatch: unknown key, did you mean recipe.minibatch?"),
        ("recip.minibatch=64", "recip: unknown key, did you mean recipe?"),
        ("expect.zzz=1", "expect.zzz: unknown key; known here: error, std, runs, source"),
        ("run={1: 2}", "run.1: expected a word as a key, found 1"),
        ("recipe.minibatch=64.0", "recipe.minibatch: expected a whole number, found 64.0"),
        ("recipe.minibatch='64'", "recipe.minibatch: expected a whole number, found '64'"),
        ("recipe.minibatch=true", "recipe.minibatch: expected a whole number, found true"),
        ("recipe.minibatch=", "recipe.minibatch: missing, and has no default; add it"),
        ("recipe.momentum=true", "recipe.momentum: expected a number, found true"),
        ("recipe.momentum=.nan", "recipe.momentum: expected a finite number, found nan"),
        ("recipe.nesterov=1", "recipe.nesterov: expected true or false, found 1"),
        ("model.name=50", "model.name: expected text, found 50"),
        ("model.last_gamma=true", "model.last_gamma: expected a whole number, found true"),
        ("model=resnet50", "model: expected a section of keys, found 'resnet50'"),
        ("recipe.milestones=5", "recipe.milestones: expected a list, found 5"),
        ("recipe.milestones=[30, a]", "recipe.milestones[1]: expected a whole number, found 'a'"),
        ("data.mean=[1, 1]", "data.mean[2]: missing"),
        ("data.mean=[1, 1, 1, 1]", "data.mean: expected at most 3 items, found [1, 1, 1, 1]"),
        (
            "recipe.decay=cosin",
            "recipe.decay: expected steps, cosine or polynomial, found 'cosin', did you mean "
            "cosine?",
        ),
        ("recipe.decay_power=-2", "recipe.decay_power: expected more than 0, found -2"),
        ("recipe.trust_coefficient=0", "recipe.trust_coefficient: expected more than 0, found 0"),
        ("recipe.warmup=null", "recipe.warmup: expected gradual, constant or none, found null"),
        (
            "run.precision=bf16",
            "run.precision: expected float32, tf32, bfloat16, float16 or float64, found 'bf16', "
            "did you mean bfloat16?",
        ),
        ("run.micro_batch=aut", "run.micro_batch: expected a whole number or auto, found 'aut'"),
        ("run.compile=1", "run.compile: expected true or false or auto, found 1"),
    ],
)
def test_a_wrong_key_or_type(override, message):
    assert refusal(override).startswith(message)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("recipe.momentum=1", "less than 1"),
        ("recipe.momentum=-0.1", "at least 0"),
        ("recipe.weight_decay=-1e-4", "at least 0"),
        ("recipe.reference_lr=0", "more than 0"),
        ("recipe.decay_factor=0", "more than 0"),
        ("recipe.label_smoothing=1.01", "at most 1"),
        ("recipe.label_smoothing=-0.01", "at least 0"),
        ("recipe.epochs=0", "at least 1"),
        ("data.val_images=-1", "at least 1"),
        ("expect.error=100.5", "at most 100"),
        ("model.last_gamma=2", "at most 1"),
        ("seed=-1", "at least 0"),
        ("seed=9223372036854775808", "less than 9223372036854775808"),  # 2**63
        ("run.micro_batch=0", "at least 1 or auto"),
        ("run.checkpoint_every_minutes=0", "more than 0"),
    ],
)
def test_a_number_out_of_range(override, expected):
    key, value = override.split("=")
    found = {"-1e-4": "-0.0001"}.get(value, value)
    assert refusal(override) == f"{key}: expected {expected}, found {found}"


# --- impossible combinations --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["recipe.minibatch=100"],
            "recipe.minibatch: 100 is not a multiple of worker_batch 32; take 96 or 128",
        ),
        (
            ["recipe.minibatch=16"],
            "recipe.minibatch: 16 is not a multiple of worker_batch 32; take 32",
        ),
        (
            ["data.train_images=8191"],
            "recipe.minibatch: 8192 is more than the 8191 training images, an epoch has no step; "
            "lower it",
        ),
        (
            ["recipe.milestones=[4, 60]"],
            "recipe.milestones: [4] inside the warm-up; take epochs from 5 on",
        ),
        (
            ["recipe.epochs=60"],  # of the default milestones 30, 60, 80
            "recipe.milestones: [60, 80] past the end (epochs: 60); take epochs below 60",
        ),
        (
            ["recipe.milestones=[30, 30]"],
            "recipe.milestones: [30, 30] must rise from one to the next; sort them",
        ),
        (
            ["recipe.epochs=4", "recipe.milestones=[]"],
            "recipe.warmup_epochs: 5 is past the end (epochs: 4); lower warmup_epochs or raise "
            "epochs",
        ),
        (
            ["recipe.momentum=0"],
            "recipe.nesterov: needs a momentum above 0; set nesterov: false or raise momentum",
        ),
        (
            ["data.crop=257", "data.resize=256"],
            "data.crop: 257 is larger than resize 256; lower it or raise resize",
        ),
        (
            ["data.crop_area=[0.5, 0.2]"],
            "data.crop_area: expected low <= high <= 1, found [0.5, 0.2]",
        ),
        (
            ["data.crop_area=[0.5, 1.1]"],
            "data.crop_area: expected low <= high <= 1, found [0.5, 1.1]",
        ),
        (["data.crop_area=[0, 1]"], "data.crop_area[0]: expected more than 0, found 0"),
        (["data.crop_ratio=[2, 1]"], "data.crop_ratio: expected low <= high, found [2.0, 1.0]"),
        (["data.std=[1, 0, 1]"], "data.std[1]: expected at least 0.001, found 0"),
        (
            # the figures for pixels from 0 to 255
            ["data.mean=[123.7, 116.3, 103.5]"],
            "data.mean[0]: expected at most 1, found 123.7 (and 2 more)",
        ),
        (
            # 1e38 * 8192 / 256 = 3.2e39 is above the largest float32, 3.4e38
            ["recipe.reference_lr=1e38"],
            "recipe.reference_lr: 1e+38, scaled, is no float32 number; lower it",
        ),
        (
            ["run.recalibrate_images=1000"],
            "run.recalibrate_images: 1000 is not a multiple of recipe.worker_batch 32; take 992 or "
            "1024",
        ),
        (
            ["run.recalibrate_images=1281184"],  # 40037 * 32
            "run.recalibrate_images: 1281184 is more than the 1281167 training images; lower it",
        ),
        (
            ["run.micro_batch=48"],
            "run.micro_batch: 48 is not a multiple of recipe.worker_batch 32",
        ),
    ],
)
def test_an_impossible_combination_says_what_to_change(overrides, message):
    assert refusal(*overrides) == message


@pytest.mark.parametrize(
    ("value", "key", "other"),
    [
        ("cosine", "recipe.milestones=[30, 60, 80]", "recipe.decay"),  # its default, yet written
        ("cosine", "recipe.decay_factor=0.1", "recipe.decay"),
        ("polynomial", "recipe.milestones=[30, 60, 80]", "recipe.decay"),
        ("cosine", "recipe.decay_power=2.0", "recipe.decay"),
        ("steps", "recipe.decay_power=2.0", "recipe.decay"),
        ("none", "recipe.warmup_epochs=5", "recipe.warmup"),
    ],
)
def test_a_key_without_meaning_is_refused_when_written(value, key, other):
    name, other_name = key.partition("=")[0], other.removeprefix("recipe.")
    assert refusal(key, f"{other}={value}") == (
        f"{name}: has no meaning with {other_name}: {value}; remove it"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.unlabelled_images=9",
            "data.unlabelled_images: such images have the soft term of distill only, and there "
            "is none; set 0, or distill with a soft weight above 0",
        ),
        (
            # 90 epochs of floor(1281167 / 8192) = 156 steps; 5 come before, 3 are traced after
            "run.profile_steps=14040",
            "run.profile_steps: 14040 needs a run of 14048 steps, this one has 14040; lower it",
        ),
    ],
)
def test_what_the_rest_of_the_config_does_not_allow(override, message):
    assert refusal(override) == message


def test_several_mistakes_the_first_and_a_count():
    message = refusal(
        "data.crop=300", "data.resize=256", "recipe.minibatch=100", "recipe.momentum=0"
    )
    assert message.startswith("data.crop: 300") and message.endswith("(and 2 more)")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["recipe.minibatch"], "'recipe.minibatch': expected section.key=value"),
        (["=64"], "'=64': expected section.key=value"),
        (["recipe..minibatch=64"], "'recipe..minibatch=64': expected section.key=value"),
        (["model.name.x=1"], "model.name.x: model.name is 'resnet50' and has no keys"),
        (["seed=1", "seed=2"], "seed: given twice; give it once"),
        (["seed=[1"], "seed: line 1: expected ',' or ']', but got '<stream end>'"),
    ],
)
def test_a_malformed_override(overrides, message):
    assert refusal(*overrides) == f"command line: {message}"
