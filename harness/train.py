"""The training loop, and how a run starts, resumes and ends."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from harness.config import Config, curve_differences, load_config
from harness.data.index import check_indices, load_index
from harness.data.loader import Feed, open_loader, resolve_loader, resolve_threads
from harness.distributed import (
    World,
    barrier,
    idle_gpus,
    lost_rank,
    process_group,
    world_from_environment,
)
from harness.errors import RunFailed
from harness.interrupt import Agreement, Stopped, StopRequest
from harness.models import build_model
from harness.recipe.minibatch import Minibatch
from harness.run import Run, choose_checkpoint
from harness.run_folder import Fenced, RunFolder, describe_environment
from harness.step import Step, set_precision


@dataclass(frozen=True)
class Result:
    """The end of a run. `error`: median top-1 error in % over the final 5 epochs."""

    error: float
    folder: Path
    config: Config


def run_steps(run: Run) -> None:
    """The loop, from the run's first step to its last. Raises Stopped and Diverged."""
    config, done = run.config, run.first_step
    agreement = Agreement(run.control)
    batches = run.loader.train(run.first_step)
    for step in range(run.first_step, config.total_steps):
        run.step(step, batches)
        done = step + 1
        stop, save = agreement.after_step(run.stop.signal is not None, run.checkpoint_is_due())
        epoch_ends = done % config.steps_per_epoch == 0
        if stop or save or epoch_ends or done % config.run.log_every_steps == 0:
            run.log_line(done)  # synchronises
        if epoch_ends and run.evaluation_is_due(done):
            run.evaluate(done)  # synchronises
        if stop or save or epoch_ends:
            run.save(done)  # synchronises
        if stop:
            break
    agreement.close()
    if done < config.total_steps:
        raise Stopped(f"stopped after step {done} of {config.total_steps}, checkpoint written")


def train(
    config: Config,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    typed: Collection[str] = (),
) -> Result:
    """Runs `config` on the ranks that the environment names, and returns its result on all.

    `out` is the run folder (runs/MODEL_MINIBATCH by default); `typed` the dotted keys given on the
    command line.
    Raises UserError before anything is written; Stopped, Diverged and Fenced later.
    """
    world = world_from_environment(config.run.device)
    folder = RunFolder(Path(out or f"runs/{config.model.name}_{config.recipe.minibatch}"))
    if resume and (result := finished_result(folder, config)):
        return result
    set_precision(config.run.precision)
    feed, config = prepare(config, world)
    going_on = world.rank == 0 and folder.check(config, resume, set(typed))
    cuda = world.device.type == "cuda"
    model = build_model(config, channels_last=cuda)
    loader = open_loader(config, feed, config.run.loader, int(config.run.loader_threads), cuda)
    stop = StopRequest()
    timeout_s = config.run.hang_timeout_s
    with stop.listen(), closing(loader), process_group(world, timeout_s) as control:
        model = on_device(model, config, world.device)
        step = Step(config, model, world, feed.micro_batches)
        if world.rank == 0:
            if idle := idle_gpus(world):
                print(idle, flush=True)
            folder.open(config, describe_environment(world.device))
        barrier(control)
        checkpoint = choose_checkpoint(folder, going_on, control)
        run = Run(config, world, folder, step, feed, loader, control, stop)
        if checkpoint is not None:
            run.restore(checkpoint)
        return run_to_the_end(run)


def finished_result(folder: RunFolder, config: Config) -> Result | None:
    """The result of a run that was finished before, under the same config."""
    status = folder.read_status()
    if status.get("state") != "finished":
        return None
    if curve_differences(load_config(folder.path / "config.yaml"), config):
        return None  # refused, with the keys, when the folder is checked
    return Result(status["error"], folder.path, config)


def prepare(config: Config, world: World) -> tuple[Feed, Config]:
    """What can be found wrong before any process group: data, ranks, micro-batch.

    Returns the rank's feed, and the config with "auto" resolved where the machine decides.
    Raises UserError.
    """
    run, minibatch = config.run, Minibatch(config.workers, config.recipe.worker_batch)
    local_workers = len(minibatch.workers_of(world.rank, world.world_size))
    train_index, val_index = (load_index(run.data_root, split) for split in ("train", "val"))
    check_indices(train_index, val_index, config)
    micro_batch = minibatch.micro_batch_images(local_workers, run.micro_batch)
    resolved = {
        "loader": resolve_loader(run.loader, world.rank),
        "loader_threads": resolve_threads(run.loader_threads, world.local_world_size),
        "micro_batch": micro_batch,
        "compile": run.compile is True,  # "auto" is off until it is measured on a GPU
    }
    config = config.model_copy(update={"run": run.model_copy(update=resolved)})
    cuda = world.device.type == "cuda"
    ranks = world.rank, world.world_size
    return Feed(config, train_index, val_index, *ranks, micro_batch, cuda), config


def on_device(model: nn.Module, config: Config, device: torch.device) -> nn.Module:
    """The model in its master precision and memory format on `device`."""
    model = model.to(device, torch.float64 if config.run.precision == "float64" else torch.float32)
    return model.to(memory_format=torch.channels_last) if device.type == "cuda" else model


def run_to_the_end(run: Run) -> Result:
    """The loop within its log and its status; rank 0 records how it ended."""
    record = run.folder.write_status if run.world.rank == 0 else lambda state, **values: None
    try:
        run.open_journal()
        record("running", step=run.first_step, total_steps=run.config.total_steps)
        run.evaluate_if_missing()
        run_steps(run)
        error = run.final_error()
        run.journal.event("finish", run.config.total_steps, error=error)
        record(
            "finished", step=run.config.total_steps, error=error, expected=run.config.expect.error
        )
        return Result(error, run.folder.path, run.config)
    except Stopped as stopped:
        record("stopped", reason=str(stopped))
        raise
    except Fenced:
        raise  # the folder is another incarnation's
    except Exception as error:
        if lost := lost_rank(error):
            error = RunFailed(f"another rank was lost or is silent: {lost}")
        record("failed", reason=(str(error).splitlines() or [repr(error)])[0])
        raise error
    finally:
        run.journal.close()
