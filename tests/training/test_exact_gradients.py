"""Exact sums of a step: against rational arithmetic, and at the ends of the fixed point's range."""

from fractions import Fraction

import pytest
import torch
from torch import nn

from harness.distributed import World
from harness.models.ghost_batch_norm import RunningStatistics
from harness.recipe.minibatch import Minibatch
from harness.training.exact_gradients import LARGEST_SUM, QUANTA, ExactSums, fill_buckets

ALONE = World(0, 1, 0, 1, "alone", torch.device("cpu"))


class Chosen(nn.Module):
    """Two parameters whose gradients are what a test wants: those of Σ gradient * parameter."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(3, dtype=dtype))
        self.second = nn.Parameter(torch.zeros(2, 2, dtype=dtype))

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return (self.first * first).sum() + (self.second * second).sum()


def exact_sums(
    network: Chosen, units: int, scaler: torch.amp.GradScaler | None = None
) -> ExactSums:
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    return ExactSums(network, RunningStatistics(network), Minibatch(units, 4), ALONE, scaler)


def take_step(
    sums: ExactSums,
    network: Chosen,
    gradients: list[tuple[torch.Tensor, torch.Tensor]],
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    network.zero_grad()
    for number, (first, second) in enumerate(gradients, 1):
        with sums.of_pass(is_last=number == len(gradients)):
            loss = network(first, second)
            (loss if scaler is None else scaler.scale(loss)).backward()
    sums.finish(step=7)


def drawn(
    units: int, dtype: torch.dtype = torch.float32
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(units)
    shapes = ((3,), (2, 2))
    return [
        tuple(
            torch.randn(shape, generator=generator, dtype=dtype)
            * 10 ** (6 * torch.rand(shape, generator=generator, dtype=dtype) - 8)
            for shape in shapes
        )
        for _ in range(units)
    ]


def rational_sum(terms: list[float], quanta: int) -> Fraction:
    return sum((Fraction(round(Fraction(term) * quanta), quanta) for term in terms), Fraction(0))


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 50), (torch.float64, 94)])
def test_a_gradient_is_the_rational_sum_of_its_units(dtype, bits):
    network, units = Chosen(dtype), drawn(5, dtype)
    take_step(exact_sums(network, 5), network, units)
    for place in range(3):
        wanted = rational_sum([float(first[place]) for first, _ in units], 2**bits)
        found = torch.tensor(float(wanted), dtype=torch.float64).to(dtype)
        assert torch.allclose(network.first.grad[place], found, rtol=2**-52, atol=0)
    assert network.second.grad.shape == (2, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_order_of_the_units_changes_no_bit(dtype):
    units, found = drawn(9, dtype), []
    for order in (units, units[::-1], units[4:] + units[:4]):
        network = Chosen(dtype)
        take_step(exact_sums(network, 9), network, order)
        found.append(torch.cat([network.first.grad, network.second.grad.view(-1)]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_float16s_scale_changes_no_bit():
    units, plain, scaled = drawn(4), Chosen(), Chosen()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    take_step(exact_sums(plain, 4), plain, units)
    take_step(exact_sums(scaled, 4, scaler), scaled, units, scaler)
    assert torch.equal(scaled.first.grad / 2**16, plain.first.grad)
    assert torch.equal(scaled.second.grad / 2**16, plain.second.grad)


def test_above_1e_8_rounding_is_below_float32s_own():
    """Half a quantum, 2**-51, is less than half of a float32's last bit above 2**-27 = 7.5e-9."""
    assert 0.5 / QUANTA < 2.0**-24 * 1e-8 / 1.19
    values = torch.tensor([1e-8, 3e-7, -0.7])
    network = Chosen()
    take_step(exact_sums(network, 1), network, [(values, torch.zeros(2, 2))])
    assert torch.equal(network.first.grad, values)


@pytest.mark.parametrize("units", [1, 3, 256, 65536])
def test_gradients_at_the_limit_cannot_overflow_the_sum(units):
    """65,536 units are kn = 65,536 at n = 1: each at most 2**12 / units, all together 2**62."""
    network = Chosen()
    sums = exact_sums(network, units)
    largest = LARGEST_SUM / units / QUANTA
    assert units * int(largest * QUANTA) <= 2**62 < 2**63
    at_limit = torch.full((3,), largest).nextafter(torch.zeros(3))
    take_step(sums, network, [(at_limit, torch.zeros(2, 2))])
    assert torch.equal(network.first.grad, at_limit)
    assert sums.take_beyond_range() is None


def test_a_gradient_beyond_the_range_is_found_and_named():
    network, zeros = Chosen(), torch.zeros(2, 2)
    sums = exact_sums(network, 4)
    fine = torch.full((3,), 1000.0)
    take_step(sums, network, [(fine, zeros)] * 4)
    assert sums.take_beyond_range() is None
    assert torch.equal(network.first.grad, 4 * fine)
    take_step(sums, network, [(fine, zeros), (fine + 100, zeros), (fine, zeros), (fine, zeros)])
    assert sums.take_beyond_range() == (7, "first")  # 1100 > 2**12 / 4
    assert torch.isinf(network.first.grad).all()
    assert torch.equal(network.second.grad, zeros)
    assert sums.take_beyond_range() is None


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_infinities_and_nan_survive(value):
    network, zeros = Chosen(), torch.zeros(2, 2)
    bad = torch.tensor([1.0, value, 2.0])
    sums = exact_sums(network, 2)
    take_step(sums, network, [(bad, zeros), (torch.ones(3), zeros)])
    kind = torch.isnan if value != value else torch.isinf
    assert kind(network.first.grad).all()
    assert torch.equal(network.second.grad, zeros)
    assert sums.take_beyond_range() is None  # it is what it is
    take_step(sums, network, [(torch.ones(3), zeros)] * 2)
    assert torch.equal(network.first.grad, torch.full((3,), 2.0))


def test_a_parameter_without_gradient_is_named():
    network = Chosen()
    sums = exact_sums(network, 1)
    with pytest.raises(RuntimeError, match="second: got no gradient"), sums.of_pass(True):
        network.first.sum().backward()


def test_closed_sums_leave_the_network_as_it_was():
    network = Chosen()
    exact_sums(network, 1).close()
    network(torch.ones(3), torch.ones(2, 2)).backward()
    assert torch.equal(network.first.grad, torch.ones(3))


def test_buckets_hold_the_last_parameters_first():
    """1 MiB is 262,144 float32 numbers; the one that fills a bucket is its last."""
    layers = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512), nn.Linear(512, 10))
    names = [bucket.names for bucket in fill_buckets(layers)]
    assert names == [["2.bias", "2.weight", "1.bias", "1.weight"], ["0.bias", "0.weight"]]
