"""Whole runs, as a user starts them: on real digits, on real ranks, interrupted and resumed."""

import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torchvision

from harness import load_config
from harness.commands.command_line import main
from harness.errors import UserError
from harness.execution.trained_model import load_trained
from harness.models.registry import build_model
from harness.outcome import Stopped
from harness.runs.checkpoint import list_checkpoints, load_checkpoint
from harness.runs.logging.jsonl import read_log
from harness.training.run import Diverged
from harness.training.setup import train
from tests.conftest import free_port, harness, start_ranks
from tests.faults import wait_for


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(list_checkpoints(folder / "checkpoints")[0])["model"]


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], relative: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        scale = a[name].double().abs().max().clamp(min=1e-30)
        difference = ((a[name].double() - b[name].double()).abs().max() / scale).item()
        assert difference <= relative, f"{name}: {difference}"


@pytest.fixture(scope="module")
def straight(digits, tmp_path_factory):
    """The small run on one rank, uninterrupted, in this process."""
    import yaml

    from tests.conftest import SMALL

    folder = tmp_path_factory.mktemp("straight")
    mapping = SMALL | {"run": SMALL["run"] | {"data_root": str(digits)}}
    (folder / "small.yaml").write_text(yaml.safe_dump(mapping))
    train(load_config(folder / "small.yaml"), folder / "run")
    return folder / "run"


def test_a_run_folder_says_it_all(straight):
    assert {path.name for path in straight.iterdir()} == {
        "config.yaml",
        "environment.json",
        "log.jsonl",
        "tensorboard",
        "checkpoints",
        "status.json",
        ".incarnation-001",
    }
    status = json.loads((straight / "status.json").read_text())
    assert (status["state"], status["step"], status["incarnation"]) == ("finished", 15, 1)
    environment = json.loads((straight / "environment.json").read_text())
    assert environment["versions"]["torch"] == str(torch.__version__)
    stored = load_config(straight / "config.yaml")
    assert (stored.workers, stored.run.loader, stored.recipe.momentum) == (8, "memory", 0.9)


def test_the_log_has_every_epoch_and_the_error_is_the_last_ones(straight):
    log = read_log(straight / "log.jsonl")
    evaluations = [line for line in log if line["event"] == "evaluation"]
    assert [(line["epoch"], line["step"], line["total"]) for line in evaluations] == [
        (1, 5, 360),
        (2, 10, 360),
        (3, 15, 360),
    ]
    # the lr falls at the end of epoch 2, so only epoch 3 was trained at the final one
    errors = [line["error"] for line in evaluations]
    result = {"error": errors[2], "final_epochs": [3], "last_error": errors[2]}
    result |= {"best_error": min(errors)}
    status = json.loads((straight / "status.json").read_text())
    assert {key: status[key] for key in result} == result and status["expected"] == 50.0
    assert log[-1]["event"] == "finish" and log[-1].items() >= result.items()
    # peak 0.1 * 256 / 32 = 0.8 after 5 steps of warm-up; / 10 from epoch 2 (step 10)
    rates = {line["step"]: line["lr"] for line in log if line["event"] == "train"}
    assert rates[2] == pytest.approx(0.1 + 0.7 * 1 / 5)  # the line of step index 1
    assert rates[6] == pytest.approx(0.8)
    assert rates[12] == pytest.approx(0.08)


def test_the_last_few_checkpoints_and_the_best_are_kept(small, tmp_path):
    train(load_config(small(run__keep_checkpoints=1, recipe__epochs=5)), tmp_path / "run")
    log = read_log(tmp_path / "run" / "log.jsonl")
    errors = {line["step"]: line["error"] for line in log if line["event"] == "evaluation"}
    best = min(errors, key=lambda step: errors[step])
    kept = {load_checkpoint(p)["step"] for p in list_checkpoints(tmp_path / "run" / "checkpoints")}
    assert kept == {25, best}


def stop_after(process: subprocess.Popen[str], text: str, number: int) -> str:
    """Waits for `text` on the process' output, sends the signal, returns what came."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            break
    process.send_signal(number)
    return seen


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_interrupted_in_mid_epoch_and_resumed_is_the_straight_run(small, tmp_path, precision):
    """Bit for bit, as the number of ranks stays the same; float16 with its scaler."""
    config = small(run__precision=precision, recipe__epochs=6, run__log_every_steps=1)
    train(load_config(config), tmp_path / "straight")
    command = ["-m", "harness", "train", str(config), "--out", str(tmp_path / "run")]
    (process,) = start_ranks(1, command)
    stop_after(process, "step 7/", signal.SIGTERM)
    out, err = process.communicate()
    assert process.returncode == 75, err
    assert "checkpoint written" in out
    assert f"harness train {config} --out {tmp_path / 'run'} --resume" in out
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "stopped" and 7 <= status["step"] < 30
    train(load_config(config), tmp_path / "run", resume=True)
    assert_same(final_weights(tmp_path / "straight"), final_weights(tmp_path / "run"), 0.0)
    events = [line["event"] for line in read_log(tmp_path / "run" / "log.jsonl")]
    assert events.count("resume") == 1 and events[-1] == "finish"


def test_killed_between_two_checkpoints_and_resumed_on_other_ranks(small, tmp_path):
    config = small(run__precision="float64", recipe__epochs=6, run__log_every_steps=1)
    train(load_config(config), tmp_path / "straight")
    command = ["-m", "harness", "train", str(config), "--out", str(tmp_path / "run")]
    (process,) = start_ranks(1, command)
    stop_after(process, "step 8/", signal.SIGKILL)
    process.communicate()
    out = harness("train", config, "--out", tmp_path / "run", "--resume", ranks=2)
    assert out.returncode == 0, out.stderr
    assert_same(final_weights(tmp_path / "straight"), final_weights(tmp_path / "run"), 1e-10)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["incarnation"] == 2


def test_torchrun_ctrl_c_and_resume(small, tmp_path):
    """Under torchrun, which hands the signal on and counts every code but 0 as a failure."""
    config = small(recipe__epochs=40, run__log_every_steps=1)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--master-port", str(free_port()), "-m", "harness", "train", str(config)]
    process = subprocess.Popen(
        [*torchrun, "--out", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    seen = stop_after(process, "step 4/", signal.SIGINT)
    out, err = process.communicate()
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "stopped", seen + out + err
    assert "torchrun --nproc-per-node 2 -m harness train" in out


def test_finished_shows_its_result_and_an_existing_folder_is_refused(straight):
    config = straight.parent / "small.yaml"
    again = harness("train", config, "--out", straight, "--resume")
    assert again.returncode == 0
    error, expected, folder = again.stdout.splitlines()[-3:]
    assert re.fullmatch(r"error (\S+) % \(epoch 3; last \1 %, best \S+ %\)", error)
    assert expected == "expected 50.00 % (a test)"
    digest = json.loads((straight / "status.json").read_text())["weights_sha256"]
    assert folder == f"run folder {straight}, weights {digest[:12]}"
    with pytest.raises(UserError, match="--resume"):
        train(load_config(config), straight)
    with pytest.raises(UserError, match=r"recipe\.weight_decay"):
        train(load_config(config, ["recipe.weight_decay=0.0"]), straight, resume=True)


def test_resuming_under_other_rounding_must_be_typed(small, tmp_path):
    config = small()
    train(load_config(config), tmp_path / "run")
    status = tmp_path / "run" / "status.json"
    status.write_text(status.read_text().replace("finished", "stopped"))
    other = ["run.precision=float64"]
    changed = load_config(small("other.yaml", run__precision="float64"))
    with pytest.raises(UserError, match=r"type run\.precision=float64"):
        train(changed, tmp_path / "run", resume=True)
    train(
        load_config(config, other), tmp_path / "run", resume=True, cli_overrides={"run.precision"}
    )


def test_a_folder_in_use_is_refused(small, tmp_path):
    config = small(recipe__epochs=200, run__log_every_steps=1)
    command = ["-m", "harness", "train", str(config), "--out", str(tmp_path / "run")]
    (process,) = start_ranks(1, command)
    try:
        stop_after(process, "step 3/", signal.SIGCONT)
        with pytest.raises(UserError, match=f"in use by process {process.pid}"):
            train(load_config(config), tmp_path / "run", resume=True)
    finally:
        process.kill()
        process.communicate()


def test_a_damaged_newest_checkpoint_is_reported_and_the_next_one_taken(small, tmp_path, capsys):
    config = load_config(small())
    train(config, tmp_path / "run")
    expected = final_weights(tmp_path / "run")
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[0]
    newest.write_bytes(newest.read_bytes()[:1000])
    status = tmp_path / "run" / "status.json"
    status.write_text(status.read_text().replace("finished", "stopped"))
    train(config, tmp_path / "run", resume=True)
    assert f"damaged checkpoint passed over: {newest}" in capsys.readouterr().out
    assert_same(expected, final_weights(tmp_path / "run"), 0.0)


def test_without_a_valid_checkpoint_it_does_not_start_over(small, tmp_path, capsys):
    config = small()
    train(load_config(config, ["recipe.epochs=2", "recipe.milestones=[]"]), tmp_path / "run")
    for path in list_checkpoints(tmp_path / "run" / "checkpoints"):
        path.write_bytes(path.read_bytes()[:-1])
    status = tmp_path / "run" / "status.json"
    status.write_text(status.read_text().replace("finished", "stopped"))
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    words = ["recipe.epochs=2", "recipe.milestones=[]", "--out", str(tmp_path / "run")]
    assert main(["train", str(config), *words, "--resume"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "none of its 2 checkpoints is valid" in line
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_without_their_checksums_the_checkpoints_are_gone_on_from(small, tmp_path, capsys):
    config = load_config(small())
    train(config, tmp_path / "run")
    expected = final_weights(tmp_path / "run")
    last, newest, _ = list_checkpoints(tmp_path / "run" / "checkpoints")
    for path in [last, *newest.parent.glob("*.sha256")]:
        path.unlink()
    status = tmp_path / "run" / "status.json"
    status.write_text(status.read_text().replace("finished", "stopped"))
    train(config, tmp_path / "run", resume=True)
    assert f"{newest}: its checksum {newest.stem}.sha256 is missing" in capsys.readouterr().out
    (resumed,) = (e for e in read_log(tmp_path / "run" / "log.jsonl") if e["event"] == "resume")
    assert resumed["step"] == 10
    assert_same(expected, final_weights(tmp_path / "run"), 0.0)


def test_a_fine_tuned_run_outlives_the_weights_it_started_from(small, tmp_path):
    weights = tmp_path / "start.pt"
    torch.save(build_model(load_config(small())).state_dict(), weights)
    config = load_config(small(model__weights=str(weights)))
    train(config, tmp_path / "run")
    expected = final_weights(tmp_path / "run")
    checkpoints = list_checkpoints(tmp_path / "run" / "checkpoints")
    for later in checkpoints[:2]:
        later.unlink()  # as after a stop at the end of the first epoch
    status = tmp_path / "run" / "status.json"
    status.write_text(status.read_text().replace("finished", "stopped"))
    weights.unlink()
    with pytest.raises(UserError, match=r"model\.weights: .*start\.pt: no such file"):
        train(config, tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists()
    train(config, tmp_path / "run", resume=True)
    assert_same(expected, final_weights(tmp_path / "run"), 0.0)
    trained = load_trained(tmp_path / "run").model.state_dict()
    assert_same(expected, trained, 0.0)


def test_a_closed_terminal_stops_the_run_with_a_checkpoint(small, tmp_path):
    """Output to the terminal fails from then on, which must not be what ends the run."""
    terminal, theirs = pty.openpty()

    def own_terminal():
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    arguments = ["train", str(small(recipe__epochs=400, run__log_every_steps=1))]
    process = subprocess.Popen(
        [sys.executable, "-m", "harness", *arguments, "--out", str(tmp_path / "run")],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        preexec_fn=own_terminal,
    )
    os.close(theirs)
    os.set_blocking(terminal, False)

    def first_epoch_is_saved():
        with suppress(BlockingIOError):
            os.read(terminal, 1 << 16)
        return len(list_checkpoints(tmp_path / "run" / "checkpoints")) > 0

    wait_for(first_epoch_is_saved, "a checkpoint")
    os.close(terminal)
    assert process.wait() == 75
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "stopped"
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[0]
    assert load_checkpoint(newest)["step"] == status["step"]


def test_resumed_without_any_checkpoint_it_starts_anew_and_logs_each_step_once(small, tmp_path):
    config = load_config(small())
    train(config, tmp_path / "run")
    expected = final_weights(tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.unlink()  # as after a crash before the first one
    status = tmp_path / "run" / "status.json"
    status.write_text(status.read_text().replace("finished", "stopped"))
    train(config, tmp_path / "run", resume=True)
    assert_same(expected, final_weights(tmp_path / "run"), 0.0)
    log = read_log(tmp_path / "run" / "log.jsonl")
    assert [line["step"] for line in log if line["event"] == "evaluation"] == [5, 10, 15]


def test_divergence_names_step_and_images_and_keeps_the_last_good_checkpoint(small, tmp_path):
    config = load_config(small(recipe__reference_lr=1e30))
    with pytest.raises(Diverged, match="not finite at step 1") as caught:
        train(config, tmp_path / "run")
    log = read_log(tmp_path / "run" / "log.jsonl")
    (line,) = [line for line in log if line["event"] == "diverged"]
    assert line["step"] == 2 and len(set(line["image_ids"])) == 256
    assert str(line["image_ids"][0]) in str(caught.value)
    assert not list_checkpoints(tmp_path / "run" / "checkpoints")  # none of weights gone bad
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and "not finite" in status["reason"]


def test_stopping_in_this_process_raises_stopped(small, tmp_path):
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Stopped, match="checkpoint written"):
        train(load_config(small(recipe__epochs=500)), tmp_path / "run")


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_checkpoint_loads_into_torchvision_as_it_is(small, tmp_path, name):
    config = small(model__name=name)
    config.write_text(config.read_text().replace("  width: 4\n", ""))
    minibatch = ["recipe.minibatch=64", "data.crop=32", "data.resize=32"]
    out = tmp_path / "run"
    process = start_ranks(
        1, ["-m", "harness", "train", str(config), *minibatch, "--out", str(out)]
    )[0]
    stop_after(process, "step 2/", signal.SIGTERM)
    assert process.wait() == 75
    model = torchvision.models.get_model(name, num_classes=10)
    model.load_state_dict(final_weights(out), strict=True)
