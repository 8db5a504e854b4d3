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
def lars(tmp_path, monkeypatch):
    install_page("optimizers.md", tmp_path / "site", monkeypatch)


def with_recipe(**keys):
    mapping = config({"name": "resnet8"}).model_dump(mode="json", exclude={"recipe"})
    recipe = {"minibatch": 16, "worker_batch": 4, "epochs": 90, "weight_decay": 0.5} | keys
    return config_from_mapping({**mapping, "recipe": recipe}, "test")


def layer_with(weight):
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([weight])
    return layer


def test_two_steps_by_hand(lars):
    layer = layer_with([3.0, 4.0])  # of norm 5
    options = {"momentum": 0.9, "trust": 0.1}
    recipe = with_recipe(optimizer="lars", optimizer_options=options).recipe
    optimizer = build_optimizer(layer, recipe, [])
    # g = (1.5, 2), decay 0.5: g + 0.5 w = (3, 4) of norm 5; ratio 0.1 * 5 / 5; u = (0.3, 0.4)
    # w = w - 0.5 u = (2.85, 3.8) of norm 4.75; with g = -0.5 w + (3, 4) the update is (3, 4) again:
    # ratio 0.1 * 4.75 / 5 = 0.095; u = 0.9 u + (0.285, 0.38) = (0.555, 0.74)
    # w = w - 0.1 u = (2.7945, 3.726)
    for lr, expected in ((0.5, [2.85, 3.8]), (0.1, [2.7945, 3.726])):
        set_lr(optimizer, lr)
        layer.weight.grad = torch.tensor([[3.0, 4.0]]) - 0.5 * layer.weight.detach()
        optimizer.step()
        assert layer.weight[0].tolist() == pytest.approx(expected)


def test_it_is_given_the_groups_of_weight_decay(lars):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    recipe = with_recipe(optimizer="lars").recipe
    optimizer = build_optimizer(network, recipe, batch_norm_parameters(network))
    decayed, undecayed = optimizer.param_groups
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.5, 0.0)
    assert undecayed["params"] == [network[1].weight, network[1].bias]


@pytest.mark.parametrize("overflow_at", [0, 2])
def test_an_overflow_of_float16_skips_its_update(lars, overflow_at):
    def run(losses):
        layer = layer_with([3.0, 4.0])
        optimizer = build_optimizer(layer, with_recipe(optimizer="lars").recipe, [])
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


def test_the_plan_names_it_and_its_options(lars):
    plan = make_plan(with_recipe(optimizer="lars", optimizer_options={"trust": 0.02}), 1)
    assert "optimizer    lars, trust 0.02" in render_plan(plan)
    plan = make_plan(with_recipe(), 1)
    assert "optimizer    sgd, momentum 0.9, nesterov true" in render_plan(plan)


def test_what_is_wrong_is_found_before_a_run(lars, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"recipe\.optimizer: no optimizer 'lers'; .* sgd, lars"):
        check_model(with_recipe(optimizer="lers"))
    with pytest.raises(ConfigError, match=r"recipe\.optimizer_options: lars .*'size'"):
        check_model(with_recipe(optimizer="lars", optimizer_options={"size": 1}))
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
    for key in ({"momentum": 0.5}, {"nesterov": False}):
        with pytest.raises(ConfigError, match="has no meaning with optimizer: lars; remove it"):
            with_recipe(optimizer="lars", **key)
    with pytest.raises(ConfigError, match="optimizer_options: has no meaning with optimizer: sgd"):
        with_recipe(optimizer_options={"trust": 1.0})


def test_a_config_from_before_the_key_is_of_sgd():
    old = with_recipe().model_dump(mode="json")
    del old["recipe"]["optimizer"], old["model"]["options"]
    assert curve_differences(config_from_mapping(old, "old"), with_recipe()) == []
    one, other = (with_recipe(optimizer="lars", optimizer_options={"trust": t}) for t in (1, 2))
    assert curve_differences(one, other) == ["recipe.optimizer_options.trust: 1 -> 2"]
    assert curve_differences(with_recipe(), one)[0] == "recipe.optimizer: 'sgd' -> 'lars'"
