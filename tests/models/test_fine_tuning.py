"""Fine-tuning: a frozen backbone keeps every bit, and the classifier has its own learning rate."""

import json

import pytest
import torch

from harness import load_config
from harness.commands.command_line import main
from harness.config.errors import ConfigError
from harness.models.registry import build_model, check_model, optimizer_of
from harness.planning.plan import make_plan
from harness.planning.plan_text import render_plan
from harness.recipe.optimizer import set_lr
from harness.runs.checkpoint import list_checkpoints, load_checkpoint
from harness.training.setup import train
from tests.conftest import harness

QUICK = ["recipe.epochs=2", "recipe.milestones=[]", "recipe.reference_lr=0.02"]


@pytest.fixture
def frozen(small, tmp_path):
    """A config that trains the classifier on trained weights, whose statistics are not initial."""
    network = build_model(load_config(small(), ["model.last_gamma=1", "seed=4"]))
    torch.manual_seed(2)
    for norm in network.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.2)
            norm.running_var.uniform_(0.5, 2)
            norm.num_batches_tracked.fill_(7)
    torch.save(network.state_dict(), tmp_path / "start.pt")
    weights = [f"model.weights={tmp_path / 'start.pt'}", "model.freeze=backbone"]
    return small(), [*QUICK, *weights], network.state_dict()


def last_weights(folder):
    return load_checkpoint(list_checkpoints(folder / "checkpoints")[0])["model"]


def test_a_frozen_backbone_keeps_every_bit_and_the_classifier_learns(frozen, tmp_path):
    path, overrides, start = frozen
    result = train(load_config(path, overrides), tmp_path / "run")
    weights = last_weights(tmp_path / "run")
    for name, value in weights.items():
        assert torch.equal(value, start[name]) != name.startswith("fc."), name
    assert result.error < 80  # 90 by chance; two epochs on random features


def test_the_classifier_is_the_one_of_plain_regression(frozen, tmp_path):
    """An oracle of its own: features from the eager network, SGD on a linear layer."""
    path, overrides, _ = frozen
    config = load_config(path, [*overrides, "recipe.momentum=0", "recipe.nesterov=false"])
    network = build_model(config).double()
    network.train()
    images = torch.rand(64, 3, 8, 8, dtype=torch.float64)
    labels = torch.arange(64) % 10
    features = {}
    hook = network.fc.register_forward_hook(lambda _, given, __: features.update(x=given[0]))
    optimizer = optimizer_of(network, config)
    set_lr(optimizer, 0.1)
    weight, bias = (p.detach().clone() for p in (network.fc.weight, network.fc.bias))
    torch.nn.functional.cross_entropy(network(images), labels).backward()
    optimizer.step()
    hook.remove()
    x = features["x"]
    assert not x.requires_grad, "nothing before the classifier is differentiated"
    network.eval()
    shares = (x @ weight.T + bias).softmax(1) - torch.nn.functional.one_hot(labels, 10)
    decay = config.recipe.weight_decay
    expected = weight - 0.1 * (shares.T @ x / 64 + decay * weight)
    torch.testing.assert_close(network.fc.weight.detach(), expected)
    torch.testing.assert_close(
        network.fc.bias.detach(), bias - 0.1 * (shares.mean(0) + decay * bias)
    )


@pytest.mark.soak
def test_any_ranks_train_the_same_classifier(frozen, tmp_path):
    path, overrides, _ = frozen
    exact = [*overrides, "run.precision=float64"]
    for ranks in (1, 2):
        done = harness("train", path, *exact, "--out", tmp_path / str(ranks), ranks=ranks)
        assert done.returncode == 0, done.stderr
    one, two = (last_weights(tmp_path / name) for name in "12")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-10, atol=1e-12)
        if not name.startswith("fc."):
            assert torch.equal(one[name], two[name]), name


def test_the_factor_of_the_classifiers_learning_rate(small):
    plain = ["recipe.momentum=0", "recipe.nesterov=false", "recipe.weight_decay=0"]
    config = load_config(small(), ["recipe.classifier_lr_factor=10", *plain])
    network = build_model(config)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = optimizer_of(network, config)
    set_lr(optimizer, 0.5)
    optimizer.step()
    for name, parameter in network.named_parameters():
        moved = before[name] - parameter.detach()
        step = 5.0 if name.startswith("fc.") else 0.5
        torch.testing.assert_close(moved, torch.full_like(moved, step))


def test_without_a_factor_the_groups_are_those_of_old_checkpoints(small):
    config = load_config(small())
    groups = optimizer_of(build_model(config), config).param_groups
    assert [len(group["params"]) > 0 for group in groups] == [True, True]
    assert "lr_factor" not in groups[0]


def test_a_plan_says_what_is_frozen(frozen):
    path, overrides, _ = frozen
    config = load_config(path, [*overrides, "recipe.classifier_lr_factor=3"])
    plan = make_plan(config, 1)
    # fc of a ResNet-8 of width 4: 16 * 10 + 10
    assert plan["parameters"] - plan["parameters_frozen"] == 170
    assert plan["parameters_decayed"] == 170 and plan["parameters_undecayed"] == 0
    assert all(check["ok"] is not False for check in plan["checks"])
    text = render_plan(plan)
    assert f"  frozen     {plan['parameters_frozen']:,}: all but the classifier" in text
    assert "  classifier lr × 3" in text


def test_mistakes(small):
    with pytest.raises(ConfigError, match=r"model\.freeze: backbone would never be trained"):
        load_config(small(), ["model.freeze=backbone"])
    headless = load_config(small(), ["recipe.classifier_lr_factor=2", "data.classes=10"])
    check_model(headless)


def test_a_frozen_run_is_evaluated_and_exported(frozen, tmp_path, capsys):
    path, overrides, _ = frozen
    train(load_config(path, overrides), tmp_path / "run")
    (tmp_path / "start.pt").unlink()
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), "--json"]) == 0
    total = json.loads(capsys.readouterr().out)["total"]
    assert total == 360
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "m.pt")]) == 0


def test_exact_sums_train_the_classifier_of_a_frozen_backbone(frozen, tmp_path):
    path, overrides, start = frozen
    exact = [*overrides, "run.micro_batch=auto", "run.sums=exact"]
    train(load_config(path, exact), tmp_path / "run")
    for name, value in last_weights(tmp_path / "run").items():
        assert torch.equal(value, start[name]) != name.startswith("fc."), name


def test_lars_has_the_classifiers_learning_rate_too(small):
    keys = ["recipe.optimizer=lars", "recipe.classifier_lr_factor=10"]
    config = load_config(small(), keys)
    network = build_model(config)
    optimizer = optimizer_of(network, config)
    set_lr(optimizer, 0.5)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates.keys() == set(network.parameters())
    assert {rates[p] for p in network.fc.parameters()} == {5.0}
    assert {rate for p, rate in rates.items() if p not in set(network.fc.parameters())} == {0.5}
