"""The setting of a verification, the requests to its ranks, and the checks before they start."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from harness.config.schema import Config
from harness.data.dataset import check_dataset
from harness.data.sources.registry import open_source
from harness.data.sources.source import ImageSource
from harness.errors import UserError
from harness.models.registry import check_model
from harness.recipe.minibatch import Minibatch

SHARED_GPU = "HARNESS_VERIFY_SHARED_GPU"  # set if several ranks share a GPU, and so use Gloo
START_EVERY = 10  # every tenth step is also made from equal weights


@dataclass(frozen=True)
class Setting:
    """The object of a verification: `ranks` are world sizes, rising from 1."""

    config: Config
    ranks: Sequence[int]
    steps: int
    train: ImageSource
    val_images: int  # the number evaluated
    folder: Path  # for temporary files
    rank_program: Sequence[str]

    @property
    def starts(self) -> list[int]:
        """The steps that each launch makes from equal weights."""
        return list(range(0, self.steps, START_EVERY))

    @property
    def stop_at(self) -> int | None:
        """The step in which a rank is interrupted; None if there is no suitable one.

        A run stops after it or the next one, neither of which ends an epoch or the trajectory.
        """
        epoch = self.config.steps_per_epoch
        steps = range(self.steps - 2)
        fitting = [step for step in steps if (step + 1) % epoch and (step + 2) % epoch]
        return min(fitting, key=lambda step: abs(step - self.steps // 2), default=None)

    @property
    def other_micro_batch(self) -> int:
        """Images of one worker, or of two if the run itself uses one worker's."""
        minibatch = Minibatch.of(self.config)
        usual = minibatch.micro_batch_images(self.config.workers, self.config.run.micro_batch)
        return minibatch.worker_batch * (2 if usual == minibatch.worker_batch else 1)

    @property
    def exact(self) -> bool:
        """Whether sums are exact: every launch must then have the same bits."""
        return self.config.run.sums == "exact"

    @property
    def curve_precision(self) -> str:
        """The precision of trajectories: the run's own where sums are exact, else float64."""
        return self.config.run.precision if self.exact else "float64"

    @property
    def own_precision(self) -> str | None:
        """The run's precision; None for float64, in which everything is compared anyway."""
        precision = self.config.run.precision
        return None if precision == "float64" else precision

    def shares_gpus(self, world_size: int) -> bool:
        """Return True if there are more ranks than GPUs, so several share one."""
        cuda = self.config.run.device != "cpu" and torch.cuda.is_available()
        return cuda and world_size > torch.cuda.device_count()

    def sharing(self, world_size: int) -> str:
        """Describe how surplus ranks share the GPUs, for the table."""
        if not self.shares_gpus(world_size):
            return ""
        gpus = torch.cuda.device_count()
        return f" on {gpus} GPU{'s' * (gpus > 1)}, with Gloo, one worker at a time"

    def work(self) -> str:
        """Describe in one line how much will be computed."""
        minibatch, starts = self.config.recipe.minibatch, self.starts
        if self.exact:
            trajectories = len(self.ranks) + (self.stop_at is not None)
            return (
                f"work: {trajectories * self.steps + len(self.ranks)} steps of {minibatch} images "
                f"forward and backward, most in {self.curve_precision}, and "
                f"{len(self.ranks) * self.val_images:,} images evaluated"
            )
        trajectories = len(self.ranks) + 1 + (self.stop_at is not None)
        single_steps = (len(self.ranks) + 1) * (1 + len(starts) * (2 if self.own_precision else 1))
        steps = trajectories * self.steps + single_steps + starts[-1]
        return (
            f"work: {steps} steps of {minibatch} images forward and backward, most in float64, "
            f"and {(len(self.ranks) + 1) * self.val_images:,} images evaluated"
        )


@dataclass(frozen=True)
class Request:
    """A request to the ranks of one launch: `tasks` are methods of `Rank`, in order.

    `steps` is the length of a trajectory in `curve_precision`, `starts` are the steps made from
    equal weights, `val_images` is the number evaluated. `shared` is the folder for what a launch
    leaves to others: the states before the `starts`, and the run that is interrupted at the step
    `stop_at`.
    """

    tasks: list[str]
    steps: int
    starts: list[int]
    stop_at: int
    val_images: int
    shared: str
    curve_precision: str


def check_setting(
    config: Config, ranks: Sequence[int], steps: int, folder: Path, rank_program: Sequence[str]
) -> Setting:
    """Return the setting; raise UserError for anything that cannot be verified."""
    check_model(config)
    if int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", "1"))) > 1:
        raise UserError("harness verify starts its own ranks; start it without torchrun or srun")
    if config.distill is not None:
        raise UserError(
            "distill: only plain training can be verified; add distill=null "
            "data.unlabelled_images=0"
        )
    world_sizes = sorted({1, *ranks})
    if world_sizes[0] < 1:
        raise UserError(f"--ranks {world_sizes[0]}: give positive numbers, such as 1,2,4")
    Minibatch.of(config).workers_of(0, world_sizes[-1])
    if world_sizes == [1]:
        raise UserError("--ranks 1: nothing to compare one rank with; add another number: 1,2")
    if not 1 <= steps <= config.total_steps:
        raise UserError(f"--steps {steps}: give 1 to {config.total_steps}, the steps of the config")
    if config.run.device == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device: cuda, but no CUDA device is available; set run.device=cpu")
    train, val = (open_source(config.run, split) for split in ("train", "val"))
    check_dataset(train, val, config)
    val_images = min(len(val), steps * config.recipe.minibatch)
    return Setting(config, world_sizes, steps, train, val_images, folder, rank_program)


def plural(ranks: int) -> str:
    """Format a number of ranks: 1 rank, 2 ranks."""
    return f"{ranks} rank{'s' * (ranks != 1)}"
