"""Snapshots of what a rank computes: gradients, states and digests of the recipe."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from harness.config.loading import dump_config
from harness.config.schema import Config
from harness.models.registry import build_model
from harness.models.running_statistics import global_running_statistics
from harness.training.step import Step
from harness.verify.results import State


class KnownLogits(nn.Module):
    """A network whose logits are 0 plus a bias (K,), whose gradient the labels imply."""

    def __init__(self, network: nn.Module, classes: int) -> None:
        super().__init__()
        self.network, self.bias = network, nn.Parameter(torch.zeros(classes))

    def forward(self, x: Tensor) -> Tensor:
        return 0 * self.network(x) + self.bias


def record_gradients(step: Step, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Return a list to which each step appends its gradients (P,), without float16's scale."""
    recorded: list[Tensor] = []

    def record(*_: object) -> None:
        gradients = [p.grad.reshape(-1) for p in parameters if p.grad is not None]
        recorded.append(torch.cat(gradients) / step.replica.scaler.get_scale())

    step.optimizer.register_step_pre_hook(record)
    return recorded


def global_state(step: Step, share: float | None) -> State:
    """Copy weights, running statistics (means over all workers) and optimizer state to the CPU."""
    weights: dict[str, Tensor] = dict(step.network.named_parameters())
    with global_running_statistics(step.network, share):
        buffers = {
            name: buffer.detach().to("cpu", copy=True)
            for name, buffer in step.network.named_buffers()
            if name.endswith(("running_mean", "running_var"))
        }
    momentum: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}  # the state of optimizers of packages
    for name, weight in weights.items():
        for key, value in step.optimizer.state[weight].items():
            if key == "momentum_buffer":
                momentum[name] = value
            elif isinstance(value, Tensor) and value.is_floating_point():
                others[f"{key} of {name}"] = value
    kinds: State = {"weights": weights, "momentum": momentum, "optimizer state": others}
    copies = {
        kind: {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        for kind, tensors in kinds.items()
    }
    return copies | {"running statistics": buffers}


def recipe_digests(config: Config) -> dict[str, int | str]:
    """Return what must be equal on all ranks: the seed, and digests of recipe and first weights."""
    curve = config.model_copy(update={"run": type(config.run)()})
    state = build_model(config).state_dict().values()
    weights = hashlib.sha256(b"".join(value.numpy().tobytes() for value in state))
    return {
        "seed": config.seed,
        "recipe": hashlib.sha256(dump_config(curve).encode()).hexdigest(),
        "first weights": weights.hexdigest(),
    }
