"""Set up a run, train it to its end, and record how it ended."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import (
    AbstractContextManager,
    ExitStack,
    closing,
    contextmanager,
    nullcontext,
    suppress,
)
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from harness.config.loading import curve_differences, load_config
from harness.config.schema import Config
from harness.config.stages import Stage
from harness.data.batch_plan import BatchPlan
from harness.data.loaders.choice import open_loader, resolve_loader, resolve_threads
from harness.data.sources.folder import load_indices
from harness.distillation.logit_cache import crop_epochs, open_teacher, write_cache
from harness.distributed import (
    World,
    barrier,
    broadcast_from_rank0,
    idle_gpus,
    describe_peer_loss,
    process_group,
    world_from_environment,
)
from harness.errors import FAILED, STOPPED, RunFailed, UserError
from harness.execution.precision import set_precision
from harness.models.registry import build_without_weights, check_model, load_start_weights
from harness.recipe.minibatch import Minibatch
from harness.resilience.stopping import Stopped, StopRequest
from harness.resilience.watchdog import Phase, Watchdog
from harness.roll_call import roll_call
from harness.runs.environment import describe_environment
from harness.runs.headline import Headline, headline, read_headline
from harness.runs.run_folder import Fenced, RunFolder
from harness.training.loop import run_steps
from harness.training.objective import build_objective
from harness.training.run import Run, choose_checkpoint
from harness.training.step import Step
from harness.training.tuning.cuda_graphs import try_graphs
from harness.training.tuning.malloc import keep_freed_memory
from harness.training.tuning.micro_batch import fastest_micro_batch


@dataclass(frozen=True)
class Result:
    """The end of a run."""

    headline: Headline
    folder: Path
    config: Config

    @property
    def error(self) -> float:
        """Top-1 validation error in %, the median over the final epochs (`headline.rule`)."""
        return self.headline.error


def train(
    config: Config,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    typed: Collection[str] = (),
    resume_command: str = "",
    stop: StopRequest | None = None,
) -> Result:
    """Runs `config` on the ranks that the environment names, and returns its result on all.

    `out` is the run folder (runs/MODEL_MINIBATCH by default); `typed` the dotted keys given on the
    command line; `resume_command` is what to tell where the watchdog ends the process; `stop` is
    shared with the stages before.
    Raises UserError before anything is written; Stopped, Diverged and Fenced later.
    """
    folder = RunFolder(Path(out or f"runs/{config.model.name}_{config.recipe.minibatch}"))
    if resume and (result := finished_result(folder, config)):
        return result
    measured = config.run.micro_batch == "auto"
    stop, timeout_s = stop or StopRequest(), config.run.hang_timeout_s
    with ExitStack() as opened:
        opened.enter_context(stop.listen())
        with roll_call(timeout_s, stop) as call:  # what one rank finds wrong here ends all
            world = world_from_environment(config.run.device)
            set_precision(config.run.precision)
            if world.device.type == "cpu":
                keep_freed_memory()
            as_given = config
            feed, config = prepare(config, world)
            resuming, checkpoint = False, None
            if world.rank == 0:
                resuming, checkpoint = find_start(folder, config, resume, typed, stop)
            cuda, threads = world.device.type == "cuda", int(config.run.loader_threads)
            model = build_without_weights(config, channels_last=cuda)
            teacher = open_teacher(config, feed, world)
            loader = open_loader(config, feed, config.run.loader, threads, cuda)
            opened.enter_context(closing(loader))
            identity = teacher.identity if teacher else None
            call.present(as_given, world, feed, folder.path, identity)
        watchdog = opened.enter_context(Watchdog(world, timeout_s, stop))
        control = opened.enter_context(process_group(world, call.store, timeout_s))
        watchdog.join_ranks()
        checkpoint = broadcast_from_rank0(checkpoint, control)
        if checkpoint is None:
            load_start_weights(model, config)
        model = on_device(model, config, world.device)
        if teacher is not None:
            teacher.to(world.device)
        step = Step(config, model, world, feed.micro_batches, build_objective(config, teacher))
        watchdog.reductions = step.reductions
        environment = describe_environment(world.device, world.world_size)
        if measured:
            keep = resuming and "run.micro_batch" not in typed
            kept = folder.recorded_micro_batch(environment) if keep else None
            config = tune_micro_batch(config, kept, step, feed, world, control, watchdog)
        tune_cuda_graphs(step, feed, control, watchdog)
        run = Run(config, world, folder, step, feed, loader, control, stop, watchdog, teacher)
        if checkpoint is not None:
            run.restore(checkpoint)
        if world.rank == 0:
            if idle := idle_gpus(world):
                print(idle, flush=True)
            folder.open(config, environment)  # last, as the heartbeat begins right after it
        barrier(control)
        return run_to_the_end(run, resume_command)


def find_start(
    folder: RunFolder, config: Config, resume: bool, typed: Collection[str], stop: StopRequest
) -> tuple[bool, Path | None]:
    """Rank 0: return whether the run resumes, and from which checkpoint; write nothing.

    May wait while another process is perhaps still running it. Raises UserError and Stopped.
    """
    resuming = folder.check(config, resume, set(typed))
    folder.ownership.wait_until_free(stop)
    return resuming, choose_checkpoint(folder) if resuming else None


def train_stages(
    stages: Sequence[Stage],
    out: str | Path | None = None,
    *,
    resume: bool = False,
    resume_command: str = "",
) -> Result:
    """Trains each teacher, or goes on with it, or takes it over as it is; then the student.

    `out` and `resume` are those of the last stage, whose result is returned. Raises as `train`;
    what is wrong with the last stage is found before the first is trained.
    """
    *teachers, student = stages
    out, stop = out or student.folder, StopRequest()
    how: Any = {"resume_command": resume_command, "stop": stop}
    with stop.listen():  # also between two stages
        if teachers and not (resume and finished_result(RunFolder(Path(out)), student.config)):
            with roll_call(student.config.run.hang_timeout_s, stop) as call:
                world = world_from_environment(student.config.run.device)
                feed, config = prepare(student.config, world)
                if world.rank == 0:
                    RunFolder(Path(out)).check(config, resume, set(student.typed))
                call.present(student.config, world, feed, Path(out))
            for stage in teachers:
                if world.rank == 0:
                    print(f"teacher  {stage.path}, run folder {stage.folder}", flush=True)
                train(stage.config, stage.folder, resume=True, typed=stage.typed, **how)
        return train(student.config, out, resume=resume, typed=student.typed, **how)


def cache_soft_targets(
    config: Config, teachers: Sequence[Stage], epochs: int, dtype: str, top: int | None
) -> Path:
    """Fills the folder `config.distill.cache` by its finished teacher, on all ranks."""
    with roll_call(config.run.hang_timeout_s, StopRequest()) as call:
        world = world_from_environment(config.run.device)
        set_precision(config.run.precision)
        assert config.distill is not None
        # no cache to read from yet
        distill = config.distill.model_copy(update={"cache": None})
        feed, prepared = prepare(config.model_copy(update={"distill": distill}), world)
        for stage in teachers[-1:]:
            if finished_result(RunFolder(stage.folder), stage.config) is None:
                raise UserError(
                    f"distill.teacher: {stage.path}: {stage.folder} is no finished run of it; "
                    f"harness train {stage.path} --resume"
                )
        call.present(config, world, feed)
    config = config.model_copy(update={"run": prepared.run})
    return write_cache(config, feed, world, epochs, dtype, top)


def finished_result(folder: RunFolder, config: Config) -> Result | None:
    """The result of a run that was finished before, under the same config."""
    status = folder.read_status()
    if status.get("state") != "finished":
        return None
    if curve_differences(load_config(folder.path / "config.yaml"), config):
        return None  # refused, with the keys, when the folder is checked
    return Result(read_headline(folder.path, status), folder.path, config)


def prepare(config: Config, world: World) -> tuple[BatchPlan, Config]:
    """What can be found wrong before any process group: network, data, ranks, micro-batch.

    Returns the rank's feed, and the config with "auto" resolved where the machine decides.
    Raises UserError.
    """
    check_model(config)
    run, minibatch = config.run, Minibatch(config.workers, config.recipe.worker_batch)
    local_workers = len(minibatch.workers_of(world.rank, world.world_size))
    train_index, val_index = load_indices(config)
    micro_batch = minibatch.micro_batch_images(local_workers, run.micro_batch)
    cuda = world.device.type == "cuda"
    resolved = {
        "loader": resolve_loader(run.loader, world.rank),
        "loader_threads": resolve_threads(run.loader_threads, world.local_world_size),
        "micro_batch": micro_batch,
        "compile": cuda if run.compile == "auto" else run.compile,
    }
    config = config.model_copy(update={"run": run.model_copy(update=resolved)})
    ranks, crops = (world.rank, world.world_size), crop_epochs(config)
    return BatchPlan(config, train_index, val_index, *ranks, micro_batch, cuda, crops), config


def tune_micro_batch(
    config: Config,
    kept: int | None,
    step: Step,
    feed: BatchPlan,
    world: World,
    control: dist.ProcessGroup | None,
    watchdog: Watchdog,
) -> Config:
    """`config` with run.micro_batch as `kept` of rank 0 says, else as measured by all ranks.

    Sets it in `step` and `feed`.
    """
    images, how = broadcast_from_rank0(kept, control), "as recorded by this run"
    if images is None:
        how = "measured as the fastest"
        images = fastest_micro_batch(
            step,
            feed.minibatch,
            world.world_size,
            control,
            lambda tried: watchdog.enter_phase(0, Phase.STARTING, tried),
        )
    feed.use_micro_batch(images)
    step.micro_batches = len(feed.micro_batches)
    if world.rank == 0:
        print(
            f"micro-batch  {feed.micro_batch} images a rank, {how}; rounding, and with it the "
            f"error, depends on it: repeat with run.micro_batch={feed.micro_batch}",
            flush=True,
        )
    run = config.run.model_copy(update={"micro_batch": feed.micro_batch})
    return config.model_copy(update={"run": run})


def tune_cuda_graphs(
    step: Step, feed: BatchPlan, control: dist.ProcessGroup | None, watchdog: Watchdog
) -> None:
    """On GPUs, where `run.compile` is on: passes are replayed if that is faster."""
    if step.device.type == "cuda" and step.config.run.compile is True:
        watchdog.enter_phase(0, Phase.STARTING, 2 * feed.micro_batch)  # after what tune_micro_batch tried
        try_graphs(step, feed.sizes, control)


def on_device(model: nn.Module, config: Config, device: torch.device) -> nn.Module:
    """The model in its master precision and memory format on `device`."""
    model = model.to(device, torch.float64 if config.run.precision == "float64" else torch.float32)
    return model.to(memory_format=torch.channels_last) if device.type == "cuda" else model


def run_to_the_end(run: Run, resume_command: str) -> Result:
    """The loop within its log and its status; rank 0 records how it ended."""
    total_steps = run.config.total_steps
    with status_kept(run, resume_command) as record:
        run.open_journal()
        with closing(run):
            record("running", step=run.first_step, total_steps=total_steps)
            run.evaluate_teacher()
            run.evaluate_if_missing()
            run_steps(run)
            result = headline(run.config, run.errors)
            if (saved := run.saved(total_steps)) != "checkpoint written":
                raise RunFailed(f"error {result.error:.2f} %, but {saved}; make room and resume")
            run.remove_surplus_checkpoints()
            run.journal.event("finish", total_steps, **result.as_mapping())
        expect = run.config.expect
        expected = None if expect is None else expect.error
        record("finished", step=total_steps, **result.as_mapping(), expected=expected)
        return Result(result, run.folder.path, run.config)


@contextmanager
def status_kept(run: Run, resume_command: str) -> Iterator[Callable[..., object]]:
    """Yields what writes the run's status, on rank 0; within, the status is kept fresh, and an
    exception is recorded and made the one that tells why the run ended."""
    record: Callable[..., object] = lambda state, **values: None  # noqa: E731
    heartbeat: AbstractContextManager[None] = nullcontext()
    if run.world.rank == 0:
        record = run.folder.write_status
        run.watchdog.record = partial(record_hang, run.folder, resume_command)
        heartbeat = run.folder.heartbeat(lambda why: run.watchdog.terminate(FAILED, why))
    with heartbeat:
        try:
            yield record
        except Fenced:
            raise  # the folder is another incarnation's
        except Exception as error:
            ended = why_it_ended(run, error)
            state = "stopped" if isinstance(ended, Stopped) else "failed"
            record(state, reason=(str(ended).splitlines() or [repr(ended)])[0])
            raise ended from (None if ended is error else error)


def record_hang(folder: RunFolder, resume_command: str, state: str, why: str) -> None:
    """The watchdog ends rank 0: its status, and how to go on."""
    print(f"to go on: {resume_command or 'the same with resume=True'}", file=sys.stderr, flush=True)
    with suppress(Fenced):  # a newer incarnation keeps the status
        folder.write_status(state, reason=why)


def why_it_ended(run: Run, error: Exception) -> Exception:
    """A lost rank is named; while the run was to stop anyway, it is no failure."""
    if not (lost := describe_peer_loss(error)):
        return error
    code, why = run.watchdog.diagnose(lost)
    if code == STOPPED:
        return Stopped(why)
    if run.stop.signal is not None:
        return Stopped(f"{why}, while the run was to stop; the newest checkpoint stands")
    return RunFailed(why)
