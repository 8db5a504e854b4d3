"""The training loss by hand."""

import math

import pytest
import torch

from harness.recipe.losses import training_loss

LOGITS = [[2.0, 0.0, 0.0, 0.0]]


def log_softmax_by_hand():
    # log sum exp = log(e^2 + 3): the true class 2 - that, every other 0 - that
    normaliser = math.log(math.exp(2) + 3)
    return 2 - normaliser, -normaliser


def test_label_smoothing_with_four_classes():
    # Szegedy et al. 2016, section 7, K = 4, epsilon = 0.1: 0.9 + 0.1/4 = 0.925 and 0.1/4 = 0.025
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    loss = training_loss(logits, torch.tensor([0]), 1, 0.1)
    true, other = log_softmax_by_hand()
    assert loss.item() == pytest.approx(-(0.925 * true + 3 * 0.025 * other))
    # the gradient is softmax - target, which shows the target itself
    loss.backward()
    assert logits.grad is not None
    target = logits.detach().softmax(1) - logits.grad
    assert target.tolist() == [pytest.approx([0.925, 0.025, 0.025, 0.025])]


def test_without_smoothing_it_is_the_cross_entropy():
    loss = training_loss(torch.tensor(LOGITS), torch.tensor([0]), 1, 0.0)
    assert loss.item() == pytest.approx(-log_softmax_by_hand()[0])


def test_smoothing_of_one_is_uniform():
    # epsilon = 1: every target is 1/4
    logits = torch.tensor(LOGITS, requires_grad=True)
    training_loss(logits, torch.tensor([0]), 1, 1.0).backward()
    assert (logits.detach().softmax(1) - logits.grad).tolist() == [pytest.approx([0.25] * 4)]


@pytest.mark.parametrize("epsilon", [-0.001, 1.001, math.nan])
def test_smoothing_outside_zero_to_one_is_an_error(epsilon):
    with pytest.raises(ValueError, match="label_smoothing"):
        training_loss(torch.tensor(LOGITS), torch.tensor([0]), 1, epsilon)


def test_the_sum_is_divided_by_the_global_minibatch():
    # remark 3 (section 3): two of kn = 8 images, uniform over 4 classes: (ln 4 + ln 4) / 8
    loss = training_loss(torch.zeros(2, 4), torch.tensor([1, 3]), 8, 0.0)
    assert loss.item() == pytest.approx(2 * math.log(4) / 8)


@pytest.mark.parametrize(
    ("logits", "loss"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_it_is_computed_in_at_least_float32(logits, loss):
    value = training_loss(torch.zeros(1, 3, dtype=logits), torch.tensor([0]), 1, 0.1)
    assert value.dtype == loss
    assert value.item() == pytest.approx(math.log(3))  # bfloat16 would give 1.1015625
