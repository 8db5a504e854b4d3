"""Ghost batch norm, residual addition and ReLU as one operation, in channels_last, by Triton.

y = relu(γ (x - mean) / sqrt(variance + eps) + β + residual), statistics over each worker's n
images (section 2.3). An activation is read and written as rarely as the arithmetic allows:
forward reads x twice and the residual once, and writes y; backward reads dy, x and y twice and
writes dx, or with a residual writes its gradient on the way and then reads that in place of dy, y.

In memory, x (m*n, C, H, W) is (m, R, C), R = n*H*W. A worker's sums are made in chunks that do not
depend on m, so its results are the same bits whatever shares the micro-batch with it.
Arithmetic is in float32, for float64 in float64. With TRITON_INTERPRET=1 all of it runs on CPUs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
# not chosen by measurement: no GPU was at hand
BLOCK_CHANNELS = 64  # 128 bytes of bfloat16, a full line of the cache
TILE = 2048  # elements of a tile: rows x channels
FINISHED_CHANNELS = 16  # channels whose chunks one program adds up
CHUNKS = 256  # of a worker's sums, over rows and channel blocks, if it has that many rows


@triton.jit
def _partial_statistics(
    x, partial, rows, channels, chunk_rows, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Compute mean and sum of squared deviations of a chunk's rows, by Welford's algorithm."""
    worker, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    x += worker.to(tl.int64) * rows * channels
    end = tl.minimum((chunk + 1) * chunk_rows, rows)
    acc = partial.dtype.element_ty
    count = tl.zeros([BLOCK_R, 1], acc)
    mean = tl.zeros([BLOCK_R, BLOCK_C], acc)
    squares = tl.zeros([BLOCK_R, BLOCK_C], acc)
    for start in range(chunk * chunk_rows, end, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)[:, None]
        inside = (r < end) & (c < channels)
        value = tl.load(x + r * channels + c, mask=inside, other=0.0).to(acc)
        count += (r < end).to(acc)
        delta = tl.where(inside, value - mean, 0.0)
        mean += delta / tl.maximum(count, 1.0)
        squares += delta * (value - mean)
    total = tl.sum(count, 0)[None, :]
    whole = tl.sum(mean * count, 0)[None, :] / total
    apart = mean - whole
    squares = tl.sum(squares + count * apart * apart, 0)[None, :]
    at = partial + ((worker * chunks + chunk) * 2) * channels + c
    tl.store(at, whole, mask=c < channels)
    tl.store(at + channels, squares, mask=c < channels)


@triton.jit
def _finish_statistics(
    partial, statistics, invstd, rows, channels, chunk_rows, chunks,
    EPS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Merge a worker's chunks: mean, unbiased variance, and 1 / sqrt(biased variance + eps)."""
    worker, workers = tl.program_id(0), tl.num_programs(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    k = tl.arange(0, BLOCK_K)[:, None]
    inside = (k < chunks) & (c < channels)
    acc = partial.dtype.element_ty
    at = partial + ((worker * chunks + k) * 2) * channels + c
    means = tl.load(at, mask=inside, other=0.0)
    squares = tl.load(at + channels, mask=inside, other=0.0)
    count = tl.maximum(tl.minimum(rows - k * chunk_rows, chunk_rows), 0).to(acc)
    mean = tl.sum(means * count, 0)[None, :] / rows
    apart = means - mean
    squares = tl.sum(squares + tl.where(inside, count * apart * apart, 0.0), 0)[None, :]
    at = statistics + worker * channels + c
    tl.store(at, mean, mask=c < channels)
    tl.store(at + workers * channels, squares / (rows - 1), mask=c < channels)
    value = 1.0 / tl.sqrt(squares / rows + EPS)
    tl.store(invstd + worker * channels + c, value, mask=c < channels)


@triton.jit
def _normalise(
    x, residual, y, mean, invstd, weight, bias, rows, channels,
    RESIDUAL: tl.constexpr, RELU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute y of a tile."""
    worker = tl.program_id(0)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    inside = (r < rows) & (c < channels)
    acc = mean.dtype.element_ty
    at = worker.to(tl.int64) * rows * channels + r * channels + c
    of_worker = worker * channels + c
    value = tl.load(x + at, mask=inside).to(acc)
    value -= tl.load(mean + of_worker, mask=c < channels)
    scale = tl.load(invstd + of_worker, mask=c < channels)
    scale *= tl.load(weight + c, mask=c < channels).to(acc)
    value = value * scale + tl.load(bias + c, mask=c < channels).to(acc)
    if RESIDUAL:
        value += tl.load(residual + at, mask=inside).to(acc)
    if RELU:
        value = tl.where(value <= 0, 0.0, value)  # NaN stays NaN
    tl.store(y + at, value, mask=inside)


@triton.jit
def _partial_gradients(
    dy, x, y, g, mean, invstd, partial, rows, channels, chunk_rows,
    RESIDUAL: tl.constexpr, RELU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum g and g (x - mean) invstd over a chunk; g is dy where the ReLU passed y, else 0.

    Where there is a residual, g is its gradient and is written, too.
    """
    worker, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    base = worker.to(tl.int64) * rows * channels
    end = tl.minimum((chunk + 1) * chunk_rows, rows)
    acc = partial.dtype.element_ty
    centre = tl.load(mean + worker * channels + c, mask=c < channels)
    scale = tl.load(invstd + worker * channels + c, mask=c < channels)
    total = tl.zeros([BLOCK_R, BLOCK_C], acc)
    along = tl.zeros([BLOCK_R, BLOCK_C], acc)
    for start in range(chunk * chunk_rows, end, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)[:, None]
        inside = (r < end) & (c < channels)
        at = base + r * channels + c
        gradient = tl.load(dy + at, mask=inside, other=0.0).to(acc)
        if RELU:
            gradient = tl.where(tl.load(y + at, mask=inside, other=0.0) <= 0, 0.0, gradient)
        if RESIDUAL:
            tl.store(g + at, gradient, mask=inside)
        value = (tl.load(x + at, mask=inside, other=0.0).to(acc) - centre) * scale
        total += gradient
        along += tl.where(inside, gradient * value, 0.0)
    at = partial + ((worker * chunks + chunk) * 2) * channels + c
    tl.store(at, tl.sum(total, 0)[None, :], mask=c < channels)
    tl.store(at + channels, tl.sum(along, 0)[None, :], mask=c < channels)


@triton.jit
def _input_gradient(
    dy, x, y, dx, mean, invstd, weight, sums, rows, channels,
    RELU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute dx = γ invstd (g - mean of g - x̂ · mean of g x̂) of a tile; `sums`: (m, 2, C)."""
    worker = tl.program_id(0)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    inside = (r < rows) & (c < channels)
    acc = mean.dtype.element_ty
    at = worker.to(tl.int64) * rows * channels + r * channels + c
    of_worker = worker * channels + c
    gradient = tl.load(dy + at, mask=inside, other=0.0).to(acc)
    if RELU:
        gradient = tl.where(tl.load(y + at, mask=inside, other=0.0) <= 0, 0.0, gradient)
    scale = tl.load(invstd + of_worker, mask=c < channels)
    value = tl.load(x + at, mask=inside, other=0.0).to(acc)
    value = (value - tl.load(mean + of_worker, mask=c < channels)) * scale
    of_sums = sums + worker * 2 * channels + c
    gradient -= tl.load(of_sums, mask=c < channels) / rows
    gradient -= value * (tl.load(of_sums + channels, mask=c < channels) / rows)
    scale *= tl.load(weight + c, mask=c < channels).to(acc)
    tl.store(dx + at, gradient * scale, mask=inside)


class _Tiling:
    """The division of (m, R, C) into chunks and tiles. Chunks depend on R and C only."""

    def __init__(self, x: Tensor, worker_batch: int) -> None:
        images, self.channels, height, width = x.shape
        self.workers, self.rows = images // worker_batch, worker_batch * height * width
        self.blocks = {"BLOCK_C": min(BLOCK_CHANNELS, triton.next_power_of_2(self.channels))}
        self.blocks["BLOCK_R"] = TILE // self.blocks["BLOCK_C"]
        self.channel_blocks = triton.cdiv(self.channels, self.blocks["BLOCK_C"])
        tiles = triton.cdiv(self.rows, self.blocks["BLOCK_R"])
        tiles_a_chunk = triton.cdiv(tiles * self.channel_blocks, CHUNKS)
        self.chunk_rows = tiles_a_chunk * self.blocks["BLOCK_R"]
        self.chunks = triton.cdiv(self.rows, self.chunk_rows)
        self.chunk_grid = self.workers, self.chunks, self.channel_blocks
        self.tile_grid = self.workers, tiles, self.channel_blocks
        self.accumulate = torch.promote_types(x.dtype, torch.float32)

    def partial_sums(self, x: Tensor) -> Tensor:
        """Return room for two sums of each worker, chunk and channel."""
        shape = self.workers, self.chunks, 2, self.channels
        return x.new_empty(shape, dtype=self.accumulate)


@torch.library.custom_op("harness::ghost_batch_norm", mutates_args=())
def ghost_batch_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    worker_batch: int,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, statistics and inverse standard deviations, worker by worker.

    y is like `x` (m*n, C, H, W), in channels_last. The statistics (2, m, C) are each worker's mean
    and unbiased variance; the last result (m, C) is 1 / sqrt(biased variance + eps).

    `residual` is of the shape and type of x, or None.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    t = _Tiling(x, worker_batch)
    y, partial = torch.empty_like(x), t.partial_sums(x)
    statistics = partial.new_empty(2, t.workers, t.channels)
    invstd = partial.new_empty(t.workers, t.channels)
    size = t.rows, t.channels
    _partial_statistics[t.chunk_grid](x, partial, *size, t.chunk_rows, **t.blocks)
    _finish_statistics[(t.workers, triton.cdiv(t.channels, FINISHED_CHANNELS))](
        partial, statistics, invstd, *size, t.chunk_rows, t.chunks,
        EPS=eps, BLOCK_K=triton.next_power_of_2(t.chunks), BLOCK_C=FINISHED_CHANNELS,
    )  # fmt: skip
    other = x if residual is None else residual  # not read
    _normalise[t.tile_grid](
        x, other, y, statistics, invstd, weight, bias, *size,
        RESIDUAL=residual is not None, RELU=relu, **t.blocks,
    )  # fmt: skip
    return y, statistics, invstd


@ghost_batch_norm.register_fake
def _(x, residual, weight, bias, worker_batch, eps, relu):
    workers, channels = x.shape[0] // worker_batch, x.shape[1]
    accumulate = torch.promote_types(x.dtype, torch.float32)
    statistics = x.new_empty((2, workers, channels), dtype=accumulate)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    return y, statistics, x.new_empty((workers, channels), dtype=accumulate)


@torch.library.custom_op("harness::ghost_batch_norm_backward", mutates_args=())
def ghost_batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    statistics: Tensor,
    invstd: Tensor,
    weight: Tensor,
    worker_batch: int,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, the residual's gradient (empty without one), and those of β and γ (2, C).

    `y` is the result of the forward pass, where that had a ReLU.
    """
    dy = dy.contiguous(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    t = _Tiling(x, worker_batch)
    partial, dx = t.partial_sums(x), torch.empty_like(x)
    dresidual = torch.empty_like(x) if residual else x.new_empty(0)
    size, gate = (t.rows, t.channels), x if y is None else y
    _partial_gradients[t.chunk_grid](
        dy, x, gate, dresidual, statistics, invstd, partial, *size, t.chunk_rows,
        RESIDUAL=residual, RELU=y is not None, **t.blocks,
    )  # fmt: skip
    sums = partial.sum(1)
    _input_gradient[t.tile_grid](
        dresidual if residual else dy, x, gate, dx, statistics, invstd, weight, sums, *size,
        RELU=y is not None and not residual, **t.blocks,
    )  # fmt: skip
    return dx, dresidual, sums.sum(0)


@ghost_batch_norm_backward.register_fake
def _(dy, x, y, statistics, invstd, weight, worker_batch, residual):
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    return dx, torch.empty_like(dx) if residual else x.new_empty(0), invstd.new_empty(2, x.shape[1])


def _setup_context(ctx, inputs, output) -> None:
    x, residual, weight, _, ctx.worker_batch, _, relu = inputs
    y, statistics, invstd = output
    ctx.residual = residual is not None
    ctx.save_for_backward(x, y if relu else None, statistics, invstd, weight)
    ctx.mark_non_differentiable(statistics, invstd)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 7
    saved = ctx.saved_tensors
    dx, dresidual, (dbias, dweight) = ghost_batch_norm_backward(
        dy, *saved, ctx.worker_batch, ctx.residual
    )
    weight = saved[-1]
    gradients = dx, dresidual if ctx.residual else None, dweight.to(weight), dbias.to(weight)
    return *gradients, None, None, None


ghost_batch_norm.register_autograd(_backward, setup_context=_setup_context)
