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
    """Return the type of device that the fused kernel (ghost_batch_norm_triton.py) runs on.

    It is "cuda" with a GPU and Triton, "cpu" in Triton's interpreter (TRITON_INTERPRET=1, for
    tests), and "" otherwise: plain PyTorch then computes the same.
    """
    if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
        return ""  # Triton takes a while to import
    try:
        from harness.models import ghost_batch_norm_triton
    except ImportError:
        return ""
    return ghost_batch_norm_triton.DEVICE


class GhostBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over each worker's n images, never across workers (section 2.3).

    In training, x is (m*n, C, H, W) in the order of `Minibatch.places`: worker by worker in
    channels_last, else image i of worker j at i*m + j. The statistics of the workers are summed
    until `RunningStatistics` applies them; `forward` does not change the running statistics.
    Evaluation, parameters and state dict are those of plain batch norm. With `residual` (shaped
    like x) and `relu`, `forward` also adds and rectifies, in channels_last on a GPU as one fused
    operation.

    In training, raises ValueError for a batch that is not a multiple of n.
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
            raise ValueError(f"{x.shape[0]} images are not a multiple of n = {self.worker_batch}")
        if x.device.type == self.fused_on and (residual is None or residual.dtype == x.dtype):
            y, statistics, _ = torch.ops.harness.ghost_batch_norm(
                x, residual, self.weight, self.bias, self.worker_batch, self.eps, relu
            )
            self.sums.add_(statistics.detach().sum(1))
            return y
        return add_relu(self._plain(x, workers), residual, relu)

    def _plain(self, x: Tensor, workers: int) -> Tensor:
        if workers == 1:
            # plain batch norm's kernels, in either layout
            y = self._normalize(x, self.one_worker[0], self.one_worker[1], self.weight, self.bias)
            self.sums.add_(self.one_worker)
            return y
        statistics = self.sums.new_zeros(2, workers, self.num_features)
        y = (self._by_worker if self.channels_last else self._by_channel)(x, *statistics)
        self.sums.add_(statistics.sum(1))
        return y

    def _normalize(
        self, x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        """Return batch norm of x; write its mean and unbiased variance to the float32 tensors.

        Momentum 1 makes the "running" statistics those of this batch. Their old values are
        multiplied by 0, so they have to be finite.
        """
        return F.batch_norm(
            x, mean, variance, weight, bias, training=True, momentum=1.0, eps=self.eps
        )

    def _by_channel(self, x: Tensor, means: Tensor, variances: Tensor) -> Tensor:
        """Normalize NCHW as n images of m*C channels, which needs no copy."""
        m = means.shape[0]
        n, image = self.worker_batch, x.shape[2:]
        wide = x.reshape(n, m * self.num_features, *image)
        weight, bias = self.weight.repeat(m), self.bias.repeat(m)
        y = self._normalize(wide, means.view(-1), variances.view(-1), weight, bias)
        # not a view: autograd would copy the gradient of add_relu's in-place operations on one
        return torch.ops.aten._unsafe_view(y, x.shape)

    def _by_worker(self, x: Tensor, means: Tensor, variances: Tensor) -> Tensor:
        """Normalize channels_last worker by worker, with the kernels of plain batch norm.

        A reduction over the middle of (m, n*H*W, C) takes 4 to 6 times as long on a CPU, in passes
        over float32 copies.
        """
        workers = zip(x.split(self.worker_batch), means, variances, strict=True)
        return torch.cat([self._normalize(*w, self.weight, self.bias) for w in workers])


def add_relu(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """Return relu(y + residual), computed in place as torchvision's blocks do."""
    if residual is not None:
        y += residual
    return F.relu(y, inplace=True) if relu else y


def ghost_batch_norms(model: nn.Module) -> list[GhostBatchNorm2d]:
    """Return the model's ghost batch norms, in model order."""
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
    """The running statistics of all ghost batch norms of a model, updated once per step.

    They become views of one tensor, so an update takes a few operations for any number of layers
    (53 in ResNet-50). Construct it once the model is on its device. `sums` holds, for each layer,
    the sums of its statistics since they were last forgotten.
    """

    def __init__(self, model: nn.Module) -> None:
        norms = ghost_batch_norms(model)
        self._scratch = [norm.one_worker for norm in norms] + [norm.sums for norm in norms]
        self.sums = [norm.sums.view(-1) for norm in norms]
        if not norms:
            self._running = next(model.parameters()).new_zeros(0)
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

    def step_sums(self) -> Tensor:
        """Return the sums (S,) of all layers' statistics, one after the other."""
        return torch.cat(self.sums) if self.sums else self._running

    @torch.no_grad()
    def update(self, workers: int, sums: Tensor | None = None) -> None:
        """Set r = 0.9 r + 0.1 (mean over `workers`), after the step's last backward pass.

        Section 5.1: "BN's running averages with momentum 0.9"; PyTorch calls it momentum 0.1.
        `sums` (S,) are those of so many workers, each normalized once; None takes the sums since
        the last update. Does not wait for the device.
        """
        if not self.sums:
            return
        seen = (self.step_sums() if sums is None else sums).to(self._running.dtype)
        momentum = self._momentum
        if isinstance(momentum, Tensor):
            self._running.mul_(1 - momentum).addcmul_(seen, momentum / workers)
        else:
            self._running.mul_(1 - momentum).add_(seen, alpha=momentum / workers)
        self._updates += 1
        self.forget()

    def forget(self) -> None:
        """Drop the sums."""
        if self._scratch:
            # one_worker too: after an overflow, 0 * inf in _normalize would be NaN
            zero_all(self._scratch)
