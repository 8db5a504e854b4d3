"""Fine-tuning: the files that training scripts write, and classifiers for other classes."""

import argparse

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from harness.config.loading import load_config
from harness.errors import UserError
from harness.models.cifar_resnet import CifarResNet
from harness.models.registry import build_model, build_without_weights, load_start_weights
from harness.planning.plan import make_plan
from harness.planning.plan_text import render_plan
from harness.runs.checkpoint import list_checkpoints
from harness.runs.logging.jsonl import read_log
from harness.training.setup import train
from tests.models.test_build_model import config


@pytest.fixture
def network():
    torch.manual_seed(3)
    return CifarResNet(8, num_classes=10)


def loaded(file, classes=10, **model):
    settings = config({"name": "resnet8", "weights": str(file), **model}, classes=classes)
    built = build_without_weights(settings)
    return built.state_dict(), load_start_weights(built, settings)


def with_prefix(prefix, state):
    return {prefix + name: value for name, value in state.items()}


WRITTEN = {  # what scripts save, by the tool whose habit it is
    "plain": lambda net: net.state_dict(),
    "DataParallel": lambda net: with_prefix("module.", net.state_dict()),
    "compiled": lambda net: torch.compile(net).state_dict(),
    "DDP around compiled": lambda net: with_prefix("module._orig_mod.", net.state_dict()),
    "PyTorch's ImageNet example": lambda net: {
        "epoch": 3,
        "arch": "resnet8",
        "state_dict": nn.DataParallel(net).state_dict(),
        "best_acc1": torch.tensor(1.0),
    },
    "torchvision's reference": lambda net: {
        "model": net.state_dict(),
        "optimizer": torch.optim.SGD(net.parameters(), 0.1).state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1, data_path="/d"),
    },
    "Lightning": lambda net: {"state_dict": with_prefix("model.", net.state_dict()), "epoch": 3},
    "AveragedModel": lambda net: AveragedModel(net).state_dict(),
    "before PyTorch 0.4.1": lambda net: {
        k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")
    },
}


@pytest.mark.parametrize("tool", WRITTEN)
def test_what_training_scripts_write_is_recognised(tmp_path, network, tool):
    torch.save(WRITTEN[tool](network), tmp_path / "weights.pth")
    state, found = loaded(tmp_path / "weights.pth")
    for name, value in network.state_dict().items():
        assert torch.equal(state[name], value), name
    assert str(found).endswith("all weights, the classifier included")


def test_a_part_of_the_model_is_compiled(tmp_path, network):
    kernel = network.layer1[0].conv1.weight
    network.layer1 = torch.compile(network.layer1)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    state, _ = loaded(tmp_path / "weights.pth")
    assert torch.equal(state["layer1.0.conv1.weight"], kernel)


def test_the_wrappers_are_said(tmp_path, network):
    file = tmp_path / "weights.pth"
    state = with_prefix("module.", network.state_dict())
    torch.save({"model": state, "model_ema": {}, "ema": state}, file)
    _, found = loaded(file)
    assert str(found).startswith(
        f"{file}, entry 'model' (beside 'ema'), names without 'module.': all"
    )


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_classifier_for_other_classes_keeps_its_initial_values(tmp_path, network, suffix):
    file = tmp_path / f"weights.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(network.state_dict(), file)
    fresh = build_model(config({"name": "resnet8"}, classes=3)).state_dict()
    state, found = loaded(file, classes=3)
    for name, value in state.items():
        expected = fresh if name.startswith("fc.") else network.state_dict()
        assert torch.equal(value, expected[name]), name
    assert (found.classifier, found.classes, found.own_classes) == ("fc", 10, 3)
    assert str(found).endswith("classifier fc, which is re-initialized (10 classes there, 3 here)")


def test_a_backbone_without_a_classifier(tmp_path, network):
    body = {k: v for k, v in network.state_dict().items() if not k.startswith("fc.")}
    torch.save(body, tmp_path / "body.pth")
    _, found = loaded(tmp_path / "body.pth")
    assert str(found).endswith("fc, which is re-initialized (the file has none, 10 here)")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"fc.weight": torch.zeros(3, 32), "fc.bias": torch.zeros(3)}, "'fc.weight' has the shape"),
        ({"fc.weight": torch.zeros(3, 64)}, "'fc.weight' has the shape (3, 64)"),
        ({"head.weight": torch.zeros(1)}, "'head.weight' is not in the model"),
        ({"conv1.weight": torch.zeros(16, 3, 5, 5)}, "'conv1.weight' has the shape"),
    ],
)
def test_more_than_the_classifier_differs(tmp_path, network, change, fault):
    torch.save(network.state_dict() | change, tmp_path / "weights.pth")
    with pytest.raises(UserError) as refused:
        loaded(tmp_path / "weights.pth")
    assert fault in str(refused.value)
    assert "it is for another model.name, model.width or model.options" in str(refused.value)


def test_another_width_is_said(tmp_path, network):
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"'conv1\.weight' has the shape .*or model\.options"):
        loaded(tmp_path / "weights.pth", width=8)


def test_squeezenets_classifier_is_a_convolution(tmp_path):
    options = {"name": "squeezenet1_1", "options": {"dropout": 0}}
    torch.save(build_model(config(options, classes=7)).state_dict(), tmp_path / "w.pth")
    _, found = loaded(tmp_path / "w.pth", classes=3, **options)
    assert (found.classifier, found.classes) == ("classifier.1", 7)


def test_runs_and_checkpoints_are_start_weights(small, tmp_path, capsys):
    quick = ["recipe.epochs=1", "recipe.milestones=[]"]
    first, second = tmp_path / "first", tmp_path / "second"
    train(load_config(small(), quick), first)
    checkpoint = list_checkpoints(first / "checkpoints")[0]
    trained = torch.load(checkpoint, weights_only=True)["model"]
    for source in (first, checkpoint):
        settings = load_config(small(), [*quick, f"model.weights={source}"])
        state = build_model(settings).state_dict()
        assert all(torch.equal(state[name], trained[name]) for name in trained)
    capsys.readouterr()
    train(settings, second)
    said = f"{checkpoint}, entry 'model': all weights, the classifier included"
    assert f"start weights  {said}\n" in capsys.readouterr().out
    (event,) = [line for line in read_log(second / "log.jsonl") if line["event"] == "weights"]
    assert (event["step"], event["loaded"]) == (0, said)
    assert f"loaded: those of {said}" in render_plan(make_plan(settings, 1))
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(UserError, match="does not match its checksum"):
        build_model(settings)
    with pytest.raises(UserError, match="a folder without checkpoints"):
        build_model(load_config(small(), [f"model.weights={tmp_path}"]))


def test_a_plan_checks_a_classifier_that_is_re_initialized(tmp_path, network):
    network.fc.weight.data.fill_(3.0)  # nothing like initial values
    torch.save(network.state_dict(), tmp_path / "w.pth")
    model = {"name": "resnet8", "weights": str(tmp_path / "w.pth")}
    checks = {c["what"]: c["ok"] for c in make_plan(config(model, classes=20), 1)["checks"]}
    drawn = [ok for what, ok in checks.items() if what.startswith(("fc weight", "largest fc"))]
    assert drawn == [True, True]
    body = [ok for what, ok in checks.items() if "last γ" in what or "convolutions" in what]
    assert body == [None, None]


def test_a_file_with_other_objects_says_which_and_what_to_do(tmp_path, network):
    file = tmp_path / "w.pth"
    torch.save({"model": network.state_dict(), "acc": numpy.float64(1.0)}, file)
    with pytest.raises(UserError) as refused:
        loaded(file)
    assert "it holds numpy" in str(refused.value)
    assert "torch.save(model.state_dict(), FILE)" in str(refused.value)
    file.write_bytes(b"not weights at all")
    with pytest.raises(UserError, match=r"no state dict \(not a file of torch\.save"):
        loaded(file)
