"""run.micro_batch: auto."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import yaml

from harness import load_config
from harness.distributed import World
from harness.execution.compilation import compile_blocks
from harness.models.registry import build_model
from harness.outcome import RunFailed
from harness.planning.runtime import pass_images
from harness.recipe.minibatch import Minibatch
from harness.runs.logging.jsonl import read_log
from harness.runs.run_folder import RunFolder
from harness.training.replica import Replica
from harness.training.setup import train
from harness.training.tuning.micro_batch import candidates, fastest_micro_batch, random_pixels
from tests.conftest import harness
from tests.test_train import final_weights

ALONE = World(0, 1, 0, 1, "alone", torch.device("cpu"))


def test_candidates_are_doubled_up_to_a_ranks_share():
    paper = Minibatch(256, 32)
    assert candidates(paper, 1, "cuda") == [32, 64, 128, 256, 512, 1024]
    assert candidates(paper, 1, "cpu") == [32, 64, 128, 256]
    assert candidates(paper, 256, "cuda") == [32]
    assert candidates(Minibatch(8, 32), 3, "cpu") == [32, 64, 96]  # shares 3, 3, 2
    assert candidates(Minibatch(2, 512), 1, "cpu") == [512]


class Timed:
    """In the place of a step whose passes take as long as they are told, or do not fit."""

    device = torch.device("cpu")
    config = SimpleNamespace(data=SimpleNamespace(crop=2), run=SimpleNamespace(compile=False))

    def __init__(self, monkeypatch, ms_an_image):
        self.ms_an_image, self.clock_s, self.asked, self.forgotten = ms_an_image, 0.0, [], 0
        monkeypatch.setattr(
            "harness.training.tuning.micro_batch.time.perf_counter", lambda: self.clock_s
        )

    def dry_pass(self, pixels):
        images = len(pixels)
        self.asked.append(images)
        if images not in self.ms_an_image:
            raise torch.OutOfMemoryError("out of memory")
        self.clock_s += images * self.ms_an_image[images] / 1000

    def forget_dry_passes(self):
        self.forgotten += 1


@pytest.mark.parametrize(
    ("ms_an_image", "chosen", "last_asked"),
    [
        ({32: 4.0, 64: 3.0, 128: 2.0, 256: 1.9}, 256, 256),
        ({32: 4.0, 64: 3.0, 128: 2.97, 256: 1.0}, 64, 128),  # 1 % is no gain
        ({32: 2.0, 64: 2.5}, 32, 64),
        ({32: 4.0, 64: 3.0}, 64, 128),  # 128 does not fit
    ],
)
def test_the_smallest_that_no_larger_one_beats(monkeypatch, ms_an_image, chosen, last_asked):
    step = Timed(monkeypatch, ms_an_image)
    told = []
    assert fastest_micro_batch(step, Minibatch(256, 32), 1, None, told.append) == chosen
    assert step.asked[-1] == told[-1] == last_asked
    assert step.forgotten == len(told)


def test_one_worker_that_does_not_fit_says_what_to_do(monkeypatch):
    step = Timed(monkeypatch, {})
    with pytest.raises(RunFailed, match="one worker's 32 images do not fit"):
        fastest_micro_batch(step, Minibatch(256, 32), 1, None, lambda images: None)


def test_only_the_size_that_was_found_is_compiled(small, monkeypatch):
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        "harness.training.replica.compile_blocks", partial(compile_blocks, backend=count)
    )
    config = load_config(small(), ["run.compile=true"])
    replica = Replica(config, build_model(config), ALONE)
    images = fastest_micro_batch(replica, Minibatch(8, 32), 1, None, lambda images: None)
    assert not graphs
    replica.dry_pass(random_pixels(images, 8, replica.device))
    assert len(graphs) == 3  # ResNet-8's blocks


def test_a_dry_pass_leaves_no_trace(small):
    config = load_config(small())
    model = build_model(config)
    replica = Replica(config, model, ALONE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for images in (32, 64):
        replica.dry_pass(random_pixels(images, 8, replica.device))
    assert any(p.grad is not None for p in model.parameters())
    replica.forget_dry_passes()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(buffer.any() for name, buffer in model.named_buffers() if "sums" in name)


@pytest.mark.parametrize("name", ["quickstart", "distill/quickstart"])
def test_the_quickstart_rounds_alike_on_any_number_of_ranks(name):
    """Each pass is one worker's 32 images, from 1 rank with 8 of them to 8 ranks with one each."""
    config = load_config(f"configs/{name}.yaml")
    minibatch = Minibatch.of(config)
    for ranks in range(1, 9):
        for rank in range(ranks):
            share = len(minibatch.workers_of(rank, ranks))
            assert minibatch.micro_batch_images(share, pass_images(config)) == 32
            assert len(minibatch.micro_batches(rank, ranks, 32)) == share


@pytest.mark.parametrize("ranks", [1, 2])
def test_auto_is_the_same_run_as_the_size_it_found(small, tmp_path, ranks):
    # measured by all ranks, recorded, kept by a resume, and then bit for bit as if it were typed
    config, auto = small(run__micro_batch="auto", run__sums="fast"), tmp_path / "auto"
    output = harness("train", config, "--out", auto, ranks=ranks).stdout
    found = yaml.safe_load((auto / "config.yaml").read_text())["run"]["micro_batch"]
    assert found in candidates(Minibatch(8, 32), ranks, "cpu")
    assert read_log(auto / "log.jsonl")[0]["micro_batch"] == found
    assert json.loads((auto / "environment.json").read_text())["ranks"] == ranks
    assert f"micro-batch  {found} images a rank, measured as the fastest; rounding" in output
    assert f"repeat with run.micro_batch={found}" in output
    typed = tmp_path / "typed"
    ended = harness("train", config, f"run.micro_batch={found}", "--out", typed, ranks=ranks)
    assert ended.returncode == 0
    for a, b in zip(final_weights(auto).values(), final_weights(typed).values(), strict=True):
        assert torch.equal(a, b)


def test_a_resume_keeps_what_was_found_on_the_same_hardware(small, tmp_path):
    out = tmp_path / "run"
    train(load_config(small(run__micro_batch=64)), out)
    here = json.loads((out / "environment.json").read_text())
    folder = RunFolder(out)
    assert folder.recorded_micro_batch(here) == 64
    assert folder.recorded_micro_batch(here | {"ranks": 2}) is None
    gpu = {"hardware": here["hardware"] | {"gpu": "another"}}
    assert folder.recorded_micro_batch(here | gpu) is None
