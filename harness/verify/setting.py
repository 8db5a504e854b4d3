"""What is verified, what ranks are asked to do, what can be found wrong before they start."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from harness.config.schema import Config
from harness.data.sources.folder import Index, check_indices, load_index
from harness.errors import UserError
from harness.models.registry import check_model
from harness.recipe.minibatch import Minibatch

SHARED_GPU = "HARNESS_VERIFY_SHARED_GPU"  # set where several ranks take one GPU, and so Gloo
START_EVERY = 10  # steps: those made from equal weights


@dataclass(frozen=True)
class Setting:
    """`ranks` are numbers of ranks, rising from 1. `folder` is for temporary files."""

    config: Config
    ranks: Sequence[int]
    steps: int
    train: Index
    val_images: int  # evaluated
    folder: Path
    rank_program: Sequence[str]

    @property
    def starts(self) -> list[int]:
        """The steps that each number of ranks makes from equal weights."""
        return list(range(0, self.steps, START_EVERY))

    @property
    def stop_at(self) -> int | None:
        """The step in which a rank is interrupted: a run stops after it or after the next one,
        neither of which ends an epoch or the trajectory. None where there is no such step."""
        epoch = self.config.steps_per_epoch
        steps = range(self.steps - 2)
        fitting = [step for step in steps if (step + 1) % epoch and (step + 2) % epoch]
        return min(fitting, key=lambda step: abs(step - self.steps // 2), default=None)

    @property
    def other_micro_batch(self) -> int:
        """Images: one worker at a time, or two where that is what the run does anyway."""
        minibatch = Minibatch(self.config.workers, self.config.recipe.worker_batch)
        usual = minibatch.micro_batch_images(self.config.workers, self.config.run.micro_batch)
        return minibatch.worker_batch * (2 if usual == minibatch.worker_batch else 1)

    @property
    def own_precision(self) -> str | None:
        """None for float64, in which everything is compared anyway."""
        precision = self.config.run.precision
        return None if precision == "float64" else precision

    def shares_gpus(self, world_size: int) -> bool:
        """Whether there are more ranks than GPUs, so that several take one."""
        cuda = self.config.run.device != "cpu" and torch.cuda.is_available()
        return cuda and world_size > torch.cuda.device_count()

    def sharing(self, world_size: int) -> str:
        """How ranks that are more than the GPUs share them, for the table."""
        if not self.shares_gpus(world_size):
            return ""
        gpus = torch.cuda.device_count()
        return f" on {gpus} GPU{'s' * (gpus > 1)}, by Gloo, one worker at a time"

    def work(self) -> str:
        """One line on how much will be computed."""
        minibatch, starts = self.config.recipe.minibatch, self.starts
        trajectories = len(self.ranks) + 1 + (self.stop_at is not None)
        single_steps = (len(self.ranks) + 1) * (1 + len(starts) * (2 if self.own_precision else 1))
        steps = trajectories * self.steps + single_steps + starts[-1]
        return (
            f"work: {steps} steps of {minibatch} images forward and backward, most in float64, "
            f"and {(len(self.ranks) + 1) * self.val_images:,} images evaluated"
        )


@dataclass(frozen=True)
class Request:
    """What the ranks of one launch do: `tasks` are methods of `Rank`, in order.

    `steps` is the length of a trajectory, `starts` are the steps made from equal weights,
    `val_images` are evaluated on. `shared` is the folder of what one launch leaves for another:
    the states before the `starts`, and the run that is interrupted at the step `stop_at`.
    """

    tasks: list[str]
    steps: int
    starts: list[int]
    stop_at: int
    val_images: int
    shared: str


def check_setting(
    config: Config, ranks: Sequence[int], steps: int, folder: Path, rank_program: Sequence[str]
) -> Setting:
    """Raises UserError for a network, ranks, steps or data that nothing can be verified with."""
    check_model(config)
    if int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", "1"))) > 1:
        raise UserError("harness verify starts its own ranks; start it without torchrun or srun")
    if config.distill is not None:
        raise UserError(
            "distill: what is verified is the plain training; add distill=null "
            "data.unlabelled_images=0"
        )
    wanted = sorted({1, *ranks})
    if wanted[0] < 1:
        raise UserError(f"--ranks {wanted[0]}: give numbers from 1 on, such as 1,2,4")
    Minibatch(config.workers, config.recipe.worker_batch).workers_of(0, wanted[-1])
    if wanted == [1]:
        raise UserError("--ranks 1: one rank has nothing to be compared with; add another: 1,2")
    if not 1 <= steps <= config.total_steps:
        raise UserError(f"--steps {steps}: give 1 to {config.total_steps}, the steps of the config")
    if config.run.device == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device: cuda, but no CUDA device is usable here; set run.device=cpu")
    train, val = (load_index(config.run.data_root, split) for split in ("train", "val"))
    check_indices(train, val, config)
    val_images = min(len(val), steps * config.recipe.minibatch)
    return Setting(config, wanted, steps, train, val_images, folder, rank_program)


def plural(ranks: int) -> str:
    """1 rank, 2 ranks."""
    return f"{ranks} rank{'s' * (ranks != 1)}"
