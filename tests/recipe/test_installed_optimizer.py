"""Optimizers of installed packages: the example of docs/optimizers.md."""

import pytest
import torch
from torch import nn

from harness.config.errors import ConfigError
from harness.config.loading import config_from_mapping, curve_differences
from harness.errors import UserError
from harness.models.registry import check_model
from harness.planning.plan import make_plan
from harness.planning.plan_text import render_plan
from harness.recipe.optimizer import batch_norm_parameters, build_optimizer, set_lr
from tests.models.test_build_model import config
from tests.packages import install, install_page


@pytest.fixture
def clipped(tmp_path, monkeypatch):
    install_page("optimizers.md", tmp_path / "site", monkeypatch)


def with_recipe(**keys):
    mapping = config({"name": "resnet8"}).model_dump(mode="json", exclude={"recipe"})
    recipe = {"minibatch": 16, "worker_batch": 4, "epochs": 90, "weight_decay": 0.5} | keys
    return config_from_mapping({**mapping, "recipe": recipe}, "test")


def layer_with(weight):
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([weight])
    return layer


def test_two_steps_by_hand(clipped):
    layer = layer_with([3.0, 4.0])
    options = {"momentum": 0.9, "clip": 2.5}
    recipe = with_recipe(optimizer="clipped", optimizer_options=options).recipe
    optimizer = build_optimizer(layer, recipe, [])
    # g = (3, 4) of norm 5, halved to (1.5, 2); decay 0.5: u = (1.5, 2) + 0.5 w = (3, 4)
    # w = w - 0.5 u = (1.5, 2)
    # g = (0.3, 0.4) of norm 0.5 stays; u = 0.9 u + (0.3, 0.4) + 0.5 w = (2.7 + 1.05, 3.6 + 1.4)
    # w = w - 0.1 u = (1.125, 1.5)
    for lr, gradient, expected in (
        (0.5, [3.0, 4.0], [1.5, 2.0]),
        (0.1, [0.3, 0.4], [1.125, 1.5]),
    ):
        set_lr(optimizer, lr)
        layer.weight.grad = torch.tensor([gradient])
        optimizer.step()
        assert layer.weight[0].tolist() == pytest.approx(expected)


def test_it_is_given_the_groups_of_weight_decay(clipped):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    recipe = with_recipe(optimizer="clipped").recipe
    optimizer = build_optimizer(network, recipe, batch_norm_parameters(network))
    decayed, undecayed = optimizer.param_groups
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.5, 0.0)
    assert undecayed["params"] == [network[1].weight, network[1].bias]


@pytest.mark.parametrize("overflow_at", [0, 2])
def test_an_overflow_of_float16_skips_its_update(clipped, overflow_at):
    def run(losses):
        layer = layer_with([3.0, 4.0])
        optimizer = build_optimizer(layer, with_recipe(optimizer="clipped").recipe, [])
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        set_lr(optimizer, 0.1)
        for factor in losses:
            optimizer.zero_grad()
            scaler.scale(layer.weight.square().sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
        return layer.weight.tolist()

    finite = [1.0, 1.0, 1.0]
    assert run([*finite[:overflow_at], float("inf"), *finite[overflow_at:]]) == run(finite)


def test_the_plan_names_it_and_its_options(clipped):
    plan = make_plan(with_recipe(optimizer="clipped", optimizer_options={"clip": 0.02}), 1)
    assert "optimizer    clipped, clip 0.02" in render_plan(plan)
    plan = make_plan(with_recipe(), 1)
    assert "optimizer    sgd, momentum 0.9, nesterov true" in render_plan(plan)


def test_what_is_wrong_is_found_before_a_run(clipped, tmp_path, monkeypatch):
    with pytest.raises(
        ConfigError, match=r"recipe\.optimizer: no optimizer 'cliped'; .* sgd, lars, clipped"
    ):
        check_model(with_recipe(optimizer="cliped"))
    with pytest.raises(ConfigError, match=r"recipe\.optimizer_options: clipped .*'size'"):
        check_model(with_recipe(optimizer="clipped", optimizer_options={"size": 1}))
    install(
        tmp_path,
        monkeypatch,
        "no",
        "def build(groups): pass",
        "harness.optimizers",
        "no = no:build",
    )
    with pytest.raises(ConfigError, match="no is a NoneType instead of a torch"):
        check_model(with_recipe(optimizer="no"))
    install(tmp_path / "own", monkeypatch, "own", "", "harness.optimizers", "lars = own:Lars")
    with pytest.raises(ConfigError, match="lars is built in, but own:Lars has the same name"):
        check_model(with_recipe(optimizer="lars"))
    install(tmp_path / "b", monkeypatch, "ill", "1 / 0", "harness.optimizers", "ill = ill:build")
    with pytest.raises(UserError, match=r"recipe\.optimizer: ill:build cannot be imported: div"):
        check_model(with_recipe(optimizer="ill"))


@pytest.mark.parametrize("draw", ["torch.randn_like(weight)", "numpy.random.rand()"])
def test_an_optimizer_that_draws_random_numbers_is_refused(tmp_path, monkeypatch, draw):
    """The ranks' weights would differ, and each trajectory from any other."""
    code = f"""
import numpy, torch

class Noisy(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for weight in group["params"]:
                weight += 1e-6 * {draw}

def build(groups):
    return Noisy(groups, lr=0.0)
"""
    point = "harness.optimizers", "noisy = noisy_sgd:build"
    install(tmp_path / "site", monkeypatch, "noisy_sgd", code, *point)
    with pytest.raises(ConfigError, match=r"recipe\.optimizer: noisy makes other updates when its"):
        check_model(with_recipe(optimizer="noisy"))


def test_the_keys_of_one_optimizer_are_refused_with_another():
    for key in ({"momentum": 0.5}, {"nesterov": False}, {"trust_coefficient": 0.1}):
        with pytest.raises(ConfigError, match="has no meaning with optimizer: clipped; remove it"):
            with_recipe(optimizer="clipped", **key)
    with pytest.raises(ConfigError, match="optimizer_options: has no meaning with optimizer: sgd"):
        with_recipe(optimizer_options={"clip": 1.0})


def test_a_config_from_before_the_key_is_of_sgd():
    old = with_recipe().model_dump(mode="json")
    del old["recipe"]["optimizer"], old["model"]["options"]
    assert curve_differences(config_from_mapping(old, "old"), with_recipe()) == []
    one, other = (with_recipe(optimizer="clipped", optimizer_options={"clip": c}) for c in (1, 2))
    assert curve_differences(one, other) == ["recipe.optimizer_options.clip: 1 -> 2"]
    assert curve_differences(with_recipe(), one)[0] == "recipe.optimizer: 'sgd' -> 'clipped'"
