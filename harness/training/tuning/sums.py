"""How sums are made: exact, where that costs little, or fast; and what forbids exact ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.compat import undetermined_operation
from harness.config.schema import Config
from harness.data.batch_plan import BatchPlan
from harness.distributed import broadcast_from_rank0, first_reason, max_over_ranks
from harness.errors import UserError
from harness.execution.determinism import threads_and_determinism
from harness.recipe.minibatch import Minibatch
from harness.resilience.watchdog import Phase, Watchdog
from harness.runs.environment import describe_environment
from harness.runs.exact_conditions import exact_conditions
from harness.runs.run_folder import RunFolder
from harness.training.gradients import StepSums
from harness.training.ready_rank import ReadyRank
from harness.training.replica import Replica
from harness.training.tuning.micro_batch import random_pixels, tune_micro_batch

COST = 0.03  # by which exact sums may lengthen a step where `run.sums` is auto
REPEATS = 5
LONGEST_S = 1.0  # of the passes that are timed together


def with_sums(config: Config, sums: Literal["exact", "fast"]) -> Config:
    """Return the config with sums made so; a pass of exact ones is a unit."""
    changed: dict[str, object] = {"sums": sums}
    if sums == "exact":
        changed["micro_batch"] = Minibatch.of(config).unit_images
    return config.model_copy(update={"run": config.run.model_copy(update=changed)})


def settle_sums(
    rank: ReadyRank,
    replica: Replica,
    folder: RunFolder,
    control: dist.ProcessGroup | None,
    watchdog: Watchdog,
) -> Config:
    """Settle `run.sums` and `run.micro_batch`, in `replica` and the batch plan; return the config.

    `auto` takes what the run in `folder` has taken before, else what is measured. Raises UserError
    where a run with exact sums cannot continue so.
    """
    config, batch_plan = rank.config, rank.batch_plan
    if config.run.sums == "exact":
        return config
    recorded = broadcast_from_rank0(rank.recorded_sums, control)
    exact = with_sums(config, "exact")
    reason = ""
    if config.run.sums == "auto" and recorded != "fast":
        reason = why_fast(config, rank.tunes_micro_batch) or other_conditions(exact, rank, control)
    if config.run.sums == "auto" and recorded == "exact":
        if reason:
            raise UserError(
                f"{folder.path}: ran with exact sums, but {reason}; type run.sums=fast to continue "
                "with others"
            )
        settled = batch_plan.settle(exact)
        replica.settle(settled, replica.build_sums(settled))
        return settled
    if rank.tunes_micro_batch:
        micro_batch = recorded_micro_batch(rank, folder)
        config = tune_micro_batch(replica, batch_plan, micro_batch, control, watchdog)
    if config.run.sums == "auto" and recorded is None and not reason:
        return tune_sums(config, replica, batch_plan, control, watchdog)
    if reason and rank.world.rank == 0:
        print(f"sums  fast: {reason}", flush=True)
    settled = batch_plan.settle(with_sums(config, "fast"))
    replica.settle(settled, replica.sums)
    return settled


def recorded_micro_batch(rank: ReadyRank, folder: RunFolder) -> int | None:
    """Return the micro-batch that this run has measured before on such ranks, on rank 0."""
    if not rank.keeps_micro_batch:
        return None
    return folder.recorded_micro_batch(
        describe_environment(rank.world.device, rank.world.world_size)
    )


def why_fast(config: Config, any_micro_batch: bool) -> str:
    """Return the key that rules exact sums out where `run.sums` is auto, or ""."""
    unit = Minibatch.of(config).unit_images
    if config.run.gradient_precision == "bfloat16":
        return "run.gradient_precision is bfloat16"
    if not any_micro_batch and config.run.micro_batch != unit:
        return f"run.micro_batch is {config.run.micro_batch} images, those of a unit are {unit}"
    return ""


def other_conditions(exact: Config, rank: ReadyRank, control: dist.ProcessGroup | None) -> str:
    """Return how the first rank's conditions for exact sums differ from those of rank 0, or ""."""
    own = exact_conditions(exact.run, rank.world.device)
    wanted = broadcast_from_rank0(own, control)
    differing = [
        f"{name} is {own.get(name)}, on rank 0 {wanted[name]}"
        for name in wanted
        if own.get(name) != wanted[name]
    ]
    reason = f"on rank {rank.world.rank} the {differing[0]}" if differing else ""
    return first_reason(reason, control)


def tune_sums(
    config: Config,
    replica: Replica,
    batch_plan: BatchPlan,
    control: dist.ProcessGroup | None,
    watchdog: Watchdog,
) -> Config:
    """Measure what exact sums cost, and settle `replica` and `batch_plan` on exact or fast ones.

    Returns the config with `run.sums` settled. All ranks must call it together, and come to the
    same result.
    """
    watchdog.enter_phase(0, Phase.STARTING, max(batch_plan.sizes) + 1)
    fast, exact = with_sums(config, "fast"), with_sums(config, "exact")
    fast_sums, exact_sums = replica.sums, replica.build_sums(exact)

    def seconds(config: Config, sums: StepSums, sizes: Sequence[int]) -> float:
        with threads_and_determinism(config.run, replica.device), replica.summing(sums):
            return _seconds_of_passes(replica, sizes)

    fast_s, exact_s = _compare(
        partial(seconds, fast, fast_sums),
        partial(seconds, exact, exact_sums),
        batch_plan.sizes,
        Minibatch.of(config).unit_images,
        control,
    )
    cost = exact_s / fast_s - 1
    chosen, sums = (exact, exact_sums) if cost <= COST else (fast, fast_sums)
    if replica.world.rank == 0:
        beside = f"{1000 * exact_s:.3g} ms against {1000 * fast_s:.3g} ms, {100 * cost:+.1f} %"
        unit = exact.run.micro_batch
        text = f"exact, in passes of {unit} images: {beside}; the same bits on any number of ranks"
        if chosen is fast:
            text = f"fast: exact ones take {beside}; run.sums=exact has them nevertheless"
        print(f"sums  {text}", flush=True)
    if chosen is fast:
        exact_sums.close()
    settled = batch_plan.settle(chosen)
    replica.settle(settled, sums)
    return settled


def _compare(
    fast: Callable[[Sequence[int]], float],
    exact: Callable[[Sequence[int]], float],
    sizes: Sequence[int],
    unit: int,
    control: dist.ProcessGroup | None,
) -> tuple[float, float]:
    """Return the seconds of the same images with fast and with exact sums, on the slowest rank.

    They are the images of a step, or of its first micro-batches where a step takes long; the best
    of a few alternating measurements counts.
    """
    (first_s,) = max_over_ranks([fast(sizes[:1])], control)
    timed = sizes[: max(int(LONGEST_S / first_s), 1)]
    units = [unit] * max(sum(timed) // unit, 1)
    (warm_s,) = max_over_ranks([exact(units)], control)
    rounds = REPEATS if warm_s < LONGEST_S else 1
    times = [(fast(timed), exact(units)) for _ in range(rounds)]
    fast_s, exact_s = max_over_ranks([min(column) for column in zip(*times, strict=True)], control)
    return fast_s, exact_s


def _seconds_of_passes(replica: Replica, sizes: Sequence[int]) -> float:
    """Time passes of so many images each, and their sum over the ranks."""
    pixels = {images: _pixels(replica, images) for images in set(sizes)}
    start_s = time.perf_counter()
    for number, images in enumerate(sizes, 1):
        replica.dry_pass(pixels[images], is_last=number == len(sizes))
    if replica.device.type == "cuda":
        torch.cuda.synchronize(replica.device)
    seconds = time.perf_counter() - start_s
    replica.forget_dry_passes()
    return seconds


def check_deterministic(replica: Replica) -> None:
    """Raise UserError where a pass needs an operation without a deterministic implementation."""
    pixels = _pixels(replica, Minibatch.of(replica.config).unit_images)
    try:
        replica.dry_pass(pixels)
    except RuntimeError as error:
        if not (operation := undetermined_operation(error)):
            raise
        module = _module_of_failure(replica.network, lambda: replica.dry_pass(pixels))
        raise UserError(
            f"run.sums: exact, but {operation} in {module} has no deterministic implementation "
            "here; replace it, or set run.sums=fast"
        ) from error
    finally:
        replica.forget_dry_passes()


def _module_of_failure(network: nn.Module, failing: Callable[[], object]) -> str:
    """Repeat a failing pass; return the module whose forward or backward pass raised."""
    running, names = [], {module: name for name, module in network.named_modules()}

    def enter(module: nn.Module, inputs: object) -> None:
        running.append(module)

    def leave(module: nn.Module, inputs: object, output: object) -> None:
        running.pop()
        if isinstance(output, Tensor) and output.grad_fn is not None:
            output.grad_fn.register_prehook(lambda gradients: running.append(module))

    hooks = [module.register_forward_pre_hook(enter) for module in names]
    hooks += [module.register_forward_hook(leave) for module in names]
    try:
        failing()
    except RuntimeError:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    module = running[-1]
    return f"{names[module] or 'the network'} ({type(module).__name__})"


def _pixels(replica: Replica, images: int) -> Tensor:
    return random_pixels(images, replica.config.data.crop, replica.device)
