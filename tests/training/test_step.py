"""Variants of the step: compiled blocks, and a GPU that is not waited for."""

import itertools
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch._dynamo as dynamo
import torch.distributed as dist

from harness import load_config
from harness.data.batch import Batch
from harness.distributed import World
from harness.execution.compilation import compile_blocks, uncompiled
from harness.execution.precision import FLOAT32_SETTINGS, precision_within, set_precision
from harness.models.registry import build_model
from harness.training.replica import Replica
from harness.training.step import Step

N, PIXELS = 4, 8


def batches(device, sizes):
    generator = torch.Generator().manual_seed(0)
    for workers in itertools.cycle(sizes):
        count = workers * N
        images = torch.randint(
            0, 256, (count, 3, PIXELS, PIXELS), dtype=torch.uint8, generator=generator
        )
        labels = torch.randint(0, 10, (count,), generator=generator)
        yield Batch(images.to(device), labels.to(device), torch.arange(count), [])


def make_step(small, device, ranks=1, **run):
    """A step of 5 workers in micro-batches of m = 2, 2 and m' = 1."""
    path = small(recipe__minibatch=5 * N, recipe__worker_batch=N)
    config = load_config(path, ["run.micro_batch=8", *(f"run.{k}={v}" for k, v in run.items())])
    cuda = device.type == "cuda"
    dtype = torch.float64 if config.run.precision == "float64" else torch.float32
    model = build_model(config, channels_last=cuda).to(device, dtype)
    model = model.to(memory_format=torch.channels_last) if cuda else model
    world = World(0, ranks, 0, ranks, "alone", device)
    return Step(config, Replica(config, model, world), [range(2), range(2, 4), range(4, 5)])


def run_steps(step, steps=2):
    source = batches(step.device, [2, 2, 1])
    for number in range(steps):
        step(number, source)
    return {name: value.clone() for name, value in step.network.state_dict().items()}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_blocks_are_the_same_step(small, device, monkeypatch):
    dynamo.reset()
    dynamo.utils.counters.clear()
    if device == "cpu":  # all but the C++ compiler's minute
        by_parts = partial(compile_blocks, backend="aot_eager")
        monkeypatch.setattr("harness.training.replica.compile_blocks", by_parts)
    device = torch.device(device)
    plain = run_steps(make_step(small, device, precision="float64", compile=False))
    step = make_step(small, device, precision="float64", compile=True)
    compiled = run_steps(step)
    assert list(compiled) == list(plain)
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-10, atol=1e-12, msg=name)
    # ResNet-8 has 3 blocks of 3 shapes, at m = 2 and m' = 1
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 6
    assert not dynamo.utils.counters["graph_break"]
    with uncompiled(step.config):
        step.network.eval()(torch.zeros(3, 3, PIXELS, PIXELS, dtype=torch.float64, device=device))
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 6


def test_ddp_does_not_cut_blocks(small, monkeypatch, tmp_path):
    dynamo.reset()
    graphs, before = [], dynamo.config.optimize_ddp

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        "harness.training.replica.compile_blocks", partial(compile_blocks, backend=count)
    )
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        step = make_step(small, torch.device("cpu"), ranks=2, compile=True)
        step.replica.sums.model.bucket_bytes_cap = (
            1  # a small network's gradients fill many buckets, too
        )
        run_steps(step)
    finally:
        dist.destroy_process_group()
    assert len(graphs) == 6  # three blocks, at m = 2 and m' = 1
    assert dynamo.config.optimize_ddp == before


def float32_arithmetic():
    """What PyTorch's kernels ask for: of matrix products, convolutions and recurrent layers."""
    operations = [(b, op) for b in ("cuda", "mkldnn") for op in ("matmul", "conv", "rnn")]
    return {pair: torch._C._get_fp32_precision_getter(*pair) for pair in operations}


@pytest.fixture
def tf32_everywhere():
    """As a user or an older PyTorch may have set it: each operation by itself."""
    before = [setting.fp32_precision for setting in FLOAT32_SETTINGS]
    for setting in FLOAT32_SETTINGS:
        setting.fp32_precision = "tf32"
    yield
    for setting, arithmetic in zip(FLOAT32_SETTINGS, before, strict=True):
        setting.fp32_precision = arithmetic


@pytest.mark.usefixtures("tf32_everywhere")
def test_only_tf32_computes_in_tf32():
    assert set(float32_arithmetic().values()) == {"tf32"}
    for precision in ("float32", "bfloat16", "float16", "float64"):
        set_precision(precision)
        assert set(float32_arithmetic().values()) == {"ieee"}, precision
        with precision_within("tf32"):
            assert set(float32_arithmetic().values()) == {"tf32"}
        assert set(float32_arithmetic().values()) == {"ieee"}
    set_precision("tf32")
    with precision_within("float32"):
        assert set(float32_arithmetic().values()) == {"ieee"}
    assert set(float32_arithmetic().values()) == {"tf32"}


def test_a_precision_for_a_while_leaves_no_trace():
    # in a process of its own, with PyTorch's own defaults; then a setting for all is still for all
    code = """
import torch
from harness.execution.precision import precision_within
from tests.training.test_step import float32_arithmetic
before = float32_arithmetic()
with precision_within("float32"):
    assert set(float32_arithmetic().values()) == {"ieee"}, float32_arithmetic()
assert float32_arithmetic() == before, float32_arithmetic()
torch.backends.fp32_precision = "tf32"
assert set(float32_arithmetic().values()) == {"tf32"}, float32_arithmetic()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_no_step_reads_a_number_back(small, monkeypatch):
    # tensors of the meta device have shapes and no numbers: whatever asks for one fails.
    # PyTorch's fused SGD has no kernel for it: not in the test
    sgd = torch.optim.SGD
    monkeypatch.setattr(
        "harness.recipe.optimizer.torch.optim.SGD",
        lambda groups, **how: sgd(groups, **how | {"fused": False}),
    )
    step = make_step(small, torch.device("meta"), compile=False)
    source = batches(torch.device("cpu"), [2, 2, 1])
    for number in range(2):
        step(number, source)
    assert next(step.network.parameters()).is_meta
    with pytest.raises(RuntimeError, match="meta"):  # a log line reads
        step.metrics.read()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_no_step_waits_for_the_gpu(small, precision):
    step = make_step(small, torch.device("cuda"), precision=precision, compile=False)
    source = batches(torch.device("cuda"), [2, 2, 1])
    for number in range(3):
        step(number, source)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(3, 6):
            step(number, source)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step.metrics.read().loss > 0
