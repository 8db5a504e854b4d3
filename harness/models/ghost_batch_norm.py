"""Batch norm over each worker's n images, however many workers share a device."""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.compat import zero_all


@cache
def kernel_device() -> str:
    """The type of device that the fused kernel (ghost_batch_norm_triton.py) runs on.

    "cuda" where there is a GPU and Triton, "cpu" in Triton's interpreter (TRITON_INTERPRET=1, for
    tests), "" for none: plain PyTorch then computes the same.
    """
    if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
        return ""  # Triton takes a while to import
    try:
        from harness.models import ghost_batch_norm_triton
    except ImportError:
        return ""
    return ghost_batch_norm_triton.DEVICE


class GhostBatchNorm2d(nn.BatchNorm2d):
    """Normalises each worker's n images by themselves, never across workers (section 2.3).

    In training, x is (m*n, C, H, W), in the order of `Minibatch.places`: channels_last worker by
    worker, else image i of worker j at i*m + j. The statistics of every worker are summed until
    `RunningStatistics` applies them; `forward` leaves the running statistics alone.
    Evaluation, parameters and state dict are those of plain batch norm. With `residual` (like x)
    and `relu`, `forward` also adds and rectifies: in channels_last on a GPU one fused operation.

    Raises ValueError in training where the batch is no multiple of n.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float
    sums: Tensor  # (2, C): over the workers seen, the sum of means and of unbiased variances
    one_worker: Tensor  # (2, C): what a single worker adds to them

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        *,
        worker_batch: int,
        channels_last: bool = False,
    ) -> None:
        super().__init__(num_features, eps, momentum)
        self.worker_batch = worker_batch
        self.channels_last = channels_last
        self.fused_on = kernel_device() if channels_last else ""
        self.register_buffer("sums", torch.zeros(2, num_features), persistent=False)
        self.register_buffer("one_worker", torch.zeros(2, num_features), persistent=False)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, worker_batch={self.worker_batch}"

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        if not self.training:
            return add_relu(super().forward(x), residual, relu)
        workers = x.shape[0] // self.worker_batch
        if workers == 0 or x.shape[0] % self.worker_batch:
            raise ValueError(f"{x.shape[0]} images are no multiple of n = {self.worker_batch}")
        if x.device.type == self.fused_on and (residual is None or residual.dtype == x.dtype):
            y, statistics, _ = torch.ops.harness.ghost_batch_norm(
                x, residual, self.weight, self.bias, self.worker_batch, self.eps, relu
            )
            self.sums.add_(statistics.detach().sum(1))
            return y
        return add_relu(self._plain(x, workers), residual, relu)

    def _plain(self, x: Tensor, workers: int) -> Tensor:
        if workers == 1:
            # the kernels of plain batch norm, in either layout
            y = self._normalise(x, self.one_worker[0], self.one_worker[1], self.weight, self.bias)
            self.sums.add_(self.one_worker)
            return y
        statistics = self.sums.new_zeros(2, workers, self.num_features)
        y = (self._by_worker if self.channels_last else self._by_channel)(x, *statistics)
        self.sums.add_(statistics.sum(1))
        return y

    def _normalise(
        self, x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        """Batch norm of x; leaves its mean and unbiased variance in the float32 scratch given.

        Momentum 1 makes the "running" statistics those of this batch. They are multiplied by 0
        before, so the scratch has to be finite.
        """
        return F.batch_norm(
            x, mean, variance, weight, bias, training=True, momentum=1.0, eps=self.eps
        )

    def _by_channel(self, x: Tensor, means: Tensor, variances: Tensor) -> Tensor:
        """NCHW: the m workers' images as n images of m*C channels, without a copy."""
        m = means.shape[0]
        n, image = self.worker_batch, x.shape[2:]
        wide = x.reshape(n, m * self.num_features, *image)
        weight, bias = self.weight.repeat(m), self.bias.repeat(m)
        y = self._normalise(wide, means.view(-1), variances.view(-1), weight, bias)
        # no view to autograd, which would copy the gradient of what add_relu does in place to one
        return torch.ops.aten._unsafe_view(y, x.shape)

    def _by_worker(self, x: Tensor, means: Tensor, variances: Tensor) -> Tensor:
        """channels_last: worker after worker, by the kernels of plain batch norm.

        Written as a reduction over the middle of (m, n*H*W, C) it takes 4 to 6 times as long on a
        CPU, in passes over float32 copies.
        """
        workers = zip(x.split(self.worker_batch), means, variances, strict=True)
        return torch.cat([self._normalise(*w, self.weight, self.bias) for w in workers])


def add_relu(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """y + residual, rectified: in place, as torchvision's blocks do."""
    if residual is not None:
        y += residual
    return F.relu(y, inplace=True) if relu else y


def ghost_batch_norms(model: nn.Module) -> list[GhostBatchNorm2d]:
    """The model's ghost batch norms, in model order."""
    return [module for module in model.modules() if isinstance(module, GhostBatchNorm2d)]


def is_convertible(norm: nn.Module) -> bool:
    """Return whether a ghost batch norm can replace this module."""
    return (
        type(norm) is nn.BatchNorm2d
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
    )


def convert_batch_norms(network: nn.Module, worker_batch: int, channels_last: bool) -> None:
    """Replace every `nn.BatchNorm2d` by a ghost batch norm over n = `worker_batch` images.

    The ghost batch norms take over parameters and running statistics: they are the same tensors.
    Raises ValueError for a batch norm without one of them.
    """
    for parent in list(network.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm) is nn.BatchNorm2d:
                setattr(parent, name, _converted(norm, worker_batch, channels_last))


def _converted(norm: nn.BatchNorm2d, worker_batch: int, channels_last: bool) -> GhostBatchNorm2d:
    if not is_convertible(norm) or norm.momentum is None:
        raise ValueError(f"{norm}: needs γ, β, running statistics and a momentum")
    ghost = GhostBatchNorm2d(
        norm.num_features,
        norm.eps,
        norm.momentum,
        worker_batch=worker_batch,
        channels_last=channels_last,
    )
    ghost.to(norm.weight.device, norm.weight.dtype).train(norm.training)
    for name in norm.state_dict():
        setattr(ghost, name, getattr(norm, name))
    return ghost


class RunningStatistics:
    """The running statistics of all ghost batch norms of a model, updated once a step.

    They become views of one tensor, so that an update is a few operations however many layers
    there are (53 in ResNet-50). Build it when the model is on its device. `sums`, one of a layer,
    are what the layers have seen since the last update.
    """

    def __init__(self, model: nn.Module) -> None:
        norms = ghost_batch_norms(model)
        self._scratch = [norm.one_worker for norm in norms] + [norm.sums for norm in norms]
        self.sums = [norm.sums.view(-1) for norm in norms]
        if not norms:
            return
        self._running = torch.cat([r for n in norms for r in (n.running_mean, n.running_var)])
        self._updates = torch.stack([norm.num_batches_tracked for norm in norms])
        sizes = [2 * norm.num_features for norm in norms]
        parts = self._running.split(sizes)
        for norm, part, updates in zip(norms, parts, self._updates, strict=True):
            norm.running_mean, norm.running_var = part.chunk(2)
            norm.num_batches_tracked = updates
        momenta = [norm.momentum for norm in norms]
        # one number where all layers agree, as in every ResNet, else one for each statistic
        self._momentum: float | Tensor = momenta[0]
        if len(set(momenta)) > 1:
            each = [m for m, size in zip(momenta, sizes, strict=True) for _ in range(size)]
            self._momentum = self._running.new_tensor(each)

    @torch.no_grad()
    def update(self, workers: int) -> None:
        """r <- 0.9 r + 0.1 (mean over the `workers` seen), after the step's last backward pass.

        Section 5.1: "BN's running averages with momentum 0.9"; PyTorch calls it momentum 0.1.
        Every layer has seen each of the workers once since the last call. Does not wait for the
        device.
        """
        if not self.sums:
            return
        seen, momentum = torch.cat(self.sums), self._momentum
        if isinstance(momentum, Tensor):
            self._running.mul_(1 - momentum).addcmul_(seen, momentum / workers)
        else:
            self._running.mul_(1 - momentum).add_(seen, alpha=momentum / workers)
        self._updates += 1
        self.forget()

    def forget(self) -> None:
        """Drops what the layers have seen since the last update."""
        if self._scratch:
            # one_worker too: a statistic that overflowed must not stay, as 0 * inf is NaN there
            zero_all(self._scratch)
