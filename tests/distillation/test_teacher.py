"""Students that are really trained by a teacher that was really trained, on the digits."""

import copy
import json

import pytest
import torch

from harness import load_config
from harness.commands.command_line import main
from harness.config.schema import Config
from harness.data.loaders.choice import open_loader
from harness.data.sources.folder import open_folder
from harness.deployment.export import export_trained
from harness.distillation.teacher import load_teacher
from harness.distributed import world_from_environment
from harness.errors import UserError
from harness.execution.preprocess import Preprocess
from harness.execution.trained_model import load_trained
from harness.models.registry import build_model
from harness.runs.checkpoint import list_checkpoints
from harness.runs.logging.jsonl import read_log
from harness.training.objective import build_objective
from harness.training.ready_rank import prepare
from harness.training.replica import Replica
from harness.training.setup import train
from harness.training.step import Step
from tests.distilling import one_line
from tests.test_train import assert_same, final_weights


def class_names(config: Config):
    return open_folder(config.run.data_root, "train").classes


def test_with_the_hard_term_alone_it_is_plain_training_bit_for_bit(small, student, tmp_path):
    plain = small("plain.yaml", recipe__label_smoothing=0.1)
    train(load_config(plain), tmp_path / "plain")
    changes = {"recipe__label_smoothing": 0.1}
    config = load_config(student(temperature=1.0, hard_weight=1.0, changes=changes))
    train(config, tmp_path / "distilled")
    assert_same(final_weights(tmp_path / "plain"), final_weights(tmp_path / "distilled"), 0.0)
    losses = [
        [line["loss"] for line in read_log(tmp_path / name / "log.jsonl") if "loss" in line]
        for name in ("plain", "distilled")
    ]
    assert losses[0] == losses[1][1:]  # after the teacher's own


def test_the_teachers_own_error_is_logged_first(teacher, student, tmp_path, capsys):
    train(load_config(student()), tmp_path / "run")
    log = read_log(tmp_path / "run" / "log.jsonl")
    assert [line["event"] for line in log[:3]] == ["start", "teacher", "train"]
    theirs = [line for line in read_log(teacher / "log.jsonl") if line["event"] == "evaluation"]
    for key in ("error", "top5_error", "total"):
        assert log[1][key] == theirs[-1][key]
    assert log[1]["loss"] == pytest.approx(theirs[-1]["loss"])
    assert f"teacher  error {log[1]['error']:.2f} %" in capsys.readouterr().out


def first_logits(config, path):
    """What the teacher makes of the first micro-batch of a run, and that batch."""
    world = world_from_environment("cpu")
    batch_plan, config = prepare(config, world)
    loader = open_loader(config, batch_plan, "memory", 0, False)
    batch = next(loader.train(0))
    loader.close()
    network = load_teacher(config, batch_plan.train.classes)
    return network, batch, network(0, batch)


def test_the_kl_divergence_is_logged_beside_the_loss(small, student, tmp_path):
    once = {"recipe__epochs": 1, "recipe__milestones": [], "run__log_every_steps": 1}
    config = load_config(student(temperature=2.0, hard_weight=0.3, changes=once))
    train(config, tmp_path / "run")
    lines = [x for x in read_log(tmp_path / "run" / "log.jsonl") if x["event"] == "train"]
    assert [line["step"] for line in lines if line["kl"] > 0] == [1, 2, 3, 4, 5]
    # the first step, from the networks themselves: the mean over its 256 images
    _, batch, theirs = first_logits(config, tmp_path)
    pixels = Preprocess(config, torch.device("cpu"))
    ours = build_model(config).train()(pixels(batch.images))
    p, q = (theirs / 2).double().softmax(1), (ours / 2).double().softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean().item()
    assert lines[0]["kl"] == pytest.approx(divergence, rel=1e-4)
    labels = torch.nn.functional.cross_entropy(ours, batch.labels).item()
    entropy = -(p * p.log()).sum(1).mean().item()
    soft = 2**2 * (divergence + entropy)
    assert lines[0]["loss"] == pytest.approx(0.3 * labels + 0.7 * soft, rel=1e-4)
    # without a teacher there is none
    train(load_config(small("plain.yaml", **once)), tmp_path / "plain")
    assert not any("kl" in line for line in read_log(tmp_path / "plain" / "log.jsonl"))


def test_it_sees_the_students_crop_in_evaluation_mode_normalised_as_it_was_trained(
    student, teacher, tmp_path
):
    config = load_config(student(changes={"data__mean": [0.1, 0.2, 0.3], "data__std": [1, 1, 1]}))
    network, batch, logits = first_logits(config, tmp_path)
    alone = load_trained(teacher).model.eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (batch.images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(logits, alone(pixels), rtol=1e-4, atol=1e-4)
    assert logits.dtype == torch.float32 and not logits.requires_grad
    assert not any(p.requires_grad for p in network.network.parameters())
    assert not any(module.training for module in network.network.modules())
    # and it is still so, and none of its statistics moved, after steps and an evaluation
    before = copy.deepcopy(network.network.state_dict())
    world = world_from_environment("cpu")
    batch_plan, config = prepare(config, world)
    loader = open_loader(config, batch_plan, "memory", 0, False)
    student_model = load_trained(teacher).model
    replica = Replica(config, student_model, world)
    step = Step(config, replica, batch_plan.micro_batches, build_objective(config, network))
    batches = loader.train(0)
    for number in range(2):
        step(number, batches)
    network.evaluate(loader.evaluate)
    loader.close()
    assert not network.network.training
    assert_same(before, network.network.state_dict(), 0.0)


@pytest.mark.parametrize("precision", ["bfloat16", "float64"])
def test_its_precision_is_its_own(student, precision, tmp_path):
    reference = first_logits(load_config(student()), tmp_path)[2]
    network, _, logits = first_logits(load_config(student(precision=precision)), tmp_path)
    difference = (logits - reference).abs().max().item()
    assert logits.dtype == torch.float32
    # bfloat16 keeps 8 bits, float64 differs by float32's own rounding
    low, high = {"bfloat16": (1e-3, 1.0), "float64": (1e-8, 1e-3)}[precision]
    assert low < difference < high
    parameters = {p.dtype for p in network.network.parameters()}
    assert parameters == {torch.float64 if precision == "float64" else torch.float32}


def test_resumed_it_is_the_straight_run_and_another_teacher_is_refused(
    student, teacher, tmp_path, monkeypatch
):
    config = load_config(student())
    train(config, tmp_path / "run")
    straight = final_weights(tmp_path / "run")
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[0]
    newest.unlink()
    status = tmp_path / "run" / "status.json"
    status.write_text(status.read_text().replace("finished", "stopped"))
    train(config, tmp_path / "run", resume=True)
    assert_same(straight, final_weights(tmp_path / "run"), 0.0)
    events = [line["event"] for line in read_log(tmp_path / "run" / "log.jsonl")]
    assert events.count("teacher") == 1
    # the folder that the config names now holds other weights
    monkeypatch.setattr("harness.distillation.teacher.weights_digest", lambda state: "another")
    list_checkpoints(tmp_path / "run" / "checkpoints")[0].unlink()
    status.write_text(status.read_text().replace("finished", "stopped"))
    with pytest.raises(UserError, match=r"distill\.teacher or its cache differs"):
        train(config, tmp_path / "run", resume=True)


def test_a_state_dict_with_the_name_of_its_model(student, teacher, small, tmp_path, capsys):
    wide = tmp_path / "wide"
    train(load_config(small("wide.yaml", model__width=16, recipe__epochs=2, recipe__milestones=[])),
          wide)  # fmt: skip
    file = tmp_path / "wide.safetensors"
    export_trained(load_trained(wide), file)
    from_run = first_logits(load_config(student(teacher=str(wide))), tmp_path)[2]
    config = student(teacher=str(file), teacher_model="resnet8")
    assert torch.equal(first_logits(load_config(config), tmp_path)[2], from_run)
    line = one_line(capsys, "train", student(teacher=str(file), teacher_model="resnet20"))
    assert "distill.teacher" in line and "another distill.teacher_model" in line
    assert "name its model" in one_line(capsys, "train", student(teacher=str(file)))
    line = one_line(capsys, "train", student(teacher_model="resnet8"))
    assert line.endswith("which names its network; remove it")


def test_evaluation_and_export_are_the_students_alone(student, tmp_path, capsys):
    run = tmp_path / "run"
    train(load_config(student()), run)
    capsys.readouterr()
    assert main(["eval", str(run), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    last = [line for line in read_log(run / "log.jsonl") if line["event"] == "evaluation"][-1]
    assert result["error"] == last["error"]
    export_trained(load_trained(run), tmp_path / "student.pt")
    exported = torch.load(tmp_path / "student.pt", weights_only=True)
    assert exported.keys() == final_weights(run).keys()
    assert exported["conv1.weight"].shape[0] == 4  # the student's width


def test_a_teacher_with_other_classes_is_refused(student, teacher, small, tmp_path):
    config = load_config(student())
    names = [*class_names(config)]
    load_teacher(config, names)
    swapped = [names[1], names[0], *names[2:]]
    with pytest.raises(UserError, match="its class 0 is 0, here it is 1"):
        load_teacher(config, swapped)
    fewer = config.model_copy(update={"data": config.data.model_copy(update={"classes": 9})})
    with pytest.raises(UserError, match=r"has 10 classes, data\.classes is 9"):
        load_teacher(fewer, names)


def test_a_missing_or_unfinished_teacher_is_refused(student, teacher, small, tmp_path, capsys):
    out = tmp_path / "run"
    line = one_line(capsys, "train", student(teacher=str(tmp_path / "none")), "--out", out)
    assert "not found" in line
    stopped = tmp_path / "stopped"
    train(load_config(small()), stopped)
    status = stopped / "status.json"
    status.write_text(status.read_text().replace("finished", "stopped"))
    line = one_line(capsys, "train", student(teacher=str(stopped)), "--out", out)
    assert "is stopped, not finished" in line
    status.write_text(status.read_text().replace("stopped", "finished"))
    list_checkpoints(stopped / "checkpoints")[0].write_bytes(b"torn")
    line = one_line(capsys, "train", student(teacher=str(stopped)), "--out", out)
    assert "final checkpoint is damaged or missing (the newest is of step 10 of 15)" in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.temperature=0", "distill.temperature: expected at least 0.01, found 0"),
        ("distill.temperature=0.009", "distill.temperature: expected at least 0.01"),
        ("distill.temperature=1001.0", "distill.temperature: expected at most 1000"),
        ("distill.hard_weight=1.5", "distill.hard_weight: expected at most 1"),
        ("distill.hard_weight=-0.1", "distill.hard_weight: expected at least 0"),
        ("distill={teacher: x, hard_weight: 0, soft_weight: 0}", "distill.soft_weight: 0, as"),
    ],
)
def test_impossible_values_are_refused(student, override, message, capsys):
    assert message in one_line(capsys, "train", student(), override)


def test_verify_shows_the_plain_training_only(student, capsys):
    line = one_line(capsys, "verify", student(), "--ranks", "1,2")
    assert "add distill=null" in line
