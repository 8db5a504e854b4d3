"""DALI carries out the same sampling as the reference loader, on every kind of file."""

from __future__ import annotations

import os
import tarfile
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from harness.config.schema import Config
from harness.data.bad_image import BadImageError
from harness.data.batch import Batch
from harness.data.sources.folder import open_folder
from harness.errors import UserError
from tests.conftest import harness
from tests.data.loading import assert_equal, loader_of
from tests.data.test_bad_images import whole_run

pytest.importorskip("nvidia.dali")

Make = Callable[..., Config]
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1) * 255
SAMPLE = "imagenet-sample.tar"


def all_batches(root: Path, config: Config, name: str, **how: int) -> tuple[list[Batch], ...]:
    """Training from the first step to the last, and evaluation."""
    with loader_of(root, config, name, how.pop("threads", 2), **how) as loader:
        return list(loader.train(0)), list(loader.evaluate())


def differences(some: list[Batch], others: list[Batch]) -> torch.Tensor:
    """(N, 3, size, size) in normalised units; everything else must be equal."""
    for a, b in zip(some, others, strict=True):
        assert torch.equal(a.ids, b.ids) and torch.equal(a.labels, b.labels)
        assert a.replaced == b.replaced and a.images.dtype == b.images.dtype == torch.uint8
        assert a.images.shape == b.images.shape and a.images.stride() == b.images.stride()
    pairs = zip(some, others, strict=True)
    return torch.cat([(a.images.float() - b.images.float()).abs() / STD for a, b in pairs])


def expect_levels(difference: torch.Tensor, levels: int) -> None:
    """DALI, PyTorch and PIL differ by their rounding: levels of 255."""
    assert float((difference * STD).max()) <= levels + 0.001


@pytest.fixture(scope="session")
def jpegs(tmp_path_factory: pytest.TempPathFactory, photo: Callable) -> Path:
    """24 training and 10 validation JPEGs of many sizes, qualities and chroma subsamplings."""
    folder, random = tmp_path_factory.mktemp("jpegs"), np.random.default_rng(1)
    for number in range(34):
        width, height = random.integers(90, [639, 426]).tolist()
        image = photo(number, width, height)
        if number % 6 == 0:
            image = image.resize((width * 2, height * 2), Image.Resampling.LANCZOS)
        split = "train" if number < 24 else "val"
        path = folder / split / "ab"[number % 2] / f"{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        quality, subsampling = int(random.integers(60, 97)), number % 3
        image.save(path, quality=quality, subsampling=subsampling, progressive=number % 5 == 0)
    return folder


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """250 original files of ImageNet, where they are at hand; as training and validation images."""
    beside = Path(__file__).parents[3] / "shared" / "data"
    archive = Path(os.environ.get("HARNESS_SHARED_DATA", beside)) / SAMPLE
    if not archive.exists():
        pytest.skip(f"{archive}: not here; set HARNESS_SHARED_DATA to the folder of {SAMPLE}")
    folder = tmp_path_factory.mktemp("photographs")
    with tarfile.open(archive) as tar:
        for number, member in enumerate(m for m in tar.getmembers() if m.isfile()):
            content = tar.extractfile(member)
            assert content is not None
            path = folder / "train" / "ab"[number % 2] / Path(member.name).name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.read())
    (folder / "val").symlink_to(folder / "train")
    return folder


def of_full_size(make_config: Make, train_images: int, val_images: int, epochs: int) -> Config:
    data = {"train_images": train_images, "val_images": val_images, "classes": 2}
    config = make_config(crop=224, resize=256, **data)
    recipe = config.recipe.model_copy(update={"epochs": epochs, "milestones": ()})
    return config.model_copy(update={"recipe": recipe})


@pytest.mark.parametrize("files", ["jpegs", "photographs"])
def test_pixels_are_those_of_the_reference_loader(
    files: str, make_config: Make, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(files)
    images = (24, 10, 3) if files == "jpegs" else (250, 250, 1)
    config = of_full_size(make_config, *images)
    passes = zip(
        all_batches(folder, config, "dali"), all_batches(folder, config, "reference"), strict=True
    )
    training, evaluation = (differences(dali, reference) for dali, reference in passes)
    for difference in (training, evaluation):
        assert float(difference.mean()) <= 0.004
        assert float(np.quantile(difference.numpy(), 0.999)) <= 0.02
        expect_levels(difference, 2)
    # DALI's own resizing, which rounds only once, differs in 16 % of the values
    assert float((evaluation > 0).double().mean()) <= 0.005


@pytest.mark.parametrize(("world_size", "threads"), [(1, 1), (1, 4), (2, 1), (4, 2)])
def test_the_same_bits_on_any_number_of_ranks_and_threads(
    jpegs: Path, make_config: Make, world_size: int, threads: int
) -> None:
    config = of_full_size(make_config, 24, 10, epochs=2)
    one_rank = whole_run(jpegs, config, "dali", 2, 1, 4)
    other = whole_run(jpegs, config, "dali", threads, world_size, 4)
    for a, b in zip(one_rank, other, strict=True):
        assert_equal(a, b)


def test_starts_at_any_step_and_again(root: Path, make_config: Make) -> None:
    with loader_of(root, make_config(), "dali", threads=2) as loader:
        straight = list(loader.train(0))
        assert len(straight) == 27  # 9 steps of 12 images, 4 at a time
        for first_step in (4, 2, 8):
            resumed = list(islice(loader.train(first_step), 3))  # left in the middle
            for a, b in zip(straight[3 * first_step :], resumed, strict=False):
                assert_equal(a, b)
        assert list(loader.train(9)) == []


def test_a_restart_reads_no_image_that_it_does_not_give(root: Path, make_config: Make) -> None:
    with loader_of(root, make_config(), "dali") as loader:
        wanted = {int(i) for batch in loader.train(8) for i in batch.ids}
    train = open_folder(root, "train")
    for image_id in set(range(40)) - wanted:
        Path(train.name(image_id)).write_bytes(b"")
    with loader_of(root, make_config(), "dali") as loader:
        assert len(list(loader.train(8))) == 3


def test_training_goes_on_after_evaluations(root: Path, make_config: Make) -> None:
    with loader_of(root, make_config(), "dali") as loader:
        straight = list(loader.train(0))
        batches = loader.train(0)
        interrupted = list(islice(batches, 5))
        for _ in range(2):
            assert sum(len(batch.ids) for batch in loader.evaluate()) == 11
        next(loader.evaluate())  # left in the middle
        interrupted += batches
    for a, b in zip(straight, interrupted, strict=True):
        assert_equal(a, b)


def test_evaluation_is_exact_on_any_number_of_ranks(root: Path, make_config: Make) -> None:
    _, (whole,) = all_batches(root, make_config(), "dali")
    assert whole.ids.tolist() == list(range(11))
    parts: list[Batch] = []
    for rank in range(5):  # 2, 2, 2, 2, 3 images
        parts += all_batches(root, make_config(), "dali", rank=rank, world_size=5)[1]
    assert torch.equal(torch.cat([part.ids for part in parts]), whole.ids)
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)


def test_a_rank_without_validation_images(root: Path, make_config: Make) -> None:
    for path in sorted((root / "val").glob("*/*"))[:-3:]:
        if path.name != "0.jpg":
            path.unlink()
    images = len(list((root / "val").glob("*/*")))
    assert images < 6
    config = make_config(val_images=images)
    shares = [all_batches(root, config, "dali", rank=rank, world_size=6)[1] for rank in range(6)]
    assert [] in shares
    assert sum(len(batch.ids) for share in shares for batch in share) == images


def test_odd_files_match_the_reference_loader(
    root: Path, make_config: Make, photo: Callable
) -> None:
    folder = root / "train" / "ant"  # which has gray, CMYK, palette, alpha, 16-bit, tiny ones
    rotated = Image.Exif()
    rotated[0x0112] = 6
    photo(0, 40, 40).save(folder / "rotated.jpg", exif=rotated)  # square: any window fits
    photo(1, 40, 24).save(folder / "png.JPEG", format="PNG")
    photo(2, 40, 24).convert("LA").save(folder / "gray_alpha.png")
    photo(3, 40, 24).save(folder / "behind.jpg")
    with open(folder / "behind.jpg", "ab") as file:
        file.write(bytes(100))  # more than the image
    photo(4, 600, 400).resize((6000, 5000)).save(folder / "huge.JPEG")  # 90 MB decoded
    config = make_config(train_images=45)
    dali, evaluated = all_batches(root, config, "dali")
    reference, expected = all_batches(root, config, "reference")
    difference = differences(dali, reference)
    expect_levels(difference, 2)
    expect_levels(differences(evaluated, expected), 2)
    train = open_folder(root, "train")
    ids = torch.cat([batch.ids for batch in dali]).tolist()
    seen = {train.relative_path(i) for i in ids}
    names = [
        "rotated.jpg",
        "png.JPEG",
        "gray_alpha.png",
        "behind.jpg",
        "huge.JPEG",
        "deep.png",
        "cmyk.jpg",
    ]
    assert seen >= {f"ant/{name}" for name in names}
    deep = [place for place, i in enumerate(ids) if train.relative_path(i) == "ant/deep.png"]
    assert float(difference[deep].max()) == 0  # rendered by PIL: DALI rounds its 16 bits otherwise


def cut(path: Path, left_over: int) -> None:
    path.write_bytes(path.read_bytes()[:-left_over])


@pytest.mark.parametrize("damage", ["middle", "end", "text"])
def test_a_bad_image_fails_by_name(root: Path, make_config: Make, damage: str) -> None:
    path = root / "train" / "ant" / "0.JPEG"
    open_folder(root, "train")
    if damage == "text":
        path.write_bytes(b"404: not found\n" * 10)
    else:  # without its last 2 bytes DALI decodes it, PIL does not
        cut(path, 2 if damage == "end" else path.stat().st_size // 2)
    with (
        pytest.raises(BadImageError, match=r"/train/ant/0\.JPEG: cannot be decoded: ") as caught,
        loader_of(root, make_config(), "dali") as loader,
    ):
        list(loader.train(0))
    with (
        pytest.raises(BadImageError) as expected,
        loader_of(root, make_config(), "reference") as loader,
    ):
        list(loader.train(0))
    assert str(caught.value) == str(expected.value)


def test_bad_images_are_replaced_as_by_the_reference_loader(
    root: Path, make_config: Make, break_images: Callable
) -> None:
    open_folder(root, "train")
    names = [f"ant/{i}.JPEG" for i in range(8)] + [f"cat/{i}.jpg" for i in range(4)]
    break_images(root / "train", names)
    for number in range(4, 8):
        cut(root / "train" / "cat" / f"{number}.jpg", 2)
    config = make_config(on_bad_image="skip")
    reference = whole_run(root, config, "reference", 0, 1)
    dali = whole_run(root, config, "dali", 2, 1)
    assert sum(len(batch.replaced) for batch in dali) > 20
    difference = differences(dali, reference)
    expect_levels(difference, 2)
    for world_size in (2, 4):
        for a, b in zip(dali, whole_run(root, config, "dali", 1, world_size), strict=True):
            assert_equal(a, b)


def test_a_bad_validation_image_always_fails(
    root: Path, make_config: Make, break_images: Callable
) -> None:
    break_images(root / "val", ["cat/0.jpg"])
    with (
        pytest.raises(BadImageError, match=r"val/cat/0\.jpg: cannot be decoded"),
        loader_of(root, make_config(on_bad_image="skip"), "dali") as loader,
    ):
        list(loader.evaluate())


def test_a_lost_file_is_no_bad_image(root: Path, make_config: Make) -> None:
    with loader_of(root, make_config(on_bad_image="skip"), "dali") as loader:
        (root / "train" / "ant" / "0.JPEG").unlink()
        message = r"0\.JPEG: cannot be read: it was there when .*train was indexed; .* is stale"
        with pytest.raises(UserError, match=message) as caught:
            list(loader.train(0))
    assert not isinstance(caught.value, BadImageError)


@pytest.mark.parametrize("size", [(9, 9), (480, 320)])
def test_a_changed_size_says_that_the_index_is_stale(
    root: Path, make_config: Make, size: tuple[int, int]
) -> None:
    open_folder(root, "train")
    Image.new("RGB", size).save(root / "train" / "ant" / "0.JPEG")
    message = rf"0\.JPEG: {size[0]} x {size[1]} pixels, 48 x 32 when it was indexed; the index is"
    with (
        pytest.raises(UserError, match=message),
        loader_of(root, make_config(), "dali") as loader,
    ):
        list(loader.train(0))


def test_batches_stay_as_they_are_when_the_loader_goes_on_and_ends(
    jpegs: Path, make_config: Make
) -> None:
    with loader_of(jpegs, of_full_size(make_config, 24, 10, epochs=3), "dali") as loader:
        pairs = [(batch.images, batch.images.clone()) for batch in loader.train(0)]
    torch.rand(10**7)  # memory that was given back would be written over
    assert len(pairs) == 18
    for images, copy in pairs:
        assert torch.equal(images, copy)


def native_threads() -> int:
    """Threads that are none of Python's."""
    return len(os.listdir("/proc/self/task")) - threading.active_count()


def test_an_early_end_leaves_no_thread(root: Path, make_config: Make) -> None:
    before = native_threads()
    with loader_of(root, make_config(), "dali", threads=4) as loader:
        batches = loader.train(0)
        next(batches)
        next(loader.evaluate())
        assert native_threads() >= before + 8
        loader.close()
        deadline_s = time.monotonic() + 5  # a joined thread is there for an instant more
        while native_threads() > before and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert native_threads() == before
        assert list(batches) == []  # instead of waiting for ever
        loader.close()


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_epochs_leak_no_memory(jpegs: Path, make_config: Make) -> None:
    config = of_full_size(make_config, 24, 10, epochs=22)
    resident = []
    with loader_of(jpegs, config, "dali") as loader:
        batches = loader.train(0)
        for _ in range(22):
            assert sum(len(batch.ids) for batch in islice(batches, 6)) == 24
            assert sum(len(batch.ids) for batch in loader.evaluate()) == 10
            resident.append(resident_mb())
    # 20 epochs of 34 images of 150 kB would be 102 MB
    assert max(resident[2:]) < 1.05 * resident[1]


def test_the_loader_is_recorded_and_another_must_be_asked_for(
    small: Callable, tmp_path: Path
) -> None:
    out = ("--out", tmp_path / "run")
    config = small(run__loader="auto", recipe__epochs=2, recipe__milestones=[1])
    assert harness("train", config, *out, "run.keep_checkpoints=1").returncode == 0
    (tmp_path / "run" / "status.json").write_text('{"state": "stopped"}')
    resumed = harness(
        "train",
        small(run__loader="reference", recipe__epochs=2, recipe__milestones=[1]),
        *out,
        "--resume",
    )
    assert resumed.returncode == 2
    assert "ran with run.loader dali, this resume has reference" in resumed.stderr


@pytest.mark.gpu
def test_batches_are_made_on_the_gpu(jpegs: Path, make_config: Make) -> None:
    from harness.data.batch_plan import BatchPlan
    from harness.data.loaders.choice import open_loader

    config = of_full_size(make_config, 24, 10, epochs=2)
    train, val = open_folder(jpegs, "train"), open_folder(jpegs, "val")
    batch_plan = BatchPlan(config, train, val, 0, 1, micro_batch=4, channels_last=True)
    loader = open_loader(config, batch_plan, "dali", 2, device_is_cuda=True)
    batches = list(loader.train(0))
    assert all(batch.images.is_cuda and batch.labels.is_pinned() for batch in batches)
    on_host = [
        Batch(batch.images.cpu(), batch.labels, batch.ids, batch.replaced) for batch in batches
    ]
    difference = differences(on_host, all_batches(jpegs, config, "reference")[0])
    assert float(difference.mean()) <= 0.004
    assert float(np.quantile(difference.numpy(), 0.999)) <= 0.02
    loader.close()
