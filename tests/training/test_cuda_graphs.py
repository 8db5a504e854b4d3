"""Passes that are replayed as CUDA graphs. On a CPU tests/recorded_graph.py stands for CUDA's."""

import copy
from functools import cache

import pytest
import torch

from harness import load_config
from harness.distributed import World
from harness.models.registry import build_model
from harness.runs.logging.jsonl import read_log
from harness.training.graphed_model import CudaCapture, GraphedModel
from harness.training.replica import Replica
from harness.training.step import Step
from harness.training.tuning.cuda_graphs import try_graphs, tune_cuda_graphs
from tests.conftest import free_port
from tests.faults import start
from tests.recorded_graph import RecordedCapture
from tests.test_train import assert_same, final_weights
from tests.training.test_step import N, batches, make_step

CPU = torch.device("cpu")
SIZES = [2 * N, 2 * N, N]  # as make_step's


def states(step, steps):
    """The whole state after steps of m = 2, 2 and m' = 1."""
    source = batches(step.device, [2, 2, 1])
    for number in range(steps):
        step(number, source)
    optimizer = step.optimizer.state_dict()["state"]
    return step.network.state_dict(), [s["momentum_buffer"] for s in optimizer.values()]


@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16", "float16"])
def test_replayed_passes_are_the_same_steps(small, precision):
    plain = states(make_step(small, CPU, precision=precision), 3)
    step, recorded = make_step(small, CPU, precision=precision), RecordedCapture()
    try_graphs(step.replica, SIZES, None, recorded)
    for images in (2 * N, N):  # whatever the trial found to be faster
        step.replica.capture(torch.zeros(images, 3, 8, 8, dtype=torch.uint8), recorded)
    step.replica.forget_dry_passes()
    before = recorded.replays
    replayed = states(step, 3)
    assert recorded.replays - before == 3 * 3 * 2  # steps, micro-batches, forward and backward
    for name, value in plain[0].items():
        assert torch.equal(replayed[0][name], value), name
    assert all(torch.equal(a, b) for a, b in zip(plain[1], replayed[1], strict=True))


def test_a_gradient_is_never_the_graphs_own_memory(small):
    # else the next replay would overwrite what is to be added to
    model = GraphedModel(build_model(load_config(small())))
    model.capture(torch.rand(64, 3, 8, 8), RecordedCapture())
    (passes,) = model._passes.values()
    model(torch.rand(64, 3, 8, 8)).sum().backward()
    own = {gradient.data_ptr() for gradient in passes.gradients}
    assert not own & {parameter.grad.data_ptr() for parameter in model.parameters()}


def test_evaluation_and_other_sizes_are_not_replayed(small):
    network = build_model(load_config(small()))
    plain, recorded = GraphedModel(copy.deepcopy(network)), RecordedCapture()
    model = GraphedModel(network)
    model.capture(torch.rand(64, 3, 8, 8), recorded)
    network.load_state_dict(plain.network.state_dict())
    images = torch.rand(96, 3, 8, 8)
    assert torch.equal(model(images), plain(images))
    for either in (model, plain):
        either.network.eval()
    assert torch.equal(model(images[:64]), plain(images[:64]))
    assert recorded.replays == 0


def timed(monkeypatch, plain_s, replayed_s):
    """A clock by which a step's passes take so long."""
    clock = {"s": 0.0}
    monkeypatch.setattr("harness.training.tuning.cuda_graphs.time.perf_counter", lambda: clock["s"])
    dry_pass = Replica.dry_pass

    def slowly(replica, pixels, is_last=False):
        dry_pass(replica, pixels, is_last)
        clock["s"] += (replayed_s if replica.graphed._replays else plain_s) / len(SIZES)

    monkeypatch.setattr(Replica, "dry_pass", slowly)


@pytest.mark.parametrize(
    ("replayed_ms", "found"),
    [
        (5, "used: 5.00 ms a step's passes, 9.00 ms without"),
        (8.9, "not used: no faster, 8.90 ms a step's passes, 9.00 ms without"),  # 1 %
    ],
)
def test_they_are_used_where_they_are_faster(small, monkeypatch, replayed_ms, found):
    timed(monkeypatch, 0.009, replayed_ms / 1000)
    step, recorded = make_step(small, CPU), RecordedCapture()
    before = copy.deepcopy(step.network.state_dict())
    trial = try_graphs(step.replica, SIZES, None, recorded)
    assert str(trial) == found and trial.used == found.startswith("used")
    # nothing of the trial stays
    assert all(torch.equal(before[k], v) for k, v in step.network.state_dict().items())
    assert all(parameter.grad is None for parameter in step.network.parameters())
    assert not any(sums.any() for sums in step.replica.running_statistics.sums)
    replays = recorded.replays
    step(0, batches(CPU, [2, 2, 1]))
    assert (recorded.replays > replays) == trial.used


class Frozen(RecordedCapture):
    """Graphs that run once, so that later images and weights are not seen."""

    def __call__(self, work):
        result, replay = super().__call__(work)
        return result, cache(replay)


class Refused(RecordedCapture):
    def __call__(self, work):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")


class Unfilled(RecordedCapture):
    """Graphs whose replay does nothing."""

    def __call__(self, work):
        return super().__call__(work)[0], lambda: None


@pytest.mark.parametrize(
    ("capture", "why"),
    [
        (Frozen, "not used: gradients of 8 images differ by"),
        (Unfilled, "not used: gradients of 8 images differ by inf"),
        (Refused, "not used: not captured: CUDA out of memory. Tried to allocate"),
    ],
)
def test_graphs_that_are_wrong_are_found_out(small, capture, why):
    plain = states(make_step(small, CPU), 2)[0]
    step = make_step(small, CPU)
    trial = try_graphs(step.replica, SIZES, None, capture())
    assert str(trial).startswith(why) and not trial.used
    found = states(step, 2)[0]
    assert all(torch.equal(plain[name], value) for name, value in found.items())


class Stream:
    """In the place of a CUDA stream; `current` is the one in use."""

    current = None

    def wait_stream(self, other):
        pass


class InStream:
    """In the place of `torch.cuda.stream`. No generator, which would leave when it is collected."""

    def __init__(self, stream):
        self.stream = stream

    def __enter__(self):
        self.before, Stream.current = Stream.current, self.stream

    def __exit__(self, *error):
        Stream.current = self.before


class RefusedGraph:
    """In the place of a CUDA graph whose capture CUDA refuses: it says so at the end."""

    def capture_begin(self, *pool, **how):
        pass

    def capture_end(self):
        raise torch.AcceleratorError("operation failed due to a previous error during capture")


def test_a_refused_capture_leaves_its_stream(small, monkeypatch):
    # torch.cuda.graph itself, on stubs of what it uses
    Stream.current = default = Stream()
    stubs = {"stream": InStream, "Stream": Stream, "current_stream": lambda: Stream.current}
    stubs |= {"CUDAGraph": RefusedGraph, "graph_pool_handle": lambda: (0, 0)}
    stubs |= {"synchronize": lambda: None, "empty_cache": lambda: None}
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", Stream())
    step = make_step(small, CPU)
    trial = try_graphs(step.replica, SIZES, None, CudaCapture())
    assert str(trial).startswith("not used: not captured: operation failed due to a previous")
    assert Stream.current is default


@pytest.mark.gpu
def test_cuda_refuses_a_capture_and_training_continues(small):
    device = torch.device("cuda")
    plain = states(make_step(small, device, compile=False), 3)[0]
    step = make_step(small, device, compile=False)
    forward = step.network.forward

    def reads_back(images):
        float(images.sum())  # waits for the device, which a capture refuses
        return forward(images)

    step.network.forward = reads_back
    before = torch.cuda.current_stream()
    trial = try_graphs(step.replica, SIZES, None)
    assert str(trial).startswith("not used: not captured")
    assert torch.cuda.current_stream() == before
    found = states(step, 3)[0]
    for name, value in found.items():
        torch.testing.assert_close(value, plain[name], msg=name)


def test_weights_that_were_cast_before_the_capture_are_found_out(small, monkeypatch):
    # what autocast does of itself within one context: the graph then holds no cast of the weights
    capture = Replica.capture

    def within_one_context(replica, pixels, recorded):
        with torch.autocast("cpu", torch.bfloat16):
            capture(replica, pixels, recorded)

    monkeypatch.setattr(Replica, "capture", within_one_context)
    step = make_step(small, CPU, precision="bfloat16")
    trial = try_graphs(step.replica, SIZES, None, RecordedCapture())
    assert str(trial).startswith("not used: gradients of 8 images differ by")


def test_on_a_cpu_there_is_no_trial(small):
    trial = tune_cuda_graphs(make_step(small, CPU).replica, SIZES, None, watchdog=None)
    assert str(trial) == "none" and not trial.used


REPLAYED = """
import harness.training.tuning.cuda_graphs as trial
import harness.training.setup
from tests.training.test_cuda_graphs import RecordedCapture, Refused
trial.GAIN = -1e9  # what only pretends to be a graph is slower
capture = Refused() if rank == {refused} else RecordedCapture()
def tune(replica, sizes, control, watchdog):
    return trial.try_graphs(replica, sizes, control, capture)
harness.training.setup.tune_cuda_graphs = tune
"""


def trained(config, out, ranks, plant=""):
    """The final weights, and what the log says of graphs."""
    port = free_port()
    arguments = ["train", config, "run.micro_batch=64", "run.precision=float64", "--out", out]
    processes = [start(arguments, rank, ranks, port, plant) for rank in range(ranks)]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, said
    return final_weights(out), read_log(out / "log.jsonl")[0]["graphs"]


def test_a_run_of_three_ranks_is_the_same_with_and_without(small, tmp_path):
    # shares of 3, 3 and 2 workers in micro-batches of m = 2: two ranks capture two sizes
    plain, none = trained(small(), tmp_path / "plain", 3)
    replayed, used = trained(small(), tmp_path / "replayed", 3, REPLAYED.format(refused=None))
    assert none == "none" and used.startswith("used: ")
    # DDP orders its buckets by the first gradient to come, so sums may round in another order
    assert_same(plain, replayed, 1e-9)
    # a rank that cannot capture decides for all
    without, graphs = trained(small(), tmp_path / "without", 3, REPLAYED.format(refused=1))
    assert graphs == "not used: not captured: CUDA out of memory. Tried to allocate"
    assert_same(plain, without, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_cuda_graphs_are_the_same_steps(small, precision):
    device = torch.device("cuda")
    plain = states(make_step(small, device, precision=precision, compile=False), 3)
    step = make_step(small, device, precision=precision, compile=True)
    trial = try_graphs(step.replica, SIZES, None)
    assert trial.used, str(trial)  # a small network is bound by launching
    for name, value in states(step, 3)[0].items():
        torch.testing.assert_close(value, plain[0][name], rtol=0.02, atol=0.01, msg=name)


def exact_step(small):
    """A step of 5 units of one worker with exact sums."""
    path = small(recipe__minibatch=5 * N, recipe__worker_batch=N, run__micro_batch="auto")
    config = load_config(path, ["run.sums=exact"])
    replica = Replica(config, build_model(config), World(0, 1, 0, 1, "alone", CPU))
    return Step(config, replica, [range(worker, worker + 1) for worker in range(5)])


def test_graphs_of_one_unit_have_the_bits_of_exact_sums(small):
    def weights_after(step):
        source = batches(CPU, [1])
        for number in range(3):
            step(number, source)
        return step.network.state_dict()

    plain, step, recorded = exact_step(small), exact_step(small), RecordedCapture()
    trial = try_graphs(step.replica, [N] * 5, None, recorded)
    assert not trial.refusal
    step.replica.capture(torch.zeros(N, 3, 8, 8, dtype=torch.uint8), recorded)
    step.replica.forget_dry_passes()
    before, wanted = recorded.replays, weights_after(plain)
    found = weights_after(step)
    assert recorded.replays - before == 3 * 5 * 2  # steps, units, forward and backward
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
