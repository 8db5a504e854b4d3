"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.config import Config, Recipe


def peak_lr(recipe: Recipe) -> float:
    """The learning rate after warm-up.

    Section 2.1, "Linear Scaling Rule": minibatch times r, learning rate times r. The square root
    (and no scaling) are the rules it was compared with (table 2a).
    """
    ratio = recipe.minibatch / recipe.reference_minibatch
    factor = {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[recipe.scaling]
    return recipe.reference_lr * factor


def warmup_steps(recipe: Recipe, steps_per_epoch: int) -> int:
    """Steps of warm-up: 0 where there is none, or nothing to warm up to.

    Section 5.1: the ramp from 0.1 is for kn > 256, that is a peak above the reference lr.
    """
    if recipe.warmup == "none" or peak_lr(recipe) <= recipe.reference_lr:
        return 0
    return recipe.warmup_epochs * steps_per_epoch


def lr_at(config: Config, step: int) -> float:
    """The learning rate of the update `step`, counted from 0 to config.total_steps - 1.

    Raises ValueError for any other step.
    """
    if not 0 <= step < config.total_steps:
        raise ValueError(f"step {step} is not in [0, {config.total_steps})")
    recipe = config.recipe
    peak, warm = peak_lr(recipe), warmup_steps(recipe, config.steps_per_epoch)
    if step < warm:
        if recipe.warmup == "constant":
            return recipe.reference_lr  # section 2.2, "Constant warmup"
        # section 2.2, "Gradual warmup": a constant amount every iteration, eta after 5 epochs
        return recipe.reference_lr + (peak - recipe.reference_lr) * step / warm
    if recipe.decay == "cosine":
        progress = (step - warm) / (config.total_steps - warm)
        return peak * (1 + math.cos(math.pi * progress)) / 2
    # section 5.1: "reduced by 1/10 at the 30-th, 60-th, and 80-th epoch", warm-up epochs included
    passed = sum(step >= epoch * config.steps_per_epoch for epoch in recipe.milestones)
    return peak * recipe.decay_factor**passed
