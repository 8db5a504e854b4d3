"""The YAML contract: defaults, overrides, the dump, and the shipped recipes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from harness.config.errors import ConfigError
from harness.config.loading import (
    config_from_mapping,
    curve_differences,
    default_run_folder,
    dump_config,
    load_config,
)
from harness.config.schema import Config, DistillConfig
from harness.config.stages import load_stages
from harness.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
# kn = 8192 is 32 times the reference of 256: the warm-up of 5 epochs is at work
SMALLEST = """\
expect: {error: 5, source: here}
data: {train_images: 100000, val_images: 100, classes: 10}
model: {name: resnet50}
recipe: {minibatch: 8192, epochs: 90}
"""


@pytest.fixture
def load(tmp_path):
    """Loads a text as x.yaml."""

    def load_text(text, *overrides):
        (tmp_path / "x.yaml").write_text(text)
        return load_config(tmp_path / "x.yaml", overrides)

    return load_text


@pytest.fixture
def refused(load, tmp_path):
    """The one-line message with which a text is refused, without its folder."""

    def refused_text(text, *overrides):
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides)
        message = str(caught.value)
        assert len(message.splitlines()) == 1
        return message.replace(f"{tmp_path}/", "")

    return refused_text


def test_omitted_keys_take_the_documented_defaults(load):
    assert load(SMALLEST).model_dump(mode="json") == {
        "seed": 1,
        "expect": {"error": 5.0, "std": None, "runs": None, "source": "here"},
        "data": {
            "train_images": 100000,
            "val_images": 100,
            "classes": 10,
            "unlabelled_images": 0,
            "crop": 224,
            "resize": 256,
            "crop_area": [0.08, 1.0],
            "crop_ratio": [0.75, 4 / 3],
            "flip": True,
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "on_bad_image": "fail",
        },
        "model": {
            **{"name": "resnet50", "last_gamma": 0, "weights": None},
            **{"freeze": "none", "options": {}},
        },
        "recipe": {
            "minibatch": 8192,
            "worker_batch": 32,
            "epochs": 90,
            "reference_lr": 0.1,
            "reference_minibatch": 256,
            "classifier_lr_factor": 1.0,
            "scaling": "linear",
            "warmup": "gradual",
            "warmup_epochs": 5,
            "decay": "steps",
            "milestones": [30, 60, 80],
            "decay_factor": 0.1,
            "optimizer": "sgd",
            "momentum": 0.9,
            "nesterov": True,
            "weight_decay": 0.0001,
            "label_smoothing": 0.0,
        },
        "distill": None,
        "run": {
            "data_root": "data/imagenet",
            "data_format": "folder",
            "device": "auto",
            "precision": "float32",
            "micro_batch": "auto",
            "sums": "auto",
            "unit_workers": 1,
            "intra_op_threads": "auto",
            "compile": "auto",
            "gradient_precision": "float32",
            "loader": "auto",
            "loader_threads": "auto",
            "evaluate_every_epochs": 1,
            "recalibrate_images": 0,
            "log_every_steps": 20,
            "checkpoint_every_minutes": 10.0,
            "keep_checkpoints": 3,
            "hang_timeout_s": 300.0,
            "profile_steps": 0,
            "noise_scale_every": 0,
            "loggers": [],
        },
    }


def test_width_is_a_key_of_the_small_resnets_only(load, refused):
    small = load(SMALLEST, "model.name=resnet20")
    assert small.model.width == 16 and "width: 16" in dump_config(small)
    assert "model.width: has no meaning with name: resnet50" in refused(SMALLEST, "model.width=8")


def test_the_sections_of_distillation_have_their_keys():
    assert DistillConfig(teacher="t.yaml").model_dump() == {
        "teacher": "t.yaml",
        "teacher_model": None,
        "temperature": 4.0,
        "hard_weight": 0.1,
        "soft_weight": None,
        "precision": "bfloat16",
        "cache": None,
    }


def test_a_config_is_frozen(load):
    config = load(SMALLEST)
    with pytest.raises(ValidationError, match="frozen"):
        config.recipe.minibatch = 64
    assert isinstance(config.recipe.milestones, tuple)
    assert issubclass(ConfigError, UserError)


def test_derived_counts(load):
    config = load(SMALLEST)
    assert config.workers == 256  # 8192 / 32
    assert config.images == 100000
    assert config.steps_per_epoch == 12  # floor(100000 / 8192) = floor(12.2)
    assert config.total_steps == 1080  # 12 * 90


def test_the_message_names_file_key_and_nearest_key(refused):
    assert refused(SMALLEST.replace("minibatch", "minibach")) == (
        "x.yaml: recipe.minibach: unknown key, did you mean recipe.minibatch? (and 1 more)"
    )  # the other one: recipe.minibatch is missing
    assert refused("seed: 1\n") == (
        "x.yaml: data: missing, and has no default; add it (and 2 more)"  # model, recipe
    )


def test_numbers_at_the_ends_of_their_ranges(load):
    config = load(SMALLEST, "seed=9223372036854775807", "recipe.label_smoothing=1")
    assert (config.seed, config.recipe.label_smoothing) == (2**63 - 1, 1.0)


@pytest.mark.parametrize(
    ("crop", "resize"),
    # 96 * 256 / 224 = 109.7; 32 * 8 / 7 = 36.6; 299 * 8 / 7 = 341.7; then the largest crop
    [(224, 256), (96, 110), (32, 37), (1, 1), (299, 342), (32768, 37449)],
)
def test_an_omitted_resize_is_in_proportion_to_the_crop(load, crop, resize):
    config = load(SMALLEST, f"data.crop={crop}")
    assert config.data.resize == resize
    # stored, it stays as it is whatever the default is by then
    assert f"resize: {resize}" in dump_config(config)
    assert load(dump_config(config)) == config
    assert load(SMALLEST, f"data.crop={crop}", f"data.resize={crop}").data.resize == crop


def test_a_crop_that_is_refused_is_the_only_mistake_told(refused):
    assert refused(SMALLEST, "data.crop=0") == (
        "x.yaml + command line: data.crop: expected at least 1, found 0"
    )


@pytest.mark.parametrize(
    "overrides",
    [
        ["recipe.milestones=[5, 89]"],  # the first and the last epoch that are allowed
        ["recipe.milestones=[]"],
        ["recipe.minibatch=256", "recipe.epochs=3", "recipe.milestones=[1]"],  # no ramp at kn = 256
        ["recipe.scaling=none", "recipe.milestones=[1]"],  # nor where nothing is scaled
        ["recipe.warmup=none", "recipe.milestones=[1]"],
        ["recipe.decay=cosine", "recipe.epochs=20"],  # the default milestones have no meaning
        ["recipe.momentum=0", "recipe.nesterov=false"],
        ["data.train_images=8192"],
        ["data.crop=256"],
        ["run.micro_batch=64"],
    ],
)
def test_what_is_possible_is_accepted(load, overrides):
    assert load(SMALLEST, *overrides).total_steps > 0


# --- the command line ---------------------------------------------------------------------------


def test_overrides(load):
    config = load(
        SMALLEST + "distill: {teacher: x}\n",
        "distill=null",
        "seed=7",
        "data.crop_area=[0.5, 1]",
        "model={name: resnet20, width: 8}",
        "run.data_root=a=b",
        "run.micro_batch=64",
    )
    assert config.distill is None and config.seed == 7
    assert config.data.crop_area == (0.5, 1.0)
    assert (config.model.name, config.model.width) == ("resnet20", 8)
    assert (config.run.data_root, config.run.micro_batch) == ("a=b", 64)


def test_null_takes_a_key_out_of_the_file(load):
    """So that a study on a config that writes warmup_epochs can have a variant without warm-up."""
    text = SMALLEST.replace("epochs: 90", "epochs: 90, warmup_epochs: 2")
    assert load(text, "recipe.warmup_epochs=null").recipe.warmup_epochs == 5
    config = load(text, "recipe.warmup_epochs=null", "recipe.warmup=none")
    assert "warmup_epochs" not in config.model_dump()["recipe"]
    for key, part in (
        ("recipe.warmup=none", "warmup_epochs: has no meaning with warmup: none"),
        ("recipe.warmup_epoch=null", "warmup_epoch: unknown key"),
    ):
        with pytest.raises(ConfigError, match=part):
            load(text, key)


def test_a_stored_config_names_its_source():
    with pytest.raises(ConfigError, match=r"^step 5's config: data: missing"):
        config_from_mapping({"seed": 1}, "step 5's config")


# --- what is expected, and of what --------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "expects"),
    [
        ([], True),
        (["seed=7", "run.micro_batch=32", "run.device=cpu"], True),
        (["recipe.epochs=90", "recipe.nesterov=true", "data.flip=true"], True),  # as they are
        (["recipe.epochs=91"], False),
        (["recipe.weight_decay=0", "seed=2"], False),
        (["data.crop=128"], False),
        (["model.last_gamma=1"], False),
        (["distill={teacher: t.pt, teacher_model: resnet50}"], False),
        (["recipe.epochs=91", "expect.error=4"], True),  # said for this recipe
        (["expect=null"], False),
    ],
)
def test_an_expectation_is_for_the_recipe_of_its_file(load, overrides, expects):
    assert (load(SMALLEST, *overrides).expect is not None) is expects


def test_a_file_that_needs_its_overrides_states_no_expectation(load):
    no_epochs = SMALLEST.replace(", epochs: 90", "")
    assert no_epochs != SMALLEST and load(no_epochs, "recipe.epochs=90").expect is None
    odd_machine = SMALLEST + "run: {micro_batch: 33}\n"
    assert load(odd_machine, "run.micro_batch=64", "recipe.epochs=90").expect is not None


def test_the_expectation_is_optional_and_counts_its_runs(load, refused):
    without = "\n".join(line for line in SMALLEST.splitlines() if not line.startswith("expect"))
    assert load(without).expect is None and load(dump_config(load(without))) == load(without)
    expect = load(SMALLEST, "expect.std=0.5", "expect.runs=5").expect
    assert str(expect) == "5.00 ± 0.50 % (5 runs, here)"
    assert "expect.std: one run has none" in refused(SMALLEST, "expect.std=0.5", "expect.runs=1")
    assert "expect.runs: expected at least 1" in refused(SMALLEST, "expect.runs=0")


# --- dump, compare, place -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["recipe.decay=cosine", "recipe.warmup=none"],  # their meaningless keys are left out
        ["model.name=resnet8", "model.width=4", "recipe.weight_decay=1e-5"],
        ["run.data_root='1e-4'", "expect.source='off: #1, 4:00:00 é'", "run.compile=false"],
    ],
)
def test_a_dumped_config_loads_back_equal(load, overrides):
    config = load(SMALLEST, *overrides)
    assert load(dump_config(config)) == config
    assert config_from_mapping(config.model_dump(mode="json"), "checkpoint") == config


def test_a_dump_holds_every_key_with_lists_on_one_line(load):
    dumped = dump_config(load(SMALLEST)).splitlines()
    assert "  milestones: [30, 60, 80]" in dumped and "  keep_checkpoints: 3" in dumped
    assert dumped[0] == "seed: 1" and "distill: null" in dumped


def test_differences_of_the_curve_leave_out_run_and_expect(load):
    a = load(SMALLEST)
    b = load(SMALLEST, "seed=2", "recipe.milestones=[30]", "run.device=cpu", "expect.error=9")
    assert curve_differences(a, b) == [
        "seed: 1 -> 2",
        "recipe.milestones: [30, 60, 80] -> [30]",
    ]
    assert curve_differences(a, load(SMALLEST, "run.precision=bfloat16")) == []


@pytest.mark.parametrize(
    ("path", "folder"),
    [
        ("configs/imagenet/x.yaml", "runs/imagenet/x"),
        ("configs/quickstart.yaml", "runs/quickstart"),
        ("/home/me/configs/a/configs/b/x.v2.yaml", "runs/b/x.v2"),
        ("elsewhere/x.yaml", "runs/x"),
        ("x.yaml", "runs/x"),
        ("configs/../../x.yaml", "runs/x"),
    ],
)
def test_default_run_folder(path, folder):
    assert default_run_folder(path) == Path(folder)


# --- the recipes that come with the harness -----------------------------------------------------


@pytest.mark.parametrize(
    ("name", "workers", "steps_per_epoch", "total_steps"),
    [
        ("quickstart", 8, 5, 150),  # 256/32; floor(1437/256) = 5; 5 * 30
        ("imagenet/resnet50_256", 8, 5004, 450360),  # floor(1281167/256) = 5004; * 90
        ("imagenet/resnet50_8192", 256, 156, 14040),  # floor(1281167/8192) = 156; * 90
        ("imagenet/resnet50_8192_no_warmup", 256, 156, 14040),
        ("imagenet/resnet50_8192_constant_warmup", 256, 156, 14040),
        ("imagenet/resnet101_8192", 256, 156, 14040),
        ("cifar10/resnet20_128", 4, 390, 4680),  # floor(50000/128) = 390; * 12
        ("cifar10/resnet20_1024", 32, 48, 576),  # floor(50000/1024) = 48; * 12
        ("cifar10/resnet56_128", 4, 390, 63960),  # * 164
        ("distill/quickstart", 8, 5, 300),  # floor((143 + 1294)/256) = 5; * 60
        ("distill/cifar10_resnet20", 4, 390, 63960),
        ("distill/imagenet_resnet50", 256, 156, 14040),
        ("distill/imagenet_resnet18", 256, 156, 14040),
        ("cifar10/resnet20_128_164epochs", 4, 390, 63960),  # 390 * 164
        ("cifar10/resnet8_16px_128", 4, 80, 960),  # floor(10240/128) = 80; * 12
        ("cifar10/resnet8_16px_256", 8, 40, 1200),  # floor(10240/256) = 40; * 30
        ("cifar10/resnet20_16px_256", 8, 40, 1200),
    ],
)
def test_a_shipped_config(name, workers, steps_per_epoch, total_steps):
    path = CONFIGS / f"{name}.yaml"
    config = load_config(path)
    assert config.workers == workers
    assert (config.steps_per_epoch, config.total_steps) == (steps_per_epoch, total_steps)
    # the comment at the head shows the same arithmetic and its own command
    head = re.split("^(?:expect|data):", path.read_text(), flags=re.M)[0]
    for figure in (f"= {workers} workers", f"= {steps_per_epoch} steps", f"= {total_steps} in all"):
        assert figure in head.replace("\n# ", " ")
    assert f"harness train configs/{name}.yaml" in head


def test_every_shipped_config_is_in_the_test_above():
    assert len(list(CONFIGS.glob("quickstart.yaml"))) == 1
    assert len(list(CONFIGS.glob("imagenet/*.yaml"))) == 5
    assert len(list(CONFIGS.glob("cifar10/*.yaml"))) == 7
    assert len(list(CONFIGS.glob("distill/*.yaml"))) == 4


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("distill/*.yaml")))
def test_a_shipped_student_has_its_teachers_classes_crops_and_size(path, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    teacher, student = load_stages(path)
    for key in ("classes", "val_images", "crop", "resize", "mean", "std"):
        assert getattr(teacher.config.data, key) == getattr(student.config.data, key)
    assert teacher.config.images == student.config.images


def test_the_published_variants_differ_in_one_key_of_the_curve():
    gradual = load_config(CONFIGS / "imagenet/resnet50_8192.yaml")
    for name, warmup in (("no_warmup", "none"), ("constant_warmup", "constant")):
        variant = load_config(CONFIGS / f"imagenet/resnet50_8192_{name}.yaml")
        differences = curve_differences(gradual, variant)
        assert differences[0] == f"recipe.warmup: 'gradual' -> '{warmup}'"
        assert variant.run == gradual.run


def test_the_config_needs_no_torch():
    code = "import sys, harness.config.schema; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert Config.model_fields.keys() == {
        "seed", "expect", "data", "model", "recipe", "distill", "run",
    }  # fmt: skip
