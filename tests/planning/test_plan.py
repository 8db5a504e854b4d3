"""The dry run: numbers computed by hand, and checks that can fail."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from harness.commands.command_line import main
from harness.config.loading import config_from_mapping, load_config
from harness.config.schema import Config
from harness.errors import UserError
from harness.models.registry import build_model
from harness.models.torchvision_networks import residual_blocks
from harness.planning.lr_plot import COLUMNS, ROWS, draw_lr
from harness.planning.model_facts import check_facts, inspect_model
from harness.planning.plan import make_plan
from harness.planning.plan_text import render_plan

CONFIGS = Path(__file__).parents[2] / "configs"


def digits(recipe: dict | None = None, **model: object) -> Config:
    counts = {"train_images": 1437, "val_images": 360, "classes": 10}
    steps = {"milestones": [10, 20, 27]}
    return config_from_mapping(
        {
            "expect": {"error": 3.0, "source": "upper bound, measured here"},
            "data": {**counts, "crop": 16, "resize": 16, "crop_area": [0.7, 1.0], "flip": False},
            "model": {"name": "resnet8", **model},
            "recipe": {
                "minibatch": 256,
                "worker_batch": 32,
                "reference_minibatch": 32,
                "epochs": 30,
                **(steps if recipe is None else recipe),
            },
        },
        "test",
    )


@pytest.fixture(scope="module")
def paper() -> dict:
    config = load_config(CONFIGS / "imagenet" / "resnet50_8192.yaml")
    return make_plan(config, ranks=8, lr_at_steps=[0, 390, 780, 4679, 4680, 9360, 12480])


def test_paper_steps(paper: dict) -> None:
    assert paper["workers"] == 256  # 8192 / 32
    assert (paper["worker_batch"], paper["minibatch"]) == (32, 8192)
    assert paper["steps_per_epoch"] == 156  # 1281167 / 8192 = 156.4
    assert paper["total_steps"] == 14040  # 156 * 90
    assert paper["images_used_per_epoch"] == 1277952  # 156 * 8192
    assert paper["images_unused_per_epoch"] == 3215  # 1281167 - 1277952


def test_paper_lr(paper: dict) -> None:
    assert paper["peak_lr"] == pytest.approx(3.2)  # 0.1 * 8192 / 256
    assert paper["warmup_steps"] == 780  # 5 * 156
    # halfway 0.1 + (3.2 - 0.1) / 2 = 1.65; a tenth from epochs 30, 60 and 80 on (* 156 steps)
    expected = {"0": 0.1, "390": 1.65, "780": 3.2, "4679": 3.2}
    expected |= {"4680": 0.32, "9360": 0.032, "12480": 0.0032}
    assert paper["lr_at"] == pytest.approx(expected)
    steps, epochs, lrs, _ = zip(*paper["lr_corners"], strict=True)
    assert steps == (0, 780, 4680, 9360, 12480, 14039)
    assert epochs == pytest.approx((0, 5, 30, 60, 80, 14039 / 156))
    assert lrs == pytest.approx((0.1, 3.2, 0.32, 0.032, 0.0032, 0.0032))


def test_paper_model(paper: dict) -> None:
    assert (paper["batch_norms"], paper["batch_norms_undecayed"]) == (53, 53)
    assert (paper["residual_blocks"], paper["zero_gammas"]) == (16, 16)
    assert paper["fc_std"] == pytest.approx(0.01, rel=0.005)  # 2048 * 1000 numbers
    assert (paper["convolutions"], paper["convolutions_as_drawn"]) == (53, 53)
    assert paper["parameters"] == 25557032  # torchvision's resnet50
    # channels: stem 64; three norms (w, w, 4w) a block and one (4w) for each stage's shortcut
    # 64 + 3*384+256 + 4*768+512 + 6*1536+1024 + 3*3072+2048 = 26560, each with γ and β
    assert paper["parameters_undecayed"] == 2 * 26560
    assert paper["undecayed_modules"] == ["GhostBatchNorm2d"]
    assert paper["parameters_decayed"] == 25557032 - 53120
    assert paper["decayed_modules"] == ["Conv2d", "Linear"]
    assert all(check["ok"] for check in paper["checks"])


def test_paper_in_words(paper: dict) -> None:
    text = render_plan(paper)
    for line in (
        "k = 256 workers, n = 32 images each: kn = 8,192 images",
        "8 (8 × 32 workers), a step in at most 4 micro-batches of at most 256",  # 32 * 32 = 4 * 256
        "156 per epoch, 14,040 in total",
        "0.1 × 8192/256 = 3.2",
        "error 23.74 ± 0.09 % (5 runs, arXiv 1706.02677v2, table 1)",
        "a run's error: median of epochs 86 to 90",
        "53 of 53 BN layers undecayed",
        "16 of 16 last γ zero",
        "fc weight std 0.0100",
        "53 of 53 convolutions",
    ):
        assert line in text
    assert "FAILED" not in text
    assert re.search(r"^ +390 +2\.5 +1\.65$", text, re.MULTILINE)  # what --lr-at asked for
    assert max(map(len, text.splitlines())) <= 100


def test_json(paper: dict) -> None:
    corners = [list(corner) for corner in paper["lr_corners"]]  # JSON has no tuples
    assert json.loads(json.dumps(paper)) == paper | {"lr_corners": corners}


def test_picture(paper: dict) -> None:
    lines = draw_lr(paper)
    assert lines[0] == "    lr (log scale)"
    rows, axis, epochs = lines[1 : ROWS + 1], lines[ROWS + 1], lines[ROWS + 2]
    # three decades over ten rows: a stair is three rows high
    labels = [row.split("┤")[0].strip() if "┤" in row else "" for row in rows]
    assert labels == ["3.2", "", "", "0.32", "", "0.1", "0.032", "", "", "0.0032"]
    curves = [row[8:].ljust(COLUMNS) for row in rows]
    # epoch 30 is first drawn in dot ceil(4680 * 119 / 14039) = 40, so in column 20; 60: 40; 80: 53
    assert curves[0][:21] == "  ⣠⠞" + "⠉" * 16 + "⡇" and not curves[0][21:].strip()
    assert curves[3][20:].strip() == "⠓" + "⠒" * 19 + "⡆"
    assert curves[6][40:].strip() == "⠧" + "⠤" * 12 + "⡄"
    assert curves[9] == " " * 53 + "⣇" + "⣀" * 6
    assert [column for column, sign in enumerate(axis[8:]) if sign == "┬"] == [0, 3, 20, 40, 53, 59]
    assert epochs.split() == ["0", "5", "30", "60", "80", "90", "epoch"]
    assert [epochs[8 + column :].split()[0] for column in (0, 3, 20, 40, 53)] == [
        "0", "5", "30", "60", "80",
    ]  # fmt: skip


def test_cosine_is_drawn_on_a_linear_scale() -> None:
    plan = make_plan(digits({"decay": "cosine"}), 1)
    # 5 warm-up epochs of 1437 // 256 = 5 steps each
    assert [corner[0] for corner in plan["lr_corners"]] == [0, 25, 149]
    lines = draw_lr(plan)
    assert lines[0].strip() == "lr"
    assert lines[1].startswith("0.8 ┤") and lines[ROWS].startswith("  0 ┤")


def test_a_polynomial_is_drawn_on_a_linear_scale() -> None:
    plan = make_plan(digits({"decay": "polynomial", "decay_power": 3}), 1)
    corners = {step: what for step, _, _, what in plan["lr_corners"]}
    assert corners[25] == "peak, end of warm-up, polynomial of power 3 starts"
    lines = draw_lr(plan)
    assert lines[0].strip() == "lr"
    assert lines[1].startswith("0.8 ┤") and lines[ROWS].startswith("  0 ┤")


@pytest.mark.parametrize(
    ("ranks", "shares", "micro_batch"),
    [
        (1, [[1, 8]], 256),
        (3, [[2, 3], [1, 2]], 96),  # 8 = 3 + 3 + 2; 3 * 32 = 96
        (8, [[8, 1]], 32),
    ],
)
def test_shares(ranks: int, shares: list, micro_batch: int) -> None:
    plan = make_plan(digits(), ranks)
    assert plan["shares"] == shares
    assert (plan["micro_batch"], plan["micro_batches"]) == (micro_batch, 1)


def test_shares_of_the_paper_on_three_ranks() -> None:
    # 256 = 86 + 85 + 85; 86 * 32 = 2752 images = 21 * 128 + 64
    overrides = ["model.name=resnet18", "run.micro_batch=128"]
    plan = make_plan(load_config(CONFIGS / "imagenet" / "resnet50_8192.yaml", overrides), 3)
    assert plan["shares"] == [[1, 86], [2, 85]]
    assert plan["micro_batches"] == 22
    assert "3 (1 × 86 workers, 2 × 85 workers), a step in at most 22 micro" in render_plan(plan)


def test_quickstart_is_scaled_and_warmed_up() -> None:
    plan = make_plan(load_config(CONFIGS / "quickstart.yaml"), ranks=2)
    assert (plan["workers"], plan["worker_batch"], plan["minibatch"]) == (8, 32, 256)
    assert plan["peak_lr"] == pytest.approx(0.8)  # 0.1 * 256 / 32
    assert plan["warmup_steps"] > 0
    assert plan["shares"] == [[2, 4]]


def test_digits() -> None:
    plan = make_plan(digits(), ranks=2)
    assert plan["workers"] == 8
    assert plan["steps_per_epoch"] == 5  # 1437 / 256 = 5.6
    assert plan["total_steps"] == 150
    assert plan["peak_lr"] == pytest.approx(0.8)  # 0.1 * 256 / 32
    assert plan["residual_blocks"] == plan["zero_gammas"] == 3  # one in each of three stages
    assert plan["batch_norms"] == plan["batch_norms_undecayed"]
    assert [check["what"] for check in plan["checks"] if not check["ok"]] == []
    assert "error 3.00 % (upper bound, measured here)" in render_plan(plan)
    assert plan["final_epochs"] == [28, 29, 30]  # after the last milestone
    nothing = make_plan(digits().model_copy(update={"expect": None}), ranks=1)
    assert nothing["expect"] is None
    assert "expected     no expectation for this recipe" in render_plan(nothing)


def test_last_gamma_one_is_legal_and_said() -> None:
    plan = make_plan(digits(last_gamma=1), 1)
    assert (plan["zero_gammas"], plan["residual_blocks"]) == (0, 3)
    assert "ok         0 of 3 last γ zero (model.last_gamma is 1)" in render_plan(plan)


def test_no_warmup_and_scalings() -> None:
    unscaled = make_plan(digits({"scaling": "none", "milestones": [20]}), 1)
    assert unscaled["lr_corners"][0][:3] == (0, 0.0, pytest.approx(0.1))
    assert unscaled["warmup_steps"] == 0
    assert "0.1, not scaled\n" in render_plan(unscaled)
    root = make_plan(digits({"scaling": "sqrt", "warmup": "none", "milestones": [20]}), 1)
    assert root["peak_lr"] == pytest.approx(0.1 * 8**0.5)
    assert root["lr_corners"][0][3] == "peak, no warm-up"


@pytest.mark.parametrize(
    ("recipe", "corners"),
    [
        # 5 steps an epoch; a warm-up of the whole run ends at step 10, which is no step of it
        (
            {"epochs": 2, "warmup_epochs": 2, "milestones": []},
            {0: "gradual warm-up starts", 9: "last step"},
        ),
        (
            {"epochs": 2, "warmup_epochs": 2, "decay": "cosine"},
            {0: "gradual warm-up starts", 9: "last step"},
        ),
        (
            {"epochs": 3, "warmup_epochs": 2, "decay": "cosine"},
            {
                0: "gradual warm-up starts",
                10: "peak, end of warm-up, cosine starts",
                14: "last step",
            },
        ),
        (  # the first milestone is the end of the warm-up: the peak is never reached
            {"epochs": 3, "warmup_epochs": 2, "milestones": [2]},
            {0: "gradual warm-up starts", 10: "end of warm-up, × 0.1", 14: "last step"},
        ),
    ],
)
def test_corners_that_share_a_step_or_lie_past_the_end(recipe: dict, corners: dict) -> None:
    plan = make_plan(digits(recipe), 1)
    assert {step: what for step, _, _, what in plan["lr_corners"]} == corners
    assert render_plan(plan)


def test_a_run_of_one_step_whose_only_step_is_warm_up() -> None:
    plan = make_plan(
        digits({"epochs": 1, "warmup_epochs": 1, "milestones": [], "minibatch": 1408}), 1
    )
    assert plan["total_steps"] == 1  # floor(1437 / 1408)
    assert plan["lr_corners"] == [(0, 0.0, 0.1, "gradual warm-up starts, last step")]
    assert render_plan(plan)


def test_the_crop_and_the_resize_are_shown() -> None:
    config = load_config(CONFIGS / "imagenet" / "resnet50_256.yaml", ["data.crop=96"])
    plan = make_plan(config, 1)
    assert (plan["crop"], plan["resize"]) == (96, 110)  # 96 * 256 / 224 = 109.7
    assert "96 pixels; evaluation: short side to 110, then the central 96\n" in render_plan(plan)


def test_failures_are_found_and_said() -> None:
    """A model and an optimizer with the field's mistakes: the plan reads them, nothing assumed."""
    config = digits()
    model = build_model(config)
    batch_norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    convolution = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    with torch.no_grad():
        residual_blocks(model)[0].last_norm.weight.fill_(1)
        convolution.weight.mul_(1.5)
        model.get_submodule("fc").weight.mul_(10)  # 0.01 taken for the variance
        model.get_submodule("fc").bias.fill_(0.5)
    undecayed = [p for bn in batch_norms[1:] for p in (bn.weight, bn.bias)]
    decayed = [convolution.weight, batch_norms[0].weight]  # and its β is forgotten
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 1e-4}, {"params": undecayed}], lr=0.1
    )
    facts = inspect_model(model, optimizer, config)
    layers = len(batch_norms)
    assert (facts["batch_norms_undecayed"], facts["batch_norms"]) == (layers - 1, layers)
    assert facts["zero_gammas"] == 2  # of 3
    assert facts["convolutions_as_drawn"] == facts["convolutions"] - 1
    assert facts["fc_std"] == pytest.approx(0.1, rel=0.2)
    assert [check["ok"] for check in check_facts(facts)] == [False] * 6
    text = render_plan(make_plan(config, 1) | facts | {"checks": check_facts(facts)})
    assert text.count("FAILED") == 6
    assert f"FAILED     {layers - 1} of {layers} BN layers undecayed" in text


def test_smallest_run_can_be_drawn() -> None:
    config = digits({"epochs": 1, "milestones": [], "warmup": "none"})
    lines = draw_lr(make_plan(config, 1))  # 5 steps at 0.8
    assert len(lines) == ROWS + 3
    assert lines[1] == "0.8 ┤" + "⠉" * COLUMNS
    assert not any(line.strip(" │") for line in lines[2 : ROWS + 1])


def test_peak_between_two_dots_is_labelled() -> None:
    # 1000 epochs are 119 gaps of 8.4 epochs; the peak lasts only from epoch 5 to 6
    lines = draw_lr(make_plan(digits({"epochs": 1000, "milestones": [6]}), 1))
    assert lines[1] == " 0.8 ┤"
    assert lines[ROWS].startswith("0.08 ┤")


def test_largest_micro_batch_is_the_share() -> None:
    config = load_config(CONFIGS / "quickstart.yaml", ["run.sums=fast", "run.micro_batch=128"])
    plan = make_plan(config, 8)  # a rank has 1 worker of 32 images, fewer than 128
    assert (plan["micro_batch"], plan["micro_batches"]) == (32, 1)


def test_loaded_weights_are_reported_not_judged(tmp_path: Path) -> None:
    model = build_model(digits())
    with torch.no_grad():
        model.get_submodule("fc").weight.mul_(10)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    plan = make_plan(digits(weights=str(tmp_path / "weights.pt")), 1)
    assert plan["fc_std"] == pytest.approx(0.1, rel=0.2)
    assert [check["ok"] for check in plan["checks"]] == [True, True, None, None, None, None]
    assert "loaded     fc weight std 0." in render_plan(plan)


def test_recalibration_is_shown() -> None:
    config = load_config(CONFIGS / "quickstart.yaml", ["run.recalibrate_images=1024"])
    assert "running statistics from 1,024 training images\n" in render_plan(make_plan(config, 1))
    assert "running statistics" not in render_plan(make_plan(digits(), 1))


@pytest.mark.parametrize("step", [-1, 150])
def test_lr_at_outside_the_run(step: int) -> None:
    with pytest.raises(UserError, match=f"--lr-at {step}: .*0 to 149"):
        make_plan(digits(), 1, [step])


def test_ranks_outside_the_recipe() -> None:
    with pytest.raises(UserError):
        make_plan(digits(), 9)  # 8 workers
    with pytest.raises(UserError, match="--ranks 0"):
        make_plan(digits(), 0)


def test_a_students_plan_tells_of_its_teacher_and_its_loss(capsys, monkeypatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    assert main(["plan", "configs/distill/quickstart.yaml", "teacher.recipe.epochs=31"]) == 0
    text = capsys.readouterr().out
    # 31 epochs of floor(1437/256) = 5 steps
    assert "configs/quickstart.yaml: resnet8, 155 steps, unless runs/quickstart is" in text
    assert "loss         0.1 × CE(labels) + 0.9 × 2² × CE(soft targets, T = 2)" in text
    assert "unlabelled   1,294 of the 1,437 images" in text
    assert main(["plan", "configs/distill/quickstart.yaml", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["stages"][0]["total_steps"] == 150
    assert (plan["distill"]["hard_weight"], plan["distill"]["soft_weight"]) == (0.1, 0.9)


@pytest.mark.parametrize(
    ("override", "named"),
    [("run.loggers=[wandb]", "wandb is not installed"), ("run.data_format=zip", "no format 'zip'")],
)
def test_a_plan_refuses_what_the_run_would(override, named):
    config = load_config(CONFIGS / "quickstart.yaml", [override])
    with pytest.raises(UserError, match=named):
        make_plan(config, ranks=1)
