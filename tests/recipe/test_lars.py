"""LARS by hand, against timm's, in float16, and on any number of ranks."""

import pytest
import torch
from torch import nn

from harness import load_config
from harness.config.errors import ConfigError
from harness.config.schema import OPTIMIZER_KEYS
from harness.models.registry import build_model, check_model, find_family
from harness.outcome import Stopped
from harness.planning.plan import make_plan
from harness.planning.plan_text import render_plan
from harness.recipe.lars import layer_rate
from harness.recipe.optimizer import (
    BUILT_IN,
    batch_norm_parameters,
    build_optimizer,
    parameter_groups,
    set_lr,
)
from harness.recipe.schedule import lr_at
from harness.runs.checkpoint import list_checkpoints, load_checkpoint
from harness.training.setup import train
from tests.conftest import harness
from tests.packages import install
from tests.recipe.test_installed_optimizer import layer_with, with_recipe


def lars(network, momentum=0.9, trust=0.1, weight_decay=0.5):
    """The optimizer as a run builds it."""
    keys = {"momentum": momentum, "trust_coefficient": trust, "weight_decay": weight_decay}
    recipe = with_recipe(optimizer="lars", **keys).recipe
    return build_optimizer(network, recipe, batch_norm_parameters(network))


def test_the_schema_knows_the_built_in_optimizers():
    assert OPTIMIZER_KEYS.keys() == BUILT_IN.keys()


def test_two_steps_by_hand():
    layer = layer_with([3.0, 4.0])  # of norm 5
    optimizer = lars(layer)
    # g = (0.9, 1.2) of norm 1.5: rate 0.1 * 5 / (1.5 + 0.5 * 5) = 0.125
    # u = 0.125 * (g + 0.5 w) = 0.125 * (2.4, 3.2) = (0.3, 0.4); w = w - 0.5 u = (2.85, 3.8)
    # w has the norm 4.75; g = (0.975, 1.3) of norm 1.625: rate 0.1 * 4.75 / (1.625 + 2.375)
    # = 0.11875; g + 0.5 w = (2.4, 3.2), so u = 0.9 u + (0.285, 0.38) = (0.555, 0.74)
    # w = w - 0.1 u = (2.7945, 3.726): u holds no learning rate, so it needs no correction
    for lr, gradient, expected in (
        (0.5, [0.9, 1.2], [2.85, 3.8]),
        (0.1, [0.975, 1.3], [2.7945, 3.726]),
    ):
        set_lr(optimizer, lr)
        layer.weight.grad = torch.tensor([gradient])
        optimizer.step()
        assert layer.weight[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("weight", "gradient", "rate"),
    [
        ([3.0, 4.0], [0.0, 0.0], 1.0),
        ([0.0, 0.0], [3.0, 4.0], 1.0),
        ([3.0, 4.0], [6.0, 8.0], 0.1 * 5 / 12.5),
    ],
)
def test_the_rate_of_a_layer(weight, gradient, rate):
    found = layer_rate(torch.tensor([weight]), torch.tensor([gradient]), 0.1, 0.5)
    assert found.item() == pytest.approx(rate)


def test_biases_and_batch_norm_take_plain_sgd_without_decay():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    optimizer = lars(network)
    layer_wise, plain = optimizer.param_groups
    convolution, norm, linear = network[0], network[1], network[3]
    assert {*layer_wise["params"]} == {convolution.weight, linear.weight}
    assert {*plain["params"]} == {convolution.bias, linear.bias, norm.weight, norm.bias}
    assert (layer_wise["weight_decay"], plain["weight_decay"]) == (0.5, 0.0)
    set_lr(optimizer, 0.1)
    with torch.no_grad():
        linear.bias.fill_(2.0)
    # u = 3, w = 2 - 0.1 * 3 = 1.7; u = 0.9 * 3 + 3 = 5.7, w = 1.7 - 0.57 = 1.13
    for expected in (1.7, 1.13):
        for parameter in network.parameters():
            parameter.grad = torch.full_like(parameter, 3.0)
        optimizer.step()
        assert linear.bias.tolist() == pytest.approx([expected] * 2)


def test_it_is_timms_over_a_warm_up(small):
    """timm's trust ratio has 1e-8 more in its denominator; gradients are larger by far here."""
    timm = pytest.importorskip("timm.optim", reason="timm, the oracle, is not installed")
    keys = ["recipe.optimizer=lars", "recipe.trust_coefficient=0.02", "run.precision=float64"]
    config = load_config(small(), [*keys, "recipe.weight_decay=0.01"])
    networks = [build_model(config).double() for _ in range(2)]
    undecayed = find_family("resnet8").undecayed
    ours = build_optimizer(networks[0], config.recipe, undecayed(networks[0]))
    vectors = [p for p in networks[1].parameters() if p.ndim <= 1]
    groups = parameter_groups(networks[1], 0.01, vectors)
    theirs = timm.Lars(groups, lr=0.0, momentum=0.9, trust_coeff=0.02)
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.arange(64) % 10
    for step in range(config.warmup_steps + 3):
        for network, optimizer in zip(networks, (ours, theirs), strict=True):
            set_lr(optimizer, lr_at(config, step))
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
    assert config.warmup_steps == 5
    first = build_model(config).double()
    for p, q, start in zip(*(n.parameters() for n in (*networks, first)), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-8)
        assert not torch.equal(p, start)


@pytest.mark.parametrize("overflow_at", [0, 2])
def test_an_overflow_of_float16_skips_its_update(overflow_at):
    def run(losses, scaled):
        layer = layer_with([3.0, 4.0])
        optimizer = lars(layer)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        set_lr(optimizer, 0.1)
        for factor in losses:
            optimizer.zero_grad()
            scaler.scale(layer.weight.square().sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
        momentum = optimizer.state[layer.weight]["momentum_buffer"]
        return layer.weight.tolist(), momentum.tolist()

    finite = [1.0, 1.0, 1.0]
    overflowing = [*finite[:overflow_at], float("inf"), *finite[overflow_at:]]
    assert run(overflowing, True) == run(finite, True) == run(finite, False)


def test_its_gradients_are_still_scaled_when_its_step_begins():
    """As fused SGD's, so that no step waits for the device; `harness verify` relies on it."""
    layer, seen = layer_with([3.0, 4.0]), []
    optimizer, scaler = lars(layer), torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer.register_step_pre_hook(lambda *_: seen.append(layer.weight.grad.clone()))
    scaler.scale(layer.weight.sum()).backward()
    scaler.step(optimizer)
    assert [gradient.tolist() for gradient in seen] == [[[4.0, 4.0]]]


def test_the_plan_states_what_is_excluded(small):
    plan = make_plan(load_config(small(), ["recipe.optimizer=lars"]), 1)
    # ResNet-8 of width 4: batch norms of 4, 4, 4, 8, 8, 16 and 16 channels, a bias of 10 classes
    text = render_plan(plan)
    assert plan["parameters_layer_wise"] == plan["parameters"] - (2 * 60 + 10)
    assert "excluded   130 from them, by plain SGD without decay: biases and" in text
    assert "optimizer    lars, momentum 0.9, trust_coefficient 0.001" in text
    assert "ok         15 of 15 biases, γ and β by plain SGD" in text  # 7 norms and the fc bias
    assert "layer-wise" not in render_plan(make_plan(load_config(small()), 1))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("recipe.trust_coefficient=0", "recipe.trust_coefficient: expected more than 0, found 0"),
        ("recipe.nesterov=true", "recipe.nesterov: has no meaning with optimizer: lars"),
        ("recipe.optimizer_options={trust: 1}", "optimizer_options: has no meaning with"),
    ],
)
def test_what_is_wrong_is_refused(small, key, message):
    with pytest.raises(ConfigError, match=message):
        load_config(small(), ["recipe.optimizer=lars", key])
    with pytest.raises(ConfigError, match="trust_coefficient: has no meaning with optimizer: sgd"):
        load_config(small(), ["recipe.trust_coefficient=0.1"])


INTERRUPTING = """
import os, signal

class Interrupting:
    def __init__(self, *_):
        pass
    def event(self, event):
        pass
    def scalars(self, values, step):
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
    def flush(self):
        pass
    close = flush
"""


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_interrupted_in_mid_epoch_and_resumed_is_the_straight_run(
    small, tmp_path, monkeypatch, precision
):
    """Weights, momentum and the scaler's state, bit for bit."""
    point = "harness.loggers", "interrupting = interrupting:Interrupting"
    install(tmp_path / "site", monkeypatch, "interrupting", INTERRUPTING, *point)
    keys = ["recipe.optimizer=lars", "recipe.trust_coefficient=0.02", "run.log_every_steps=1"]
    config = load_config(small(), [*keys, f"run.precision={precision}"])
    stopping = load_config(
        small(), [*keys, f"run.precision={precision}", "run.loggers=[interrupting]"]
    )
    straight, run = tmp_path / "straight", tmp_path / "run"
    train(config, straight)
    with pytest.raises(Stopped, match="stopped after step 8 of 15, checkpoint written"):
        train(stopping, run)
    train(config, run, resume=True)
    one, other = (load_checkpoint(list_checkpoints(r / "checkpoints")[0]) for r in (straight, run))
    assert one["step"] == other["step"] == 15 and one["scaler"] == other["scaler"]
    for name, weight in one["model"].items():
        assert torch.equal(weight, other["model"][name]), name
    momenta, others = (c["optimizer"]["state"] for c in (one, other))
    for number, state in momenta.items():
        assert state["momentum_buffer"].any()
        assert torch.equal(state["momentum_buffer"], others[number]["momentum_buffer"])


@pytest.mark.soak
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_verify_passes(small, precision):
    keys = ["recipe.optimizer=lars", "recipe.trust_coefficient=0.02", "recipe.decay=polynomial"]
    keys += ["recipe.milestones=null", f"run.precision={precision}"]
    ended = harness("verify", small(), *keys, "--ranks", "1,2,3", "--steps", 11)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_momentum_0_is_possible(small):
    config = load_config(small(), ["recipe.optimizer=lars", "recipe.momentum=0"])
    check_model(config)
    layer = layer_with([3.0, 4.0])
    optimizer = lars(layer, momentum=0.0)
    set_lr(optimizer, 0.5)
    layer.weight.grad = torch.tensor([[0.9, 1.2]])
    optimizer.step()
    assert layer.weight[0].tolist() == pytest.approx([2.85, 3.8])
