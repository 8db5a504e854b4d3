"""Set up and train a run: alone, after its teachers, or to fill a teacher's cache."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import nn

from harness.config.loading import curve_differences, load_config
from harness.config.schema import Config
from harness.config.stages import Stage
from harness.distillation.logit_cache import write_cache
from harness.distributed import (
    barrier,
    broadcast_from_rank0,
    process_group,
    world_from_environment,
)
from harness.errors import UserError
from harness.execution.determinism import threads_and_determinism
from harness.execution.precision import master_dtype, precision_within
from harness.models.registry import load_start_weights
from harness.outcome import State, recorded_state
from harness.plug_ins import modules_behind_results
from harness.resilience.stopping import StopRequest
from harness.resilience.watchdog import Watchdog
from harness.roll_call import roll_call
from harness.runs.environment import describe_environment
from harness.runs.exact_conditions import exact_conditions
from harness.runs.headline import read_headline
from harness.runs.run_folder import RunFolder
from harness.training.ending import Result, run_to_the_end
from harness.training.objective import build_objective
from harness.training.profiling import Profile
from harness.training.ready_rank import ReadyRank, prepare, ready_rank
from harness.training.replica import Replica
from harness.training.resume import Start, restore
from harness.training.run import Run
from harness.training.step import Step
from harness.training.tuning.cuda_graphs import tune_cuda_graphs
from harness.training.tuning.sums import check_deterministic, settle_sums


def train(
    config: Config,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    cli_overrides: Collection[str] = (),
    resume_command: str = "",
    stop: StopRequest | None = None,
) -> Result:
    """Run `config` on the ranks that the environment names; return its result on all of them.

    `out` is the run folder (runs/MODEL_MINIBATCH by default); `cli_overrides` the dotted keys given
    on the command line; `resume_command` is printed if the watchdog terminates the process; `stop`
    is shared with earlier stages. Signal handlers, number formats and hooks are restored. Raises
    UserError before anything is written; Stopped, Diverged and Fenced later.
    """
    folder = RunFolder(Path(out or f"runs/{config.model.name}_{config.recipe.minibatch}"))
    if resume and (result := finished_result(folder, config)):
        return result
    stop = stop or StopRequest()
    with ExitStack() as opened:
        opened.enter_context(stop.listen())
        opened.enter_context(precision_within(config.run.precision))
        rank = opened.enter_context(ready_rank(config, folder, resume, cli_overrides, stop))
        config, world, batch_plan, teacher = rank.config, rank.world, rank.batch_plan, rank.teacher
        watchdog = opened.enter_context(Watchdog(world, config.run.hang_timeout_s, stop))
        control = opened.enter_context(process_group(world, rank.store, config.run.hang_timeout_s))
        watchdog.join_ranks()
        checkpoint = broadcast_from_rank0(rank.checkpoint, control)
        loaded = load_start_weights(rank.model, rank.config) if checkpoint is None else None
        network = place_network(rank)
        profile = Profile(config.run.profile_steps, world, control, folder.path)
        replica = Replica(config, network, world, (watchdog, profile))
        opened.enter_context(threads_and_determinism(config.run, world.device))
        config = settle_sums(rank, replica, folder, control, watchdog)
        opened.enter_context(threads_and_determinism(config.run, world.device))  # now settled
        if config.run.sums == "exact":
            check_deterministic(replica)
        exact = exact_conditions(config.run, world.device)
        plug_ins = modules_behind_results(config)
        environment = describe_environment(world.device, world.world_size, plug_ins, exact)
        graphs = tune_cuda_graphs(replica, batch_plan.sizes, control, watchdog)
        step = Step(config, replica, batch_plan.micro_batches, build_objective(config, teacher))
        start = (
            restore(checkpoint, step, batch_plan, teacher, control)
            if checkpoint
            else Start(weights=loaded)
        )
        if world.rank == 0:
            folder.open(config, environment)  # last, as the heartbeat begins right after it
        barrier(control)
        parts = config, world, folder, step, batch_plan, rank.loader, control, stop, watchdog
        open_run = partial(Run, *parts, profile, start, graphs, teacher, rank.loggers)
        return run_to_the_end(open_run, world, folder, watchdog, stop, resume_command)


def place_network(rank: ReadyRank) -> nn.Module:
    """Move network and teacher to the device; return the network."""
    if rank.teacher is not None:
        rank.teacher.to(rank.world.device)
    return on_device(rank.model, rank.config, rank.world.device)


def train_stages(
    stages: Sequence[Stage],
    out: str | Path | None = None,
    *,
    resume: bool = False,
    resume_command: str = "",
) -> Result:
    """Train each teacher, unless it is finished, then the student.

    `out` and `resume` are those of the last stage, whose result is returned. Raises as `train`;
    mistakes in the last stage are found before the first one is trained.
    """
    *teachers, student = stages
    out, stop = out or student.folder, StopRequest()
    start = partial(train, resume_command=resume_command, stop=stop)
    with stop.listen():  # also between two stages
        if teachers and not (resume and finished_result(RunFolder(Path(out)), student.config)):
            with roll_call(student.config.run.hang_timeout_s, stop) as call:
                world = world_from_environment(student.config.run.device)
                batch_plan, config = prepare(student.config, world)
                if world.rank == 0:
                    RunFolder(Path(out)).check(config, resume, set(student.cli_overrides))
                call.present(student.config, world, batch_plan, Path(out))
            for stage in teachers:
                if world.rank == 0:
                    print(f"teacher  {stage.path}, run folder {stage.folder}", flush=True)
                start(stage.config, stage.folder, resume=True, cli_overrides=stage.cli_overrides)
        return start(student.config, out, resume=resume, cli_overrides=student.cli_overrides)


def cache_soft_targets(
    config: Config, teachers: Sequence[Stage], epochs: int, dtype: str, top: int | None
) -> Path:
    """Fill the folder `config.distill.cache` from its finished teacher, on all ranks."""
    with precision_within(config.run.precision):
        with roll_call(config.run.hang_timeout_s, StopRequest()) as call:
            world = world_from_environment(config.run.device)
            assert config.distill is not None
            # no cache to read from yet
            distill = config.distill.model_copy(update={"cache": None})
            batch_plan, prepared = prepare(config.model_copy(update={"distill": distill}), world)
            for stage in teachers[-1:]:
                if finished_result(RunFolder(stage.folder), stage.config) is None:
                    raise UserError(
                        f"distill.teacher: {stage.path}: {stage.folder} is no finished run of it; "
                        f"harness train {stage.path} --resume"
                    )
            call.present(config, world, batch_plan)
        config = config.model_copy(update={"run": prepared.run})
        with threads_and_determinism(config.run, world.device):
            return write_cache(config, batch_plan, world, epochs, dtype, top)


def finished_result(folder: RunFolder, config: Config) -> Result | None:
    """Return the result of a run that finished earlier under the same config, else None."""
    status = folder.read_status()
    if recorded_state(status) is not State.FINISHED:
        return None
    if curve_differences(load_config(folder.path / "config.yaml"), config):
        return None  # refused, with the keys, when the folder is checked
    digest = status.get("weights_sha256", "")
    return Result(read_headline(folder.path, status), folder.path, config, digest)


def on_device(model: nn.Module, config: Config, device: torch.device) -> nn.Module:
    """Move a model to `device`, in its master precision and memory format."""
    model = model.to(device, master_dtype(config.run.precision))
    return model.to(memory_format=torch.channels_last) if device.type == "cuda" else model
