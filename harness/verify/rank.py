"""A rank of `harness verify`: a real process that does a request; rank 0 saves the results.

    python -m harness.verify.rank FOLDER PARENT         with torchrun's environment variables

FOLDER contains request.json and config.yaml; results.pt and progress.txt are written there. The
process ends when the process PARENT does.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from harness.config.loading import load_config
from harness.config.schema import Config
from harness.data.batch import Batch, Loader
from harness.data.batch_plan import BatchPlan
from harness.data.loaders.child_process import settle_child
from harness.data.loaders.choice import open_loader
from harness.distributed import (
    World,
    barrier,
    broadcast_from_rank0,
    group_timeout,
    process_group,
    world_from_environment,
)
from harness.errors import FINISHED, USER_ERROR, UserError
from harness.execution.determinism import threads_and_determinism
from harness.execution.evaluation import evaluate
from harness.execution.precision import set_precision
from harness.execution.recalibration import evaluation_statistics
from harness.models.registry import build_model
from harness.outcome import Stopped
from harness.resilience.stopping import StopRequest
from harness.resilience.watchdog import Phase, Watchdog
from harness.roll_call import roll_call
from harness.runs.environment import describe_environment
from harness.runs.run_folder import RunFolder
from harness.training.loop import run_steps
from harness.training.profiling import Profile
from harness.training.ready_rank import prepare
from harness.training.replica import Replica
from harness.training.resume import START, choose_checkpoint, restore
from harness.training.run import Run
from harness.training.setup import on_device
from harness.training.step import Step
from harness.verify.loaders import FedImages, InterruptingLoader, summed
from harness.verify.results import Results, StepResult
from harness.verify.setting import SHARED_GPU, Request
from harness.verify.snapshot import KnownLogits, global_state, recipe_digests, record_gradients

T = TypeVar("T")


@dataclass
class Rank:
    """One rank of a launch; its public methods are the tasks. Rank 0 saves `results`."""

    folder: Path
    request: Request
    config: Config
    world: World
    batch_plan: BatchPlan
    loader: Loader
    control: dist.ProcessGroup | None
    stopping: StopRequest
    watchdog: Watchdog
    results: Results = field(default_factory=lambda: Results())

    def known_sum(self) -> None:
        """Record the summed gradient (K,) of a bias in step 0 that alone makes the logits."""
        step = self._step("float64", known_logits=True)
        gradients = record_gradients(step, [step.network.get_parameter("bias")])
        self._one_step(step, 0, self.loader.train(0))
        self.results["known_sum"] = gradients[-1].cpu()

    def curve(self) -> None:
        """Record a trajectory from step 0, its images, and an evaluation at its end."""
        precision = self.request.curve_precision
        step = self._step(precision)
        self.results["recipes"] = self._gather(recipe_digests(self.config))
        channels_last = self.world.device.type == "cuda"
        fed = FedImages(self.batch_plan, self.config, self.request.steps, channels_last)
        self._run(step, 0, fed.watch(self.loader.train(0)), precision)
        self.results["fed"] = fed.over_ranks(self.control)
        self._evaluate(step)

    def _evaluate(self, step: Step) -> None:
        """Record the counts, and how often each validation image (V,) was evaluated."""
        self._show_progress("evaluation")
        counted = np.zeros(self.config.data.val_images, dtype=np.int64)
        config = in_precision(self.config, self.request.curve_precision)
        share = self.batch_plan.statistics_share
        watch = partial(self.watchdog.watch, step=lambda: 0, phase=Phase.EVALUATING)
        training_images = lambda: watch(self.loader.recalibrate())  # noqa: E731
        preprocess = step.replica.preprocess
        with evaluation_statistics(config, step.network, share, training_images, preprocess):
            batches = watch(self.loader.evaluate())
            count = lambda batch, _: np.add.at(counted, batch.ids.cpu().numpy(), 1)  # noqa: E731
            found = evaluate(config, step.network, batches, preprocess, count)
        self.results["evaluation"] = [found.correct, found.top5_correct, found.total]
        self.results["evaluation_loss"] = found.loss
        self.results["counted"] = summed(counted, self.control)

    def twin(self) -> None:
        """Repeat the float64 trajectory with every other initial weight changed by one rounding.

        It shows how far this recipe alone makes a rounding error grow.
        """
        step = self._step("float64")
        with torch.no_grad():
            for weights in step.network.parameters():
                weights.view(-1)[::2] *= 1 + 2.0**-52
        self._run(step, 0, self.loader.train(0), "twin in float64:")

    def states(self) -> None:
        """Save the states before the `starts` of a trajectory in the run's own precision."""
        precision, last = self.config.run.precision, self.request.starts[-1]
        step, batches = self._step(precision), self.loader.train(0)
        for number in range(last + 1):
            if number in self.request.starts:
                torch.save(step.state_dict(), self._state_file(number))
            if number < last:
                self._show_progress(f"{precision} step {number + 1} of {last}")
                self._one_step(step, number, batches)

    def own_steps(self) -> None:
        """Record a step from each of the states, in the run's own precision."""
        self.results["own_steps"] = self._single_steps(self.config.run.precision)

    def float64_steps(self) -> None:
        """Record the same steps in float64, the reference for rounding errors."""
        self.results["float64_steps"] = self._single_steps("float64")

    def stop(self) -> None:
        """Train with the real loop until one rank gets SIGTERM and all stop with a checkpoint."""
        run = self._open_run(InterruptingLoader(self.loader, self._interrupts_at()))
        with closing(run), suppress(Stopped):
            run_steps(run)

    def resume(self) -> None:
        """Resume from the checkpoint of `stop`, to the end of the trajectory."""
        run = self._open_run(self.loader)
        with closing(run):
            self._run(run.step, run.first_step, self.loader.train(run.first_step), "resumed")

    def _open_run(self, loader: Loader) -> Run:
        """Open a run as `train` does: new, or from the newest checkpoint of the run folder."""
        folder = RunFolder(Path(self.request.shared) / "run")
        precision = self.request.curve_precision
        config, step = in_precision(self.config, precision), self._step(precision)
        checkpoint = None
        if self.world.rank == 0:
            if folder.path.exists():
                folder.ownership.wait_until_free(self.stopping)
                checkpoint = choose_checkpoint(folder.path)
            folder.open(config, describe_environment(self.world.device, self.world.world_size))
        checkpoint = broadcast_from_rank0(checkpoint, self.control)
        start = START
        if checkpoint is not None:
            start = restore(checkpoint, step, self.batch_plan, None, self.control)
        ways = self.batch_plan, loader, self.control, self.stopping, self.watchdog
        profile = Profile(0, self.world, self.control, folder.path)
        # ranks agree after every step, so the stop falls in mid-epoch
        return Run(config, self.world, folder, step, *ways, profile, start, ask_every_s=0.0)

    def _interrupts_at(self) -> int | None:
        """Return the micro-batch at which this rank receives the signal; None but on the last."""
        if self.world.rank < self.world.world_size - 1:
            return None
        return self.request.stop_at * len(self.batch_plan.micro_batches)

    def _step(self, precision: str, known_logits: bool = False) -> Step:
        """Build the config's model and optimizer as before step 0."""
        set_precision(precision)
        config = in_precision(self.config, precision)
        model = build_model(config, channels_last=self.world.device.type == "cuda")
        if known_logits:
            model = KnownLogits(model, config.data.classes)
        model = on_device(model, config, self.world.device)
        replica = Replica(config, model, self.world, [self.watchdog])
        return Step(config, replica, self.batch_plan.micro_batches)

    def _one_step(self, step: Step, number: int, batches: Iterator[Batch]) -> float:
        """Make step `number`; return its loss over all ranks."""
        self.watchdog.enter_phase(number, Phase.COMPUTING)
        step(number, batches)
        return step.metrics.read().loss

    def _run(self, step: Step, first_step: int, batches: Iterator[Batch], what: str) -> None:
        """Record the losses and the last state of the trajectory from `first_step` on."""
        losses = []
        for number in range(first_step, self.request.steps):
            self._show_progress(f"{what} step {number + 1} of {self.request.steps}")
            losses.append(self._one_step(step, number, batches))
        self.results["losses"] = losses
        self.results["state"] = global_state(step, self.batch_plan.statistics_share)

    def _single_steps(self, precision: str) -> list[StepResult]:
        """Make each of the steps from equal weights."""
        step, found = self._step(precision), list[StepResult]()
        gradients = record_gradients(step, list(step.network.parameters()))
        for number in self.request.starts:
            self._show_progress(f"{precision} step {number} from equal weights")
            step.load_state_dict(torch.load(self._state_file(number), map_location="cpu"))
            loss = self._one_step(step, number, self.loader.train(number))
            statistics = global_state(step, self.batch_plan.statistics_share)[
                "running statistics"
            ].values()
            found.append(
                {
                    "gradient": gradients.pop().cpu(),
                    "loss": loss,
                    "statistics": torch.cat([s.double() for s in statistics]),
                }
            )
        return found

    def _state_file(self, number: int) -> Path:
        return Path(self.request.shared) / f"state-{number}.pt"

    def _gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in their order."""
        everywhere = [value] * self.world.world_size
        if self.control is not None:
            dist.all_gather_object(everywhere, value, group=self.control)
        return everywhere

    def _show_progress(self, text: str) -> None:
        if self.world.rank == 0:
            (self.folder / "progress.txt").write_text(text)


def in_precision(config: Config, precision: str) -> Config:
    """Return the config with `run.precision`; only the user's own precision is compiled."""
    if precision == config.run.precision:
        return config
    changed = {"precision": precision, "compile": False}
    return config.model_copy(update={"run": config.run.model_copy(update=changed)})


@contextmanager
def join(
    world: World, store: dist.Store | None, hang_timeout_s: float
) -> Iterator[dist.ProcessGroup | None]:
    """Open a run's process group; with Gloo only if ranks share a GPU, which NCCL refuses."""
    if SHARED_GPU not in os.environ or store is None:
        with process_group(world, store, hang_timeout_s) as usual:
            yield usual
        return
    torch.cuda.set_device(world.device)
    timeout, ranks = group_timeout(hang_timeout_s), (world.rank, world.world_size)
    dist.init_process_group(
        "gloo", store=store, rank=ranks[0], world_size=ranks[1], timeout=timeout
    )
    try:
        control = dist.new_group(backend="gloo")
        assert isinstance(control, dist.ProcessGroup)  # this rank is in it
        yield control
        barrier(control)
    finally:
        dist.destroy_process_group()


def carry_out(folder: Path, request: Request, config: Config) -> None:
    """Open all that a run has on this rank, and do the tasks."""
    stopping, timeout_s = StopRequest(), config.run.hang_timeout_s
    with ExitStack() as opened:
        opened.enter_context(stopping.listen())
        with roll_call(timeout_s, stopping) as call:
            world = world_from_environment(config.run.device)
            # an error on one rank ends all. No card is presented: verify itself compares the
            # ranks' configs and shows the result in its own lines
            batch_plan, config = prepare(config, world)
            batch_plan = batch_plan.with_val_images(request.val_images)
            config = batch_plan.config
            cuda, threads = world.device.type == "cuda", int(config.run.loader_threads)
            loader = open_loader(config, batch_plan, config.run.loader, threads, cuda)
            opened.enter_context(closing(loader))
        opened.enter_context(threads_and_determinism(config.run, world.device))
        watchdog = opened.enter_context(Watchdog(world, timeout_s, stopping))
        control = opened.enter_context(join(world, call.store, timeout_s))
        watchdog.join_ranks()
        rank = Rank(folder, request, config, world, batch_plan, loader, control, stopping, watchdog)
        for task in request.tasks:
            getattr(rank, task)()
        if world.rank == 0:
            torch.save(rank.results, folder / "results.pt")


def main(arguments: list[str]) -> int:
    """Run the rank; return the exit code. A user's mistake is printed as one line."""
    folder, parent = Path(arguments[0]), int(arguments[1])
    settle_child(parent)
    request = Request(**json.loads((folder / "request.json").read_text()))
    try:
        carry_out(folder, request, load_config(folder / "config.yaml"))
    except UserError as error:
        print(error, file=sys.stderr)
        return USER_ERROR
    return FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
