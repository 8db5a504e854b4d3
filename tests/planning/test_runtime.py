"""The times that `harness plan` predicts, against arithmetic by hand."""

import json
from pathlib import Path

import pytest
from torch import nn

from harness.commands.command_line import main
from harness.config.loading import load_config
from harness.config.schema import Config
from harness.errors import UserError
from harness.models.registry import build_model
from harness.planning.plan_text import render_prediction
from harness.planning.runtime import (
    Hardware,
    gradient_layers,
    multiply_adds,
    predict,
)

CONFIGS = Path(__file__).parents[2] / "configs"
PAPER = CONFIGS / "imagenet" / "resnet50_8192.yaml"
# ResNet-50 from its end, in bytes: fc; then all of the last block and half of the one before it,
# 4 · (4,462,592 + 3,412,992), which is the first sum of theirs above 25 MiB; and so on
FIRST_BUCKETS = (8_196_000, 31_502_336, 26_255_360, 26_550_272)


@pytest.fixture(scope="module")
def paper() -> tuple[Config, nn.Module]:
    config = load_config(PAPER)
    return config, build_model(config)


def test_multiply_adds_of_a_small_network() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 8 * 8, 10))
    # 8 · 8 · 4 numbers of 27 products; 10 of 256
    assert multiply_adds(model, 8) == {"0": 6912, "2": 2560}
    layers = gradient_layers(model, {"0": 6912, "2": 2560})
    assert [layer.gradient_bytes for layer in layers] == [432, 16, 10240, 40]
    shares = [6912 / 9472, 0, 2560 / 9472, 0]
    assert [layer.backward_share for layer in layers] == pytest.approx(shares)


def test_one_gpu(paper: tuple[Config, nn.Module]) -> None:
    prediction = predict(*paper, ranks=1, hardware=Hardware(images_per_s=4096))
    assert prediction["step_s"] == pytest.approx(2)  # 8192 images
    assert prediction["exposed_s"] == 0
    assert prediction["efficiency"] == 1
    evaluation_s = 50000 / 3 / 4096
    assert prediction["epoch_s"] == pytest.approx(156 * 2 + evaluation_s)
    assert prediction["run_s"] == pytest.approx(90 * (156 * 2 + evaluation_s))
    # (14040 · 8192 + 90 · 50000 / 3) images in 3600 s
    hour = (14040 * 8192 + 90 * 50000 / 3) / 3600
    assert prediction["hour_needs_images_per_s_a_gpu"] == pytest.approx(hour)


def test_eight_gpus_hide_all_but_the_last_bucket(paper: tuple[Config, nn.Module]) -> None:
    prediction = predict(*paper, ranks=8, hardware=Hardware(images_per_s=4096))
    assert prediction["compute_s"] == pytest.approx(0.25)
    # 4 workers are 1024 images in 4 micro-batches; the last one's backward pass, 41.7 ms, hides
    # what it can. The last bucket: 20 µs + 14 steps of 2 µs + 14/8 of its bytes at 450 GB/s
    last = 102_228_128 - sum(FIRST_BUCKETS)
    assert prediction["exposed_s"] == pytest.approx(48e-6 + 14 / 8 * last / 450e9)
    assert prediction["efficiency"] == pytest.approx(0.25 / prediction["step_s"])


def test_a_slower_network_and_half_of_the_bytes() -> None:
    config = load_config(PAPER)
    model = build_model(config)
    slow = Hardware(gpus_per_node=1, images_per_s=1e9, gbit_per_s=1)
    prediction = predict(config, model, 256, slow)
    # next to no compute: 2 · 255/256 of 102 MB at 1/8 GB/s, and 16 steps of 5 µs for 5 buckets
    whole = 2 * 255 / 256 * 102_228_128 / 0.125e9
    assert prediction["exposed_s"] == pytest.approx(whole, rel=1e-3)
    assert prediction["limit"] == "bandwidth between nodes"
    assert prediction["hour_needs_images_per_s_a_gpu"] is None  # 14040 · 1.63 s are 6.4 hours
    lines = render_prediction({"prediction": prediction, "ranks": 256})
    assert "communication takes longer" in "\n".join(lines)


def test_small_networks_need_a_figure() -> None:
    config = load_config(CONFIGS / "quickstart.yaml")
    model = build_model(config)
    assert predict(config, model, 2, Hardware()) == {}
    given = predict(config, model, 2, Hardware(images_per_s=1280))
    assert given["compute_s"] == pytest.approx(0.1)  # 4 workers of 32 images
    with pytest.raises(UserError, match=r"--gbit-per-second 0: must be above 0"):
        predict(config, model, 2, Hardware(images_per_s=1280, gbit_per_s=0))


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", str(PAPER), "--ranks", "16", "--images-per-second", "2048", "--json"]
    assert main([*command, "--gpus-per-node", "4", "--gbit-per-second", "100"]) == 0
    prediction = json.loads(capsys.readouterr().out)["prediction"]
    assert prediction["compute_s"] == pytest.approx(0.25)
    assert "4 × 4 GPUs" in prediction["assumed"][1]
