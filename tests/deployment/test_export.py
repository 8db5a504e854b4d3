"""Exported files say what they hold, and other programs predict the same with them."""

import json

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from harness import load_config
from harness.config.loading import curve_digest
from harness.config.schema import DataConfig
from harness.deployment.export import export_trained
from harness.deployment.hub import crop_share
from harness.execution.trained_model import load_trained
from harness.models.registry import build_model
from harness.runs.checkpoint import save_checkpoint
from harness.runs.logging.jsonl import read_log


def test_safetensors_say_what_they_hold(run, tmp_path, output_of):
    file = tmp_path / "m.safetensors"
    output_of("export", run, "--to", file)
    with safe_open(file, "pt") as opened:
        said = opened.metadata()
    last = [line for line in read_log(run / "log.jsonl") if line["event"] == "evaluation"][-1]
    assert said["format"] == "pt" and said["architecture"] == "resnet8"
    assert json.loads(said["model"]) == {"name": "resnet8", "width": 4}
    assert json.loads(said["class_names"]) == [*map(str, range(10))]
    assert (said["crop"], said["resize"], said["evaluated_images"]) == ("8", "8", "360")
    assert json.loads(said["mean"]) == [0.485, 0.456, 0.406]
    assert said["error_percent"] == f"{last['error']:.4f}"
    low, high = json.loads(said["error_interval_95_percent"])
    evaluated = output_of("eval", run, "--json")
    assert [low, high] == pytest.approx(evaluated["error_interval_95"], abs=1e-4)
    assert said["config_sha256"] == curve_digest(load_config(run / "config.yaml"))


def test_the_digest_of_a_config_follows_the_curve_alone(small):
    def digest(*overrides):
        return curve_digest(load_config(small(), overrides))

    assert digest() == digest("run.micro_batch=32", "expect.error=3", "model.last_gamma=0")
    assert len({digest(), digest("seed=2"), digest("recipe.epochs=4"), digest("data.crop=7")}) == 4


def test_pth_is_what_pt_is(run, tmp_path, output_of):
    states = []
    for suffix in ("pt", "pth"):
        output_of("export", run, "--to", tmp_path / f"m.{suffix}")
        states.append(torch.load(tmp_path / f"m.{suffix}", weights_only=True))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_onnx_predicts_what_predict_does(run, digits, tmp_path, output_of, refusal_of):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    file = tmp_path / "m.onnx"
    text = output_of("export", run, "--to", file)
    assert f"predicts the same classes as PyTorch for 64 images of {digits / 'val'}; logits" in text
    session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    meta = session.get_modelmeta().custom_metadata_map
    names = json.loads(meta["class_names"])
    assert len(names) == 10 and meta["architecture"] == "resnet8"
    files = sorted((digits / "val" / "4").iterdir())[:7]  # a batch of another size
    images = np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files])
    (logits,) = session.run(None, {"images": images.transpose(0, 3, 1, 2)})
    shares = torch.tensor(logits).double().softmax(1)
    for one, row in zip(
        output_of("predict", run, *files, "--json", "--top", 10), shares, strict=True
    ):
        for likely in one["classes"]:
            share = row[names.index(likely["class"])].item()
            assert likely["probability"] == pytest.approx(share, abs=1e-5)
    line = refusal_of("export", run, "--to", tmp_path / "m.pt", "--data", digits / "val")
    assert "only an .onnx file is checked on images" in line


@pytest.fixture
def resnet18(tmp_path, small, digits):
    """An untrained checkpoint of torchvision's ResNet-18 with varied running statistics."""
    path = small(model__name="resnet18", data__crop=40, data__resize=47, data__classes=10)
    path.write_text(path.read_text().replace("  width: 4\n", ""))
    config = load_config(path, ["model.last_gamma=1", "data.mean=[0.3,0.4,0.5]"])
    network = build_model(config)
    torch.manual_seed(1)
    for norm in network.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 2)
    payload = {"step": 5, "config": config.model_dump(mode="json"), "model": network.state_dict()}
    checkpoint = tmp_path / "checkpoint-001-00000005.pt"
    save_checkpoint(checkpoint, payload | {"class_names": [*"abcdefghij"]})
    return checkpoint


@pytest.fixture
def photos(digits, tmp_path):
    """Twenty images of odd sizes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, file in enumerate(sorted((digits / "val").glob("*/*.png"))[::18]):
        size = (60 + 3 * number, 90 - 2 * number)
        Image.open(file).convert("RGB").resize(size).save(folder / f"{number:02}.png")
    return folder


def assert_same_shares(found, names, model, transform):
    assert len(found) == 20
    for one in found:
        pixels = transform(Image.open(one["path"]))[None]
        assert pixels.shape == (1, 3, 40, 40)
        with torch.no_grad():
            shares = model(pixels).softmax(1)[0]
        ours = {likely["class"]: likely["probability"] for likely in one["classes"]}
        assert names[shares.argmax()] == one["classes"][0]["class"]
        assert shares.tolist() == pytest.approx([ours[name] for name in names], abs=1e-4)


def test_torchvision_loads_a_hub_folder(resnet18, photos, tmp_path, output_of, refusal_of, run):
    folder = tmp_path / "hub"
    text = output_of("export", resnet18, "--format", "hub", "--to", folder)
    assert text.startswith(f"{folder}: model.safetensors, config.json and README.md of resnet18")
    said = json.loads((folder / "config.json").read_text())
    data = said["pretrained_cfg"]
    model = torchvision.models.resnet18(num_classes=said["num_classes"]).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    transform = torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize(int(data["input_size"][1] / data["crop_pct"])),
            torchvision.transforms.CenterCrop(data["input_size"][1:]),
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize(data["mean"], data["std"]),
        ]
    )
    found = output_of("predict", resnet18, photos, "--json", "--top", 10)
    assert_same_shares(found, said["label_names"], model, transform)
    hub = ["--format", "hub", "--to"]
    assert "is not an empty folder" in refusal_of("export", resnet18, *hub, folder)
    assert "timm has no resnet8" in refusal_of("export", run, *hub, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    network = build_model(load_config_of(resnet18, weights=folder))  # and the harness itself
    assert torch.equal(network.fc.weight, model.fc.weight)


def load_config_of(checkpoint, weights):
    config = load_trained(checkpoint).config
    model = config.model.model_copy(update={"weights": str(weights)})
    return config.model_copy(update={"model": model})


@pytest.mark.soak  # timm takes seconds to import
def test_timm_loads_a_hub_folder(resnet18, photos, tmp_path, output_of):
    timm = pytest.importorskip("timm")
    folder = tmp_path / "hub"
    output_of("export", resnet18, "--format", "hub", "--to", folder)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    names = json.loads((folder / "config.json").read_text())["label_names"]
    found = output_of("predict", resnet18, photos, "--json", "--top", 10)
    assert_same_shares(found, names, model, transform)


def test_timms_rounding_arrives_at_resize():
    for crop in range(8, 400, 7):
        for resize in range(crop, crop + 90):
            data = DataConfig(train_images=1, val_images=1, classes=2, crop=crop, resize=resize)
            assert int(crop / crop_share(data)) == resize


def test_a_card_says_what_is_known(run, resnet18, tmp_path, monkeypatch):
    monkeypatch.setattr("harness.deployment.hub._check", lambda trained, folder: None)
    export_trained(load_trained(run), tmp_path / "known", hub=True)
    card = (tmp_path / "known" / "README.md").read_text()
    last = [line for line in read_log(run / "log.jsonl") if line["event"] == "evaluation"][-1]
    assert f"Error {last['error']:.2f} % (95 % interval " in card
    assert f"{last['correct']} of 360 validation images correct." in card
    assert "After 15 of 15 steps (3 epochs)." in card
    recorded = json.loads((run / "status.json").read_text())["weights_sha256"]
    assert f"SHA-256 of the weights at the end of the run: {recorded}." in card
    assert "- ranks: 1 from step 0\n- not interrupted\n" in card
    assert "- train: 1,437 images; digest of classes, names, labels and sizes: SHA-256 " in card
    assert "no GPU" in card and "torch 2" in card and "minibatch: 256" in card
    export_trained(load_trained(resnet18), tmp_path / "bare", hub=True)
    card = (tmp_path / "bare" / "README.md").read_text()
    assert "The error of these weights is not recorded" in card
    assert "hardware: not recorded" in card and "from the middle of a run" in card
