"""Image pipelines for comparison: each yields batches of training windows from the same files.

FFCV decodes its own files instead (here JPEGs of quality 90 at full size). timm normalises
(to float32) on the consumer's side, which is counted. Bare decoding crops and resizes
nothing, and discards its pixels.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from harness.config.loading import config_from_mapping
from harness.config.schema import Config
from harness.data.batch_plan import BatchPlan
from harness.data.loaders.choice import open_loader
from harness.data.sources.folder import FolderSource
from harness.data.sources.header import size_of

SIZE = 224
AREA, RATIO = (0.08, 1.0), (0.75, 4 / 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DALI, BENCH = "pip install -e '.[dali]'", "pip install -e '.[bench]'"


class Unavailable(Exception):
    """The reason why a contender cannot run here."""


@dataclass(frozen=True)
class Job:
    """A job. `paths`: a file for each image to be loaded; `cores`: threads or worker processes.

    A contender is a context manager that takes a job and yields batches of `batch` images.
    """

    paths: Sequence[Path]
    cores: int
    batch: int


# ---- this project


def job_index(paths: Sequence[Path]) -> FolderSource:
    """Return the images of a job as one class."""
    sizes = {path: size_of(path) for path in set(paths)}
    folder = Path(os.path.commonpath([path.parent for path in paths]))
    names = np.array([os.fsencode(path.relative_to(folder)) for path in paths])
    widths, heights = np.array([sizes[path] for path in paths], dtype=np.int32).T
    labels = np.zeros(len(paths), dtype=np.int64)
    return FolderSource(folder.parent, (folder.name,), names, labels, widths.copy(), heights.copy())


def job_config(images: int, batch: int) -> Config:
    """Return the config of one epoch of batches of `batch`."""
    recipe = {"minibatch": batch, "worker_batch": batch, "epochs": 1}
    mapping = {
        "expect": {"error": 100, "source": "no training"},
        "data": {"train_images": images, "val_images": images, "classes": 1},
        "model": {"name": "resnet50"},
        "recipe": recipe | {"warmup": "none", "milestones": []},
    }
    return config_from_mapping(mapping, "benchmarks/loaders.py")


@contextmanager
def ours(job: Job, name: str, cuda: bool = False) -> Iterator[Iterator[Tensor]]:
    """Yield batches through the batch plan, as in training."""
    config, index = job_config(len(job.paths), job.batch), job_index(job.paths)
    batch_plan = BatchPlan(config, index, index, 0, 1, job.batch, channels_last=True)
    try:
        loader = open_loader(config, batch_plan, name, job.cores, device_is_cuda=cuda)
    except ImportError as error:
        raise Unavailable(f"DALI is not installed ({error}): {DALI}") from None
    try:
        yield (batch.images for batch in loader.train(0))
    finally:
        loader.close()


# ---- others


@contextmanager
def dali_reader(job: Job, as_uint8: bool) -> Iterator[Iterator[Tensor]]:
    """Yield batches of fn.readers.file and fn.decoders.image_random_crop, which draw themselves."""
    try:
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline
    except ImportError as error:
        raise Unavailable(f"DALI is not installed ({error}): {DALI}") from None
    if as_uint8:
        output: dict[str, Any] = {"dtype": types.UINT8, "output_layout": "HWC"}
    else:
        mean, std = ([255 * x for x in values] for values in (MEAN, STD))
        output = {"dtype": types.FLOAT, "output_layout": "CHW", "mean": mean, "std": std}
    pipeline = Pipeline(job.batch, job.cores, None, prefetch_queue_depth=2)
    with pipeline:
        files, _ = fn.readers.file(files=[str(path) for path in job.paths], random_shuffle=True)
        images = fn.decoders.image_random_crop(files, random_area=AREA, random_aspect_ratio=RATIO)
        images = fn.resize(images, size=[SIZE, SIZE])
        flips = fn.random.coin_flip()
        pipeline.set_outputs(fn.crop_mirror_normalize(images, mirror=flips, **output))
    pipeline.build()

    def batches() -> Iterator[Tensor]:
        while True:
            yield torch.from_dlpack(pipeline.run()[0].as_tensor())

    yield batches()


class Files(Dataset):
    """A data set of `read(path)` for each of `paths`, with a label."""

    def __init__(self, paths: Sequence[Path], read: Callable[[Path], Any]) -> None:
        self.paths, self.read = paths, read
        self.transform: Callable[[Any], Any] | None = None  # set by timm

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> tuple[Any, int]:
        image = self.read(self.paths[place])
        return (self.transform(image) if self.transform else image), 0


def read_pil(path: Path) -> Image.Image:
    """Read an image as torchvision does (datasets.folder.pil_loader)."""
    with open(path, "rb") as file:
        return Image.open(file).convert("RGB")


def read_tensor(path: Path) -> Tensor:
    """Read an image as uint8 (3, H, W)."""
    content = path.read_bytes()
    if content.startswith(b"\xff\xd8"):
        return decode_jpeg(
            torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB
        )
    return transforms.functional.pil_to_tensor(Image.open(BytesIO(content)).convert("RGB"))


@contextmanager
def torchvision(job: Job, backend: str, as_uint8: bool) -> Iterator[Iterator[Tensor]]:
    """Yield batches of a DataLoader with the transforms of torchvision's training reference."""
    dataset = Files(job.paths, read_pil if backend == "PIL" else read_tensor)
    if backend == "PIL":
        steps = [transforms.RandomResizedCrop(SIZE, AREA, RATIO), transforms.RandomHorizontalFlip()]
        floats = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        last = [transforms.PILToTensor()] if as_uint8 else floats
        dataset.transform = transforms.Compose([*steps, *last])
    else:
        crop = v2.RandomResizedCrop(SIZE, AREA, RATIO, antialias=True)
        floats = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        last = [] if as_uint8 else floats
        dataset.transform = v2.Compose([crop, v2.RandomHorizontalFlip(), *last])
    yield from _workers(job, dataset)


def _workers(job: Job, dataset: Dataset) -> Iterator[Iterator[Tensor]]:
    """Yield batches of a DataLoader's worker processes, which end with the iterator."""
    loader = DataLoader(dataset, job.batch, shuffle=True, num_workers=job.cores, drop_last=True)
    yield (images for images, _ in loader)


@contextmanager
def timm(job: Job) -> Iterator[Iterator[Tensor]]:
    """Yield batches of timm.data.create_loader with its prefetcher, the default."""
    try:
        from timm.data import create_loader
    except ImportError as error:
        raise Unavailable(f"timm is not installed ({error}): {BENCH}") from None
    loader = create_loader(
        Files(job.paths, read_pil),
        (3, SIZE, SIZE),
        job.batch,
        is_training=True,
        scale=AREA,
        ratio=RATIO,
        color_jitter=0.0,
        interpolation="bilinear",
        num_workers=job.cores,
        device=torch.device("cpu"),
        persistent_workers=False,
    )
    yield (images for images, _ in loader)


@contextmanager
def ffcv(job: Job) -> Iterator[Iterator[Tensor]]:
    """Yield batches of FFCV from its own file. Untested: FFCV could not be built here."""
    try:
        from ffcv.fields import IntField, RGBImageField
        from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import RandomHorizontalFlip, ToTensor
        from ffcv.writer import DatasetWriter
    except ImportError as error:
        raise Unavailable(
            f"FFCV is not installed ({error}): pip can build it if the headers of OpenCV and "
            "libjpeg-turbo and pkg-config are installed"
        ) from None
    with tempfile.NamedTemporaryFile(suffix=".beton") as file:
        fields = {"image": RGBImageField("jpg"), "label": IntField()}
        DatasetWriter(file.name, fields).from_indexed_dataset(Files(job.paths, read_pil))
        crop = RandomResizedCropRGBImageDecoder((SIZE, SIZE), AREA, RATIO)
        loader = Loader(
            file.name,
            batch_size=job.batch,
            num_workers=job.cores,
            order=OrderOption.RANDOM,
            pipelines={"image": [crop, RandomHorizontalFlip(), ToTensor()], "label": None},
        )
        yield (images for images, *_ in loader)


class Decoded(Dataset):
    """Decode each file with libjpeg-turbo, at 1/`reduction` of its size, and yield its shape."""

    def __init__(self, paths: Sequence[Path], reduction: int) -> None:
        self._paths, self._reduction = paths, reduction

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        import simplejpeg

        content, least = self._paths[place].read_bytes(), {}
        if self._reduction > 1:
            height, width = simplejpeg.decode_jpeg_header(content)[:2]
            sides = {"min_height": height, "min_width": width}
            least = {key: -(-side // self._reduction) for key, side in sides.items()}
        return torch.tensor(simplejpeg.decode_jpeg(content, **least).shape), 0


@contextmanager
def bare_decoding(job: Job, reduction: int) -> Iterator[Iterator[Tensor]]:
    """Yield shapes of decoded images: the limit for decoding whole images on these cores."""
    if importlib.util.find_spec("simplejpeg") is None:
        raise Unavailable(f"simplejpeg is not installed: {BENCH}")
    jpegs = {path for path in set(job.paths) if path.read_bytes()[:2] == b"\xff\xd8"}
    paths = [path for path in job.paths if path in jpegs]
    yield from _workers(job, Decoded(paths, reduction))


CONTENDERS: dict[str, Callable[[Job], AbstractContextManager[Iterator[Any]]]] = {
    "this project, DALI": partial(ours, name="dali"),
    "this project, reference": partial(ours, name="reference"),
    "DALI's own reader": partial(dali_reader, as_uint8=True),
    "DALI's own reader, float32": partial(dali_reader, as_uint8=False),
    "torchvision, PIL": partial(torchvision, backend="PIL", as_uint8=True),
    "torchvision, PIL, float32": partial(torchvision, backend="PIL", as_uint8=False),
    "torchvision, v2 on tensors": partial(torchvision, backend="tensor", as_uint8=True),
    "torchvision, v2 on tensors, float32": partial(torchvision, backend="tensor", as_uint8=False),
    "timm, float32": timm,
    "FFCV": ffcv,
    "bare libjpeg-turbo": partial(bare_decoding, reduction=1),
    "bare libjpeg-turbo at 1/2 scale": partial(bare_decoding, reduction=2),
}
