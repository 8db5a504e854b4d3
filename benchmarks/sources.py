"""Where images come from: folders, tars and squashfs, locally and with a delay; and other readers.

    python -m benchmarks.sources IMAGES WORK [--repetitions 5] [--batches 20] [--delays 0 1 5 20]
    python -m benchmarks.sources IMAGES WORK --peers

--write stores the figures. IMAGES is a folder of JPEGs or of class folders of them. They are copied
into WORK, `--copies` times under other names, since ratios need more images than a few; archives
and a squashfs image (mksquashfs, without compression) are packed from the copies there.

Images/s are those of the training loader, of windows of 224 x 224, with 2 cores, in blocks that
alternate; ratios are those of blocks of the same round. Delays are added to every operation of a
file system in user space (`pass_through.py`), which keeps nothing in the page cache. `operations`
are those that one image takes, each read once, after the file system was opened.

--peers: the same JPEGs in the files of other readers (`archive_readers.py`): the time to prepare
them, the disk they take, images/s beside this project's reference loader (all decode with PIL),
how much of an epoch's order is decided by the order on disk, and what a resume after a third of an
epoch yields. `rank_correlation` is that of an image's place in the epoch with its place on disk,
and with its place in the next epoch; 0 is a global shuffle.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from benchmarks.archive_readers import READERS, Reader
from benchmarks.conditions import benchmark_parser, spread, timed, versions, write_results
from benchmarks.loaders import find_images
from benchmarks.pass_through import PassThrough, missing
from benchmarks.pipelines import Unavailable
from harness.config.loading import config_from_mapping
from harness.config.schema import Config
from harness.data.batch_plan import BatchPlan
from harness.data.loaders.choice import open_loader
from harness.data.prepare.pack import pack
from harness.data.sampling import permutation
from harness.data.sources.registry import open_source

WARM_UP = 6  # batches
CORES = 2


@dataclass(frozen=True)
class Case:
    """A contender: images of `data_format` in WORK/`place`, by so many loader threads."""

    name: str
    place: str
    data_format: str
    threads: int = CORES


LOCAL = (
    Case("folders", "folders", "folder"),
    Case("tar", "tar", "tar"),
    Case("tar, 8 shards", "shards", "tar"),
    Case("squashfs", "squashfs", "folder"),
)
DELAYED = (
    Case("folders", "folders", "folder"),
    Case("folders, 32 threads", "folders", "folder", 32),
    Case("tar", "tar", "tar"),
)


def prepare(images: Path, work: Path, copies: int) -> int:
    """Makes the contenders' files where they are missing; returns the number of images."""
    folders = work / "folders"
    found = find_images(images)
    if not folders.exists():
        half = work / "folders.partial"
        shutil.rmtree(half, ignore_errors=True)
        for number, path in enumerate(found * copies):
            place = half / "train" / f"class{number % 10}" / f"{number:06}{path.suffix}"
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
        shutil.copytree(half / "train", half / "val", copy_function=os.link)
        half.rename(folders)
    pack(folders, work / "tar", None)
    pack(folders, work / "shards", 8)
    if shutil.which("mksquashfs") and not (work / "squashfs.image").exists():
        flags = ["-noI", "-noD", "-noF", "-noX", "-no-progress", "-quiet"]
        half = work / "squashfs.partial"
        subprocess.run(["mksquashfs", str(folders), str(half), *flags], check=True)
        half.rename(work / "squashfs.image")
    return len(found) * copies


@contextmanager
def squashfs(work: Path) -> Iterator[None]:
    """Mounts the squashfs image by the kernel, where it can."""
    (work / "squashfs").mkdir(exist_ok=True)
    image, mount = str(work / "squashfs.image"), str(work / "squashfs")
    command = ["mount", "-t", "squashfs", "-o", "loop,ro", image, mount]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        print(f"squashfs: not run: {done.stderr.strip()}")
    yield
    if done.returncode == 0:
        subprocess.run(["umount", mount], check=True)


def config_of(root: Path, data_format: str, images: int, batch: int) -> Config:
    recipe = {"minibatch": batch, "worker_batch": batch, "epochs": 1000}
    return config_from_mapping(
        {
            "expect": {"error": 100, "source": "no training"},
            "data": {"train_images": images, "val_images": images, "classes": 10},
            "model": {"name": "resnet50"},
            "recipe": recipe | {"warmup": "none", "milestones": []},
            "run": {"data_root": str(root), "data_format": data_format},
        },
        "benchmarks/sources.py",
    )


def images_per_s(case: Case, root: Path, loader_name: str, images: int, batches: int) -> float:
    """The rate of a block."""
    config = config_of(root / case.place, case.data_format, images, batch := 64)
    train = open_source(config.run, "train")
    batch_plan = BatchPlan(config, train, train, 0, 1, batch, channels_last=True)
    loader = open_loader(config, batch_plan, loader_name, case.threads, device_is_cuda=False)
    with closing(loader):
        delivered = iter(loader.train(0))
        for _ in range(WARM_UP):
            next(delivered)
        start_s = time.perf_counter()
        for _ in range(batches):
            next(delivered)
        return batch * batches / (time.perf_counter() - start_s)


def alternate(
    cases: Sequence[Case], root: Path, loader: str, images: int, batches: int, repetitions: int
) -> dict[str, list[float]]:
    """The rates of each case, in blocks that alternate."""
    rates: dict[str, list[float]] = {case.name: [] for case in cases}
    for repetition in range(repetitions):
        for case in cases[:: -1 if repetition % 2 else 1]:
            rates[case.name].append(images_per_s(case, root, loader, images, batches))
    return rates


def ratios(rates: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    pairs = {name: zip(values, rates[base], strict=True) for name, values in rates.items()}
    return {name: spread([a / b for a, b in of]) for name, of in pairs.items()}


def show(title: str, rates: dict[str, list[float]], base: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, ratio in ratios(rates, base).items():
        rows.append({"case": name, "images_per_s": spread(rates[name]), f"ratio to {base}": ratio})
        low, median, high = (ratio[key] for key in ("quartile_1", "median", "quartile_3"))
        rate = spread(rates[name])["median"]
        print(f"{title:26}{name:24}{rate:9.0f} images/s {median:7.2f} ({low:.2f} to {high:.2f})")
    return rows


def measure_local(work: Path, options: Any, images: int) -> list[dict[str, Any]]:
    rows = []
    with squashfs(work):
        cases = [
            case
            for case in LOCAL
            if (work / case.place / "train").is_dir() or case.data_format == "tar"
        ]
        for loader in options.loaders:
            rates = alternate(cases, work, loader, images, options.batches, options.repetitions)
            rows += [{"loader": loader} | row for row in show(loader, rates, "folders")]
    return rows


def measure_delayed(work: Path, options: Any, images: int) -> list[dict[str, Any]]:
    """Rates through the slow file system: of each case at each delay, to its own without one."""
    rates: dict[str, dict[str, list[float]]] = {case.name: {} for case in DELAYED}
    with PassThrough(work, work.with_name(f"{work.name}-mounted")) as mounted:
        for repetition in range(options.repetitions):
            for case in DELAYED[:: -1 if repetition % 2 else 1]:
                for delay_ms in options.delays:
                    mounted.delay(0)  # opening is not measured
                    config = config_of(mounted.mount / case.place, case.data_format, images, 64)
                    open_source(config.run, "train")
                    mounted.delay(delay_ms)
                    rate = images_per_s(case, mounted.mount, "dali", images, options.batches)
                    rates[case.name].setdefault(f"{delay_ms:g} ms", []).append(rate)
        mounted.delay(0)
        counted = {case.name: operations(case, mounted, images) for case in DELAYED[::2]}
    rows: list[dict[str, Any]] = [{"operations": counted}]
    for case in DELAYED:
        found = show(case.name, rates[case.name], f"{options.delays[0]:g} ms")
        rows += [{"source": case.name} | row for row in found]
    for name, kinds in counted.items():
        print(f"{name:26}operations an image: {kinds}")
    return rows


def operations(case: Case, mounted: PassThrough, images: int) -> dict[str, float]:
    """The operations that an image takes, by kind."""
    train = open_source(
        config_of(mounted.mount / case.place, case.data_format, images, 64).run, "train"
    )
    before = mounted.operations()
    for image_id in range(len(train)):
        train.read(image_id)
    after = mounted.operations()
    return {kind: (after[kind] - before[kind]) / len(train) for kind in after}


def measure_peers(work: Path, options: Any, images: int) -> list[dict[str, Any]]:
    """A row for this project's tars and each reader that runs here."""
    files = sorted((work / "folders" / "train").glob("*/*"))
    ours = Case("this project, tar", "tar", "tar")
    rates: dict[str, list[float]] = {ours.name: []}
    readers: dict[str, Reader] = {}
    rows = [ours_row(work, images)]
    for name, kind in READERS.items():
        try:
            reader = kind(files, work / name.partition(" ")[0].lower())
            seconds, _ = timed(reader.prepare)
            rows.append(peer_row(name, reader, seconds))
            readers[name], rates[name] = reader, []
        except Unavailable as error:
            print(f"{name:26}not run: {error}")
    for repetition in range(options.repetitions):
        for name in list(rates)[:: -1 if repetition % 2 else 1]:
            if name == ours.name:
                rate = images_per_s(ours, work, "reference", images, options.batches)
            else:
                rate = peer_rate(readers[name], repetition, options.batches)
            rates[name].append(rate)
    speeds = {row["case"]: row for row in show("peers", rates, ours.name)}
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in row.items()))
    return [row | speeds[row["reader"]] for row in rows]


def peer_rate(reader: Reader, epoch: int, batches: int) -> float:
    delivered = reader.batches(epoch, CORES, 64)
    for _ in range(WARM_UP):
        next(delivered)
    start_s = time.perf_counter()
    for _ in range(batches):
        next(delivered)
    return 64 * batches / (time.perf_counter() - start_s)


def peer_row(name: str, reader: Reader, seconds: float) -> dict[str, Any]:
    first, second, third = reader.order(0), reader.order(1), len(reader.files) // 3
    resume_s, _ = timed(lambda: reader.order(0, third))
    rest = reader.order(0, third)
    size = sum(path.stat().st_size for path in reader.folder.rglob("*") if path.is_file())
    row = order_row(first, second, rest, third)
    return (
        {"reader": name, "prepare_s": seconds, "gb": size / 1e9, "resume_s": resume_s}
        | row
        | {"loses": reader.loses}
    )


def ours_row(work: Path, images: int) -> dict[str, Any]:
    """The same figures for this project: ids are in the order of the disk."""
    place = work / "repacked"
    shutil.rmtree(place, ignore_errors=True)
    seconds, _ = timed(lambda: pack(work / "folders", place, None))
    first, second = (permutation(1, epoch, images).tolist() for epoch in (0, 1))
    third = images // 3
    resume_s, _ = timed(lambda: permutation(1, 0, images)[third:])
    size = (place / "train.tar").stat().st_size
    shutil.rmtree(place)
    row = order_row(first, second, first[third:], third)
    about = {"prepare_s": seconds / 2, "gb": size / 1e9, "resume_s": resume_s}  # of train and val
    return {"reader": "this project, tar"} | about | row | {"loses": "nothing of the order"}


def order_row(first: list[int], second: list[int], rest: list[int], third: int) -> dict[str, Any]:
    places = np.argsort(first)
    return {
        "rank_correlation_with_disk": float(abs(spearmanr(places, np.arange(len(first)))[0])),
        "rank_correlation_of_epochs": float(abs(spearmanr(places, np.argsort(second))[0])),
        "resume_repeats": len({*first[:third]} & {*rest}),
        "resume_skips": len({*first[third:]} - {*rest}),
        "resume_in_order": rest == first[third:],
    }


def main() -> None:
    parser = benchmark_parser(__doc__, repetitions=5)
    parser.add_argument("images", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--batches", type=int, default=20, help="per block, after the warm-up")
    parser.add_argument("--delays", type=float, nargs="+", default=[0, 1, 5, 20], help="ms")
    parser.add_argument("--loaders", nargs="+", default=["dali", "reference"])
    parser.add_argument("--peers", action="store_true", help="other readers instead")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    images = prepare(options.images, options.work, options.copies)
    about: dict[str, Any] = {"images": images, "cores": CORES}
    about["versions"] = versions("webdataset", "mosaicml-streaming", "timm", "nvidia-dali-cuda130")
    if options.peers:
        about["peers"] = measure_peers(options.work, options, images)
    else:
        about["local"] = measure_local(options.work, options, images)
        if reason := missing():
            print(f"delays: not run: {reason}")
        else:
            about["delayed"] = measure_delayed(options.work, options, images)
    if options.write:
        name = "archive_readers" if options.peers else "sources"
        print(write_results(name, about, options.write))


if __name__ == "__main__":
    main()
