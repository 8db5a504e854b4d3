"""Other readers of packed images: how each is made, read, ordered and resumed.

Each takes class folders of images, writes its own files into a folder, and yields batches of the
same training windows, decoded and cropped by torchvision with PIL in worker processes. WebDataset
shuffles its shards, and then samples in a buffer of a hundredth of the images; MosaicML streaming
uses its default algorithm, py1e. All read the original JPEGs.
"""

from __future__ import annotations

import io
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

from benchmarks.pipelines import AREA, RATIO, SIZE, Unavailable

SHARDS = 50  # about so many files, of WebDataset and MosaicML
BUFFERS = 100  # the images over those that WebDataset shuffles at a time: 12,800 of ImageNet's

WINDOW = transforms.Compose(
    [
        transforms.RandomResizedCrop(SIZE, AREA, RATIO),
        transforms.RandomHorizontalFlip(),
        transforms.PILToTensor(),
    ]
)


def window(content: bytes) -> Tensor:
    """A training window of an encoded image, uint8 (3, SIZE, SIZE)."""
    return WINDOW(Image.open(io.BytesIO(content)).convert("RGB"))


class Reader(ABC):
    """`files`: the images, by class and name; `folder`: where the reader's own files lie.

    loses: what its users give up, for the table.
    """

    loses: str

    def __init__(self, files: Sequence[Path], folder: Path) -> None:
        self.files, self.folder = files, folder
        self.shard_bytes = sum(path.stat().st_size for path in files) // SHARDS

    @abstractmethod
    def prepare(self) -> None:
        """Writes the reader's files."""

    @abstractmethod
    def batches(self, epoch: int, workers: int, batch: int) -> Iterator[Tensor]:
        """The batches of an epoch."""

    @abstractmethod
    def order(self, epoch: int, skip: int = 0) -> list[int]:
        """The images of an epoch, by their place on disk, as one process yields them.

        With `skip`: after a resume that many images into the epoch.
        """


class WebDataset(Reader):
    """Tars that are read from one end to the other."""

    loses = "the global shuffle; a resume reads what was seen again, or skips it"

    def prepare(self) -> None:
        wds = _import("webdataset")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        pattern = str(self.folder / "train-%06d.tar")
        order = torch.randperm(len(self.files), generator=torch.Generator().manual_seed(0)).tolist()
        with wds.ShardWriter(pattern, maxsize=self.shard_bytes, verbose=0) as sink:
            for place, number in enumerate(order):  # its guide: shuffle when shards are written
                content = self.files[number].read_bytes()
                sink.write({"__key__": f"{place:08}", "jpg": content, "cls": str(number)})

    def _samples(self, epoch: int) -> Any:
        wds = _import("webdataset")
        shards = sorted(map(str, self.folder.glob("*.tar")))
        data = wds.WebDataset(shards, shardshuffle=len(shards), seed=epoch, empty_check=False)
        return data.shuffle(len(self.files) // BUFFERS, seed=epoch)

    def batches(self, epoch: int, workers: int, batch: int) -> Iterator[Tensor]:
        data = self._samples(epoch).map(_window_of_jpg).batched(batch, partial=False)
        loader = DataLoader(data, batch_size=None, num_workers=workers)
        return iter(loader)

    def order(self, epoch: int, skip: int = 0) -> list[int]:
        # there is no resume: what was seen has to be read and thrown away
        numbers = [int(sample["__key__"]) for sample in self._samples(epoch)]
        return numbers[skip:]


def _window_of_jpg(sample: dict[str, Any]) -> Tensor:
    return window(sample["jpg"])


class Streaming(Reader):
    """MosaicML's shards (MDS), read by index from whole shards."""

    loses = "the archives as they are: images are packed into its own files"

    def prepare(self) -> None:
        streaming = _import("streaming")
        shutil.rmtree(self.folder, ignore_errors=True)
        columns = {"image": "bytes", "label": "int"}
        with streaming.MDSWriter(
            out=str(self.folder), columns=columns, size_limit=self.shard_bytes
        ) as sink:
            for number, path in enumerate(self.files):
                sink.write({"image": path.read_bytes(), "label": number})

    def _dataset(self, transform: Callable[[bytes], Any]) -> Any:
        streaming: Any = _import("streaming")
        streaming.base.util.clean_stale_shared_memory()

        def sample_of(data: Any, at: int) -> tuple[Any, int]:
            sample = streaming.StreamingDataset.__getitem__(data, at)
            return transform(sample["image"]), sample["label"]

        kind = type("Windows", (streaming.StreamingDataset,), {"__getitem__": sample_of})
        return kind(local=str(self.folder), shuffle=True, batch_size=1, shuffle_seed=1)

    def batches(self, epoch: int, workers: int, batch: int) -> Iterator[Tensor]:
        streaming = _import("streaming")
        data = self._dataset(window)
        loader = streaming.StreamingDataLoader(
            data, batch_size=batch, num_workers=workers, drop_last=True
        )
        return (images for images, _ in chain.from_iterable(loader for _ in range(10**6)))

    def order(self, epoch: int, skip: int = 0) -> list[int]:
        data = self._dataset(len)
        if skip or epoch:
            state = {"epoch": epoch, "sample_in_epoch": skip, "num_canonical_nodes": 1}
            state |= {"shuffle_seed": 1, "initial_physical_nodes": 1}
            data.load_state_dict(state)
        return [int(label) for _, label in iter(data)]


class Timm(Reader):
    """timm's reader of class tars within one tar, as ImageNet's archive is."""

    loses = "the place in an epoch: a resume starts the epoch again"

    def prepare(self) -> None:
        import tarfile

        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        with tarfile.open(self.folder / "train.tar", "w") as archive:
            for path in self.files:
                archive.add(path, f"{path.parent.name}/{path.name}")

    def _reader(self) -> Any:
        readers = _import("timm.data.readers.reader_image_in_tar")
        return readers.ReaderImageInTar(str(self.folder / "train.tar"), cache_tarinfo=False)

    def batches(self, epoch: int, workers: int, batch: int) -> Iterator[Tensor]:
        loader = DataLoader(
            _TimmImages(self._reader()), batch, True, num_workers=workers, drop_last=True
        )
        return iter(loader)

    def order(self, epoch: int, skip: int = 0) -> list[int]:
        # a sampler's, as timm leaves the order to it; its training script resumes at whole epochs
        generator = torch.Generator().manual_seed(epoch)
        return torch.randperm(len(self.files), generator=generator).tolist()


class _TimmImages(torch.utils.data.Dataset):
    def __init__(self, reader: Any) -> None:
        self._reader = reader

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, place: int) -> Tensor:
        stream, _ = self._reader[place]
        return window(stream.read())


def _import(name: str) -> Any:
    import importlib

    with suppress(ImportError):
        return importlib.import_module(name)
    package = {"streaming": "mosaicml-streaming"}.get(name, name.partition(".")[0])
    raise Unavailable(f"{package} is not installed: pip install {package}")


READERS: dict[str, type[Reader]] = {
    "WebDataset": WebDataset,
    "MosaicML streaming": Streaming,
    "timm's tar reader": Timm,
}
