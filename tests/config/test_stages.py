"""A teacher's config and its student's, run as one thing."""

import json
import os
import re
import signal
from pathlib import Path

import pytest

from harness.commands.command_line import main
from harness.config.stages import load_stages
from harness.errors import UserError
from harness.runs.logging.jsonl import read_log
from harness.training.run import Run
from tests.conftest import free_port, start_ranks
from tests.distilling import TENTH, one_line
from tests.test_train import assert_same, final_weights, stop_after


@pytest.fixture
def chain(small, student, tenth, tmp_path, monkeypatch):
    """configs/student.yaml, a tenth of its images labelled, whose teacher is configs/teacher.yaml.

    Run folders go to runs/.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    small("configs/teacher.yaml", model__width=8, recipe__epochs=2, recipe__milestones=[])
    changes = TENTH | {"run__data_root": str(tenth)}
    student("configs/student.yaml", teacher="configs/teacher.yaml", changes=changes)
    return "configs/student.yaml"


def state(name):
    return json.loads(Path(f"runs/{name}/status.json").read_text())


def test_overrides_reach_their_stages(chain):
    overrides = ["run.precision=float64", "recipe.epochs=5", "teacher.recipe.epochs=4"]
    overrides += ["run.log_every_steps=3", "teacher.run.log_every_steps=1"]
    teacher, student = load_stages(chain, overrides)
    assert (teacher.path, str(teacher.folder)) == ("configs/teacher.yaml", "runs/teacher")
    assert (student.path, str(student.folder)) == (chain, "runs/student")
    assert (teacher.config.recipe.epochs, student.config.recipe.epochs) == (4, 5)
    assert teacher.config.run.precision == student.config.run.precision == "float64"
    assert (teacher.config.run.log_every_steps, student.config.run.log_every_steps) == (1, 3)
    assert teacher.cli_overrides == {"run.precision", "recipe.epochs", "run.log_every_steps"}
    assert student.overrides == ("run.precision=float64", "recipe.epochs=5", overrides[3])


def test_a_teacher_may_have_a_teacher(chain, student):
    student("configs/young.yaml", teacher=chain)
    keys = ["teacher.recipe.epochs=7", "teacher.teacher.recipe.epochs=8", "run.hang_timeout_s=9"]
    stages = load_stages("configs/young.yaml", keys)
    assert [stage.config.recipe.epochs for stage in stages] == [8, 7, 3]
    assert {stage.config.run.hang_timeout_s for stage in stages} == {9.0}


def test_wrong_chains_are_refused(chain, student, teacher, capsys):
    student("configs/circle.yaml", teacher="configs/../configs/circle.yaml")
    line = one_line(capsys, "train", "configs/circle.yaml")
    assert "is its own student; name another teacher" in line
    student("configs/plain.yaml")  # its teacher is a run folder
    line = one_line(capsys, "train", "configs/plain.yaml", "teacher.recipe.epochs=3")
    assert "teacher.recipe.epochs=3: configs/plain.yaml has no teacher that is a config" in line
    student("configs/lost.yaml", teacher="configs/none.yaml")
    assert "none.yaml: cannot be read" in one_line(capsys, "train", "configs/lost.yaml")
    with pytest.raises(UserError, match=r"recipe\.epoch: unknown key, did you mean"):
        load_stages(chain, ["teacher.recipe.epoch=1"])


def test_the_teacher_is_trained_first_and_taken_over_by_the_next_student(chain, capsys):
    assert main(["train", chain]) == 0
    assert state("teacher")["state"] == state("student")["state"] == "finished"
    out = capsys.readouterr().out
    assert out.index("teacher  configs/teacher.yaml, run folder runs/teacher") < out.index(
        "teacher  error"
    )
    assert re.fullmatch(r"run folder runs/student, weights [0-9a-f]{12}", out.splitlines()[-1])
    pid, started = state("teacher")["pid"], state("teacher")["started"]
    assert main(["train", chain, "--out", "runs/second"]) == 0
    assert (state("teacher")["pid"], state("teacher")["started"]) == (pid, started)
    assert_same(*(final_weights_of(name) for name in ("student", "second")), 0.0)
    # finished: its result, also where the teacher is gone
    assert main(["train", chain, "--resume"]) == 0


def final_weights_of(name):
    return final_weights(Path("runs") / name)


def test_a_mistake_of_the_student_is_told_before_the_teacher_is_trained(chain, tmp_path, capsys):
    assert "data.train_images" in one_line(capsys, "train", chain, "data.train_images=1000")
    (tmp_path / "runs" / "student").mkdir(parents=True)
    (tmp_path / "runs" / "student" / "config.yaml").touch()
    assert "run folder exists" in one_line(capsys, "train", chain)
    assert not (tmp_path / "runs" / "teacher").exists()


def test_a_teacher_run_by_another_config_is_refused(chain, capsys):
    assert main(["train", "configs/teacher.yaml"]) == 0
    line = one_line(capsys, "train", chain, "teacher.recipe.weight_decay=0.0")
    assert "recipe.weight_decay" in line and "another config" in line


def stop_at_step_3(log_line, run, done):
    if done == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    log_line(run, done)


def test_stopped_in_either_stage_on_other_ranks_it_is_the_straight_run(
    chain, tmp_path, monkeypatch, capsys
):
    """A rank alone, stopped in the teacher's stage; two under torchrun, in the student's; one.

    The two have a group for each stage, and worker processes forked between them.
    """
    keys = ["run.log_every_steps=1", "run.precision=float64", "recipe.epochs=12"]
    assert main(["train", chain, *keys, "--out", "straight"]) == 0
    (tmp_path / "runs" / "teacher").rename(tmp_path / "first-teacher")
    usual = Run.log_line
    with monkeypatch.context() as planted:
        planted.setattr(Run, "log_line", lambda run, done: stop_at_step_3(usual, run, done))
        assert main(["train", chain, *keys]) == 75
    assert state("teacher")["state"] == "stopped"
    assert not (tmp_path / "runs" / "student").exists()
    assert f"harness train {chain} {' '.join(keys)} --resume" in capsys.readouterr().out

    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--master-port", str(free_port()), "-m", "harness", "train", chain, *keys]
    torchrun += ["run.loader=reference", "run.loader_threads=1", "--resume"]
    (process,) = start_ranks(1, torchrun)
    seen = stop_after(process, "epoch 1/12  step 3/", signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 0 or "SignalException" in err, seen + out + err
    assert (state("teacher")["state"], state("teacher")["incarnation"]) == ("finished", 2)
    assert state("student")["state"] == "stopped", seen + out + err

    assert main(["train", chain, *keys, "run.loader=memory", "--resume"]) == 0
    assert_same(final_weights_of("student"), final_weights(tmp_path / "straight"), 1e-10)
    log = read_log(tmp_path / "runs" / "student" / "log.jsonl")
    events = [line["event"] for line in log]
    assert events.count("teacher") == events.count("resume") == 1 and events[-1] == "finish"
    straight, shares = (
        [line["labelled_shares"] for line in lines if line["event"] == "train"]
        for lines in (read_log(tmp_path / "straight" / "log.jsonl"), log)
    )
    assert shares == straight and len(shares) == 60
