"""The results of a launch: what rank 0 keeps of the tasks of all ranks."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor

State = dict[str, dict[str, Tensor]]  # weights, momentum and running statistics, by name


class StepResult(TypedDict):
    """One step from given weights: gradient (P,), loss, and running statistics (R,)."""

    gradient: Tensor
    loss: float
    statistics: Tensor


class Results(TypedDict, total=False):
    """The results by task; keys of tasks that were not requested are missing."""

    known_sum: Tensor  # (K,)
    recipes: list[dict[str, int | str]]  # one per rank
    fed: dict[str, Tensor]  # ids and pixels (steps, kn), windows (steps, kn, 5)
    losses: list[float]  # of the trajectory's steps
    state: State  # after the last step
    evaluation: list[int]  # correct, top-5 correct, total
    evaluation_loss: float
    counted: Tensor  # (V,): how often each validation image was evaluated
    float64_steps: list[StepResult]
    own_steps: list[StepResult]
