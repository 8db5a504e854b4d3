"""A rank before the process group exists: what it validates and opens by itself."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch import nn

from harness.config.schema import Config
from harness.data.batch import Loader
from harness.data.batch_plan import BatchPlan
from harness.data.dataset import open_dataset
from harness.data.loaders.choice import open_loader, resolve_loader, resolve_threads
from harness.distillation.logit_cache import crop_epochs, open_teacher
from harness.distillation.teacher import AnyTeacher
from harness.distributed import World, idle_gpus, world_from_environment
from harness.models.registry import build_without_weights, check_model
from harness.numa import near_gpu
from harness.recipe.minibatch import Minibatch
from harness.resilience.stopping import StopRequest
from harness.roll_call import roll_call
from harness.runs.logging.installed import load_loggers
from harness.runs.logging.sink import OpenSink
from harness.runs.run_folder import RunFolder
from harness.training.resume import choose_checkpoint


@dataclass(frozen=True)
class ReadyRank:
    """A rank that has passed the roll call. `config`: with "auto" resolved where it decides itself.

    `model` is on the CPU, without weights. `checkpoint`, `loggers` and what a resume takes over are
    rank 0's; `store` is where the ranks met (None: a single rank).
    """

    config: Config
    world: World
    batch_plan: BatchPlan
    model: nn.Module
    loader: Loader
    teacher: AnyTeacher | None
    loggers: Mapping[str, OpenSink]
    checkpoint: Path | None
    tunes_micro_batch: bool  # run.micro_batch: auto
    keeps_micro_batch: bool  # a resume takes the size that the run has recorded
    recorded_sums: str | None  # a resume takes those of the run
    store: dist.Store | None


@contextmanager
def ready_rank(
    config: Config,
    folder: RunFolder,
    resume: bool,
    cli_overrides: Collection[str],
    stop: StopRequest,
) -> Iterator[ReadyRank]:
    """Validate and open what a run needs; whatever one rank finds wrong here ends all of them.

    Within, the loader is open. Raises UserError, RunFailed and Stopped; writes nothing.
    """
    tunes = config.run.micro_batch == "auto" and config.run.sums != "exact"
    with ExitStack() as opened:
        with roll_call(config.run.hang_timeout_s, stop) as call:
            world = world_from_environment(config.run.device)
            as_given = config
            batch_plan, config = prepare(config, world)
            resuming, checkpoint, loggers = False, None, {}
            if world.rank == 0:
                loggers = load_loggers(config.run.loggers)
                resuming, checkpoint = find_start(folder, config, resume, cli_overrides, stop)
            cuda, threads = world.device.type == "cuda", int(config.run.loader_threads)
            model = build_without_weights(config, channels_last=cuda)
            teacher = open_teacher(config, batch_plan, world)
            opened.enter_context(near_gpu(world.device))  # the loader's threads, too
            loader = open_loader(config, batch_plan, config.run.loader, threads, cuda)
            opened.enter_context(closing(loader))
            identity = teacher.identity if teacher else None
            call.present(as_given, world, batch_plan, folder.path, identity)
        if world.rank == 0 and (idle := idle_gpus(world)):
            print(idle, flush=True)
        keeps = resuming and "run.micro_batch" not in cli_overrides
        sums = folder.recorded_sums() if resuming and "run.sums" not in cli_overrides else None
        parts = config, world, batch_plan, model, loader, teacher, loggers, checkpoint
        yield ReadyRank(*parts, tunes, keeps, sums, call.store)


def find_start(
    folder: RunFolder,
    config: Config,
    resume: bool,
    cli_overrides: Collection[str],
    stop: StopRequest,
) -> tuple[bool, Path | None]:
    """Rank 0: return whether the run resumes, and from which checkpoint; write nothing.

    May wait for another process that is perhaps still running it. Raises UserError and Stopped.
    """
    resuming = folder.check(config, resume, set(cli_overrides))
    folder.ownership.wait_until_free(stop)
    return resuming, choose_checkpoint(folder.path) if resuming else None


def prepare(config: Config, world: World) -> tuple[BatchPlan, Config]:
    """Validate network, data, ranks and micro-batch before creating the process group.

    Returns the rank's batch plan, and the config with "auto" resolved where the machine decides.
    Raises UserError.
    """
    check_model(config)
    run, minibatch = config.run, Minibatch.of(config)
    local_workers = len(minibatch.workers_of(world.rank, world.world_size))
    train_index, val_index = open_dataset(config)
    micro_batch = minibatch.micro_batch_images(local_workers, run.micro_batch)
    if run.sums == "exact":
        micro_batch = minibatch.unit_images
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
