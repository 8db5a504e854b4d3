"""Models by name, and the weights they start from."""

import os
import pickle

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from harness.config.errors import ConfigError
from harness.config.loading import config_from_mapping
from harness.errors import UserError
from harness.models.cifar_resnet import SMALL_RESNET
from harness.models.family import ModelFamily
from harness.models.ghost_batch_norm import ghost_batch_norms
from harness.models.registry import build_model, check_model
from harness.models.torchvision_networks import OTHERS, RESNET


def config(model, seed=1, classes=10, worker_batch=4, crop=224):
    return config_from_mapping(
        {
            "seed": seed,
            "expect": {"error": 3.0, "source": "test"},
            "data": {"train_images": 64, "val_images": 8, "classes": classes, "crop": crop},
            "model": model,
            "recipe": {"minibatch": 16, "worker_batch": worker_batch, "epochs": 90},
        },
        "test",
    )


def test_every_resnet_of_torchvision_and_the_small_ones():
    small = {"resnet8", "resnet20", "resnet32", "resnet56"}
    plain = {"resnet18", "resnet34", "resnet50", "resnet101", "resnet152"}
    resnext = {"resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"}
    wide = {"wide_resnet50_2", "wide_resnet101_2"}
    assert set(SMALL_RESNET.names) == small
    assert set(RESNET.names) == plain | resnext | wide
    assert {"regnet_y_400mf", "vgg16_bn"} <= set(OTHERS.names)


@pytest.mark.parametrize(
    ("name", "stride"),
    [("resnet8", 4), ("resnet56", 4), ("resnet18", 32), ("resnet50", 32)],
)
def test_one_image_a_worker_needs_more_than_one_place_in_the_last_stage(name, stride):
    """The last stage has ceil(crop / stride) places a side: batch norm needs two values."""
    check_model(config({"name": name}, worker_batch=1, crop=stride + 1))
    check_model(config({"name": name}, worker_batch=2, crop=1))
    with pytest.raises(ConfigError) as refused:
        check_model(config({"name": name}, worker_batch=1, crop=stride))
    start = f"data.crop: {name} cannot be trained on {stride} × {stride} pixels with recipe.worker"
    assert str(refused.value).startswith(f"{start}_batch 1 (Expected more than 1 value per channel")
    assert "\n" not in str(refused.value)


def test_a_crop_that_a_network_makes_nothing_of_is_refused(monkeypatch):
    """No ResNet does: one that a feature map of 4 pixels is too small for."""

    def build(name, classes, options):
        convolution = nn.Sequential(nn.Conv2d(3, 8, 7), nn.BatchNorm2d(8))
        return nn.Sequential(*convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))

    family = ModelFamily("large kernels", ["large"], build)
    monkeypatch.setattr("harness.models.registry.FAMILIES", (family,))
    check_model(config({"name": "large"}, crop=7))
    with pytest.raises(ConfigError, match=r"cannot be trained on 4 × 4 pixels .*; raise one of"):
        check_model(config({"name": "large"}, crop=4))


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "resnet50"])
def test_a_model_by_name(name):
    model = build_model(config({"name": name}, classes=7), channels_last=True)
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float32, "cpu")}
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms == ghost_batch_norms(model)
    assert {(norm.worker_batch, norm.channels_last) for norm in norms} == {(4, True)}
    assert model.fc.out_features == 7
    assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.1)


def test_the_width_of_a_small_one():
    assert build_model(config({"name": "resnet8", "width": 4})).conv1.out_channels == 4


def test_resnet50s_weights_load_into_torchvisions():
    model = build_model(config({"name": "resnet50"}, classes=1000))
    plain = torchvision.models.resnet50()
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), plain.eval()(x))


def test_the_seed_decides():
    def first(seed):
        return build_model(config({"name": "resnet8"}, seed)).conv1.weight

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_gamma_is_a_setting():
    ones = build_model(config({"name": "resnet8", "last_gamma": 1}))
    zeros = build_model(config({"name": "resnet8"}))
    assert ones.layer3[0].bn2.weight.tolist() == [1.0] * 64
    assert zeros.layer3[0].bn2.weight.tolist() == [0.0] * 64


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(UserError, match=r"^model\.name: no model 'resnet_101'.* 'resnet101'\? "):
        build_model(config({"name": "resnet_101"}))


@pytest.fixture
def trained():
    return build_model(config({"name": "resnet8"}, seed=9)).state_dict()


def write(state, path):
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_weights_replace_the_initial_ones(tmp_path, trained, suffix):
    trained["bn1.running_mean"].fill_(0.5)
    file = write(trained, tmp_path / f"weights{suffix}")
    model = build_model(config({"name": "resnet8", "weights": file}))
    for key, value in model.state_dict().items():
        assert torch.equal(value, trained[key]), key


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_from_before_num_batches_tracked(tmp_path, trained, suffix):
    for key in [key for key in trained if key.endswith("num_batches_tracked")]:
        del trained[key]
    file = write(trained, tmp_path / f"weights{suffix}")
    model = build_model(config({"name": "resnet8", "weights": file}))
    assert torch.equal(model.conv1.weight, trained["conv1.weight"])


def expect_one_line_about(path, *words):
    with pytest.raises(UserError) as raised:
        build_model(config({"name": "resnet8", "weights": str(path)}))
    message = str(raised.value)
    assert "\n" not in message
    for word in ("model.weights", str(path), *words):
        assert word in message
    return message


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_that_do_not_fit(tmp_path, trained, suffix):
    path = tmp_path / f"weights{suffix}"
    write({**trained, "fc.weight": torch.zeros(3, 64)}, path)
    expect_one_line_about(path, "'fc.weight'", "(3, 64) instead of (10, 64)")
    write({**trained, "head.weight": torch.zeros(1)}, path)
    expect_one_line_about(path, "'head.weight'", "is not in the model")
    del trained["fc.bias"]
    write(trained, path)
    expect_one_line_about(path, "'fc.bias'", "is missing")


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_weights_that_are_no_weights(tmp_path, name):
    path = tmp_path / name
    expect_one_line_about(path, "no such file")
    for content in (b"", b"not weights at all", os.urandom(4096)):
        path.write_bytes(content)
        expect_one_line_about(path, "no state dict")


def test_other_objects_are_not_a_state_dict(tmp_path, trained):
    path = tmp_path / "checkpoint.pt"
    torch.save([1, 2], path)
    expect_one_line_about(path, "a list, not a state dict")
    torch.save({"epoch": 3, "best": torch.tensor(1.0)}, path)
    expect_one_line_about(path, "no state dict of names and tensors in it (it holds 'epoch', ")
    torch.save({"ema": trained, "teacher": trained}, path)
    expect_one_line_about(path, "under the keys 'ema', 'teacher'", "torch.load(FILE)['ema']")


class Hostile:
    """Touches a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


@pytest.mark.parametrize(
    "save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x, protocol=2))]
)
def test_a_file_that_carries_code_is_refused_without_running_it(tmp_path, trained, save):
    path, marker = tmp_path / "weights.pt", tmp_path / "ran"
    save({**trained, "fc.bias": Hostile(marker)}, path)
    torch.load(path, weights_only=False) if save is torch.save else pickle.loads(path.read_bytes())
    assert marker.exists()  # the file is hostile indeed
    marker.unlink()
    expect_one_line_about(path, "no state dict")
    assert not marker.exists()
