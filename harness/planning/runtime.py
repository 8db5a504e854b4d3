"""The predicted times of a step, an epoch and a run on a number of GPUs.

They follow from assumed hardware by the model of step_time_model.py; nothing here is measured.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypedDict

import torch
from torch import Tensor, nn

from harness.config.run_section import RunConfig
from harness.config.schema import Config
from harness.errors import UserError
from harness.planning.step_time_model import (
    Layer,
    Link,
    Network,
    StepTime,
    Workload,
    fill_buckets,
    step_time,
)
from harness.recipe.minibatch import Minibatch

# Published: ResNet-50, 224 × 224, PyTorch with mixed precision on one H200 (Lambda's benchmark).
PUBLISHED_IMAGES_PER_S, PUBLISHED_MACS = 3060.0, 4_089_184_256
GBIT_PER_S_PER_GPU = 400.0  # an InfiniBand NDR interface for each GPU
NVLINK_BYTES_PER_S = 450e9  # H100 and H200, in each direction
INSIDE_LATENCY_S, BETWEEN_LATENCY_S, OVERHEAD_S = 2e-6, 5e-6, 20e-6
BACKWARD_SHARE = 2 / 3  # two products, by input and by weight, to the forward pass's one
EVALUATED_SHARE = 1 / 3  # an image's evaluation is the forward pass of its training
HOUR_S = 3600.0


@dataclass(frozen=True)
class Hardware:
    """The hardware that a prediction assumes.

    `images_per_s` is the throughput of one GPU alone with this config's network and crop; None
    takes a published figure, scaled by the number of multiply-adds. `gbit_per_s` is the bandwidth
    of each GPU's interface between nodes, `spread` that of Workload.
    """

    gpus_per_node: int = 8
    images_per_s: float | None = None
    gbit_per_s: float = GBIT_PER_S_PER_GPU
    spread: float = 0.0

    def network(self, ranks: int) -> Network:
        """Return nodes of at most `gpus_per_node` ranks, with an interface for each GPU."""
        local = min(self.gpus_per_node, ranks)
        return Network(
            local,
            inside=Link(INSIDE_LATENCY_S, NVLINK_BYTES_PER_S),
            between=Link(BETWEEN_LATENCY_S, local * self.gbit_per_s * 1e9 / 8),
            overhead_s=OVERHEAD_S,
        )


class Prediction(TypedDict, total=False):
    """Predicted times; empty where no throughput is given, nor published for the network."""

    images_per_s_a_gpu: float
    assumed: list[str]
    compute_s: float
    exposed_s: float
    step_s: float
    limit: str
    images_per_s: float
    efficiency: float
    epoch_s: float
    run_s: float
    hour_needs_images_per_s_a_gpu: float | None  # None where communication alone takes longer


def predict(config: Config, model: nn.Module, ranks: int, hardware: Hardware) -> Prediction:
    """Predict the times of `config` on `ranks` GPUs.

    Raises UserError where a figure of the hardware is not above 0.
    """
    for name, value in (
        ("--images-per-second", hardware.images_per_s),
        ("--gbit-per-second", hardware.gbit_per_s),
        ("--gpus-per-node", hardware.gpus_per_node),
    ):
        if value is not None and value <= 0:
            raise UserError(f"{name} {value:g}: must be above 0")
    macs = multiply_adds(model, config.data.crop)
    images_per_s = hardware.images_per_s or _published(config, sum(macs.values()))
    if images_per_s is None:
        return {}
    run = _PredictedRun(config, ranks, gradient_layers(model, macs), hardware)
    step = run.step(images_per_s)
    return {
        "images_per_s_a_gpu": images_per_s,
        "assumed": _assumed(ranks, hardware, images_per_s, config.distill is not None),
        "compute_s": step.compute_s,
        "exposed_s": step.exposed_s,
        "step_s": step.step_s,
        "limit": step.limit,
        "images_per_s": config.recipe.minibatch / step.step_s,
        "efficiency": run.step(images_per_s, ranks=1).step_s / step.step_s,
        "epoch_s": config.steps_per_epoch * step.step_s + run.evaluation_s(images_per_s),
        "run_s": run.seconds(images_per_s),
        "hour_needs_images_per_s_a_gpu": run.images_per_s_for(HOUR_S),
    }


def sent_bytes(run: RunConfig) -> int:
    """Return the bytes in which ranks send a number of a float32 gradient: exact sums are int64."""
    if run.sums == "exact":
        return 8
    return 2 if run.gradient_precision == "bfloat16" else 4


def pass_images(config: Config) -> int | Literal["auto"]:
    """Return the images of a pass, as far as the config says: a unit where sums are exact."""
    exact = config.run.sums == "exact"
    return Minibatch.of(config).unit_images if exact else config.run.micro_batch


@dataclass(frozen=True)
class _PredictedRun:
    config: Config
    ranks: int
    layers: list[Layer]
    hardware: Hardware

    def step(self, images_per_s: float, ranks: int | None = None) -> StepTime:
        """Return the step time of the ranks with the most workers.

        `ranks=1` gives that of the same work without the other ranks.
        """
        recipe = self.config.recipe
        minibatch = Minibatch.of(self.config)
        workers = max(len(minibatch.workers_of(rank, self.ranks)) for rank in range(self.ranks))
        size = minibatch.micro_batch_images(workers, pass_images(self.config))
        images = workers * recipe.worker_batch
        last = images - (images - 1) // size * size  # images of the last micro-batch
        sent = sent_bytes(self.config.run) / 4  # buckets are filled by their bytes in float32
        work = Workload(
            compute_s=images / images_per_s,
            backward_s=BACKWARD_SHARE * last / images_per_s,
            buckets=tuple(
                replace(bucket, count=sent * bucket.count) for bucket in fill_buckets(self.layers)
            ),
            spread=self.hardware.spread,
        )
        return step_time(work, self.hardware.network(self.ranks), ranks or self.ranks)

    def evaluation_s(self, images_per_s: float) -> float:
        images = self.config.data.val_images + self.config.run.recalibrate_images
        return images * EVALUATED_SHARE / images_per_s / self.ranks

    def seconds(self, images_per_s: float) -> float:
        every = self.config.run.evaluate_every_epochs
        evaluations = -(-self.config.recipe.epochs // every)
        training_s = self.config.total_steps * self.step(images_per_s).step_s
        return training_s + evaluations * self.evaluation_s(images_per_s)

    def images_per_s_for(self, limit_s: float) -> float | None:
        """Return the least images/s of a GPU for a run of `limit_s`.

        None where communication alone takes longer. Found by bisection, since exposed
        communication grows as compute shrinks.
        """
        low, high = 1.0, 1e9
        if self.seconds(high) > limit_s:
            return None
        for _ in range(100):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if self.seconds(middle) > limit_s else (low, middle)
        return high


def multiply_adds(model: nn.Module, pixels: int) -> dict[str, int]:
    """Count the multiply-adds of each convolution and linear layer for an image of `pixels`².

    The shapes come from a forward pass on PyTorch's meta device, which holds no data.
    """
    counted: dict[str, int] = {}
    shapes = copy.deepcopy(model).to("meta").eval()

    def count(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(layer: nn.Module, _: object, output: Tensor) -> None:
            assert isinstance(layer.weight, Tensor)
            # Each of the output's numbers is a sum over one filter.
            counted[name] = output[0].numel() * layer.weight[0].numel()

        return hook

    for name, layer in shapes.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count(name))
    with torch.no_grad():
        shapes(torch.empty(1, 3, pixels, pixels, device="meta"))
    return counted


def gradient_layers(model: nn.Module, macs: dict[str, int]) -> list[Layer]:
    """Return the parameters in forward order, each with its share of the backward pass.

    That is its layer's share of `macs` for a weight, and 0 for a bias and for batch norm's γ and
    β, which are ready at the same moment.
    """
    total = sum(macs.values())

    def layers() -> Iterator[Layer]:
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue  # frozen: it has no gradient to send
            owner, _, kind = name.rpartition(".")
            share = macs.get(owner, 0) / total if kind == "weight" else 0.0
            yield Layer(parameter.numel() * parameter.element_size(), share)

    return list(layers())


def _published(config: Config, macs: int) -> float | None:
    """Scale the published figure by `macs`; None for networks that it says nothing about."""
    if config.model.freeze != "none" or config.model.name not in (
        "resnet50",
        "resnet101",
        "resnet152",
    ):
        return None
    return PUBLISHED_IMAGES_PER_S * PUBLISHED_MACS / macs


def _assumed(ranks: int, hardware: Hardware, images_per_s: float, distilled: bool) -> list[str]:
    published = "published for ResNet-50 on an H200, scaled by arithmetic"
    source = "as given" if hardware.images_per_s else published
    network = hardware.network(ranks)
    nodes, local = -(-ranks // network.ranks_per_node), network.ranks_per_node
    return [
        f"one GPU: {images_per_s:,.0f} images/s ({source})",
        f"{nodes} × {local} GPUs: NVLink of {NVLINK_BYTES_PER_S / 1e9:.0f} GB/s, "
        f"{hardware.gbit_per_s:g} Gbit/s per GPU between nodes",
        "not counted: slow ranks, waiting for data, start-up, checkpoints"
        + (", the teacher" if distilled else ""),
    ]
