"""Ghost batch norm against one plain batch norm for each worker."""

import copy

import pytest
import torch
from torch import nn

from harness.models.cifar_resnet import CifarResNet
from harness.models.ghost_batch_norm import (
    GhostBatchNorm2d,
    RunningStatistics,
    convert_batch_norms,
    ghost_batch_norms,
)
from harness.recipe.minibatch import Minibatch

N, C = 3, 4
layouts = pytest.mark.parametrize("channels_last", [False, True])


def in_order(x, channels_last):
    """Images (m*n, ...) worker by worker -> in the memory order of the layout."""
    m = x.shape[0] // N
    places = Minibatch(m, N).places(range(m), channels_last)
    x = x[torch.from_numpy(places)]
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def worker_by_worker(y, channels_last):
    """The inverse of `in_order`."""
    m = y.shape[0] // N
    return y if channels_last else y[torch.arange(m * N).view(N, m).t().reshape(-1)]


def random_images(m, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m * N, C, 5, 6, generator=generator, dtype=torch.float64)
    return (3 * x + torch.arange(C)[:, None, None]).to(dtype)


def ghost_and_plain(channels_last, dtype=torch.float64):
    """A ghost batch norm and a plain one with the same γ and β."""
    torch.manual_seed(3)
    plain = nn.BatchNorm2d(C).to(dtype)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    ghost = GhostBatchNorm2d(C, worker_batch=N, channels_last=channels_last).to(dtype)
    ghost.load_state_dict(plain.state_dict(), strict=True)
    return ghost, plain


def separately(plain, x, upstream):
    """Each worker's n images through a plain batch norm of their own.

    Returns outputs, gradients of images, γ and β, and the mean of the workers' running statistics.
    """
    norms = [copy.deepcopy(plain) for _ in x.split(N)]
    x = x.clone().requires_grad_()
    y = torch.cat([norm(part) for norm, part in zip(norms, x.split(N), strict=True)])
    y.backward(upstream)
    gradients = [x.grad, *(sum(getattr(b, p).grad for b in norms) for p in ("weight", "bias"))]
    means = torch.stack([norm.running_mean for norm in norms]).mean(0)
    variances = torch.stack([norm.running_var for norm in norms]).mean(0)
    return y.detach(), gradients, means, variances


@layouts
@pytest.mark.parametrize("m", [1, 2, 5])
def test_it_is_one_batch_norm_for_each_worker(m, channels_last):
    ghost, plain = ghost_and_plain(channels_last)
    x, upstream = random_images(m), random_images(m, seed=1)
    y, (dx, dweight, dbias), mean, variance = separately(plain, x, upstream)
    images = in_order(x, channels_last).requires_grad_()
    found = ghost(images)
    found.backward(in_order(upstream, channels_last))
    torch.testing.assert_close(worker_by_worker(found, channels_last), y)
    torch.testing.assert_close(worker_by_worker(images.grad, channels_last), dx)
    torch.testing.assert_close(ghost.weight.grad, dweight)
    torch.testing.assert_close(ghost.bias.grad, dbias)
    assert not ghost.running_mean.any()  # not before the step's end
    RunningStatistics(ghost).update(m)
    torch.testing.assert_close(ghost.running_mean, mean)
    torch.testing.assert_close(ghost.running_var, variance)
    assert ghost.num_batches_tracked.item() == 1


@layouts
def test_statistics_by_hand(channels_last):
    # n = 2 images of one pixel and channel; workers (1, 3) and (10, 14)
    ghost = GhostBatchNorm2d(1, worker_batch=2, channels_last=channels_last, eps=1e-12).double()
    x = torch.tensor([1.0, 3, 10, 14], dtype=torch.float64)
    order = [0, 1, 2, 3] if channels_last else [0, 2, 1, 3]
    y = ghost(x[order].view(4, 1, 1, 1)).flatten()
    # each worker by itself: (1 - 2)/1, (3 - 2)/1 and (10 - 12)/2, (14 - 12)/2
    expected = [-1, 1, -1, 1] if channels_last else [-1, -1, 1, 1]
    assert y.tolist() == pytest.approx(expected)
    RunningStatistics(ghost).update(2)
    # mean (2 + 12)/2 = 7: 0.9 * 0 + 0.1 * 7; unbiased variances 2 and 8 (biased 1 and 4, factor
    # nHW/(nHW - 1) = 2), mean 5: 0.9 * 1 + 0.1 * 5
    assert ghost.running_mean.item() == pytest.approx(0.7)
    assert ghost.running_var.item() == pytest.approx(1.4)


@layouts
def test_micro_batches_of_a_step_count_by_their_workers(channels_last):
    # 5 workers as m = 2, 2, m' = 1: as all 5 at once, and as 5 by themselves
    x = random_images(5)
    _, plain = ghost_and_plain(channels_last)
    *_, mean, variance = separately(plain, x, torch.ones_like(x))
    for step in (1, 2):  # the sums begin anew with each step
        for shares in ([5], [2, 2, 1], [1, 4]):
            ghost, _ = ghost_and_plain(channels_last)
            for _ in range(step):
                for part in x.split([share * N for share in shares]):
                    ghost(in_order(part, channels_last))
                RunningStatistics(ghost).update(5)
            # r2 = 0.9 r1 + (r1 - 0.9 r0), as both steps saw the same images; r0 = 0 and 1
            factor = [1.0, 1.9][step - 1]
            torch.testing.assert_close(ghost.running_mean, factor * mean)
            one_step = variance - 0.9
            torch.testing.assert_close(ghost.running_var, 0.9**step + factor * one_step)
            assert ghost.num_batches_tracked.item() == step


@pytest.mark.parametrize("m", [1, 3])
def test_both_layouts_agree(m):
    x = random_images(m)
    found = []
    for channels_last in (False, True):
        ghost, _ = ghost_and_plain(channels_last)
        images = in_order(x, channels_last)
        found.append(worker_by_worker(ghost(images), channels_last))
    torch.testing.assert_close(*found)


@layouts
@pytest.mark.parametrize("m", [1, 3])
def test_memory_of_the_other_layout_is_slow_but_right(m, channels_last):
    ghost, plain = ghost_and_plain(channels_last)
    x = random_images(m)
    expected, *_ = separately(plain, x, x)
    images = in_order(x, channels_last)
    other = torch.contiguous_format if channels_last else torch.channels_last
    y = ghost(images.contiguous(memory_format=other))
    torch.testing.assert_close(worker_by_worker(y, channels_last), expected)


@pytest.mark.parametrize("m", [1, 3])
def test_channels_last_stays_channels_last(m):
    ghost, _ = ghost_and_plain(True)
    y = ghost(in_order(random_images(m), True))
    assert y.is_contiguous(memory_format=torch.channels_last)


@layouts
@pytest.mark.parametrize("m", [1, 2])
def test_gradients_numerically(m, channels_last):
    ghost, _ = ghost_and_plain(channels_last)
    x = in_order(random_images(m), channels_last)[:, :, :2, :2].clone().requires_grad_()

    def function(x, weight, bias):
        return torch.func.functional_call(ghost, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(function, (x, ghost.weight, ghost.bias), fast_mode=True)


@layouts
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_float32_statistics(m, dtype, channels_last):
    ghost, plain = ghost_and_plain(channels_last, torch.float32)
    x, upstream = random_images(m, dtype), random_images(m, dtype, seed=1)
    y, (dx, dweight, _), mean, variance = separately(
        copy.deepcopy(plain).double(), x.double(), upstream.double()
    )
    images = in_order(x, channels_last).requires_grad_()
    with torch.autocast("cpu", dtype):
        found = ghost(images)
    found.backward(in_order(upstream, channels_last))
    RunningStatistics(ghost).update(m)
    assert found.dtype == dtype and ghost.running_mean.dtype == torch.float32
    rounding = 2 * torch.finfo(dtype).eps
    for half, exact in ((found, y), (images.grad, dx)):
        half = worker_by_worker(half, channels_last).double()
        torch.testing.assert_close(half, exact, rtol=rounding, atol=rounding)
    torch.testing.assert_close(ghost.weight.grad.double(), dweight, rtol=rounding, atol=0.5)
    # far better than the images' own 3 digits
    torch.testing.assert_close(ghost.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ghost.running_var.double(), variance, rtol=1e-5, atol=1e-6)


@layouts
def test_evaluation_is_plain_batch_norm(channels_last):
    ghost, plain = ghost_and_plain(channels_last)
    ghost(random_images(2))
    RunningStatistics(ghost).update(2)
    plain.load_state_dict(ghost.state_dict(), strict=True)
    x = random_images(3)[:7]  # no multiple of n
    assert torch.equal(ghost.eval()(x), plain.eval()(x))
    assert ghost.num_batches_tracked.item() == 1


@layouts
@pytest.mark.parametrize("images", [0, 2, 4])
def test_training_takes_whole_workers(images, channels_last):
    ghost, _ = ghost_and_plain(channels_last)
    with pytest.raises(ValueError, match=f"^{images} images are not a multiple of n = 3$"):
        ghost(torch.zeros(images, C, 2, 2, dtype=torch.float64))


@layouts
def test_a_step_that_overflowed_does_not_stay(channels_last):
    # as in float16: the next step's sums are finite again
    ghost, _ = ghost_and_plain(channels_last)
    ghost(torch.full((N, C, 2, 2), float("inf"), dtype=torch.float64))
    RunningStatistics(ghost).update(1)
    ghost.reset_running_stats()
    ghost(random_images(1))
    RunningStatistics(ghost).update(1)
    assert torch.isfinite(ghost.running_mean).all() and torch.isfinite(ghost.running_var).all()


@layouts
def test_a_whole_model_is_converted(channels_last):
    model = CifarResNet(8, 10).eval()
    gamma, state = model.layer2[0].bn1.weight, model.state_dict()
    convert_batch_norms(model, worker_batch=N, channels_last=channels_last)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 7 and ghost_batch_norms(model) == norms  # 1 + 3 blocks of 2
    assert {(b.worker_batch, b.channels_last, b.training) for b in norms} == {
        (N, channels_last, False)
    }
    assert model.layer2[0].bn1.weight is gamma
    assert list(model.state_dict()) == list(state)
    # a training step of 2 workers, then each layer's statistics have moved once
    model.train()(torch.randn(2 * N, 3, 8, 8)).sum().backward()
    RunningStatistics(model).update(2)
    assert all(b.running_mean.any() and b.num_batches_tracked == 1 for b in norms)
    assert not any(b.sums.any() for b in norms)
    CifarResNet(8, 10).load_state_dict(model.state_dict(), strict=True)


def test_what_cannot_be_converted_is_refused():
    for norm in (nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, momentum=None)):
        with pytest.raises(ValueError, match="BatchNorm2d"):
            convert_batch_norms(nn.Sequential(norm), 2, False)


def test_an_images_own_worker_is_all_it_sees():
    # section 2.3: never across workers; the other workers' images change nothing, bit for bit
    ghost, _ = ghost_and_plain(True)
    x = random_images(2)
    alone = ghost(x[:N].contiguous(memory_format=torch.channels_last))
    x[N:] *= 100
    assert torch.equal(ghost(in_order(x, True))[:N], alone)


@layouts
def test_it_compiles_whole(channels_last):
    ghost, _ = ghost_and_plain(channels_last)
    compiled = torch.compile(copy.deepcopy(ghost), backend="aot_eager", fullgraph=True)
    for m in (2, 1):  # a rank's micro-batches
        x = in_order(random_images(m), channels_last)
        torch.testing.assert_close(compiled(x), ghost(x))
    RunningStatistics(ghost).update(3)
    RunningStatistics(compiled).update(3)
    torch.testing.assert_close(compiled.running_var, ghost.running_var)


@pytest.mark.gpu
@layouts
@pytest.mark.parametrize("m", [1, 4])
def test_on_a_gpu(m, channels_last):
    ghost, plain = ghost_and_plain(channels_last, torch.float32)
    ghost.cuda()
    x = random_images(m, torch.float32)
    y, _, mean, _ = separately(plain, x, x)
    found = ghost(in_order(x, channels_last).cuda())
    RunningStatistics(ghost).update(m)
    torch.testing.assert_close(
        worker_by_worker(found.cpu(), channels_last), y, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(ghost.running_mean.cpu(), mean, rtol=1e-4, atol=1e-5)
