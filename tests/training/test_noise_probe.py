"""The gradient noise scale of a run: known in closed form, and without a trace in the weights."""

from __future__ import annotations

import json
from contextlib import closing

import pytest
import torch
import yaml
from torch import nn

from harness import load_config
from harness.commands.command_line import main
from harness.config.errors import ConfigError
from harness.data.loaders.choice import open_loader
from harness.distributed import World
from harness.recipe.noise_scale import SquaredNorms, noise_scale
from harness.runs.logging.jsonl import read_log
from harness.training.ready_rank import prepare
from harness.training.replica import Replica
from harness.training.setup import train
from harness.training.step import Step
from tests.conftest import SMALL

ALONE = World(0, 1, 0, 1, "alone", torch.device("cpu"))
CLASSES, PIXELS, IMAGES = 10, 3 * 8 * 8, 1437


def linear_model() -> nn.Module:
    """Logits that are linear in the pixels, all of them 0."""
    layer = nn.Linear(PIXELS, CLASSES, dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return nn.Sequential(nn.Flatten(), layer)


def noise_scale_of(images: torch.Tensor, labels: torch.Tensor) -> float:
    """S / |G|² over all images: with logits 0 an image's gradient is (1/K - onehot) (x, 1)ᵀ."""
    inputs = torch.cat([images.flatten(1), torch.ones(len(images), 1)], 1)
    outputs = 1 / CLASSES - nn.functional.one_hot(labels, CLASSES).double()
    squares = outputs.square().sum(1) * inputs.square().sum(1)
    whole = outputs.T @ inputs / len(images)
    signal = whole.square().sum()
    trace = (squares.sum() - len(images) * signal) / (len(images) - 1)
    return float(trace / signal)


@pytest.mark.parametrize("micro_batch", [32, 96])
def test_a_linear_model_has_the_noise_scale_of_its_closed_form(small, micro_batch):
    """200 steps at a learning rate that moves no weight; the images are the whole squares."""
    path = small(recipe__epochs=40, recipe__reference_lr=1e-30, data__crop_area=[1.0, 1.0])
    keys = ["run.precision=float64", "run.noise_scale_every=1", f"run.micro_batch={micro_batch}"]
    batch_plan, config = prepare(load_config(path, [*keys, "data.crop_ratio=[1.0,1.0]"]), ALONE)
    step = Step(config, Replica(config, linear_model(), ALONE), batch_plan.micro_batches)
    seen: dict[int, tuple[torch.Tensor, int]] = {}
    with closing(open_loader(config, batch_plan, "memory", 0, False)) as loader:
        batches = loader.train(0)

        def noting():
            for batch in batches:
                for number, image_id in enumerate(batch.ids.tolist()):
                    seen[image_id] = batch.images[number], int(batch.labels[number])
                yield batch

        watched = noting()
        for number in range(config.total_steps):
            step(number, watched)
    assert len(seen) == IMAGES
    images = step.replica.preprocess(torch.stack([image for image, _ in seen.values()]))
    known = noise_scale_of(images, torch.tensor([label for _, label in seen.values()]))
    measured = step.noise.read()
    assert [number for number, _ in measured] == [*range(200)]
    found = noise_scale([norms for _, norms in measured], 32, 256, IMAGES)
    assert found.standard_error is not None
    assert found.standard_error < 0.1 * known
    assert abs(found.images - known) <= 3 * found.standard_error


def test_it_leaves_no_trace_in_the_weights(small, tmp_path):
    config = small(run__micro_batch=96)
    plain = train(load_config(config), tmp_path / "plain")
    measured = train(load_config(config, ["run.noise_scale_every=4"]), tmp_path / "measured")
    assert measured.weights_sha256 == plain.weights_sha256
    lines = read_log(tmp_path / "measured" / "log.jsonl")
    noise = [line for line in lines if line["event"] == "noise_scale"]
    assert [line["step"] for line in noise] == [1, 5, 9, 13]  # steps done
    assert all(line["worker"] > line["minibatch"] > 0 for line in noise)


def test_a_single_worker_is_refused(small):
    with pytest.raises(ConfigError, match=r"run\.noise_scale_every: compares workers with"):
        load_config(small(), ["recipe.worker_batch=256", "run.noise_scale_every=10"])


@pytest.fixture(scope="module")
def measured(digits, tmp_path_factory):
    """A run that has measured each of its steps; its config stands beside."""
    folder = tmp_path_factory.mktemp("noise")
    run = SMALL["run"] | {"data_root": str(digits), "noise_scale_every": 1}
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL | {"run": run}))
    train(load_config(folder / "small.yaml"), folder / "run")
    return folder / "run"


def test_the_plan_and_the_report_show_it(measured, tmp_path, capsys):
    """Ten steps before the milestone at epoch 2."""
    lines = read_log(measured / "log.jsonl")
    norms = [
        SquaredNorms(line["worker"], line["minibatch"])
        for line in lines
        if line["event"] == "noise_scale" and line["step"] <= 10
    ]
    scale = noise_scale(norms, 32, 256, IMAGES)
    words = ["plan", str(measured.parent / "small.yaml"), "--noise-from", str(measured)]
    assert main(words) == 0
    shown = f"{scale.images:,.0f} ± {scale.standard_error:,.0f} images"
    said = f"noise scale  {shown}, from 10 steps of {measured} up to epoch 2"
    assert said in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    noise = json.loads(capsys.readouterr().out)["noise"]
    assert noise["steps"] == pytest.approx(1 + scale.images / 256)
    assert noise["examples"] == pytest.approx(1 + 256 / scale.images)
    assert main(["report", str(measured), "--to", str(tmp_path / "report.html")]) == 0
    assert f"{shown} (10 steps up to epoch 2)" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["model.width=8"], "measured with model.width 4;"),
        (["data.flip=true"], "measured with data.flip False;"),
        (["recipe.momentum=0.8"], "measured with recipe.momentum 0.9;"),
    ],
)
def test_another_network_data_or_optimizer_is_refused(measured, capsys, keys, says):
    words = ["plan", str(measured.parent / "small.yaml"), *keys, "--noise-from", str(measured)]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_a_run_without_a_measurement_is_refused(small, tmp_path, capsys):
    train(load_config(small(recipe__epochs=1, recipe__milestones=[])), tmp_path / "run")
    assert main(["plan", str(small()), "--noise-from", str(tmp_path / "run")]) == 2
    assert "has measured no gradient noise before epoch 1" in capsys.readouterr().err
