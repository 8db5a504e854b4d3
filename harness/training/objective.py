"""Objectives: the loss that a step minimises, for each micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from harness.config.schema import Config
from harness.data.batch import Batch
from harness.recipe.losses import kl_divergence, soft_loss, training_loss


@dataclass(frozen=True)
class Loss:
    """A micro-batch's share of a step's loss: sums over its images, divided by kn.

    `minimised` is what is differentiated. `kl` is only logged: the KL divergence of the
    student from its teacher, None without one.
    """

    minimised: Tensor
    kl: Tensor | None = None


# the loss of logits (B, K) and labels (B,), both on the device
LossOf = Callable[[Tensor, Tensor], Loss]
# a teacher's logits, float32 (B, K) on the device, for a micro-batch of a step
SoftTargets = Callable[[int, Batch], Tensor]
# called before the forward pass, whose activations then take the memory
Objective = Callable[[int, Batch], LossOf]


def build_objective(config: Config, soft_targets: SoftTargets | None) -> Objective:
    """Return what `config` minimises; `soft_targets` are those of its distill section.

    Plain training: the cross entropy with the labels. Distillation (Hinton et al. 2015, section
    2): the weighted sum of that and the cross entropy with the soft targets.
    """
    recipe, distill = config.recipe, config.distill
    hard_loss = partial(
        training_loss, global_batch=recipe.minibatch, label_smoothing=recipe.label_smoothing
    )
    if distill is None:
        return lambda step, batch: lambda logits, labels: Loss(hard_loss(logits, labels))
    if soft_targets is None:
        raise ValueError("distill: this objective needs a teacher")
    hard_weight, soft_weight = distill.weights

    def objective(step: int, batch: Batch) -> LossOf:
        teacher_logits = soft_targets(step, batch)

        def loss(logits: Tensor, labels: Tensor) -> Loss:
            softening = teacher_logits, recipe.minibatch, distill.temperature
            hard, soft = hard_loss(logits, labels), soft_loss(logits, *softening)
            return Loss(hard_weight * hard + soft_weight * soft, kl_divergence(logits, *softening))

        return loss

    return objective
