"""The fused kernel against plain PyTorch. test_ghost_batch_norm_triton.py runs this in a process of
its own: on a GPU, or in Triton's interpreter, which has to be asked for before Triton is imported.
"""

import copy

import pytest
import torch
from torch import nn

from harness.models import ghost_batch_norm_triton as kernel
from harness.models.cifar_resnet import CifarResNet
from harness.models.fused_blocks import fuse_blocks
from harness.models.ghost_batch_norm import (
    GhostBatchNorm2d,
    RunningStatistics,
    convert_batch_norms,
    ghost_batch_norms,
    kernel_device,
)

DEVICE = kernel_device()
N = 4
shapes = pytest.mark.parametrize("shape", [(5, 9, 7), (70, 5, 3), (1, 1, 2)])  # C, H, W
variants = pytest.mark.parametrize(
    ("residual", "relu"), [(False, False), (False, True), (True, True), (True, False)]
)


def images(m, shape, dtype=torch.float64, seed=0):
    """(m*n, C, H, W) in channels_last on the device, of means and spreads of their own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m * N, *shape, generator=generator, dtype=torch.float64)
    x = (x * 3 + torch.arange(shape[0])[:, None, None] % 5 - 2).to(dtype)
    return x.to(DEVICE, memory_format=torch.channels_last)


def norm_of(channels, dtype=torch.float64):
    torch.manual_seed(3)
    norm = GhostBatchNorm2d(channels, worker_batch=N, channels_last=True)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm.to(DEVICE, dtype)


def pass_through(norm, x, residual, upstream, relu):
    """Outputs, gradients of x, residual, γ, β, and the sums of statistics."""
    x = x.clone().requires_grad_()
    residual = None if residual is None else residual.clone().requires_grad_()
    y = norm(x, residual, relu)
    y.backward(upstream)
    return [
        y.detach(),
        x.grad,
        *([] if residual is None else [residual.grad]),
        norm.weight.grad,
        norm.bias.grad,
        norm.sums,
    ]


def fused_and_plain(m, shape, residual, relu, dtype=torch.float64, exact=torch.float64):
    """The same through the kernel in `dtype`, and through plain PyTorch in `exact`."""
    x, up = images(m, shape, dtype), images(m, shape, dtype, seed=1)
    other = images(m, shape, dtype, seed=2) if residual else None
    fused = norm_of(shape[0], torch.promote_types(dtype, torch.float32))
    plain = copy.deepcopy(fused).to(exact)
    plain.fused_on = ""
    found = pass_through(fused, x, other, up, relu)
    other = None if other is None else other.to(exact)
    return found, pass_through(plain, x.to(exact), other, up.to(exact), relu)


@shapes
@variants
@pytest.mark.parametrize("m", [1, 3])
def test_float64_to_1e_10(m, shape, residual, relu):
    for found, expected in zip(*fused_and_plain(m, shape, residual, relu), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunks", [1, 3, 1000])
def test_chunks_of_any_size(chunks, monkeypatch):
    monkeypatch.setattr(kernel, "TILE", 64)
    monkeypatch.setattr(kernel, "CHUNKS", chunks)
    for found, expected in zip(*fused_and_plain(2, (5, 9, 7), True, True), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@variants
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_within_rounding(dtype, residual, relu):
    found, exact = fused_and_plain(2, (70, 5, 3), residual, relu, dtype)
    *images_like, dweight, dbias, sums = zip(found, exact, strict=True)
    # everything is in float32 up to the one rounding of what is written, half a unit of it; where
    # y is within a rounding of 0, that may decide what the ReLU lets through
    eps = torch.finfo(dtype).eps
    y, exact_y = images_like[0]
    sure = (exact_y.abs() > 1e-5) | torch.tensor(not relu, device=DEVICE)
    assert sure.double().mean() > 0.4
    assert torch.equal(y == 0, exact_y == 0) or not relu
    for half, true in images_like:
        assert half.dtype == dtype
        torch.testing.assert_close(half.double(), true, rtol=eps, atol=2e-5)
    for half, true in (dweight, dbias, sums):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half.double(), true, rtol=1e-5, atol=1e-4)


@variants
def test_gradients_numerically(residual, relu):
    x, norm = images(2, (3, 2, 2)).requires_grad_(), norm_of(3)
    other = images(2, (3, 2, 2), seed=2).requires_grad_() if residual else None

    def function(x, other, weight, bias):
        return kernel.ghost_batch_norm(x, other, weight, bias, N, 1e-5, relu)[0]

    inputs = x, other, norm.weight, norm.bias
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_a_worker_is_the_same_bits_whatever_its_micro_batch():
    # 5 workers as m = 5, and as m = 2, 2, m' = 1
    x, up = images(5, (70, 5, 3), torch.bfloat16), images(5, (70, 5, 3), torch.bfloat16, seed=1)
    norm = norm_of(70, torch.float32)
    whole = pass_through(norm, x, None, up, True)[:2]
    running = RunningStatistics(norm)
    running.update(5)
    parts = copy.deepcopy(norm)
    parts.reset_running_stats()
    split = [
        pass_through(parts, *pair, True)[:2]
        for pair in zip(x.split([8, 8, 4]), [None] * 3, up.split([8, 8, 4]), strict=True)
    ]
    for one, several in zip(whole, zip(*split, strict=True), strict=True):
        assert torch.equal(one, torch.cat(several))
    RunningStatistics(parts).update(5)
    torch.testing.assert_close(parts.running_mean, norm.running_mean)
    torch.testing.assert_close(parts.running_var, norm.running_var)


def test_a_value_that_is_not_finite_stays_visible():
    x = images(2, (5, 3, 3), torch.float32)
    x[0, 2, 1, 1] = float("nan")
    y = norm_of(5, torch.float32)(x, relu=True)
    assert y[:N, 2].isnan().all()  # the worker's channel, and nothing else
    assert y.isnan().sum() == N * 9


def test_any_memory_layout_is_taken():
    x = images(2, (5, 3, 4))
    norm = norm_of(5)
    y = norm(x, relu=True)
    assert torch.equal(norm(x.contiguous(), x.contiguous()), norm(x, x))
    upstream = torch.ones(2 * N, 5, 1, 1, dtype=torch.float64, device=DEVICE).expand_as(y)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    norm(x1).backward(upstream)
    norm(x2).backward(upstream.contiguous(memory_format=torch.channels_last))
    assert torch.equal(x1.grad, x2.grad)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_a_whole_model():
    torch.manual_seed(0)
    model = CifarResNet(8, 10, width=4)
    convert_batch_norms(model, worker_batch=N, channels_last=True)
    fuse_blocks(model)
    model = model.to(DEVICE, torch.float64).to(memory_format=torch.channels_last)
    plain = copy.deepcopy(model)
    for norm in ghost_batch_norms(plain):
        norm.fused_on = ""
    x = images(3, (3, 8, 8))
    for network in (model, plain):
        network(x).logsumexp(1).sum().backward()
        RunningStatistics(network).update(3)
    for (name, found), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-10, msg=name)
    for found, expected in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_the_operations_are_what_pytorch_takes_them_for():
    x, norm = images(2, (5, 3, 4), torch.float32).requires_grad_(), norm_of(5, torch.float32)
    for other in (None, images(2, (5, 3, 4), torch.float32, seed=2).requires_grad_()):
        inputs = x, other, norm.weight, norm.bias, N, 1e-5, True
        torch.library.opcheck(kernel.ghost_batch_norm, inputs)
        y, statistics, invstd = (t.detach() for t in kernel.ghost_batch_norm(*inputs))
        saved = y, x.detach(), y, statistics, invstd, norm.weight.detach()
        torch.library.opcheck(kernel.ghost_batch_norm_backward, (*saved, N, other is not None))


def test_it_compiles_whole():
    norm = norm_of(5)
    compiled = torch.compile(copy.deepcopy(norm), backend="aot_eager", fullgraph=True)
    for m in (2, 1):
        inputs = images(m, (5, 3, 4)), images(m, (5, 3, 4), seed=2), images(m, (5, 3, 4), seed=1)
        for found, expected in zip(
            pass_through(compiled, *inputs, True), pass_through(norm, *inputs, True), strict=True
        ):
            torch.testing.assert_close(found, expected)
