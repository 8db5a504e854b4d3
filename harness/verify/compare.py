"""What two launches did, compared line by line.

What was fed, and counts, are equal without any tolerance. The rest is relative, within a bound:

- FLOAT64_BOUND for trajectories in float64: two orders of summation differ by some 1e-15 a step
  there, so it leaves room for that to grow, and none for an error of the mathematics.
- In the run's own precision, steps from equal weights, since trajectories of low precision part
  sooner or later: where an activation lies within rounding of 0, ReLU takes one side or the other.
  What rounding does is measured on one rank first: how far it moves a step's gradient (and the
  running statistics) from those in float64, ‖g - g64‖ / ‖g64‖. Each order of summation is about as
  far from float64 as another, so two may differ from each other by ROUNDINGS times that. For the
  gradient, which jumps where a ReLU turns, the middle one of the steps counts; for loss and
  statistics the largest. The loss is held to the gradient's bound: it is a mean over the same
  images, with fewer roundings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.config import Config
from harness.verify.setting import Setting, plural

FLOAT64_BOUND = 1e-10  # the promise
ROUNDINGS = 4.0
UNIT_ROUNDOFF = {"float32": 2.0**-24, "tf32": 2.0**-11, "bfloat16": 2.0**-8, "float16": 2.0**-11}
TINY = 1e-300  # instead of 0 in a denominator


@dataclass(frozen=True)
class Line:
    """One comparison. `over`: how much was compared. `difference` counts unequal things where
    `bound` is 0, else it is relative. `detail`: where and how it failed.
    """

    where: str
    what: str
    over: str
    difference: float | None
    bound: float | None
    passed: bool
    detail: str = ""


def run_ended(where: str, crash: Exception) -> Line:
    """The line of a launch that did not come to its end."""
    return Line(where, "ran to its end", "", None, None, False, str(crash))


def _equality(where: str, what: str, over: str, differ: int, detail: str) -> Line:
    return Line(where, what, over, differ, 0, differ == 0, detail if differ else "")


def _nearness(
    where: str, what: str, over: str, difference: float, bound: float, detail: str
) -> Line:
    passed = difference <= bound  # False for NaN
    return Line(where, what, over, difference, bound, passed, "" if passed else detail)


def compare_alone(setting: Setting, where: str, found: dict[str, Any]) -> Iterator[Line]:
    """What is known without anything to compare it with."""
    yield _known_sum(setting, where, found)
    yield _counted(where, found)


def compare(
    setting: Setting, where: str, one: dict[str, Any], found: dict[str, Any]
) -> Iterator[Line]:
    """All lines of a launch against those of one rank, causes before effects."""
    yield _recipes(where, one, found)
    yield from _fed(setting.config, where, one["fed"], found["fed"])
    yield _known_sum(setting, where, found)
    if setting.own_precision:
        yield from _own_steps(setting, where, one, found)
    yield from compare_curves(setting, where, one, found)
    yield _counted(where, found)
    differ = sum(a != b for a, b in zip(one["evaluation"], found["evaluation"], strict=True))
    detail = f"correct, top-5 correct, total: {found['evaluation']} instead of {one['evaluation']}"
    yield _equality(where, "evaluation counts", f"{setting.val_images} images", differ, detail)


def _recipes(where: str, one: dict[str, Any], found: dict[str, Any]) -> Line:
    (expected,) = one["recipes"]
    unequal = [
        f"rank {rank}: another {key}" + (f", {held[key]}" if key == "seed" else "")
        for rank, held in enumerate(found["recipes"])
        for key in expected
        if held[key] != expected[key]
    ]
    over = plural(len(found["recipes"]))
    return _equality(where, "seed, recipe, first weights", over, len(unequal), "; ".join(unequal))


def _fed(
    config: Config, where: str, one: dict[str, Tensor], found: dict[str, Tensor]
) -> Iterator[Line]:
    """The images at each place of each step; of each image its window and pixels, at any place."""
    moved = np.flatnonzero(one["ids"] != found["ids"])
    detail = ""
    if len(moved):
        ids = (int(fed["ids"].view(-1)[moved[0]]) for fed in (found, one))
        detail = "first at {}: image {} instead of {}".format(_place(config, moved[0]), *ids)
    steps, minibatch = one["ids"].shape
    yield _equality(where, "images of each step", f"{steps} × {minibatch}", len(moved), detail)

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
    yield _equality(where, "windows and flips", over, int(other.sum()), detail)

    changed = found["pixels"].view(-1).numpy()[places] != one["pixels"].view(-1).numpy()[twins]
    changed &= ~other
    detail = f"first at {_place(config, places[changed.argmax()])}" if changed.any() else ""
    over = f"{int((~other).sum())} images"
    yield _equality(where, "pixels that the loader gave", over, int(changed.sum()), detail)


def _place(config: Config, flat: int) -> str:
    """A place of a (steps, kn) array in words."""
    step, place = divmod(int(flat), config.recipe.minibatch)
    epoch = step // config.steps_per_epoch + 1
    return f"step {step} (epoch {epoch}), worker {place // config.recipe.worker_batch}"


def _same_images(config: Config, one: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, ...]:
    """Flat places in `found` (steps, kn), and those of the same images and epochs in `one`."""
    epochs = np.arange(len(one))[:, None] // config.steps_per_epoch
    known, wanted = ((ids + epochs * config.images).ravel() for ids in (one, found))
    order = np.argsort(known, kind="stable")
    at = np.minimum(np.searchsorted(known, wanted, sorter=order), len(known) - 1)
    places = np.flatnonzero(known[order[at]] == wanted)
    return places, order[at][places]


def _known_sum(setting: Setting, where: str, found: dict[str, Any]) -> Line:
    """The gradient of the fc bias where fc is zero: each class then has the probability 1/K, so it
    is (1 - ε) (1/K - count_c / kn) for class c, by the labels of the step alone."""
    recipe, classes = setting.config.recipe, setting.config.data.classes
    labels = setting.train.labels[found["fed"]["ids"][0].numpy()]
    counts = torch.from_numpy(np.bincount(labels, minlength=classes)).double()
    known = (1 - recipe.label_smoothing) * (1 / classes - counts / recipe.minibatch)
    gradient = found["known_sum"].double()
    # of balanced classes the sum is 0; one image's part of it is about 1 / kn
    difference = float((gradient - known).norm() / (known.norm() + 1 / recipe.minibatch))
    factor = float(gradient @ known / (known @ known).clamp(min=TINY))
    detail = f"it is {factor:.4g} times what the labels say"
    over = f"{classes} classes"
    return _nearness(where, "gradient of a known sum", over, difference, FLOAT64_BOUND, detail)


def _own_steps(
    setting: Setting, where: str, one: dict[str, Any], found: dict[str, Any]
) -> Iterator[Line]:
    """Steps from equal weights, against what rounding does on one rank."""
    precision, starts = str(setting.own_precision), setting.starts
    rounding = _relative_by_step(one["float64_steps"], one["own_steps"])
    apart = _relative_by_step(one["own_steps"], found["own_steps"])
    least = UNIT_ROUNDOFF[precision]
    gradient_bound = ROUNDINGS * max(median(rounding["gradient"]), least)
    statistics_bound = ROUNDINGS * max(least, *rounding["statistics"])
    for what, key, difference, bound in (
        ("gradient (middle step)", "gradient", median(apart["gradient"]), gradient_bound),
        ("loss", "loss", max(apart["loss"]), gradient_bound),
        ("running statistics", "statistics", max(apart["statistics"]), statistics_bound),
    ):
        largest = max(apart[key])
        detail = f"at most {largest:.1e}, at step {starts[apart[key].index(largest)]}"
        over = f"{len(starts)} steps"
        yield _nearness(where, f"{precision}: {what}", over, difference, bound, detail)


def _relative_by_step(
    expected: list[dict[str, Any]], found: list[dict[str, Any]]
) -> dict[str, list[float]]:
    """‖found - expected‖ / ‖expected‖, step by step, of gradient, loss and running statistics."""
    return {
        key: [
            _relative_norm(torch.as_tensor(a[key]).double(), torch.as_tensor(b[key]).double())
            for a, b in zip(expected, found, strict=True)
        ]
        for key in ("gradient", "loss", "statistics")
    }


def _relative_norm(expected: Tensor, found: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=TINY))


def compare_curves(
    setting: Setting, where: str, one: dict[str, Any], found: dict[str, Any]
) -> Iterator[Line]:
    """Losses, and the state after the last step, each tensor relative to its largest value."""
    first = setting.steps - len(found["losses"])  # where it was resumed
    pairs = zip(one["losses"][first:], found["losses"], strict=True)
    apart = [abs(a - b) / max(abs(a), TINY) for a, b in pairs]
    begins = next((first + i for i, value in enumerate(apart) if not value <= FLOAT64_BOUND), None)
    over = f"steps {first} to {setting.steps - 1}"
    detail = f"from step {begins} on"
    yield _nearness(where, "float64: loss", over, max(apart), FLOAT64_BOUND, detail)
    for kind, expected in one["state"].items():
        if not expected:
            continue  # recipe.momentum is 0
        tensors = {
            name: float((value - found["state"][kind][name]).abs().max())
            / max(float(value.abs().max()), TINY)
            for name, value in expected.items()
        }
        worst = max(tensors, key=lambda name: (tensors[name] != tensors[name], tensors[name]))
        what, over = f"float64: {kind} after step {setting.steps - 1}", f"{len(expected)} tensors"
        yield _nearness(where, what, over, tensors[worst], FLOAT64_BOUND, f"most in {worst}")


def _counted(where: str, found: dict[str, Any]) -> Line:
    """Every validation image is evaluated once."""
    counted = found["counted"]
    wrong = torch.nonzero(counted != 1).flatten().tolist()
    detail = f"image {wrong[0]}: {int(counted[wrong[0]])} times" if wrong else ""
    over = f"{len(counted)} images"
    return _equality(where, "validation images, each once", over, len(wrong), detail)
