"""What a step minimises. An objective is asked with each micro-batch for the loss of its logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from harness.config import Config
from harness.data.loader import Batch
from harness.recipe.losses import soft_loss, training_loss

# of logits (B, K) and labels (B,), both on the device: the sum over B, divided by kn
Loss = Callable[[Tensor, Tensor], Tensor]
# a teacher's logits, float32 (B, K) on the device, for a micro-batch of a step
SoftTargets = Callable[[int, Batch], Tensor]
# asked before the network is, whose activations then take the memory
Objective = Callable[[int, Batch], Loss]


def build_objective(config: Config, soft_targets: SoftTargets | None) -> Objective:
    """What `config` minimises; `soft_targets` are those of its distill section.

    Plain: the cross entropy with the labels. Distillation (Hinton et al. 2015, section 2): the
    weighted sum of that and the cross entropy with the soft targets.
    """
    recipe, distill = config.recipe, config.distill
    hard_loss = partial(
        training_loss, global_batch=recipe.minibatch, label_smoothing=recipe.label_smoothing
    )
    if distill is None:
        return lambda step, batch: hard_loss
    if soft_targets is None:
        raise ValueError("distill: this objective needs a teacher")
    hard_weight, soft_weight = distill.weights

    def objective(step: int, batch: Batch) -> Loss:
        teacher_logits = soft_targets(step, batch)

        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            soft = soft_loss(logits, teacher_logits, recipe.minibatch, distill.temperature)
            return hard_weight * hard_loss(logits, labels) + soft_weight * soft

        return loss

    return objective
