"""The gradient noise scale: by hand, and exactly over all minibatches of a small data set."""

import itertools
import math

import pytest
import torch

from harness.recipe.noise_scale import SquaredNorms, noise_scale, signal_and_noise, trade_off


def test_signal_and_noise_by_hand():
    """n = 2, kn = 8: |G|² = (8 * 3 - 2 * 9) / 6 = 1, S = (9 - 3) / (1/2 - 1/8) = 16."""
    assert signal_and_noise(SquaredNorms(worker=9.0, minibatch=3.0), 2, 8) == (1.0, 16.0)


def test_the_average_is_taken_before_the_division():
    """Signals 1 and 3, noises 16 and 8, N = 6: 24 / (4 + 24 / 6) = 3; without one: 16/3, 8/5."""
    first = SquaredNorms(9.0, 3.0)
    second = SquaredNorms(3 + 8 / 2, 3 + 8 / 8)  # |G|² + S / b
    found = noise_scale([first, second], 2, 8, 6)
    assert found.images == pytest.approx(3.0)
    # leaving out the first or the second: 8 / (3 + 8/6) = 24/13 and 16 / (1 + 16/6) = 48/11
    without = [24 / 13, 48 / 11]
    assert found.standard_error == pytest.approx(abs(without[0] - without[1]) / 2)
    assert noise_scale([first], 2, 8, 6).standard_error is None


def test_it_is_exact_over_all_minibatches_of_a_small_data_set():
    """Averaged over every way to draw 4 of 6 images as two workers of 2, it is S / |G|² itself.

    The gradients of the images are drawn; S is the trace of their covariance with divisor N.
    """
    gradients = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients += 0.7
    whole = gradients.mean(0)
    trace = float((gradients - whole).square().sum()) / 6
    steps = []
    for drawn in itertools.permutations(range(6), 4):
        two, four = gradients[list(drawn)].view(2, 2, 5).mean(1), gradients[list(drawn)].mean(0)
        steps.append(SquaredNorms(float(two.square().sum(1).mean()), float(four.square().sum())))
    known = trace / float(whole.square().sum())
    assert noise_scale(steps, 2, 4, 6).images == pytest.approx(known * 6 / 5, rel=1e-9)


def test_the_trade_off_by_hand():
    """At the noise scale itself both cost twice the least; at a quarter of it 5 and 1.25 times."""
    assert trade_off(100, 100.0) == trade_off(7, 7.0)
    assert (trade_off(100, 100.0).steps, trade_off(100, 100.0).examples) == (2.0, 2.0)
    quarter = trade_off(25, 100.0)
    assert (quarter.steps, quarter.examples) == (5.0, 1.25)
    assert math.isclose((quarter.steps - 1) * (quarter.examples - 1), 1.0)
