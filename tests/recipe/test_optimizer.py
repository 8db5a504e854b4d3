"""Weight decay's groups, and remarks 1 to 3 (section 3), by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchvision.models import resnet50

from harness.models.ghost_batch_norm import convert_batch_norms
from harness.recipe.losses import training_loss
from harness.recipe.optimizer import (
    batch_norm_parameters,
    build_optimizer,
    parameter_groups,
    set_lr,
)

LRS = [0.1, 0.1, 0.4, 0.4, 0.04]  # a warm-up jump and a decay


def sgd(layer, momentum=0.9, nesterov=False, weight_decay=0.0):
    arguments = {"momentum": momentum, "nesterov": nesterov}
    recipe = SimpleNamespace(
        optimizer="sgd", optimizer_arguments=arguments, weight_decay=weight_decay
    )
    return build_optimizer(layer, recipe, batch_norm_parameters(layer))


@pytest.mark.parametrize("ghost", [False, True])
def test_fifty_three_of_fifty_three_batch_norms_are_undecayed(ghost):
    with torch.device("meta"):
        model = resnet50()
        if ghost:
            convert_batch_norms(model, worker_batch=32, channels_last=True)
    decayed, undecayed = parameter_groups(model, 1e-4, batch_norm_parameters(model))
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (1e-4, 0.0)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 53  # 1 + 16 * 3 + 4 shortcuts
    assert len(undecayed["params"]) == 106  # γ and β of each
    in_group = {id(p) for p in undecayed["params"]}
    assert all(id(norm.weight) in in_group and id(norm.bias) in in_group for norm in norms)
    # 53 convolutions, the fc weight and, by the letter of section 5.1, its bias
    assert len(decayed["params"]) == 53 + 2
    assert any(p is model.fc.bias for p in decayed["params"])
    # torchvision: 25,557,032 parameters, each in one group
    total = sum(p.numel() for group in (decayed, undecayed) for p in group["params"])
    assert total == 25_557_032


def one_weight(value=1.0):
    layer = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(layer.weight, value)
    return layer


def gradient(w, step):
    """Of a loss that depends on w and on the step's images."""
    return 2.0 * w + 0.3 * step - 0.5


def sgd_trajectory(lrs, nesterov):
    """What `build_optimizer` does to one weight."""
    layer = one_weight()
    optimizer = sgd(layer, nesterov=nesterov)
    weights = []
    for step, lr in enumerate(lrs):
        set_lr(optimizer, lr)
        layer.weight.grad = gradient(layer.weight.detach(), step)
        optimizer.step()
        weights.append(layer.weight.item())
    return weights


def form_9(lrs, nesterov):
    """u' = m u + g, w' = w - eta u' (Nesterov: w - eta (g + m u'))."""
    w, u, weights = 1.0, 0.0, []
    for step, lr in enumerate(lrs):
        g = gradient(w, step)
        u = 0.9 * u + g
        w -= lr * (g + 0.9 * u if nesterov else u)
        weights.append(w)
    return weights


def form_10(lrs, nesterov, correct):
    """v' = m (eta'/eta) v + eta' g, w' = w - v' (Nesterov: w - (eta' g + m v'))."""
    w, v, last_lr, weights = 1.0, 0.0, lrs[0], []
    for step, lr in enumerate(lrs):
        g = gradient(w, step)
        v = 0.9 * (lr / last_lr if correct else 1.0) * v + lr * g
        w -= lr * g + 0.9 * v if nesterov else v
        last_lr = lr
        weights.append(w)
    return weights


@pytest.mark.parametrize("nesterov", [False, True])
def test_form_10_with_correction_is_torchs_sgd(nesterov):
    # remark 2: "Apply momentum correction after changing learning rate if using (10)"
    expected = sgd_trajectory(LRS, nesterov)
    assert form_9(LRS, nesterov) == pytest.approx(expected, rel=1e-12)
    assert form_10(LRS, nesterov, correct=True) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
def test_form_10_without_correction_is_not(nesterov):
    expected, found = sgd_trajectory(LRS, nesterov), form_10(LRS, nesterov, correct=False)
    assert found[:2] == pytest.approx(expected[:2], rel=1e-12)  # no change of eta yet
    assert abs(found[2] - expected[2]) > 0.1
    # with one eta throughout, the two forms are the same
    constant = form_10([0.1] * 5, nesterov, correct=False)
    assert constant == pytest.approx(sgd_trajectory([0.1] * 5, nesterov), rel=1e-12)


def test_two_steps_of_sgd_by_hand():
    # w = 1: g = 2 - 0.5 = 1.5, u = 1.5, w = 1 - 0.1 * 1.5 = 0.85
    # g = 1.7 + 0.3 - 0.5 = 1.5, u = 0.9 * 1.5 + 1.5 = 2.85, w = 0.85 - 0.1 * 2.85 = 0.565
    assert sgd_trajectory([0.1, 0.1], nesterov=False) == pytest.approx([0.85, 0.565])
    # Nesterov: w = 1 - 0.1 * (1.5 + 0.9 * 1.5) = 0.715; g = 1.43 - 0.2 = 1.23,
    # u = 1.35 + 1.23 = 2.58, w = 0.715 - 0.1 * (1.23 + 0.9 * 2.58) = 0.3598
    assert sgd_trajectory([0.1, 0.1], nesterov=True) == pytest.approx([0.715, 0.3598])


@pytest.mark.parametrize(
    ("loss_scale", "lr_scale", "expected"),
    [
        # w = 2, loss gradient 3, decay 0.5: w' = 2 - 0.1 * 0.5 * 2 - 0.1 * 3 = 1.6
        (1, 1, 1.6),
        # loss times 4: 2 - 0.1 - 1.2 = 0.7; lr times 4: 2 - 0.4 - 1.2 = 0.4
        (4, 1, 0.7),
        (1, 4, 0.4),
    ],
)
def test_scaling_the_loss_is_not_scaling_the_learning_rate(loss_scale, lr_scale, expected):
    layer = one_weight(2.0)  # remark 1
    optimizer = sgd(layer, weight_decay=0.5)
    set_lr(optimizer, 0.1 * lr_scale)
    (loss_scale * layer(torch.full((1, 1), 3.0, dtype=torch.float64)).sum()).backward()
    optimizer.step()
    assert layer.weight.item() == pytest.approx(expected)


def test_the_gradient_is_the_sum_over_kn_whatever_the_shares():
    # remark 3. Two classes, weights 0: the gradient of an image's loss to the logit of class 1 is
    # 1/2 - [label 1]. Five images x = 1..5, labels 1 0 0 1 1, kn = 5:
    # (-1 + 2 + 3 - 4 - 5) / 2 / 5 = -0.5
    images = torch.arange(1.0, 6.0, dtype=torch.float64)[:, None]
    labels = torch.tensor([1, 0, 0, 1, 1])

    def summed(shares):
        layer = nn.Linear(1, 2, bias=False).double()
        nn.init.zeros_(layer.weight)
        for x, y in zip(images.split(shares), labels.split(shares), strict=True):
            training_loss(layer(x), y, 5, 0.0).backward()  # sums over shares, as the ranks do
        assert layer.weight.grad is not None
        return layer.weight.grad.flatten().tolist()

    for shares in ([5], [3, 2], [2, 3], [4, 1], [1, 1, 3]):
        assert summed(shares) == pytest.approx([0.5, -0.5], rel=1e-12), shares
    # the mean of the means over shares 3 : 2 would be ((-1 + 2 + 3)/3 + (-4 - 5)/2)/4 = -0.79


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_plain_sgd(dtype, nesterov):
    # the momentum that is there from the start changes nothing
    models = [nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        model.to(dtype)
    ours = sgd(models[0], nesterov=nesterov, weight_decay=0.1)
    groups = parameter_groups(models[1], 0.1, batch_norm_parameters(models[1]))
    plain = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=nesterov, foreach=False)
    torch.manual_seed(0)
    x = torch.randn(8, 3, 6, 6, dtype=dtype)
    for lr in LRS:
        for model, optimizer in zip(models, (ours, plain), strict=True):
            set_lr(optimizer, lr)
            optimizer.zero_grad()
            model(x).square().sum().mul(1e-3).backward()
            optimizer.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-7)


@pytest.fixture
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
@pytest.mark.parametrize("overflow_at", [0, 2])
def test_an_overflow_skips_the_update_whole(overflow_at):
    # float16's scaler, at the first step too: weight and momentum are as if it had not been there
    def run(losses):
        layer = nn.Linear(1, 1, bias=False)
        nn.init.ones_(layer.weight)
        optimizer = sgd(layer)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        set_lr(optimizer, 0.1)
        for factor in losses:
            optimizer.zero_grad()
            scaler.scale(layer.weight.square().sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
        return layer.weight.item(), scaler.get_scale()

    finite = [1.0, 1.0, 1.0]
    overflowing = [*finite[:overflow_at], float("inf"), *finite[overflow_at:]]
    weight, scale = run(overflowing)
    # w = 1: g = 2, u = 2, w = 0.8; g = 1.6, u = 3.4, w = 0.46; g = 0.92, u = 3.98, w = 0.062
    assert weight == pytest.approx(0.062, abs=1e-6)
    assert weight == run(finite)[0]
    assert scale == 512.0


def test_without_momentum():
    layer = one_weight()
    optimizer = sgd(layer, momentum=0.0)
    set_lr(optimizer, 0.1)
    for _ in range(2):  # 1 - 0.1 * 1.5 = 0.85; 0.85 - 0.1 * 1.2 = 0.73
        layer.weight.grad = gradient(layer.weight.detach(), 0)
        optimizer.step()
    assert layer.weight.item() == pytest.approx(0.73)
