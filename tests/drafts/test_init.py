"""`harness init`: configs that load and say what a person would have computed."""

import shutil

import pytest

from harness import load_config, lr_at
from harness.commands.command_line import main
from harness.drafts.from_folder import largest_minibatch
from harness.planning.plan import make_plan


@pytest.fixture
def drafted(tmp_path, capsys):
    """The text that `harness init` prints, and the config that it is."""

    def call(*words):
        capsys.readouterr()
        assert main(["init", *map(str, words)]) == 0, capsys.readouterr().err
        text = capsys.readouterr().out
        (tmp_path / "drafted.yaml").write_text(text)
        return text, load_config(tmp_path / "drafted.yaml")

    return call


def refused(capsys, *words):
    capsys.readouterr()
    assert main(["init", *map(str, words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_largest_minibatch_that_leaves_twenty_steps():
    # 32 * 20 = 640 images for a minibatch of 32, twice as many for 64
    assert [largest_minibatch(n) for n in (100, 640, 1279, 1280, 50_000)] == [32, 32, 32, 64, 2048]
    assert largest_minibatch(1_281_167) == 8192  # the paper's largest, although 160 steps are left


def test_a_folder_of_small_images(digits, drafted):
    text, config = drafted(digits, "--ranks", 2)
    assert (config.data.train_images, config.data.val_images, config.data.classes) == (
        1437,
        360,
        10,
    )
    assert (config.data.crop, config.data.resize, config.model.name) == (8, 8, "resnet20")
    assert config.recipe.minibatch == 64  # 1437 / 64 = 22 steps; 128 would leave 11
    assert config.expect is None and config.run.data_root == str(digits)
    assert "k = 64/32 = 2; peak lr 0.1 * 64/256 = 0.025, no warm-up" in text
    assert "floor(1437/64) = 22 steps per epoch, 22 * 90 = 1980 in all" in text
    assert "lr 0.0025 from step 660; " in text
    assert "workers on each of 2 ranks: 1;" in text
    assert "classes: 10                # 0, 1, 2 and 7 more" in text
    make_plan(config, 2)


def test_comments_of_the_draft_are_keys_too(digits, drafted, tmp_path):
    text, _ = drafted(digits)
    for hint in ("reference_lr: 0.01", "milestones: [15, 25]"):
        assert f"  # {hint}" in text
        text = text.replace(f"  # {hint}", f"  {hint}").replace("epochs: 90", "epochs: 30")
    (tmp_path / "tuned.yaml").write_text(text)
    assert load_config(tmp_path / "tuned.yaml").recipe.reference_lr == 0.01


def test_what_cannot_be_drafted(digits, tmp_path, capsys):
    assert "no such folder" in refused(capsys, tmp_path / "nowhere")
    assert "give the folder" in refused(capsys)
    line = refused(capsys, digits, "--ranks", 3)
    assert "minibatch that leaves 20 steps an epoch is 64, of 2 workers" in line
    assert "did you mean 'resnet50'" in refused(capsys, digits, "--model", "resnet_50")
    shutil.copytree(digits / "val", tmp_path / "flat")
    line = refused(capsys, tmp_path / "flat")
    assert f"`harness data import {tmp_path / 'flat'} NEW --val 0.1`" in line
    (tmp_path / "x.txt").write_text("nothing of the kind")
    assert "neither an args.yaml of timm" in refused(capsys, "--from", tmp_path / "x.txt")
    (tmp_path / "x.txt").write_text("--model resnet50 --lr high")
    assert "lr is 'high', not a number" in refused(capsys, "--from", tmp_path / "x.txt")


def test_files_that_training_would_not_read_are_said(own_digits, capsys):
    (own_digits / "train" / "3" / "photo.webp").write_bytes(b"")
    assert main(["init", str(own_digits)]) == 0
    err = capsys.readouterr().err
    assert "train: training does not read 1 entries" in err and "photo.webp" in err


TORCHVISION = """torchrun --nproc_per_node=8 train.py --model resnet50 --batch-size 128 --lr 0.5 \\
 --lr-scheduler cosineannealinglr --lr-warmup-epochs 5 --lr-warmup-method linear \\
 --auto-augment ta_wide --epochs 600 --weight-decay 0.00002 --norm-weight-decay 0.0 \\
 --label-smoothing=0.1 --train-crop-size 176 --model-ema --val-resize-size 232 -j 16
"""


def test_torchvisions_arguments(tmp_path, drafted):
    (tmp_path / "command.txt").write_text(TORCHVISION)
    text, config = drafted("--from", tmp_path / "command.txt", "--ranks", 8)
    recipe, data = config.recipe, config.data
    assert (data.train_images, data.crop, data.resize) == (1_281_167, 176, 232)
    assert (recipe.minibatch, recipe.worker_batch, recipe.epochs) == (1024, 128, 600)
    assert (recipe.weight_decay, recipe.label_smoothing, recipe.decay) == (2e-5, 0.1, "cosine")
    assert (recipe.nesterov, config.model.last_gamma) == (False, 1)
    assert config.warmup_steps == 5 * 1251
    assert lr_at(config, config.warmup_steps) == pytest.approx(0.5)
    assert lr_at(config, 0) == pytest.approx(0.5 * 0.01, rel=0.05)
    lost = text.partition("No counterpart:")[2].partition("\ndata:")[0]
    assert "auto_augment: ta_wide" in lost and "model_ema: True" in lost
    assert "γ and β" not in text and "workers: 16" not in lost  # norm_weight_decay is 0
    assert "val_crop_size 224: data.crop is for training, too: 176" in text


TIMM = """
aa: rand-m9
batch_size: 256
crop_pct: 0.95
decay_epochs: 30
decay_rate: 0.2
epochs: 100
hflip: 0.5
img_size: 160
lr: null
lr_base: 0.1
lr_base_scale: ''
lr_base_size: 256
mean: null
model: resnet18
momentum: 0.9
num_classes: 10
opt: sgd
reprob: 0.25
scale: [0.35, 1.0]
sched: step
smoothing: 0.1
sync_bn: false
warmup_epochs: 3
warmup_lr: 0.025
weight_decay: 0.0005
workers: 8
"""


def test_timms_arguments(tmp_path, digits, drafted, capsys):
    (tmp_path / "args.yaml").write_text(TIMM)
    line = refused(capsys, "--from", tmp_path / "args.yaml")
    assert "num_classes is 10, so give DATA_DIR" in line
    text, config = drafted(digits, "--from", tmp_path / "args.yaml", "--ranks", 2)
    recipe, data = config.recipe, config.data
    assert (data.train_images, data.classes, data.crop) == (1437, 10, 160)
    assert data.resize == 168  # floor(160 / 0.95)
    assert data.crop_area == (0.35, 1.0)
    assert (recipe.minibatch, recipe.worker_batch) == (512, 256)
    assert lr_at(config, config.warmup_steps) == pytest.approx(0.2)  # 0.1 * 512 / 256
    assert lr_at(config, 0) == pytest.approx(0.025)
    assert (recipe.milestones, recipe.decay_factor) == ((30, 60, 90), 0.2)
    assert recipe.nesterov, "timm's sgd is Nesterov's"
    lost = text.partition("No counterpart:")[2]
    assert "aa: rand-m9" in lost and "reprob: 0.25" in lost
    assert "timm spares all biases" in text
