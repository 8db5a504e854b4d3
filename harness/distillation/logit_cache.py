"""A teacher's logits on disk, computed once and used by many students.

A crop is a pure function of (seed, crop epoch, image id), and so are a teacher's logits for it:
kn, the ranks and the order of the images do not change them. A cache of E crop epochs is a folder
of manifest.json and, for each epoch and each SHARD_IMAGES images, a file of rows by image id.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from harness.config.schema import Config
from harness.data.batch import Batch
from harness.data.batch_plan import BatchPlan
from harness.data.loaders.choice import open_loader
from harness.data.sampling import TrainBatchSpec, crops
from harness.data.sources.digest import first_difference
from harness.data.sources.source import ImageSource
from harness.distillation.logit_rows import Rows
from harness.distillation.teacher import AnyTeacher, Teacher, load_teacher
from harness.distributed import World, barrier, process_group
from harness.errors import UserError
from harness.execution.evaluation import Evaluation
from harness.outcome import RunFailed
from harness.resilience.stopping import StopRequest
from harness.roll_call import roll_call
from harness.runs.checkpoint import write_atomically

FORMAT_VERSION = 1
SHARD_IMAGES = 16384
MAKE_AGAIN = "make it again with `harness cache`, in an empty folder"


class Manifest(TypedDict):
    """The contents of manifest.json, besides the items of `identify`."""

    epochs: int
    images: int
    classes: int
    dtype: str
    top: int | None
    evaluation: dict[str, Any]  # the fields of `Evaluation`
    shards: dict[str, str]  # file name -> SHA-256


@dataclass(frozen=True)
class Shard:
    """A file with the images `first` to `end` - 1, in the crops of `epoch`."""

    epoch: int
    first: int
    end: int

    @property
    def name(self) -> str:
        return f"epoch-{self.epoch:03d}-image-{self.first:08d}.npy"


def all_shards(epochs: int, images: int) -> list[Shard]:
    """Return the shards of a cache, epoch by epoch."""
    starts = range(0, images, SHARD_IMAGES)
    return [Shard(e, s, min(s + SHARD_IMAGES, images)) for e in range(epochs) for s in starts]


def identify(
    config: Config, batch_plan: BatchPlan, teacher: Teacher, top: int | None
) -> dict[str, object]:
    """Return everything that the rows of a cache depend on; a cache is valid if all of it is equal.

    Complete rows serve any temperature; the `top` largest are exact at one (see `Rows.encode`).
    """
    data, distill = config.data, config.distill
    assert distill is not None
    return {
        "format": FORMAT_VERSION,
        "seed": config.seed,
        "images": len(batch_plan.train),
        "index": batch_plan.train.checksum(),
        "crop": data.crop,
        "crop_area": list(data.crop_area),
        "crop_ratio": list(data.crop_ratio),
        "flip": data.flip,
        "classes": data.classes,
        "teacher": teacher.identity,
        **teacher.settings,
        **({} if top is None else {"temperature": distill.temperature}),
    }


class _Sweep(BatchPlan):
    """A plan with every image of `shards`, by id, on this rank."""

    def __init__(
        self, shards: Sequence[Shard], batch_plan: BatchPlan, world: World, channels_last: bool
    ) -> None:
        ranks = world.rank, world.world_size
        images = batch_plan.config, batch_plan.train, batch_plan.val
        super().__init__(*images, *ranks, batch_plan.micro_batch, channels_last)
        self.shards = shards

    def training(self, first_step: int) -> Iterator[TrainBatchSpec]:
        train, data = self.train, self.config.data
        for shard in self.shards:
            for start in range(shard.first, shard.end, self.micro_batch):
                ids = np.arange(start, min(start + self.micro_batch, shard.end))
                sizes = train.heights[ids], train.widths[ids]
                yield crops(self.config.seed, shard.epoch, ids, *sizes, data)


def write_cache(
    config: Config, batch_plan: BatchPlan, world: World, epochs: int, dtype: str, top: int | None
) -> Path:
    """Compute the logits of E = `epochs` crop epochs on all ranks; return the cache's folder.

    Existing shards are kept, so an interrupted call can be repeated. Raises UserError where the
    folder holds another cache, or the disk is too small.
    """
    assert config.distill is not None and config.distill.cache is not None
    folder, rows = Path(config.distill.cache), Rows(config.data.classes, dtype, top)
    shards = all_shards(epochs, len(batch_plan.train))
    size_mb = epochs * len(batch_plan.train) * rows.type.itemsize / 1e6
    cuda, threads = world.device.type == "cuda", int(config.run.loader_threads)
    timeout_s = config.run.hang_timeout_s
    with ExitStack() as opened:
        with roll_call(timeout_s, StopRequest()) as call:
            teacher = load_teacher(config, batch_plan.train.classes)
            plan = identify(config, batch_plan, teacher, top) | asdict(rows) | {"epochs": epochs}
            plan["loader"] = config.run.loader
            plan["class_digests"] = batch_plan.train.class_digests()
            if world.rank == 0:
                images = len(batch_plan.train)
                print(f"{folder}: {epochs} epochs of {images:,} images, {size_mb:,.1f} MB")
                _begin(folder, plan, size_mb, batch_plan.train)
            missing = [shard for shard in shards if not _sum_file(folder, shard).exists()]
            own = missing[world.rank :: world.world_size]
            sweep = _Sweep(own, batch_plan, world, cuda)
            loader = open_loader(config, sweep, config.run.loader, threads, cuda)
            opened.enter_context(closing(loader))
            call.present(config, world, batch_plan, folder, teacher.identity)
        control = opened.enter_context(process_group(world, call.store, timeout_s))
        teacher.to(world.device)
        evaluation = teacher.evaluate(loader.evaluate)
        batches = loader.train(0)
        for shard in own:
            encode = partial(rows.encode, temperature=config.distill.temperature)
            _write_shard(folder, shard, encode, teacher, batches)
        barrier(control)  # the other ranks may take as long as one more shard
        if world.rank == 0:
            sums = {shard.name: _sum_file(folder, shard).read_text() for shard in shards}
            whole = plan | {"evaluation": asdict(evaluation), "shards": sums}
            write_atomically(folder / "manifest.json", json.dumps(whole, indent=2).encode())
        barrier(control)
    return folder


def _begin(folder: Path, plan: dict[str, object], size_mb: float, train: ImageSource) -> None:
    """Create the cache's folder, or check an unfinished one, on rank 0.

    Until the manifest exists, plan.json records which cache the shards belong to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (begun := folder / "plan.json").exists():
            held = {"class_digests": plan["class_digests"]}  # older plans have none
            with suppress(ValueError):  # damaged, so not this cache
                held |= json.loads(begun.read_text())
            _check_data(str(folder), held, train)
            if held != json.loads(json.dumps(plan)):
                raise UserError(f"{folder}: holds another cache; remove it or name another folder")
            return
        if any(folder.iterdir()):
            raise UserError(f"{folder}: is neither empty nor a cache; name another folder")
        free_mb = shutil.disk_usage(folder).free / 1e6
        if size_mb > free_mb:
            raise UserError(
                f"{folder}: {free_mb:,.0f} MB are free, but the cache takes {size_mb:,.0f}"
            )
        write_atomically(begun, json.dumps(plan, indent=2).encode())
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from error


def _check_data(place: str, held: Mapping[str, Any], train: ImageSource) -> None:
    """Raise UserError if the plan or manifest `held` records other images than `train`."""
    here = train.class_digests()
    there = held.get("class_digests", here)  # older ones hold a checksum only
    if difference := first_difference(there, here, "the cache", str(train.location)):
        raise UserError(f"{place}: was made from other data: {difference}; {MAKE_AGAIN}")


def _sum_file(folder: Path, shard: Shard) -> Path:
    return folder / f"{shard.name}.sha256"


def _write_shard(
    folder: Path,
    shard: Shard,
    encode: Callable[[Tensor], np.ndarray],
    teacher: Teacher,
    batches: Iterator[Batch],
) -> None:
    """Write a shard from the next batches of a sweep; its checksum is written last.

    The row of an image that cannot be decoded holds its replacement; no student reads it.
    """
    parts: list[np.ndarray] = []
    while sum(map(len, parts)) < shard.end - shard.first:
        parts.append(encode(teacher(0, next(batches)).cpu()))
    file = io.BytesIO()
    np.save(file, np.concatenate(parts))
    content = file.getvalue()
    try:
        write_atomically(folder / shard.name, content)
        write_atomically(_sum_file(folder, shard), hashlib.sha256(content).hexdigest().encode())
    except OSError as error:
        raise RunFailed(
            f"{folder / shard.name}: {error.strerror}; free some space and repeat the command"
        ) from error


class CachedTeacher:
    """A teacher whose logits come from a cache. `identity` is that of the whole cache."""

    def __init__(self, config: Config, folder: Path, manifest: Manifest) -> None:
        self.identity = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        self._steps_per_epoch, self._epochs = config.steps_per_epoch, manifest["epochs"]
        self._rows = Rows(manifest["classes"], manifest["dtype"], manifest["top"])
        self._evaluation = Evaluation(**manifest["evaluation"])
        shards = all_shards(manifest["epochs"], manifest["images"])
        self._shards = {
            (shard.epoch, shard.first): np.load(folder / shard.name, mmap_mode="r")
            for shard in shards
        }
        self._device = torch.device("cpu")

    def to(self, device: torch.device) -> None:
        """Return logits on `device` from now on."""
        self._device = device

    def __call__(self, step: int, batch: Batch) -> Tensor:
        """Return the logits, float32 (B, K), of a micro-batch."""
        epoch = step // self._steps_per_epoch % self._epochs
        ids = batch.ids.numpy()
        first = ids - ids % SHARD_IMAGES
        logits = np.empty((len(ids), self._rows.classes), np.float32)
        for start in np.unique(first).tolist():
            places = first == start
            logits[places] = self._rows.decode(self._shards[epoch, start][ids[places] - start])
        tensor = torch.from_numpy(logits)
        if self._device.type == "cuda":
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor

    def evaluate(self, batches: Callable[[], Iterator[Batch]]) -> Evaluation:
        """Return the evaluation that was made with the cache."""
        return self._evaluation


def open_teacher(config: Config, batch_plan: BatchPlan, world: World) -> AnyTeacher | None:
    """Return the teacher of `config`: None, live, or cached where distill.cache is set.

    Raises UserError for an unusable teacher, and for a cache that is damaged or was made with
    other crops or another teacher.
    """
    if config.distill is None:
        return None
    teacher = load_teacher(config, batch_plan.train.classes)
    if config.distill.cache is None:
        return teacher
    folder = Path(config.distill.cache)
    manifest = read_manifest(folder)
    _check_data(f"distill.cache: {folder}", manifest, batch_plan.train)
    recorded: Mapping[str, object] = manifest
    for key, here in identify(config, batch_plan, teacher, manifest["top"]).items():
        if (there := recorded.get(key, "not recorded")) != here:
            raise UserError(
                f"distill.cache: {folder}: is of another {key} ({there}, here {here}); {MAKE_AGAIN}"
            )
    # Each rank checks its share; a fault on any rank ends the run.
    for name, checksum in list(manifest["shards"].items())[world.rank :: world.world_size]:
        try:
            found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"distill.cache: {folder / name}: {error.strerror}") from error
        if found != checksum:
            raise UserError(f"distill.cache: {folder / name}: is damaged; {MAKE_AGAIN}")
    return CachedTeacher(config, folder, manifest)


def crop_epochs(config: Config) -> int | None:
    """Return after how many epochs of a cache the crops repeat; None without a cache."""
    if config.distill is None or config.distill.cache is None:
        return None
    return read_manifest(Path(config.distill.cache))["epochs"]


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a finished cache. Raises UserError if it is missing or damaged."""
    try:
        manifest: Manifest = json.loads((folder / "manifest.json").read_text())
        if set(manifest["shards"]) != {
            shard.name for shard in all_shards(manifest["epochs"], manifest["images"])
        }:
            raise ValueError("its shards are not those of its epochs")
        return manifest
    except OSError as error:
        unfinished = (folder / "plan.json").exists()
        why = "is not finished" if unfinished else f"no cache ({os.strerror(error.errno or 0)})"
        raise UserError(
            f"distill.cache: {folder}: {why}; write it with `harness cache CONFIG --epochs E`"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"distill.cache: {folder}/manifest.json: is damaged ({error}); {MAKE_AGAIN}"
        ) from None
