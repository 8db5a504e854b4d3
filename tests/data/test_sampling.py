"""The sampling: golden values, torchvision's distribution, and nothing that holds state."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from harness.config.schema import DataConfig
from harness.data.bad_image import replacement
from harness.data.sampling import (
    Purpose,
    TrainBatchSpec,
    crops,
    hash64,
    permutation,
    resizes,
)
from harness.errors import UserError

DATA = DataConfig(train_images=1, val_images=1, classes=1)  # ImageNet's window: area 8 to 100 %


def crops_of(images: int, height: int, width: int, data: DataConfig = DATA) -> TrainBatchSpec:
    ids = np.arange(images)
    return crops(1, 0, ids, np.full(images, height), np.full(images, width), data)


def test_hash_is_splitmix64() -> None:
    # the published test vector of splitmix64 for seed 1234567
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert hash64(1234567, np.arange(3)).tolist() == expected  # type: ignore[arg-type]


def test_hash_by_hand() -> None:
    def splitmix64(seed: int, number: int) -> int:
        z = (seed + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    seed, epoch, image_id = 2**63 - 1, 89, 1281166
    by_hand = splitmix64(splitmix64(splitmix64(Purpose.CROP, seed), epoch), image_id)
    assert int(hash64(Purpose.CROP, seed, epoch, image_id)) == by_hand


def test_golden_values() -> None:
    # changing any of these changes the training curve of every config
    assert permutation(1, 0, 10).tolist() == [0, 2, 4, 9, 6, 8, 5, 1, 3, 7]
    window = crops(1, 0, np.arange(4), np.full(4, 375), np.full(4, 500), DATA)
    columns = (window.top, window.left, window.height, window.width, window.flip)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    assert list(rows) == [
        (31, 43, 244, 221, False),
        (12, 104, 359, 340, False),
        (20, 126, 295, 347, False),
        (130, 215, 226, 244, False),
    ]
    assert [replacement(1, 0, 5, attempt, 1000) for attempt in range(4)] == [121, 208, 963, 786]


def test_bits_are_fair_and_independent() -> None:
    # 20,000 coins: 0.5 +- 5 sqrt(0.25 / 20,000) = 0.018
    def bits(*keys: object) -> np.ndarray:
        hashes = hash64(*keys)[:, None] >> np.arange(64, dtype=np.uint64)  # type: ignore[arg-type]
        return hashes & np.uint64(1)

    ids = np.arange(20_000)
    plain = bits(Purpose.CROP, 1, 0, ids)
    np.testing.assert_allclose(plain.mean(axis=0), 0.5, atol=0.018)
    for other in (
        bits(Purpose.FLIP, 1, 0, ids),
        bits(Purpose.CROP, 2, 0, ids),
        bits(Purpose.CROP, 1, 1, ids),
        bits(Purpose.CROP, 1, 0, ids + 1),
        np.roll(plain, 1, axis=1),
    ):
        np.testing.assert_allclose((plain ^ other).mean(axis=0), 0.5, atol=0.018)


def test_permutation_holds_every_image_once() -> None:
    order = permutation(3, 7, 5000)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(5000))
    for other in (permutation(3, 8, 5000), permutation(4, 7, 5000)):
        assert (order == other).sum() < 10  # one in common is expected


def test_every_place_is_as_likely() -> None:
    # 7 images, 7,000 epochs: 1000 +- 5 sqrt(7000 * 1/7 * 6/7) = 146 for each image at each place
    orders = np.stack([permutation(1, epoch, 7) for epoch in range(7000)])
    counts = np.stack([(orders == image_id).sum(axis=0) for image_id in range(7)])
    assert np.abs(counts - 1000).max() < 146


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float:
    """The largest distance between two empirical distribution functions."""
    values = np.concatenate([a, b])
    at_a = np.searchsorted(np.sort(a), values, side="right") / len(a)
    at_b = np.searchsorted(np.sort(b), values, side="right") / len(b)
    return float(np.abs(at_a - at_b).max())


@pytest.mark.parametrize(
    ("height", "width", "area"),
    [
        (375, 500, (0.08, 1.0)),
        (500, 375, (0.08, 1.0)),
        (32, 32, (0.08, 1.0)),
        (8, 8, (0.7, 1.0)),
        (100, 1000, (0.08, 1.0)),  # a panorama: about half of the windows are the fallback's
        (1000, 100, (0.08, 1.0)),
        (100, 1000, (0.5, 1.0)),  # nothing fits
        (1, 1, (0.08, 1.0)),
    ],
)
def test_windows_are_distributed_as_torchvisions(
    height: int, width: int, area: tuple[float, float]
) -> None:
    data = DATA.model_copy(update={"crop_area": area})
    image = Image.new("L", (width, height))
    torch.manual_seed(1)
    transform = transforms.RandomResizedCrop(224, area, data.crop_ratio)
    theirs = np.array(
        [transform.get_params(image, transform.scale, transform.ratio) for _ in range(3000)]
    )
    ours = crops_of(30_000, height, width, data)
    columns = [ours.top, ours.left, ours.height, ours.width]
    # 0.1 % points of the Kolmogorov-Smirnov test: 1.95 sqrt(1/3000 + 1/30,000) = 0.0373
    for our, their in zip(columns, theirs.T, strict=True):
        assert kolmogorov_smirnov(our, their) < 0.0373
    # what couples the columns: area, ratio, the far edges, and both corners
    for function in (
        lambda top, left, h, w: h * w,
        lambda top, left, h, w: h / w,
        lambda top, left, h, w: height - top - h,
        lambda top, left, h, w: width - left - w,
        lambda top, left, h, w: top * width - left * height,
    ):
        assert kolmogorov_smirnov(function(*columns), function(*theirs.T)) < 0.0373


def test_fallback_by_hand() -> None:
    # area of at least half of 100 x 1000 needs a height of sqrt(50,000 / 1.333) = 194 > 100:
    # so the whole height, 100 * 4/3 = 133 wide, centred: (1000 - 133) // 2 = 433
    data = DATA.model_copy(update={"crop_area": (0.5, 1.0)})
    for height, width, expected in (
        (100, 1000, (0, 433, 100, 133)),
        (1000, 100, (433, 0, 133, 100)),
    ):
        window = crops_of(5, height, width, data)
        for column, value in zip(
            (window.top, window.left, window.height, window.width), expected, strict=True
        ):
            assert column.tolist() == [value] * 5


def test_windows_lie_within_their_images() -> None:
    random = np.random.default_rng(1)
    sizes = np.exp(random.uniform(0, np.log(3000), (20_000, 2))).astype(np.int32)
    sizes[:3] = (1, 1), (1, 3000), (3000, 1)
    heights, widths = sizes.T
    window = crops(1, 0, np.arange(20_000), heights, widths, DATA)
    assert (window.top >= 0).all() and (window.left >= 0).all()
    assert (window.height >= 1).all() and (window.width >= 1).all()
    assert (window.top + window.height <= heights).all()
    assert (window.left + window.width <= widths).all()
    assert {x.dtype for x in (window.top, window.left, window.height, window.width)} == {
        np.dtype(np.int32)
    }


def test_a_window_depends_on_seed_epoch_and_image_only() -> None:
    random = np.random.default_rng(1)
    heights, widths = random.integers(1, 500, (2, 100))
    ids = random.permutation(100)
    all_at_once = crops(5, 3, ids, heights[ids], widths[ids], DATA)
    for place in (0, 17, 99):
        alone = crops(5, 3, ids[[place]], heights[ids[[place]]], widths[ids[[place]]], DATA)
        for name in ("top", "left", "height", "width", "flip"):
            assert getattr(alone, name)[0] == getattr(all_at_once, name)[place]
    for seed, epoch in ((6, 3), (5, 4)):
        other = crops(seed, epoch, ids, heights[ids], widths[ids], DATA)
        assert (other.top == all_at_once.top).mean() < 0.5


def test_half_of_the_images_are_flipped_or_none() -> None:
    # 10,000 coins: 5000 +- 5 * 50
    assert abs(int(crops_of(10_000, 30, 30).flip.sum()) - 5000) < 250
    no_flip = DATA.model_copy(update={"flip": False})
    assert not crops_of(10_000, 30, 30, no_flip).flip.any()


def test_no_pixel_is_asked_of_an_unknown_size() -> None:
    window = crops_of(3, 0, 0)
    assert window.top.tolist() == window.left.tolist() == [0, 0, 0]
    assert window.height.tolist() == window.width.tolist() == [1, 1, 1]
    assert resizes(np.arange(1), np.zeros(1), np.zeros(1), DATA).resized_height.tolist() == [256]


def test_resizes_by_hand() -> None:
    # 375 x 500: short side to 256, long side int(256 * 500 / 375) = int(341.33) = 341;
    # top (256 - 224) / 2 = 16, left (341 - 224) / 2 = 58.5, rounded to even: 58
    # 100 x 101: int(258.56) = 258, left 17; 300 x 301: int(256.85) = 256, left 16
    heights, widths = np.array([375, 500, 100, 300, 256]), np.array([500, 375, 101, 301, 256])
    found = resizes(np.arange(5), heights, widths, DATA)
    assert found.resized_height.tolist() == [256, 341, 256, 256, 256]
    assert found.resized_width.tolist() == [341, 256, 258, 256, 256]
    assert found.top.tolist() == [16, 58, 16, 16, 16]
    assert found.left.tolist() == [58, 16, 17, 16, 16]


def test_resized_sizes_are_torchvisions() -> None:
    random = np.random.default_rng(1)
    sizes = random.integers(1, 60, (300, 2))
    data = DATA.model_copy(update={"crop": 8, "resize": 10})
    found = resizes(np.arange(300), sizes[:, 0], sizes[:, 1], data)
    resize = transforms.Resize(10)
    for place, (height, width) in enumerate(sizes.tolist()):
        theirs = resize(Image.new("L", (width, height)))
        assert theirs.size == (found.resized_width[place], found.resized_height[place])


def test_replacement_is_any_other_image() -> None:
    found = [replacement(1, epoch, 2, 0, 5) for epoch in range(4000)]
    counts = np.bincount(found, minlength=5)
    assert counts[2] == 0
    # 1000 +- 5 sqrt(4000 * 1/4 * 3/4) = 137 for each of the four others
    assert np.abs(counts[[0, 1, 3, 4]] - 1000).max() < 137
    assert replacement(1, 0, 0, 0, 2) == 1 and replacement(1, 0, 1, 0, 2) == 0
    with pytest.raises(UserError, match="no other image"):
        replacement(1, 0, 0, 0, 1)
