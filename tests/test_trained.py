"""`harness eval` and `harness export` on a run that was really trained."""

import csv
import json

import pytest
import torch
import torchvision
from safetensors.torch import load_file

from harness import load_config
from harness.checkpoint import list_checkpoints, load_checkpoint
from harness.cli import main
from harness.journal import read_log
from harness.models import build_model
from harness.train import train
from harness.trained import load_trained


@pytest.fixture
def run(small, tmp_path):
    folder = tmp_path / "run"
    train(load_config(small()), folder)
    return folder


def test_eval_gives_the_error_of_the_last_epoch(run, capsys):
    assert main(["eval", str(run), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    last = [line for line in read_log(run / "log.jsonl") if line["event"] == "evaluation"][-1]
    assert (result["error"], result["correct"], result["total"]) == (
        last["error"],
        last["correct"],
        360,
    )
    low, high = result["error_interval_95"]
    assert low < result["error"] < high


def test_eval_takes_the_loader_threads_that_are_typed(run):
    assert load_trained(run).config.run.loader_threads == "auto"
    assert load_trained(run, ["run.loader_threads=0"]).config.run.loader_threads == 0


def test_eval_of_one_checkpoint_and_its_predictions(run, tmp_path, capsys):
    checkpoint = list_checkpoints(run / "checkpoints")[-1]  # of the first epoch
    file = tmp_path / "predictions.csv"
    assert main(["eval", str(checkpoint), "--json", "--predictions", str(file)]) == 0
    result = json.loads(capsys.readouterr().out)
    first = next(line for line in read_log(run / "log.jsonl") if line["event"] == "evaluation")
    assert result["error"] == first["error"]
    with file.open() as stream:
        rows = list(csv.DictReader(stream))
    assert len({row["path"] for row in rows}) == 360
    assert sum(row["label"] == row["prediction"] for row in rows) == result["correct"]
    assert all(row["path"].startswith(f"{row['label']}/") for row in rows)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_export_is_a_plain_state_dict(run, small, tmp_path, suffix, capsys):
    file = tmp_path / f"model.{suffix}"
    assert main(["export", str(run), "--to", str(file)]) == 0
    state = torch.load(file, weights_only=True) if suffix == "pt" else load_file(file)
    trained = load_checkpoint(list_checkpoints(run / "checkpoints")[0])["model"]
    assert state.keys() == trained.keys()
    assert all(torch.equal(state[name], trained[name]) for name in state)
    # and it is what model.weights takes
    fine_tuned = build_model(load_config(small(), [f"model.weights={file}"]))
    assert torch.equal(fine_tuned.state_dict()["fc.weight"], state["fc.weight"])


def test_an_exported_resnet_is_torchvisions(small, tmp_path):
    config = small(model__name="resnet18")
    config.write_text(config.read_text().replace("  width: 4\n", ""))
    short = ["recipe.epochs=1", "recipe.milestones=[]", "recipe.minibatch=480"]
    folder, file = tmp_path / "run", tmp_path / "resnet18.pt"
    train(load_config(config, short), folder)
    assert main(["export", str(folder), "--to", str(file)]) == 0
    model = torchvision.models.resnet18(num_classes=10)
    model.load_state_dict(torch.load(file, weights_only=True), strict=True)


def test_mistakes_are_one_line(run, tmp_path, capsys):
    for words, text in [
        (["eval", str(tmp_path / "nowhere")], "no such run folder"),
        (["eval", str(tmp_path)], "no valid checkpoint"),
        (["eval", str(run), "recipe.epochs=1"], "only run.*"),
        (["export", str(run), "--to", str(tmp_path / "model.onnx")], ".pt or .safetensors"),
        (["export", str(run), "--to", str(tmp_path / "no" / "model.pt")], "model.pt"),
        (["eval", str(run), "--predictions", str(tmp_path / "no" / "file.csv")], "file.csv"),
    ]:
        assert main(words) == 2, words
        (line,) = capsys.readouterr().err.splitlines()
        assert text in line
