"""ImageNet at full size, on a made-up index of 1,281,167 training images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.sampling import (
    TRAIN,
    VAL,
    in_a_fresh_process,
    make_up_index,
    paper_config,
    rank_memory,
)
from harness.data.batch_plan import BatchPlan
from harness.data.sampling import permutation
from harness.data.sources.folder import open_folder


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("full")
    make_up_index(root, "train", TRAIN)
    make_up_index(root, "val", VAL)
    return root


def test_a_rank_needs_less_than_200_mb(full: Path) -> None:
    memory = in_a_fresh_process(rank_memory, full)
    # names 20, label 8, width and height 4 each: 36 bytes for each of 1,331,167 images
    assert memory["index_mb"] > 0.8 * 36 * (TRAIN + VAL) / 1e6
    # and two orders of 8 bytes an image, this epoch's and the next one's
    assert memory["index_mb"] + 16 * TRAIN / 1e6 < memory["peak_mb"] < 200


def test_an_epoch_of_the_paper(full: Path) -> None:
    # floor(1,281,167 / 8192) = 156 steps; rank 1 of 8 has workers 32 to 63, so the places 1024 to
    # 2047 of each step, in 4 micro-batches of 256
    config = paper_config()
    batch_plan = BatchPlan(
        config, open_folder(full, "train"), open_folder(full, "val"), 1, 8, 256, True
    )
    requests = list(batch_plan.training(156))
    assert len(requests) == 156 * 4
    order = permutation(config.seed, 1, TRAIN)[: 156 * 8192].reshape(156, 8, 1024)
    ids = np.concatenate([request.ids for request in requests])
    np.testing.assert_array_equal(ids.reshape(156, 1024), order[:, 1])
    assert len(np.unique(ids)) == 156 * 1024
