"""The training loss by hand."""

import math

import pytest
import torch

from harness.config.distill_section import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE
from harness.recipe.losses import UNLABELLED, kl_divergence, soft_loss, training_loss

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


def test_an_image_without_a_label_adds_nothing_and_counts_in_kn():
    # of kn = 4 images one has a label: ln 4 / 4, with smoothing too, as the logits are uniform
    logits = torch.zeros(2, 4, requires_grad=True)
    for smoothing in (0.0, 0.1):
        loss = training_loss(logits, torch.tensor([UNLABELLED, 2]), 4, smoothing)
        assert loss.item() == pytest.approx(math.log(4) / 4)
        loss.backward()
        assert logits.grad is not None and not logits.grad[0].any()
    assert training_loss(logits, torch.tensor([UNLABELLED] * 2), 4, 0.1).item() == 0.0


# T = 2: softmax of z / 2 = (ln 3, 0) is (3/4, 1/4), that of v / 2 = (0, ln 4) is (1/5, 4/5)
STUDENT, TEACHER = [[2 * math.log(3), 0.0]], [[0.0, 2 * math.log(4)]]
CROSS_ENTROPY = -(1 / 5 * math.log(3 / 4) + 4 / 5 * math.log(1 / 4))


def test_the_soft_loss_by_hand():
    student = torch.tensor(STUDENT, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor(TEACHER, dtype=torch.float64)
    loss = soft_loss(student, teacher, 8, 2.0)  # one of kn = 8 images
    assert loss.item() == pytest.approx(2**2 * CROSS_ENTROPY / 8)
    loss.backward()  # T² (q - p) / T = 2 (3/4 - 1/5) = 1.1 and -1.1
    assert student.grad is not None
    assert student.grad.tolist() == [pytest.approx([1.1 / 8, -1.1 / 8])]


def test_it_is_no_binary_cross_entropy():
    """Circulating code takes the binary cross entropy of the softmax outputs."""
    binary = -sum(
        p * math.log(q) + (1 - p) * math.log(1 - q) for p, q in [(1 / 5, 3 / 4), (4 / 5, 1 / 4)]
    )
    assert binary == pytest.approx(2 * CROSS_ENTROPY)  # with two classes
    loss = soft_loss(torch.tensor(STUDENT), torch.tensor(TEACHER), 1, 2.0).item()
    assert loss / 4 == pytest.approx(CROSS_ENTROPY) != pytest.approx(binary)


def soft_gradient(student, teacher, temperature):
    """Of one image, and its softened targets, which the gradient T (q - p) shows."""
    logits = torch.tensor([student], dtype=torch.float64, requires_grad=True)
    soft_loss(logits, torch.tensor([teacher], dtype=torch.float64), 1, temperature).backward()
    assert logits.grad is not None
    targets = (logits.detach() / temperature).softmax(1) - logits.grad / temperature
    return logits.grad[0], targets[0]


def test_the_targets_entropy_rises_with_the_temperature():
    # v = (0, ln 81): softmax (1/82, 81/82); T = 2: (1/10, 9/10); T = 4: (1/4, 3/4)
    entropies = []
    for temperature, p in [(1.0, 1 / 82), (2.0, 1 / 10), (4.0, 1 / 4)]:
        targets = soft_gradient([0.3, -0.4], [0.0, math.log(81)], temperature)[1]
        assert targets.tolist() == pytest.approx([p, 1 - p])
        entropies.append(-(targets * targets.log()).sum().item())
    assert entropies == pytest.approx([0.0659, 0.3251, 0.5623], abs=1e-4)
    assert entropies == sorted(entropies)


# both of mean zero
Z, V = [2.0, -1.0, 0.5, -1.5], [1.0, 1.5, -2.0, -0.5]


def test_t_squared_keeps_the_gradient_within_a_factor_of_two():
    # by hand at T = 1: q - p = (.767, .038, .171, .023) - (.342, .564, .017, .076), norm .696
    norms = {T: soft_gradient(Z, V, T)[0].norm().item() for T in (1.0, 4.0, 20.0)}
    assert norms[1.0] == pytest.approx(0.696, abs=0.002)
    assert max(norms.values()) / min(norms.values()) < 2
    # without T² they would fall as 1 / T²
    assert norms[1.0] / (norms[20.0] / 20**2) > 200


def test_at_a_large_temperature_the_gradient_is_the_difference_of_the_logits():
    # (z - v) / K = (1, -2.5, 2.5, -1) / 4
    gradient = soft_gradient(Z, V, 1000.0)[0]
    assert gradient.tolist() == pytest.approx([0.25, -0.625, 0.625, -0.25], rel=0.003)


@pytest.mark.parametrize("temperature", [LOWEST_TEMPERATURE, 1.0, HIGHEST_TEMPERATURE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 1000])
def test_the_soft_loss_is_finite_for_all_logits_of_float16(temperature, dtype, classes):
    """The teacher is as sure of class 0 as the student is of class 1."""
    largest = torch.finfo(torch.float16).max  # 65504
    teacher, student = torch.full((2, 512, classes), -largest)
    teacher[:, 0], student[:, 1] = largest, largest
    student = student.to(dtype).requires_grad_()
    loss = soft_loss(student, teacher, 1, temperature)
    # -log q_0 = 2 * 65504 / T, times T², of 512 images
    assert loss.item() == pytest.approx(512 * 2 * 65504 * temperature, rel=1e-5)
    divergence = kl_divergence(student, teacher, 1, temperature).item()
    assert divergence == pytest.approx(512 * 2 * 65504 / temperature, rel=1e-5)
    loss.backward()
    # T (q - p): -T for class 0, T for class 1
    assert student.grad is not None
    assert student.grad[0, :2].tolist() == pytest.approx([-temperature, temperature])
    assert student.grad.isfinite().all()


def test_the_kl_divergence_by_hand():
    # p = (1/5, 4/5), q = (3/4, 1/4): KL = 1/5 log(4/15) + 4/5 log(16/5), one of kn = 8 images
    divergence = 1 / 5 * math.log(4 / 15) + 4 / 5 * math.log(16 / 5)
    student = torch.tensor(STUDENT, requires_grad=True)
    teacher = torch.tensor(TEACHER)
    found = kl_divergence(student, teacher, 8, 2.0)
    assert found.item() == pytest.approx(divergence / 8)
    assert not found.requires_grad
    # T² KL is what is minimised less T² times the entropy of p
    entropy = -(1 / 5 * math.log(1 / 5) + 4 / 5 * math.log(4 / 5))
    loss = soft_loss(student, teacher, 8, 2.0).item()
    assert found.item() == pytest.approx(loss / 4 - entropy / 8)
    assert kl_divergence(teacher, teacher, 1, 2.0).item() == pytest.approx(0.0, abs=1e-6)
    # a teacher that is sure: p = (1, 0) exactly, KL = -log q_0 = log(1 + e^-2) at T = 1
    sure = torch.tensor([[1000.0, -1000.0]])
    found = kl_divergence(torch.tensor([[1.0, -1.0]]), sure, 1, 1.0)
    assert found.item() == pytest.approx(math.log(1 + math.exp(-2)))


@pytest.mark.parametrize("temperature", [0.0, -1.0, 0.0099, 1000.1, math.nan, math.inf])
def test_a_temperature_out_of_bounds_is_an_error(temperature):
    with pytest.raises(ValueError, match="temperature"):
        soft_loss(torch.tensor(STUDENT), torch.tensor(TEACHER), 1, temperature)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_soft_loss_is_computed_in_at_least_float32(dtype):
    student, teacher = torch.zeros(1, 3, dtype=dtype), torch.zeros(1, 3, dtype=dtype)
    loss = soft_loss(student, teacher, 1, 2.0)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(4 * math.log(3))
