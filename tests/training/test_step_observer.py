"""Observers of a step: what they are told, and when."""

import itertools

import pytest
import torch
import torch.distributed as dist

from harness.distributed import World
from harness.resilience.step_observer import StepObserver
from harness.training.replica import Replica
from harness.training.step import Step
from tests.training.test_step import batches, make_step

CPU = torch.device("cpu")


class Recorder(StepObserver):
    def __init__(self):
        self.seen = []

    def on_phase(self, phase):
        self.seen.append(phase)

    def on_bucket_sent(self, last):
        self.seen.append("last bucket" if last else "bucket")

    def on_step_end(self):
        self.seen.append("end")


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone: DDP as on several ranks."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def observed(step, ranks, *observers):
    """A step like `step`, followed by observers."""
    world = World(0, ranks, 0, ranks, "alone", CPU)
    replica = Replica(step.config, step.network, world, observers)
    return Step(step.config, replica, [range(2), range(2, 4), range(4, 5)])


def test_each_phase_is_entered_in_order(small):
    recorder = Recorder()
    step = observed(make_step(small, CPU), 1, recorder, StepObserver())
    step(0, batches(CPU, [2, 2, 1]))
    passes = ["data wait", "forward", "backward", "metrics"]
    assert recorder.seen == [*passes * 3, "optimizer", "end"]


@pytest.mark.usefixtures("group")
def test_buckets_are_sent_within_the_last_backward_pass(small):
    recorder = Recorder()
    step = observed(make_step(small, CPU), 2, recorder)
    for number in range(2):
        recorder.seen.clear()
        step(number, itertools.islice(batches(CPU, [2, 2, 1]), 3))
        sent = [place for place, name in enumerate(recorder.seen) if "bucket" in name]
        # three micro-batches of 4 phases; gradients of the first two stay local
        assert sent == list(range(11, 11 + len(sent))) and sent
        assert recorder.seen[sent[-1]] == "last bucket" and recorder.seen[10] == "backward"
        assert recorder.seen[sent[-1] + 1 :] == ["metrics", "optimizer", "end"]


def test_an_observer_changes_no_bit_of_the_run(small):
    plain, followed = make_step(small, CPU), observed(make_step(small, CPU), 1, Recorder())
    for step in (plain, followed):
        source = batches(CPU, [2, 2, 1])
        for number in range(2):
            step(number, source)
    for a, b in zip(plain.network.parameters(), followed.network.parameters(), strict=True):
        assert torch.equal(a, b)
