import math

import pytest
import torch

from harness.training.metrics import Metrics


def add(metrics: Metrics, loss: float, correct: int, images: int) -> None:
    """A micro-batch of `images` images, `correct` of them classified correctly."""
    labels = torch.zeros(images, dtype=torch.int64)
    logits = torch.zeros(images, 2)
    logits[:, 0] = torch.where(torch.arange(images) < correct, 1.0, -1.0)
    metrics.add_micro_batch(torch.tensor(loss), logits, labels)


def test_means_over_steps_and_images():
    metrics = Metrics(torch.device("cpu"), minibatch=6)
    add(metrics, 0.5, correct=3, images=4)  # step 0: loss 0.5 + 0.25
    add(metrics, 0.25, correct=1, images=2)
    metrics.end_step(0)
    add(metrics, 0.125, correct=2, images=4)  # step 1: loss 0.25
    add(metrics, 0.125, correct=0, images=2)
    metrics.end_step(1)
    reading = metrics.read()
    assert reading.loss == pytest.approx(0.5)  # (0.75 + 0.25) / 2
    assert reading.error == pytest.approx(50.0)  # 6 of 12 correct
    assert reading.first_bad_step is None
    add(metrics, 2.0, correct=0, images=4)
    metrics.end_step(2)
    assert metrics.read().loss == pytest.approx(2.0)  # a reading starts anew


def test_the_kl_divergence_is_the_mean_of_the_steps_that_counted():
    metrics = Metrics(torch.device("cpu"), minibatch=4)
    logits, labels = torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64)
    # two micro-batches a step, each Σ/(kn): 0.25 + 0.125; then 0.5 + 0.125; the third overflows
    steps = [(0.25, 0.125, 0.0), (0.5, 0.125, 0.0), (math.inf, math.nan, 1.0)]
    for step, (first, second, overflow) in enumerate(steps):
        for divergence in (first, second):
            metrics.add_micro_batch(torch.tensor(1.0), logits, labels, torch.tensor(divergence))
        metrics.end_step(step, torch.tensor(overflow))
    assert metrics.read().kl == pytest.approx((0.375 + 0.625) / 2)
    add(metrics, 1.0, correct=1, images=2)
    metrics.end_step(3)
    assert metrics.read().kl is None  # no teacher


def test_the_first_step_that_is_not_finite_is_kept_until_it_is_read():
    metrics = Metrics(torch.device("cpu"), minibatch=2)
    for step, loss in enumerate([0.5, math.inf, math.nan, 0.5]):
        add(metrics, loss, correct=1, images=2)
        metrics.end_step(step)
    assert metrics.read().first_bad_step == 1


def test_a_float16_overflow_is_counted_and_is_no_divergence():
    metrics = Metrics(torch.device("cpu"), minibatch=2)
    yes, no = torch.tensor(1.0), torch.tensor(0.0)
    for step, (loss, overflow) in enumerate([(1.0, no), (math.nan, yes), (math.inf, yes)]):
        add(metrics, loss, correct=1, images=2)
        metrics.end_step(step, overflow)
    reading = metrics.read()
    assert (reading.overflows, reading.overflows_in_row) == (2, 2)
    assert reading.first_bad_step is None
    assert reading.loss == pytest.approx(1.0)  # of the one step that counted
    add(metrics, 1.0, correct=1, images=2)
    metrics.end_step(3, no)
    assert metrics.read().overflows_in_row == 0
    add(metrics, math.nan, correct=1, images=2)
    metrics.end_step(4, no)  # finite gradients of a loss that is not: that is one
    assert metrics.read().first_bad_step == 4
