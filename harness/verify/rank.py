"""A rank of `harness verify`: a real process that carries out a request; rank 0 keeps the results.

    python -m harness.verify.rank FOLDER PARENT         with torchrun's environment variables

FOLDER holds request.json and config.yaml; results.pt and progress.txt are written there. The
process ends with the process PARENT.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.config.loading import dump_config, load_config
from harness.config.schema import Config
from harness.data.batch import Batch, Loader
from harness.data.batch_plan import BatchPlan
from harness.data.loaders.child_process import settle_child
from harness.data.loaders.choice import open_loader
from harness.data.sources.folder import Index
from harness.distributed import (
    World,
    barrier,
    first_ranks,
    group_timeout,
    process_group,
    world_from_environment,
)
from harness.errors import FINISHED, USER_ERROR, UserError
from harness.execution.evaluation import evaluate
from harness.execution.precision import set_precision
from harness.models.registry import build_model
from harness.models.running_statistics import global_running_statistics
from harness.resilience.stopping import Stopped, StopRequest
from harness.resilience.watchdog import Phase, Watchdog
from harness.roll_call import roll_call
from harness.runs.environment import describe_environment
from harness.runs.run_folder import RunFolder
from harness.training.loop import run_steps
from harness.training.run import Run, choose_checkpoint
from harness.training.setup import on_device, prepare
from harness.training.step import Step
from harness.verify.loaders import Fed, Interrupting, summed
from harness.verify.setting import SHARED_GPU, Request


@dataclass
class Rank:
    """This process among the ranks of a launch. `results` is what rank 0 keeps."""

    folder: Path
    request: Request
    config: Config
    world: World
    feed: BatchPlan
    loader: Loader
    control: dist.ProcessGroup | None
    stopping: StopRequest
    watchdog: Watchdog
    results: dict[str, Any] = field(default_factory=dict)

    def known_sum(self) -> None:
        """The summed gradient (K,) of the fc bias in step 0, from fc weights and bias of zero."""
        step = self._step("float64", zero_fc=True)
        gradients = noted_gradients(step, fc(step.network)[1:])
        self._one_step(step, 0, self.loader.train(0))
        self.results["known_sum"] = gradients[-1].cpu()

    def curve(self) -> None:
        """A trajectory in float64 from step 0, what was fed to it, and an evaluation at its end."""
        step = self._step("float64")
        self.results["recipes"] = self._gather(recipe_of(self.config))
        fed = Fed(self.feed, self.config, self.request.steps, self.world.device.type == "cuda")
        self._run(step, 0, fed.watch(self.loader.train(0)), "float64")
        self.results["fed"] = fed.over_ranks(self.control)
        self._evaluate(step)

    def _evaluate(self, step: Step) -> None:
        """Counts, and how often each validation image (V,) was met."""
        self._say("evaluation")
        counted = np.zeros(self.config.data.val_images, dtype=np.int64)
        with global_running_statistics(step.network, self.feed.share):
            batches = self.watchdog.watch(self.loader.evaluate(), lambda: 0, Phase.EVALUATING)
            config = in_precision(self.config, "float64")
            count = lambda batch, _: np.add.at(counted, batch.ids.cpu().numpy(), 1)  # noqa: E731
            found = evaluate(config, step.network, batches, step.pixels, count)
        self.results["evaluation"] = [found.correct, found.top5_correct, found.total]
        self.results["counted"] = summed(counted, self.control)

    def twin(self) -> None:
        """The float64 trajectory again, from first weights of which every other is moved by one
        rounding: how far this recipe makes a rounding grow by itself."""
        step = self._step("float64")
        with torch.no_grad():
            for weights in step.network.parameters():
                weights.view(-1)[::2] *= 1 + 2.0**-52
        self._run(step, 0, self.loader.train(0), "twin in float64:")

    def states(self) -> None:
        """Leaves the states before the `starts` of a trajectory in the run's own precision."""
        precision, last = self.config.run.precision, self.request.starts[-1]
        step, batches = self._step(precision), self.loader.train(0)
        for number in range(last + 1):
            if number in self.request.starts:
                torch.save(step.state_dict(), self._state_file(number))
            if number < last:
                self._say(f"{precision} step {number + 1} of {last}")
                self._one_step(step, number, batches)

    def own_steps(self) -> None:
        """A step from each of the states, in the run's own precision."""
        self.results["own_steps"] = self._single_steps(self.config.run.precision)

    def float64_steps(self) -> None:
        """The same steps in float64, which rounding is measured against."""
        self.results["float64_steps"] = self._single_steps("float64")

    def stop(self) -> None:
        """The real loop until one rank gets a real SIGTERM; all write a checkpoint and stop."""
        run = self._open_run()
        run.loader = Interrupting(self.loader, self._interrupts_at())
        with closing(run):
            try:
                run_steps(run)
            except Stopped as stopped:
                self.results["stopped"] = str(stopped)

    def resume(self) -> None:
        """Takes over the checkpoint that `stop` wrote, and goes on to the end of the trajectory."""
        run = self._open_run()
        with closing(run):
            self.results["first_step"] = run.first_step
            self._run(run.step, run.first_step, self.loader.train(run.first_step), "resumed")

    def _open_run(self) -> Run:
        """As `train` opens one: new, or from the newest checkpoint of the run folder."""
        folder = RunFolder(Path(self.request.shared) / "run")
        config, step = in_precision(self.config, "float64"), self._step("float64")
        checkpoint = None
        if self.world.rank == 0:
            if folder.path.exists():
                folder.ownership.wait_until_free(self.stopping)
                checkpoint = choose_checkpoint(folder)
            folder.open(config, describe_environment(self.world.device, self.world.world_size))
        checkpoint = first_ranks(checkpoint, self.control)
        ways = self.feed, self.loader, self.control, self.stopping, self.watchdog
        # asked after every step, so that the stop falls in mid-epoch
        run = Run(config, self.world, folder, step, *ways, ask_every_s=0.0)
        if checkpoint is not None:
            run.restore(checkpoint)
        run.open_journal()
        return run

    def _interrupts_at(self) -> int | None:
        """The micro-batch at which this rank gets the signal: the last rank only."""
        if self.world.rank < self.world.world_size - 1:
            return None
        return self.request.stop_at * len(self.feed.micro_batches)

    def _step(self, precision: str, zero_fc: bool = False) -> Step:
        """The config's model and optimizer before step 0."""
        set_precision(precision)
        config = in_precision(self.config, precision)
        model = build_model(config, channels_last=self.world.device.type == "cuda")
        if zero_fc:
            for parameter in fc(model):
                nn.init.zeros_(parameter)
        model = on_device(model, config, self.world.device)
        step = Step(config, model, self.world, self.feed.micro_batches)
        self.watchdog.reductions = step.reductions
        return step

    def _one_step(self, step: Step, number: int, batches: Iterator[Batch]) -> float:
        """Makes the step `number`; its loss over all ranks."""
        self.watchdog.at(number, Phase.COMPUTING)
        step(number, batches)
        return step.metrics.read().loss

    def _run(self, step: Step, first_step: int, batches: Iterator[Batch], what: str) -> None:
        """The trajectory from `first_step` on: the losses of its steps, and its last state."""
        losses = []
        for number in range(first_step, self.request.steps):
            self._say(f"{what} step {number + 1} of {self.request.steps}")
            losses.append(self._one_step(step, number, batches))
        self.results["losses"] = losses
        self.results["state"] = global_state(step, self.feed.share)

    def _single_steps(self, precision: str) -> list[dict[str, Any]]:
        """Of each step from equal weights: gradient (P,), loss, running statistics (R,)."""
        step, found = self._step(precision), []
        gradients = noted_gradients(step, list(step.network.parameters()))
        for number in self.request.starts:
            self._say(f"{precision} step {number} from equal weights")
            step.load_state_dict(torch.load(self._state_file(number), map_location="cpu"))
            loss = self._one_step(step, number, self.loader.train(number))
            statistics = global_state(step, self.feed.share)["running statistics"].values()
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

    def _gather(self, value: object) -> list[Any]:
        everywhere: list[Any] = [value]
        if self.control is not None:
            everywhere = [None] * self.world.world_size
            dist.all_gather_object(everywhere, value, group=self.control)
        return everywhere

    def _say(self, text: str) -> None:
        if self.world.rank == 0:
            (self.folder / "progress.txt").write_text(text)


def fc(network: nn.Module) -> list[nn.Parameter]:
    """Weight and bias of the classifier."""
    classifier = network.get_submodule("fc")
    return list(classifier.parameters())


def noted_gradients(step: Step, parameters: list[nn.Parameter]) -> list[Tensor]:
    """A list that grows by the gradients, as one tensor (P,), that each step hands its optimizer.

    Without float16's scale.
    """
    noted: list[Tensor] = []

    def note(*_: object) -> None:
        gradients = [p.grad.reshape(-1) for p in parameters if p.grad is not None]
        noted.append(torch.cat(gradients) / step.scaler.get_scale())

    step.optimizer.register_step_pre_hook(note)
    return noted


def global_state(step: Step, share: float) -> dict[str, dict[str, Tensor]]:
    """Copies on the CPU: weights, running statistics (means over all workers) and momentum."""
    weights = dict(step.network.named_parameters())
    with global_running_statistics(step.network, share):
        buffers = {
            name: buffer.detach().to("cpu", copy=True)
            for name, buffer in step.network.named_buffers()
            if name.endswith(("running_mean", "running_var"))
        }
    momentum = {
        name: step.optimizer.state[weight]["momentum_buffer"]
        for name, weight in weights.items()
        if "momentum_buffer" in step.optimizer.state[weight]
    }
    kinds = {"weights": weights, "momentum": momentum}
    copies = {
        kind: {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        for kind, tensors in kinds.items()
    }
    return copies | {"running statistics": buffers}


def recipe_of(config: Config) -> dict[str, Any]:
    """What every rank must hold alike: seed, the recipe's keys, the first weights (digests)."""
    curve = config.model_copy(update={"run": type(config.run)()})
    state = build_model(config).state_dict().values()
    weights = hashlib.sha256(b"".join(value.numpy().tobytes() for value in state))
    return {
        "seed": config.seed,
        "recipe": hashlib.sha256(dump_config(curve).encode()).hexdigest(),
        "first weights": weights.hexdigest(),
    }


def in_precision(config: Config, precision: str) -> Config:
    """The config under another `run.precision`; what the user's is not is not compiled."""
    if precision == config.run.precision:
        return config
    changed = {"precision": precision, "compile": False}
    return config.model_copy(update={"run": config.run.model_copy(update=changed)})


def first_images(index: Index, images: int) -> Index:
    """An index of the first `images` images only."""
    return replace(
        index,
        names=index.names[:images],
        labels=index.labels[:images],
        widths=index.widths[:images],
        heights=index.heights[:images],
    )


@contextmanager
def join(
    world: World, store: dist.Store | None, hang_timeout_s: float
) -> Iterator[dist.ProcessGroup | None]:
    """The process group of a run; by Gloo alone where ranks share a GPU, which NCCL refuses."""
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
    """Opens what a run has on this rank, and does the tasks."""
    stopping, timeout_s = StopRequest(), config.run.hang_timeout_s
    with ExitStack() as opened:
        opened.enter_context(stopping.listen())
        with roll_call(timeout_s, stopping) as call:
            world = world_from_environment(config.run.device)
            # errors of one rank end all; no card is presented, as whether the ranks hold the same
            # config is what verify is to find out and to show in its own lines
            feed, config = prepare(config, world)
            feed.val = first_images(feed.val, request.val_images)
            data = config.data.model_copy(update={"val_images": request.val_images})
            config = feed.config = config.model_copy(update={"data": data})
            cuda, threads = world.device.type == "cuda", int(config.run.loader_threads)
            loader = open_loader(config, feed, config.run.loader, threads, cuda)
            opened.enter_context(closing(loader))
        watchdog = opened.enter_context(Watchdog(world, timeout_s, stopping))
        control = opened.enter_context(join(world, call.store, timeout_s))
        watchdog.join_ranks()
        rank = Rank(folder, request, config, world, feed, loader, control, stopping, watchdog)
        for task in request.tasks:
            getattr(rank, task)()
        if world.rank == 0:
            torch.save(rank.results, folder / "results.pt")


def main(arguments: list[str]) -> int:
    """Returns the exit code; a user's mistake is one line."""
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
