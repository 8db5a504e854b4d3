"""k workers of n images over ranks and micro-batches, by hand."""

import numpy as np
import pytest

from harness.errors import UserError
from harness.recipe.minibatch import Minibatch


def test_the_minibatch_is_k_times_n():
    # section 2.1; the paper's 8192 = 256 workers of 32
    assert Minibatch(workers=256, worker_batch=32).size == 8192


def test_eight_workers_over_three_ranks():
    # 8 = 3 + 3 + 2
    minibatch = Minibatch(workers=8, worker_batch=32)
    shares = [minibatch.workers_of(rank, 3) for rank in range(3)]
    assert shares == [range(0, 3), range(3, 6), range(6, 8)]


@pytest.mark.parametrize("world_size", range(1, 9))
def test_shares_are_contiguous_and_differ_by_at_most_one(world_size):
    minibatch = Minibatch(workers=8, worker_batch=2)
    shares = [minibatch.workers_of(rank, world_size) for rank in range(world_size)]
    assert [worker for share in shares for worker in share] == list(range(8))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1


def test_more_ranks_than_workers_are_refused():
    with pytest.raises(UserError, match=r"^9 ranks, but .* is only 8 workers: start at most 8$"):
        Minibatch(workers=8, worker_batch=32).workers_of(0, 9)


@pytest.mark.parametrize("rank", [-1, 3])
def test_a_rank_outside_the_world_is_a_mistake(rank):
    with pytest.raises(ValueError, match="not in"):
        Minibatch(workers=8, worker_batch=32).workers_of(rank, 3)


def test_the_last_micro_batch_may_hold_fewer_workers():
    # rank 0 of 2 hosts workers 0..4 of 10; two workers (64 images) at a time: m = 2, 2, m' = 1
    minibatch = Minibatch(workers=10, worker_batch=32)
    assert minibatch.micro_batches(0, 2, 64) == [range(0, 2), range(2, 4), range(4, 5)]
    assert minibatch.micro_batches(1, 2, 64) == [range(5, 7), range(7, 9), range(9, 10)]
    # more than the rank has: all of them at once
    assert minibatch.micro_batches(1, 2, 1024) == [range(5, 10)]


@pytest.mark.parametrize("images", [0, 16, 48])
def test_a_micro_batch_is_a_multiple_of_n(images):
    with pytest.raises(ValueError, match="not a multiple of 32"):
        Minibatch(workers=8, worker_batch=32).micro_batches(0, 1, images)


def test_places_in_both_layouts():
    # n = 3; worker 1 holds places 3 4 5, worker 2 holds 6 7 8
    minibatch = Minibatch(workers=5, worker_batch=3)
    assert minibatch.places(range(1, 3), channels_last=True).tolist() == [3, 4, 5, 6, 7, 8]
    # NCHW: image i of the j-th worker at i*m + j, so the workers alternate
    nchw = minibatch.places(range(1, 3), channels_last=False)
    assert nchw.tolist() == [3, 6, 4, 7, 5, 8]
    assert nchw.dtype == np.int64


def test_places_of_a_smaller_last_micro_batch():
    # micro-batches of 5 workers of 2 images, two workers at a time: the last, m' = 1, has worker 4
    minibatch = Minibatch(workers=5, worker_batch=2)
    *_, last = minibatch.micro_batches(0, 1, 4)
    assert last == range(4, 5)
    # m' = 1: both orders are the same
    assert minibatch.places(last, channels_last=True).tolist() == [8, 9]
    assert minibatch.places(last, channels_last=False).tolist() == [8, 9]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("micro_batch", [4, 12, 28])
def test_all_ranks_together_have_every_place_once(channels_last, world_size, micro_batch):
    minibatch = Minibatch(workers=7, worker_batch=4)
    places = [
        minibatch.places(workers, channels_last)
        for rank in range(world_size)
        for workers in minibatch.micro_batches(rank, world_size, micro_batch)
    ]
    assert sorted(np.concatenate(places).tolist()) == list(range(28))
