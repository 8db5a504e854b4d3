import json
import os
import subprocess
import sys

import pytest

from harness import __version__, load_config
from harness.commands.command_line import main
from harness.training.setup import train
from tests.conftest import harness

HEAVY = {"torch", "numpy", "pydantic", "yaml", "torchvision", "PIL"}


MAIN = "from harness.commands.command_line import main"


@pytest.mark.parametrize(
    "code",
    [
        "import harness; harness.__version__",
        f"{MAIN}\ntry: main(['--help'])\nexcept SystemExit: pass",
        f"{MAIN}\ntry: main(['train', '--help'])\nexcept SystemExit: pass",
    ],
)
def test_import_and_help_load_nothing_heavy(code):
    report = f"{code}\nimport sys; print(*sorted({HEAVY!r} & sys.modules.keys()), 'END')"
    out = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1].strip() == "END"


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"harness {__version__}\n"


def test_a_wrong_key_is_one_line_with_code_2(small, capsys):
    config = small(recipe__minibach=256)
    assert main(["train", str(config)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {config}: recipe.minibach") and "recipe.minibatch" in line


def test_overrides_may_stand_before_and_behind_options(small, tmp_path):
    out = tmp_path / "run"
    code = main(
        ["train", str(small()), "recipe.epochs=2", "--out", str(out), "recipe.milestones=[]"]
    )
    assert code == 0
    stored = load_config(out / "config.yaml")
    assert (stored.recipe.epochs, stored.recipe.milestones) == (2, ())


@pytest.mark.parametrize("words", [["--nonsense"], ["plainword"], ["--key=value"]])
def test_unknown_arguments_are_refused(small, words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", str(small()), "--resume", "a=b", *words])
    assert ended.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_plan_prints_json_for_the_papers_recipe(capsys):
    words = ["plan", "configs/imagenet/resnet50_8192.yaml", "--ranks", "8", "--json"]
    assert main([*words, "--lr-at", "0,390,780,4680,9360,12480"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["workers"], plan["steps_per_epoch"], plan["total_steps"]) == (256, 156, 14040)
    assert (plan["batch_norms"], plan["batch_norms_undecayed"]) == (53, 53)
    assert (plan["residual_blocks"], plan["zero_gammas"]) == (16, 16)
    assert plan["fc_std"] == pytest.approx(0.01, rel=0.01)
    assert plan["lr_at"] == pytest.approx(
        {"0": 0.1, "390": 1.65, "780": 3.2, "4680": 0.32, "9360": 0.032, "12480": 0.0032}
    )


def test_plan_refuses_steps_that_are_no_numbers(small, capsys):
    assert main(["plan", str(small()), "--lr-at", "0,soon"]) == 2
    assert "--lr-at" in capsys.readouterr().err


def test_the_traceback_of_a_users_mistake_is_never_shown(tmp_path):
    finished = harness("train", tmp_path / "missing.yaml")
    assert finished.returncode == 2
    assert len(finished.stderr.splitlines()) == 1 and "missing.yaml" in finished.stderr


def test_output_cut_off_by_a_closed_pipe_is_no_traceback(small):
    reading, writing = os.pipe()
    os.close(reading)  # nobody reads: the first line that is written fails
    with open(writing, "w") as closed:
        command = [sys.executable, "-m", "harness", "plan", str(small())]
        out = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert out.stderr == "" and out.returncode == 1


def test_the_library_trains_too(small, tmp_path):
    result = train(load_config(small()), tmp_path / "run")
    assert 0 <= result.error <= 100 and result.folder == tmp_path / "run"
