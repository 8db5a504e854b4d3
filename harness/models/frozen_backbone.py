"""Fine-tuning of the classifier alone: everything before it stays as it was loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from typing_extensions import Self


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that uses and keeps its running statistics, in training as in evaluation."""

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode."""
        return super().train(False)


def freeze_backbone(network: nn.Module, classifier: str) -> None:
    """Let only the module named `classifier` be trained; freeze the batch norms before it.

    Call it before `convert_batch_norms`, which then leaves the frozen ones alone.
    """
    for place, parent in list(network.named_modules()):
        for name, child in list(parent.named_children()):
            path = f"{place}.{name}" if place else name
            if isinstance(child, nn.BatchNorm2d) and not _within(path, classifier):
                setattr(parent, name, _frozen(child))
    for name, parameter in network.named_parameters():
        if not _within(name, classifier):
            parameter.requires_grad_(False)


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _frozen(norm: nn.BatchNorm2d) -> FrozenBatchNorm2d:
    frozen = FrozenBatchNorm2d(norm.num_features, norm.eps, norm.momentum)
    for name in norm.state_dict():
        setattr(frozen, name, getattr(norm, name))
    return frozen.eval()
