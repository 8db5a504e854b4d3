"""The gradient noise scale: the minibatch at which its gradient stops being mostly noise.

McCandlish et al. 2018 (arXiv 1812.06162). For the gradient G_b of the mean loss over b images of a
data set of N, drawn without replacement,
    E |G_b|² = |G|² + (S / b) (N - b) / (N - 1),
with the gradient G over the whole data set and the trace S of the covariance of single images'
gradients. Two sizes b < B of the same minibatch give both (appendix A.1), and B_simple = S / |G|².
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SquaredNorms:
    """The squared norms of one step's gradients of the mean loss.

    `worker` is the mean over workers of n images, `minibatch` that of all kn.
    """

    worker: float
    minibatch: float


@dataclass(frozen=True)
class NoiseScale:
    """B_simple in images, and its standard error over the steps; None from a single step."""

    images: float
    standard_error: float | None


def signal_and_noise(norms: SquaredNorms, n: int, kn: int) -> tuple[float, float]:
    """Return the unbiased estimates of |G|² - S / (N - 1) and S N / (N - 1) (appendix A.1).

    Each is noisy and may be negative: average them over many steps before dividing.
    """
    signal = (kn * norms.minibatch - n * norms.worker) / (kn - n)
    noise = (norms.worker - norms.minibatch) / (1 / n - 1 / kn)
    return signal, noise


def noise_scale(steps: Sequence[SquaredNorms], n: int, kn: int, images: int) -> NoiseScale:
    """Return B_simple over `steps`, with N = `images`; the spread is that of the jackknife.

    Both estimates carry the correction for a finite N: S / |G|² = noise / (signal + noise / N),
    up to a factor of 1 - 1/N. The scale may be negative where the steps are too few.
    """
    pairs = [signal_and_noise(norms, n, kn) for norms in steps]
    signals, noises = (sum(values) for values in zip(*pairs, strict=True))

    def scale(signal: float, noise: float) -> float:
        return noise / (signal + noise / images)

    count = len(pairs)
    if count < 2:
        return NoiseScale(scale(signals, noises), None)
    without = [scale(signals - signal, noises - noise) for signal, noise in pairs]
    mean = sum(without) / count
    variance = (count - 1) / count * sum((value - mean) ** 2 for value in without)
    return NoiseScale(scale(signals, noises), variance**0.5)


@dataclass(frozen=True)
class TradeOff:
    """What a minibatch costs beside the fewest steps and the fewest examples (section 2.3)."""

    steps: float  # S / S_min
    examples: float  # E / E_min


def trade_off(minibatch: int, scale: float) -> TradeOff:
    """Return the prediction (S/S_min - 1)(E/E_min - 1) = 1 at a minibatch of so many images."""
    return TradeOff(1 + scale / minibatch, 1 + minibatch / scale)
