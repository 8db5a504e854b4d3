"""`harness eval` and `harness export` on a run that was really trained."""

import csv
import json
import os
import shutil

import pytest
import torch
import torchvision
from safetensors.torch import load_file

from harness import load_config
from harness.commands.command_line import main
from harness.execution.trained_model import load_trained
from harness.models.registry import build_model
from harness.runs.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from harness.runs.logging.jsonl import read_log
from harness.training.setup import train


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


def test_eval_of_one_checkpoint_and_its_predictions(run, own_digits, tmp_path, capsys):
    old = min((own_digits / "val" / "3").iterdir())
    old.rename(os.fsdecode(bytes(old.parent) + b"/caf\xe9, 3.png"))  # Latin-1, as in old archives
    checkpoint = list_checkpoints(run / "checkpoints")[-1]  # of the first epoch
    file = tmp_path / "predictions.csv"
    words = ["eval", str(checkpoint), f"run.data_root={own_digits}", "--json"]
    assert main([*words, "--predictions", str(file)]) == 0
    result = json.loads(capsys.readouterr().out)
    first = next(line for line in read_log(run / "log.jsonl") if line["event"] == "evaluation")
    assert result["error"] == first["error"]
    assert b'"3/caf\xe9, 3.png",3,' in file.read_bytes()
    with file.open(encoding="utf-8", errors="surrogateescape") as stream:
        rows = list(csv.DictReader(stream))
    assert len({row["path"] for row in rows}) == 360
    assert sum(row["label"] == row["prediction"] for row in rows) == result["correct"]
    assert all(row["path"].startswith(f"{row['label']}/") for row in rows)


def read_predictions(file):
    with file.open() as stream:
        return {row["path"]: row for row in csv.DictReader(stream)}


def test_eval_maps_by_class_name(run, own_digits, tmp_path, capsys):
    """The images of class 0 are in the folder of class 1, so all classes left sort one earlier."""
    before, after = tmp_path / "before.csv", tmp_path / "after.csv"
    assert main(["eval", str(run), "--predictions", str(before)]) == 0
    original = read_predictions(before)
    for path in list((own_digits / "val" / "0").iterdir()):
        path.rename(own_digits / "val" / "1" / f"zero-{path.name}")
    (own_digits / "val" / "0").rmdir()
    shutil.rmtree(own_digits / "train")  # plays no part
    capsys.readouterr()
    words = ["eval", str(run), f"run.data_root={own_digits}", "--predictions", str(after)]
    assert main([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    rows = read_predictions(after)
    for path, row in rows.items():
        was = original[path.replace("1/zero-", "0/")]
        assert row["label"] == path.split("/")[0]
        assert row["prediction"] == was["prediction"]
    assert len(rows) == 360
    assert json.loads(out)["correct"] == sum(
        row["label"] == row["prediction"] for row in rows.values()
    )
    assert err.startswith("warning: ") and "has no images of 0 of the network's 10 classes" in err


@pytest.mark.parametrize("name", ["00", "ten"])  # sorted among the network's classes, and last
def test_eval_refuses_a_class_that_the_network_does_not_know(run, own_digits, name, capsys):
    (own_digits / "val" / "9").rename(own_digits / "val" / name)
    assert main(["eval", str(run), f"run.data_root={own_digits}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"val: class {name} is none of the network's 10 classes (0, 1, 2 and 7 more)" in line


def test_eval_of_a_checkpoint_without_class_names_warns(run, own_digits, capsys):
    path = list_checkpoints(run / "checkpoints")[0]
    payload = load_checkpoint(path)
    save_checkpoint(path, payload | {"class_names": []})
    assert main(["eval", str(run)]) == 0
    assert "records no class names; taken to be those of" in capsys.readouterr().err
    shutil.rmtree(own_digits / "val" / "9")
    for number in range(36):  # as many images as before, of nine classes
        (own_digits / "val" / "8" / f"x{number}.png").write_bytes(
            next((own_digits / "val" / "8").iterdir()).read_bytes()
        )
    images = len(list((own_digits / "val").glob("*/*")))
    assert images == 360
    assert main(["eval", str(run), f"run.data_root={own_digits}"]) == 2
    assert "val: 9 classes, but the network has 10" in capsys.readouterr().err


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


def test_an_output_that_cannot_be_written_is_found_before_the_work(run, monkeypatch, capsys):
    for name in ("evaluation.evaluate", "export.safetensors_bytes"):
        monkeypatch.setattr(
            f"harness.deployment.{name}", lambda *_: pytest.fail("the work has begun")
        )
    for words in (["eval", str(run), "--predictions"], ["export", str(run), "--to"]):
        for file in ("/proc/p.safetensors", f"/tmp/{'p' * 300}.safetensors"):
            assert main([*words, file]) == 2
            assert f"{words[-1]} {file}: " in capsys.readouterr().err


def test_mistakes_are_one_line(run, tmp_path, capsys):
    for words, text in [
        (["eval", str(tmp_path / "nowhere")], "no such run folder"),
        (["eval", str(tmp_path)], "no valid checkpoint"),
        (["eval", str(run), "recipe.epochs=1"], "only run.*"),
        (["export", str(run), "--to", str(tmp_path / "model.h5")], ".safetensors or .onnx"),
        (["export", str(run), "--to", str(tmp_path / "no" / "model.pt")], "model.pt"),
        (["eval", str(run), "--predictions", str(tmp_path / "no" / "file.csv")], "file.csv"),
    ]:
        assert main(words) == 2, words
        (line,) = capsys.readouterr().err.splitlines()
        assert text in line


def test_what_is_odd_about_checkpoints_leaves_json_and_one_line_alone(run, tmp_path, capsys):
    copied, exported = tmp_path / "best.pt", tmp_path / "exported.pt"
    newest = list_checkpoints(run / "checkpoints")[0]
    copied.write_bytes(newest.read_bytes())  # alone: its checksum has another name
    assert main(["eval", str(copied), "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["total"] == 360
    assert "verified by the archive's CRC only" in output.err
    assert main(["export", str(run), "--to", str(exported)]) == 0
    for path in list_checkpoints(run / "checkpoints"):
        path.write_bytes(path.read_bytes()[:100])
    capsys.readouterr()
    for what, text in [
        (exported, "no checkpoint of a run"),
        (run, f"none of its 3 checkpoints is valid (newest: {newest}: "),
    ]:
        assert main(["eval", str(what)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert text in line
