"""Comparison of the results of two launches, line by line.

Images and counts must be exactly equal. Other values may differ by a relative bound:

- FLOAT64_BOUND in float64, for single steps from equal weights and for trajectories. Two orders of
  summation differ by about 1e-15 per step there, so the bound allows for some growth, but for no
  mathematical error. Some recipes make rounding errors grow further: batch norm over few values,
  or a learning rate on the verge of divergence. If a trajectory differs by more, one rank computes
  it again as a twin, from initial weights changed by one rounding, and the bound is GROWN times
  the twin's distance, as the line then says. Single steps have no such excuse.
- In the run's own precision, steps from equal weights, since trajectories in low precision diverge
  sooner or later: for an activation within rounding of 0, ReLU may take either side.
  The effect of rounding is first measured on one rank: how far it moves a step's gradient (and the
  running statistics) from those in float64, ‖g - g64‖ / ‖g64‖. Each order of summation is about
  equally far from float64, so two may differ from each other by ROUNDINGS times that. For the
  gradient, which jumps where a ReLU switches, the median over the steps counts; for loss and
  statistics, the maximum. The loss is held to the gradient's bound: it is a mean over the same
  images, with fewer roundings. Steps that overflow in float16 must overflow in all launches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from harness.config.schema import Config
from harness.verify.results import Results, StepResult
from harness.verify.setting import Setting, plural

FLOAT64_BOUND = 1e-10  # the promised bound
ROUNDINGS = 4.0
GROWN = 100.0  # a step has many roundings, the twin's initial weights one
UNIT_ROUNDOFF = {"float32": 2.0**-24, "tf32": 2.0**-11, "bfloat16": 2.0**-8, "float16": 2.0**-11}
TINY = 1e-300  # instead of 0 in a denominator
Quantity = Literal["gradient", "loss", "statistics"]  # of a single step
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)


@dataclass(frozen=True)
class Line:
    """One comparison.

    `over`: how much was compared. `difference` counts unequal items if `bound` is 0, otherwise it
    is relative. `detail`: where and how it failed.
    """

    where: str
    what: str
    over: str
    difference: float | None
    bound: float | None
    passed: bool
    detail: str = ""


def run_ended(where: str, crash: Exception) -> Line:
    """Return the line of a launch that failed."""
    return Line(where, "ran to completion", "", None, None, False, str(crash))


def equality(where: str, what: str, over: str, differ: int, detail: str) -> Line:
    """Return the line of a comparison in which `differ` items are unequal."""
    return Line(where, what, over, differ, 0, differ == 0, detail if differ else "")


def _nearness(
    where: str, what: str, over: str, difference: float, bound: float, detail: str
) -> Line:
    passed = difference <= bound  # False for NaN
    return Line(where, what, over, difference, bound, passed, "" if passed else detail)


def compare_alone(setting: Setting, where: str, found: Results) -> Iterator[Line]:
    """Check the results of a single launch against known values."""
    yield _known_sum(setting, where, found)
    yield _counted(where, found)


def compare(
    setting: Setting,
    where: str,
    one: Results,
    found: Results,
    twin: Callable[[], Results],
) -> Iterator[Line]:
    """Compare a launch with one rank, causes before effects.

    `twin` returns the trajectory of one rank from initial weights changed by one rounding.
    """
    yield from compare_causes(setting, where, one, found)
    yield _float64_steps(setting, where, one, found)
    if setting.own_precision:
        yield from own_steps(setting, where, one, found)
    yield from compare_curves(setting, where, one, found, twin)
    yield from compare_evaluations(setting, where, one, found)


def compare_causes(setting: Setting, where: str, one: Results, found: Results) -> Iterator[Line]:
    """Compare what a step is made of: recipe, images, pixels, and a sum with a known result."""
    yield _recipes(where, one, found)
    yield from _fed(setting.config, where, one["fed"], found["fed"])
    yield _known_sum(setting, where, found)


def compare_evaluations(
    setting: Setting, where: str, one: Results, found: Results
) -> Iterator[Line]:
    """Compare which images were evaluated, and their counts."""
    yield _counted(where, found)
    differ = sum(a != b for a, b in zip(one["evaluation"], found["evaluation"], strict=True))
    detail = f"correct, top-5 correct, total: {found['evaluation']} instead of {one['evaluation']}"
    yield equality(where, "evaluation counts", f"{setting.val_images} images", differ, detail)


def _recipes(where: str, one: Results, found: Results) -> Line:
    (expected,) = one["recipes"]
    unequal = [
        f"rank {rank}: another {key}" + (f", {held[key]}" if key == "seed" else "")
        for rank, held in enumerate(found["recipes"])
        for key in expected
        if held[key] != expected[key]
    ]
    over = plural(len(found["recipes"]))
    return equality(where, "seed, recipe, first weights", over, len(unequal), "; ".join(unequal))


def _fed(
    config: Config, where: str, one: dict[str, Tensor], found: dict[str, Tensor]
) -> Iterator[Line]:
    """Compare the images at each place of each step, and the window and pixels of each image."""
    moved = np.flatnonzero(one["ids"] != found["ids"])
    detail = ""
    if len(moved):
        ids = (int(fed["ids"].view(-1)[moved[0]]) for fed in (found, one))
        detail = "first at {}: image {} instead of {}".format(_place(config, moved[0]), *ids)
    steps, minibatch = one["ids"].shape
    yield equality(where, "images of each step", f"{steps} × {minibatch}", len(moved), detail)

    places, twins = _same_images(config, one["ids"].numpy(), found["ids"].numpy())
    windows, expected = (
        fed["windows"].flatten(0, 1).numpy()[at] for fed, at in ((found, places), (one, twins))
    )
    other = (windows != expected).any(1)
    detail = ""
    if other.any():
        first = int(other.argmax())
        detail = f"first at {_place(config, places[first])}: top, left, height, width, flip "
        detail += f"{windows[first].tolist()} instead of {expected[first].tolist()}"
    over = f"{len(places)} images"
    yield equality(where, "windows and flips", over, int(other.sum()), detail)

    changed = found["pixels"].view(-1).numpy()[places] != one["pixels"].view(-1).numpy()[twins]
    changed &= ~other
    detail = f"first at {_place(config, places[changed.argmax()])}" if changed.any() else ""
    over = f"{int((~other).sum())} images"
    yield equality(where, "pixels that the loader gave", over, int(changed.sum()), detail)


def _place(config: Config, flat: int) -> str:
    """Describe a place of a (steps, kn) array."""
    step, place = divmod(int(flat), config.recipe.minibatch)
    epoch = step // config.steps_per_epoch + 1
    return f"step {step} (epoch {epoch}), worker {place // config.recipe.worker_batch}"


def _same_images(config: Config, one: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return flat places in `found` (steps, kn), and those of the same images in `one`."""
    epochs = np.arange(len(one))[:, None] // config.steps_per_epoch
    known, sought = ((ids + epochs * config.images).ravel() for ids in (one, found))
    order = np.argsort(known, kind="stable")
    at = np.minimum(np.searchsorted(known, sought, sorter=order), len(known) - 1)
    places = np.flatnonzero(known[order[at]] == sought)
    return places, order[at][places]


def _known_sum(setting: Setting, where: str, found: Results) -> Line:
    """Compare the gradient of a bias that alone makes the logits with the one the labels imply.

    Each class then has the probability 1/K, so the gradient is (1 - ε) (1/K - count_c / kn) for
    class c.
    """
    recipe, classes = setting.config.recipe, setting.config.data.classes
    labels = setting.train.labels[found["fed"]["ids"][0].numpy()]
    counts = torch.from_numpy(np.bincount(labels, minlength=classes)).double()
    known = (1 - recipe.label_smoothing) * (1 / classes - counts / recipe.minibatch)
    gradient = found["known_sum"].double()
    # for balanced classes the sum is 0; one image contributes about 1 / kn
    difference = float((gradient - known).norm() / (known.norm() + 1 / recipe.minibatch))
    factor = float(gradient @ known / (known @ known).clamp(min=TINY))
    detail = f"it is {factor:.4g} times the value that the labels imply"
    over = f"{classes} classes"
    return _nearness(where, "gradient of a known sum", over, difference, FLOAT64_BOUND, detail)


def _float64_steps(setting: Setting, where: str, one: Results, found: Results) -> Line:
    """Compare float64 steps from equal weights: gradient, loss and running statistics."""
    apart = _relative_by_step(one["float64_steps"], found["float64_steps"])
    largest = {key: max(apart[key], key=_nan_first) for key in QUANTITIES}
    worst = max(QUANTITIES, key=lambda key: _nan_first(largest[key]))
    step = setting.starts[apart[worst].index(largest[worst])]
    what, over = "float64: steps from equal weights", f"{len(setting.starts)} steps"
    detail = f"{worst} at step {step}"
    return _nearness(where, what, over, largest[worst], FLOAT64_BOUND, detail)


def own_steps(setting: Setting, where: str, one: Results, found: Results) -> Iterator[Line]:
    """Compare steps from equal weights within a multiple of the rounding error on one rank."""
    precision = str(setting.own_precision)
    finite, also = (
        [bool(step["gradient"].isfinite().all()) for step in launched["own_steps"]]
        for launched in (one, found)
    )
    starts = [start for start, usable in zip(setting.starts, finite, strict=True) if usable]
    if precision == "float16":
        differ = sum(a != b for a, b in zip(finite, also, strict=True))
        over = f"{len(setting.starts)} steps"
        yield equality(where, "float16: steps that overflow", over, differ, "")
    if not starts:
        return
    reference, own, others = (
        [step for step, usable in zip(steps, finite, strict=True) if usable]
        for steps in (one["float64_steps"], one["own_steps"], found["own_steps"])
    )
    rounding, apart = _relative_by_step(reference, own), _relative_by_step(own, others)
    least = UNIT_ROUNDOFF[precision]
    gradient_bound = ROUNDINGS * max(median(rounding["gradient"]), least)
    statistics_bound = ROUNDINGS * max(least, *rounding["statistics"])
    names = "gradient (middle step)", "loss", "running statistics"
    bounds = gradient_bound, gradient_bound, statistics_bound
    for what, by_step, bound in zip(names, map(apart.__getitem__, QUANTITIES), bounds, strict=True):
        largest = max(by_step, key=_nan_first)
        difference = median(by_step) if by_step is apart["gradient"] else largest
        detail = f"at most {largest:.1e}, at step {starts[by_step.index(largest)]}"
        over = f"{len(starts)} steps"
        yield _nearness(where, f"{precision}: {what}", over, difference, bound, detail)


def _relative_by_step(
    expected: list[StepResult], found: list[StepResult]
) -> dict[Quantity, list[float]]:
    """Return ‖found - expected‖ / ‖expected‖ of each quantity, step by step."""

    def relative(a: Tensor, b: Tensor) -> float:
        return float((b - a).norm() / a.norm().clamp(min=TINY))

    return {
        key: [
            relative(torch.as_tensor(a[key]).double(), torch.as_tensor(b[key]).double())
            for a, b in zip(expected, found, strict=True)
        ]
        for key in QUANTITIES
    }


def _nan_first(value: float) -> tuple[bool, float]:
    """Return a sort key by which NaN is the largest value."""
    return math.isnan(value), value


def compare_curves(
    setting: Setting,
    where: str,
    one: Results,
    found: Results,
    twin: Callable[[], Results],
) -> Iterator[Line]:
    """Compare the losses, and the state after the last step."""
    apart, last = _apart(one, found), setting.steps - 1
    grown = {}
    if not all(difference <= FLOAT64_BOUND for difference, _ in apart.values()):
        grown = {what: difference for what, (difference, _) in _apart(one, twin()).items()}
    for what, (difference, most) in apart.items():
        bound = max(FLOAT64_BOUND, GROWN * grown.get(what, 0.0))
        passed = difference <= bound  # False for NaN
        detail = "" if passed else most
        if bound > FLOAT64_BOUND:
            detail += "; " if detail else ""
            detail += f"one rounding of the initial weights alone grows to {grown[what]:.1e}"
        name, over = (
            f"float64: {what} after step {last}",
            f"{len(one['state'].get(what, ()))} tensors",
        )
        if what == "loss":
            name, over = "float64: loss", f"steps {setting.steps - len(found['losses'])} to {last}"
        yield Line(where, name, over, difference, bound, passed, detail)


def _apart(one: Results, found: Results) -> dict[str, tuple[float, str]]:
    """Return the largest difference of loss, weights, momentum and statistics, and its location.

    Losses are relative to each loss, tensors to their largest value.
    """
    first = len(one["losses"]) - len(found["losses"])  # the step at which it was resumed
    pairs = zip(one["losses"][first:], found["losses"], strict=True)
    losses = [abs(a - b) / max(abs(a), TINY) for a, b in pairs]
    beyond = [first + i for i, value in enumerate(losses) if not value <= FLOAT64_BOUND]
    apart = {"loss": (max(losses, key=_nan_first), f"from step {min(beyond, default=first)} on")}
    for kind, tensors in one["state"].items():
        by_name = {
            name: float((value - found["state"][kind][name]).abs().max())
            / max(float(value.abs().max()), TINY)
            for name, value in tensors.items()
        }
        if by_name:  # no momentum where recipe.momentum is 0
            worst = max(by_name, key=lambda name: _nan_first(by_name[name]))
            apart[kind] = by_name[worst], f"most in {worst}"
    return apart


def _counted(where: str, found: Results) -> Line:
    """Check that every validation image was evaluated once."""
    counted = found["counted"]
    wrong = torch.nonzero(counted != 1).flatten().tolist()
    detail = f"image {wrong[0]}: {int(counted[wrong[0]])} times" if wrong else ""
    over = f"{len(counted)} images"
    return equality(where, "validation images, each once", over, len(wrong), detail)
