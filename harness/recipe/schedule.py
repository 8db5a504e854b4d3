"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.config.schema import Config, RecipeConfig

FINAL_EPOCHS = 5  # section 5.1: "the median error of the final 5 epochs"


def peak_lr(recipe: RecipeConfig) -> float:
    """Return the learning rate after warm-up.

    Section 2.1, "Linear Scaling Rule": minibatch times r, learning rate times r. The square root
    (and no scaling) are the rules it was compared with (table 2a).
    """
    ratio = recipe.minibatch / recipe.reference_minibatch
    factor = {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[recipe.scaling]
    return recipe.reference_lr * factor


def lr_at(config: Config, step: int) -> float:
    """Return the learning rate of the update `step`, counted from 0 to config.total_steps - 1.

    Raises ValueError for any other step.
    """
    if not 0 <= step < config.total_steps:
        raise ValueError(f"step {step} is not in [0, {config.total_steps})")
    recipe = config.recipe
    peak, warm = peak_lr(recipe), config.warmup_steps
    if step < warm:
        if recipe.warmup == "constant":
            return recipe.reference_lr  # section 2.2, "Constant warmup"
        # section 2.2, "Gradual warmup": a constant amount every iteration, eta after 5 epochs
        return recipe.reference_lr + (peak - recipe.reference_lr) * step / warm
    progress = (step - warm) / (config.total_steps - warm)
    if recipe.decay == "cosine":
        return peak * (1 + math.cos(math.pi * progress)) / 2
    if recipe.decay == "polynomial":
        return peak * (1 - progress) ** recipe.decay_power
    # section 5.1: "reduced by 1/10 at the 30-th, 60-th, and 80-th epoch", warm-up epochs included
    passed = sum(step >= epoch * config.steps_per_epoch for epoch in recipe.milestones)
    return peak * recipe.decay_factor**passed


def final_epochs(config: Config) -> range:
    """Return the epochs, counted from 1, whose median validation error is the run's error.

    Section 5.1 takes the final 5, all of which the paper trains at the final learning rate. In a
    shorter run some of them may precede the last milestone, with a much larger error, so only
    epochs entirely at the final learning rate count. Where the learning rate changes until the
    end (cosine, polynomial, or warm-up throughout), only the last epoch counts.
    """
    recipe = config.recipe
    settled = recipe.warmup_end  # epochs after which the learning rate stays
    if recipe.decay != "steps":
        settled = recipe.epochs
    elif recipe.milestones and recipe.decay_factor < 1:
        settled = max(settled, recipe.milestones[-1])
    before = max(settled, recipe.epochs - FINAL_EPOCHS)
    return range(min(before, recipe.epochs - 1) + 1, recipe.epochs + 1)


def error_rule(epochs: Sequence[int]) -> str:
    """Describe the error of `epochs`: `median of epochs 28 to 30`, or `epoch 12` for one."""
    first, last = epochs[0], epochs[-1]
    return f"epoch {last}" if first == last else f"median of epochs {first} to {last}"
