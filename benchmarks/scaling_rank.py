"""One rank of the scaling benchmark: the same step on the first 1, 2, … N ranks of a job.

    torchrun --nproc-per-node 8 -m benchmarks.scaling_rank CONFIG [key=value …] --out FILE.json
    srun --nodes 4 --ntasks-per-node 8 python -m benchmarks.scaling_rank CONFIG … --out FILE.json

The harness's own step trains CONFIG's network on random images. Weak scaling keeps the
images per rank (one micro-batch), strong scaling the config's minibatch. `--waits` replaces
CONFIG if hosts outnumber cores: layers whose compute is a wait, with real gradients, DDP and
the harness's sum of them.

Each point alternates blocks of steps by all ranks together with the same work by each rank alone,
at the same time; a block is timed on its slowest rank. The difference is the exposed
communication.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.conditions import at_least_two, conditions, spread
from benchmarks.hosts import shape_this_host
from harness.compat import buffer_sync_off
from harness.config.loading import load_config
from harness.config.schema import Config
from harness.data.batch import Batch
from harness.distributed import (
    World,
    world_from_environment,
)
from harness.errors import UserError
from harness.execution.precision import set_precision
from harness.models.registry import build_model
from harness.output_file import check_output, write_output
from harness.planning.step_time_model import MIB
from harness.recipe.minibatch import Minibatch
from harness.slurm_step import use_slurm_rendezvous
from harness.training.gradients import GradientReducer
from harness.training.replica import Replica
from harness.training.step import Step
from harness.training.tuning.cuda_graphs import try_graphs
from harness.training.tuning.malloc import keep_freed_memory

Block = Callable[[int], None]  # runs a number of steps
WARM_UP_STEPS = 3  # DDP rebuilds its buckets after the first
PATIENCE = timedelta(hours=1)  # time-out of ranks that wait for a smaller world
# the waits' network: equal layers, a backward pass twice the forward
LAYERS, GRADIENT_BYTES, BUCKET_BYTES, WAIT_S = 16, 2 * MIB, MIB // 2, 0.2


class _Wait(torch.autograd.Function):
    """A layer that waits for a set time, and returns a given gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gradient: Tensor, wait_s: float) -> Tensor:
        ctx.gradient, ctx.wait_s = gradient, 2 * wait_s
        time.sleep(wait_s)
        return x + weight[0]

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        time.sleep(ctx.wait_s)
        return outputs[0], ctx.gradient, None, None


class Waits(nn.Module):
    """LAYERS layers that wait for `wait_s` in total, a third of it in the forward pass."""

    def __init__(self, gradient_bytes: int = GRADIENT_BYTES) -> None:
        super().__init__()
        self.wait_s = WAIT_S
        numbers = gradient_bytes // LAYERS // 4
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(numbers)) for _ in range(LAYERS))
        self.gradient = torch.ones(numbers)

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = _Wait.apply(x, weight, self.gradient, self.wait_s / LAYERS / 3)
        return x


def wait_blocks(world: World) -> dict[str, Block]:
    """Return blocks of the waits, with the ranks together and alone."""

    def block_of(model: nn.Module) -> Block:
        def block(steps: int) -> None:
            for _ in range(steps):
                model(torch.zeros(1)).sum().backward()
                model.zero_grad(set_to_none=True)

        return block

    ddp = DistributedDataParallel(
        Waits(),
        gradient_as_bucket_view=True,
        bucket_cap_mb=BUCKET_BYTES / MIB,
        **buffer_sync_off(),  # type: ignore[arg-type]
    )
    GradientReducer().register(ddp)
    return {"together": block_of(ddp), "alone": block_of(Waits())}


def step_blocks(config: Config, world: World) -> dict[str, Block]:
    """Return blocks of the harness's step, with the ranks together and alone."""
    recipe, cuda = config.recipe, world.device.type == "cuda"
    compile = cuda if config.run.compile == "auto" else config.run.compile
    config = config.model_copy(update={"run": config.run.model_copy(update={"compile": compile})})
    set_precision(config.run.precision)
    if not cuda:
        keep_freed_memory()
    minibatch = Minibatch.of(config)
    local_workers = len(minibatch.workers_of(world.rank, world.world_size))
    size = minibatch.micro_batch_images(local_workers, config.run.micro_batch)
    micro_batches = minibatch.micro_batches(world.rank, world.world_size, size)
    sizes = [len(workers) * recipe.worker_batch for workers in micro_batches]
    alone = World(0, 1, world.local_rank, world.local_world_size, "alone", world.device)

    def block_of(place: World) -> Block:
        layout = torch.channels_last if cuda else torch.contiguous_format
        model = build_model(config, channels_last=cuda).to(world.device).to(memory_format=layout)
        replica, numbers = Replica(config, model, place), itertools.count()
        if cuda and compile:
            try_graphs(replica, sizes, messages_of(place))
        step = Step(config, replica, micro_batches)
        batches = random_batches(config, sizes)

        def block(steps: int) -> None:
            for _ in range(steps):
                step(next(numbers) % config.total_steps, batches)
            if cuda:
                torch.cuda.synchronize()

        return block

    return {"together": block_of(world), "alone": block_of(alone)}


def messages_of(world: World) -> dist.ProcessGroup | None:
    """Create a group for small CPU messages, as in a run."""
    if world.world_size == 1:
        return None
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)  # this rank is a member
    return group


def random_batches(config: Config, sizes: list[int]) -> Iterator[Batch]:
    """Yield micro-batches of these sizes in turn, endlessly, with pixels drawn once."""
    shape = (max(sizes), 3, config.data.crop, config.data.crop)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, config.data.classes, shape[:1], generator=generator)
    for size in itertools.cycle(sizes):
        yield Batch(images[:size], labels[:size], ids=torch.arange(size), replaced=[])


def measure(
    blocks: dict[str, Block], device: torch.device, repetitions: int, block_s: float
) -> dict[str, Any]:
    """Return seconds per step from alternating blocks; `exposed_s`: differences of neighbours."""

    def seconds(name: str, steps: int) -> float:
        dist.barrier()
        start = time.perf_counter()
        blocks[name](steps)
        slowest = torch.tensor((time.perf_counter() - start) / steps, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return float(slowest)

    for name in blocks:
        seconds(name, WARM_UP_STEPS)
    steps = {name: max(round(block_s / seconds(name, 1)), 1) for name in blocks}
    times: dict[str, list[float]] = {name: [] for name in blocks}
    for repetition in range(repetitions):
        for name in list(blocks)[:: 1 if repetition % 2 else -1]:
            times[name].append(seconds(name, steps[name]))
    pairs = list(zip(times["together"], times["alone"], strict=True))
    return {
        "step_s": spread(times["together"]),
        "alone_s": spread(times["alone"]),
        "exposed_s": spread([together - alone for together, alone in pairs]),
        "cost_ratio": spread([together / alone for together, alone in pairs]),
        "steps_a_block": steps["together"],
    }


def points_of_network(options: argparse.Namespace, world: World) -> Iterator[dict[str, Any]]:
    """Measure weak and strong scaling of the config on the ranks of the process group."""
    given = load_config(options.config, options.overrides)
    local_images = Minibatch.of(given).micro_batch_images(given.workers, given.run.micro_batch)
    others = [typed for typed in options.overrides if not typed.startswith("recipe.minibatch=")]
    weak = [*others, f"recipe.minibatch={local_images * world.world_size}"]
    for scaling, overrides in (("weak", weak), ("strong", options.overrides)):
        config = load_config(options.config, overrides)
        if config.workers < world.world_size:
            continue  # a rank hosts at least one worker
        blocks = step_blocks(config, world)
        found = measure(blocks, world.device, options.repetitions, options.block_seconds)
        images = config.recipe.minibatch
        yield {
            "case": f"{scaling} scaling, {world.world_size} ranks",
            "scaling": scaling,
            "ranks": world.world_size,
            "images": images,
            "images_per_s": images / found["step_s"]["median"],
            **found,
        }


def points_of_waits(options: argparse.Namespace, world: World) -> Iterator[dict[str, Any]]:
    """Measure the waits on the ranks of the process group, at each speed of the hosts' links."""
    for mbit_per_s in options.mbit_per_s:
        shape_this_host(mbit_per_s)
        found = measure(
            wait_blocks(world), world.device, options.repetitions, options.block_seconds
        )
        place = {"ranks": world.world_size, "mbit_per_s": mbit_per_s, "delay_ms": options.delay_ms}
        case = f"{world.world_size} hosts, {mbit_per_s:g} Mbit/s, {options.delay_ms:g} ms"
        yield {"case": case} | place | found


def measure_worlds(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure each number of ranks in its own process group; rank 0 returns the points."""
    world = world_from_environment("cpu" if options.waits else options.device)
    if world.launcher == "slurm":
        use_slurm_rendezvous()
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    store, _, _ = next(dist.rendezvous("env://", world.rank, world.world_size, timeout=PATIENCE))
    points: list[dict[str, Any]] = []
    for ranks in options.ranks or rank_counts(world.world_size):
        if world.rank < ranks:
            part = World(
                world.rank,
                ranks,
                world.local_rank,
                min(world.local_world_size, ranks),
                world.launcher,
                world.device,
            )
            dist.init_process_group(
                "nccl" if world.device.type == "cuda" else "gloo",
                store=dist.PrefixStore(f"ranks-{ranks}", store),
                rank=world.rank,
                world_size=ranks,
            )
            of_kind = points_of_waits if options.waits else points_of_network
            points += of_kind(options, part)
            dist.destroy_process_group()
        store.add(f"measured-{ranks}", 1)
        _wait_for(store, f"measured-{ranks}", world.world_size)
    store.add("left", 1)
    if world.rank > 0:
        return []
    _wait_for(store, "left", world.world_size)  # the store may be in this process
    return points


def _wait_for(store: dist.Store, key: str, count: int) -> None:
    while store.add(key, 0) < count:  # too rarely to disturb the ranks that measure
        time.sleep(0.2)


def rank_counts(most: int) -> list[int]:
    """Return 1, 2, 4, … and `most`."""
    return sorted({1 << bit for bit in range(most.bit_length())} | {most})


def main() -> None:
    """Measure; rank 0 writes the points to --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml", metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--waits", action="store_true", help="timed waits instead of a network")
    parser.add_argument("--mbit-per-s", type=float, nargs="*", default=[1000.0])
    parser.add_argument("--delay-ms", type=float, default=0.0, help="only noted")
    parser.add_argument("--ranks", type=int, nargs="*", help="default: 1, 2, 4, … and all")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--repetitions", type=at_least_two, default=5)
    parser.add_argument("--block-seconds", type=float, default=2.0)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    options = parser.parse_args()
    try:
        check_output(options.out, "--out")
    except UserError as error:
        parser.error(str(error))
    if points := measure_worlds(options):
        text = json.dumps(conditions() | {"points": points}, indent=2) + "\n"
        write_output(options.out, "--out", text)


if __name__ == "__main__":
    main()
